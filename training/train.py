"""Trains the built-in model on the token stream that prepare.py wrote, resumably.

    python training/train.py --minutes 90        # CPU or GPU, whichever torch finds

Every window is BOS followed by `context - 1` tokens of the stream, drawn without replacement in an order that
depends on the seed alone, so that step s sees the same batch whether or not the run was interrupted before it.
The matrices of the blocks are trained with Muon (Jordan et al. 2024), embeddings and norms with AdamW. The
learning rate warms up, stays, and falls linearly to zero over the last part: the length of the run may be
changed until that fall begins.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TABLE_MULTIPLE = 64  # the embedding table is padded to a multiple of this, as the tables of larger models are


def newton_schulz(gradient: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix to a gradient, approximately, by a quintic Newton-Schulz iteration.

    Same iteration as `torch.optim.Muon`, which runs it in bfloat16: 50 times slower than float32 on a CPU
    that has no bfloat16 instructions.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient.T if gradient.shape[0] > gradient.shape[1] else gradient
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if gradient.shape[0] > gradient.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix-shaped update is orthogonalised; updates have the size AdamW's have (arXiv 2502.16982)."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = newton_schulz(p.grad.add(buffer, alpha=group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(p.shape)))


def build_model(tokenizer: PreTrainedTokenizerFast, context: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / TABLE_MULTIPLE) * TABLE_MULTIPLE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


class Windows:
    """Batches of BOS + `context - 1` consecutive tokens; batch `s` depends on the seed and `s` alone."""

    def __init__(self, stream: np.ndarray, context: int, batch: int, bos: int, seed: int):
        self.stream, self.span, self.batch, self.bos, self.seed = stream, context - 1, batch, bos, seed
        self.per_epoch = (len(stream) // self.span - 1) // batch

    def __getitem__(self, step: int) -> Tensor:
        epoch, index = divmod(step, self.per_epoch)
        rng = np.random.default_rng((self.seed, epoch))
        offset = rng.integers(self.span)  # the cuts between windows move from epoch to epoch
        order = rng.permutation(len(self.stream) // self.span - 1)
        starts = offset + order[index * self.batch : (index + 1) * self.batch] * self.span
        rows = np.stack([self.stream[s : s + self.span] for s in starts]).astype(np.int64)
        return torch.from_numpy(np.insert(rows, 0, self.bos, axis=1))


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, windows: Windows, batches: int, device: str) -> float:
    return float(np.mean([next_token_loss(model, windows[i].to(device)).item() for i in range(batches)]))


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: float) -> float:
    """Warm-up, plateau, linear fall to zero over the last `decay` share of the run."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def save_whole(path: Path, state: dict) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    with temporary.open("rb") as f:
        os.fsync(f.fileno())
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("training/run"), help="folder that prepare.py filled")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay", type=float, default=0.3, help="share of the run over which the rate falls to zero")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.run / "tokenizer")
    train, validation = (
        Windows(
            np.load(args.run / f"{n}.npy", mmap_mode="r"), args.context, args.batch, tokenizer.bos_token_id, args.seed
        )
        for n in ("train", "validation")
    )
    model = build_model(tokenizer, args.context, args.seed).to(device)
    blocks = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    optimizers = [Muon(blocks, lr=0.0), torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)]

    checkpoint, start, history = args.run / "checkpoint.pt", 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, history = state["step"], state["history"]
        print(f"resuming at step {start} of {args.steps}")

    forward = torch.compile(model) if args.compile else model
    seconds = history[-1]["seconds"] if history else 0.0
    clock, losses = time.perf_counter(), []
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step")
    for step in progress:
        rate = learning_rate(step, args.steps, args.lr, args.warmup, args.decay)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with torch.autocast(device, dtype=torch.bfloat16, enabled=args.bf16):
            loss = next_token_loss(forward, train[step].to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", lr=f"{rate:.1e}")
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
            seconds += time.perf_counter() - clock
            held_out = validation_loss(model, validation, 12, device)
            history.append(
                {
                    "step": step + 1,
                    "tokens": (step + 1) * args.batch * (args.context - 1),
                    "train_loss": float(np.mean(losses)),
                    "validation_loss": held_out,
                    "learning_rate": rate,
                    "seconds": seconds,
                }
            )
            tqdm.write(json.dumps(history[-1]))
            save_whole(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step + 1,
                    "history": history,
                },
            )
            clock, losses = time.perf_counter(), []

    (args.run / "history.json").write_text(
        json.dumps({"arguments": vars(args) | {"run": str(args.run)}, "history": history}, indent=1)
    )
    model.to(torch.bfloat16).save_pretrained(args.run / "model")
    tokenizer.save_pretrained(args.run / "model")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters written to {args.run / 'model'}")


if __name__ == "__main__":
    main()
