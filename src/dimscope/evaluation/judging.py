"""How much worse a changed model predicts a text: loss, KL from the model as it was, agreement of the first choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.activations.collection import next_tokens
from dimscope.activations.forward import final_states
from dimscope.activations.output_head import logit_transform, position_blocks
from dimscope.checkpoints.model import available_memory
from dimscope.texts.windows import Window, grouped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOP = 5  # choices whose agreement is told beside that of the first
KEPT_SHARE = 1 / 8  # of the memory that is free, which the log-probabilities of a baseline may take
LARGEST_EXPONENT = 709  # of what a float holds
AT_ONCE = 8  # positions compared at once


@dataclass(frozen=True, slots=True)
class Judgement:
    """Means over the predicted positions of a text; KL and agreement are over all positions, against the model as it was."""

    loss: float  # nats per token
    loss_rise: float  # above that of the model as it was, position by position
    loss_rise_stderr: float  # of independent positions: a lower bound, as that of KL
    bits_per_byte: float
    kl: float  # KL(as it was || changed), nats; 0 for the same model
    kl_stderr: float
    top_1: float  # share of positions with the same first choice
    top_5: float  # share of the five first choices that are among the five of the other
    n_predicted: int
    n_positions: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < LARGEST_EXPONENT else math.inf


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a model says on windows before it is changed: its final states, T x d numbers, from which its logits come again.

    The log-probabilities themselves are T x V numbers, 2.5 GB for 4,096 tokens of a vocabulary of 152,000: they are kept
    only where that is little of the memory that is free, and come out the same where they are computed again.
    """

    windows: tuple[Window, ...]
    batch: int
    states: tuple[Float[Tensor, "_ t d"], ...]  # of each batch, in the memory of the CPU
    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None
    kept: tuple[tuple[Float[Tensor, "_ v"], ...], ...] | None  # log-probabilities by batch and block of positions

    def blocks(self, n_positions: int) -> Sequence[Int[Tensor, " r"]]:
        """The positions of a batch in the blocks in which logits are computed."""
        return position_blocks(torch.arange(n_positions), len(self.weight))

    def log_probs(self, model: PreTrainedModel, states: Float[Tensor, "r d"]) -> Float[Tensor, "r v"]:
        """Float32, by the output table as it was, whatever is hooked to it or put in its place since."""
        raw = torch.nn.functional.linear(states.to(self.weight.device), self.weight, self.bias)
        return logit_transform(model)(raw.float()).log_softmax(dim=1)


@torch.no_grad()
def baseline(model: PreTrainedModel, windows: Sequence[Window], batch: int = 1) -> Baseline:
    """The model as it is, on windows of one length, `batch` of them at once. Raises ValueError for windows of several."""
    if len({len(w.ids) for w in windows}) != 1:
        raise ValueError("a baseline is of windows of one length")
    head = model.get_output_embeddings()
    states = tuple(final_states(model, _ids(group)).cpu() for group in grouped(windows, batch))
    base = Baseline(tuple(windows), batch, states, head.weight, getattr(head, "bias", None), None)
    size = 4 * len(head.weight) * sum(len(w.ids) for w in windows)
    if head.weight.device.type != "cpu" or size > KEPT_SHARE * available_memory():
        return base
    flat = [batch_states.flatten(0, 1) for batch_states in states]
    kept = tuple(tuple(base.log_probs(model, f[rows]) for rows in base.blocks(len(f))) for f in flat)
    return replace(base, kept=kept)


def _ids(windows: Sequence[Window]) -> Tensor:
    return torch.stack([w.ids for w in windows])


@torch.no_grad()
def judge(model: PreTrainedModel, base: Baseline, *, changed: bool = True) -> Judgement:
    """The model as it is now against its baseline: one forward pass, and the logits, block by block.

    The pass of a model that is not `changed` is that of the baseline.
    """
    head, transform = model.get_output_embeddings(), logit_transform(model)
    sums = torch.zeros(8, dtype=torch.float64)  # predicted, loss, its rise, squared, kl, squared, first, five
    n_positions = 0
    for number, (group, before) in enumerate(zip(grouped(base.windows, base.batch), base.states, strict=True)):
        ids = _ids(group)
        targets = next_tokens(group, ids).flatten()
        then = before.flatten(0, 1)
        now = final_states(model, ids).flatten(0, 1) if changed else then.to(base.weight.device)
        for block, rows in enumerate(base.blocks(len(then))):
            logits = transform(head(now[rows.to(now.device)]).float())
            known = base.kept[number][block] if base.kept is not None else base.log_probs(model, then[rows])
            # Few rows at once: what is computed from them stays in the cache.
            triples = (known.to(logits.device), logits, targets[rows].to(logits.device))
            for part in zip(*(t.split(AT_ONCE) for t in triples), strict=True):
                sums += _compared(*part).cpu()
        n_positions += len(then)
    n, loss, rise, rise_squares, kl, kl_squares, first, five = sums.tolist()
    n_bytes = sum(w.predicted_bytes for w in base.windows)
    return Judgement(
        loss=loss / n, loss_rise=rise / n, loss_rise_stderr=_stderr(rise, rise_squares, n),
        bits_per_byte=loss / math.log(2) / n_bytes, kl=kl / n_positions, kl_stderr=_stderr(kl, kl_squares, n_positions),
        top_1=first / n_positions, top_5=five / n_positions / TOP, n_predicted=round(n), n_positions=n_positions,
    )  # fmt: skip


def _stderr(total: float, squares: float, n: float) -> float:
    return math.sqrt(max(squares / n - (total / n) ** 2, 0.0) / n)


def _compared(
    log_p: Float[Tensor, "r v"], logits: Float[Tensor, "r v"], targets: Int[Tensor, " r"]
) -> Float[Tensor, " 8"]:
    log_q = logits.log_softmax(dim=1)
    known = targets >= 0
    chosen = targets[known, None]
    loss, before = (-x[known].gather(1, chosen)[:, 0].double() for x in (log_q, log_p))
    rise = loss - before
    # Rounding may leave less than nothing.
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1).double().clamp_min(0)
    ours, theirs = (x.topk(min(TOP, x.shape[1]), dim=1).indices for x in (log_q, log_p))
    first = (ours[:, 0] == theirs[:, 0]).sum().double()
    five = (ours[:, :, None] == theirs[:, None, :]).sum().double()
    told = (known.sum().double(), loss.sum(), rise.sum(), rise.square().sum(), kl.sum(), kl.square().sum(), first, five)
    return torch.stack(told)
