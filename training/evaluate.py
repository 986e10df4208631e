"""Measures the trained model, draws its loss curve, writes samples and the model card, and installs it in the package.

    python training/evaluate.py --alice alice.txt --wikitext wikitext2_test.txt

Bits per byte: the text is read in windows of the context length, each BOS + `context - 1` tokens, that advance by
half a window; every token is scored once, with at least half a window of context (but the first). The negative
log-likelihood of all tokens, in bits, is divided by the bytes of the text.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import plotly.graph_objects as go
import torch
from prepare import render_module
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = Path("src/dimscope/builtin")
PROMPTS = (
    "Once upon a time there was a",
    "“I am very sorry,” said the old man, “but",
    "The wind had been blowing all night, and when",
    '<tr><td class="section-title"',
)


def body(text: str) -> str:
    """The text between the marks of Project Gutenberg, as it stands (line ends too)."""
    start, end = text.find("*** START OF"), text.find("*** END OF")
    return text if start < 0 else text[text.index("\n", start) + 1 : end]


@torch.no_grad()
def bits_per_byte(model, tokenizer, text: str) -> tuple[float, int]:
    """Bits per byte of a text, and the number of tokens scored."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    span = model.config.max_position_embeddings - 1
    stride, nll = span // 2, 0.0
    for start in range(0, max(1, len(ids) - span + stride), stride):
        window = ids[start : start + span]
        new = len(window) if start == 0 else max(0, len(window) - (span - stride))
        if not new:
            break
        logits = model(torch.tensor([[tokenizer.bos_token_id, *window]])).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(window), reduction="none")
        nll += float(losses[-new:].sum())
    return nll / math.log(2) / len(text.encode()), len(ids)


def loss_curve(history: list[dict]) -> go.Figure:
    """Training and held-out loss against tokens seen."""
    tokens = [h["tokens"] / 1e6 for h in history]
    last = history[-1]
    figure = go.Figure(
        layout={
            "title": f"Held-out loss fell to {last['validation_loss']:.2f} nats per token over {tokens[-1]:.1f}M tokens",
            "xaxis_title": "training tokens seen (millions)",
            "yaxis_title": "loss (nats per token)",
            "template": "plotly_white",
            "legend": {"x": 0.98, "y": 0.98, "xanchor": "right"},
            "width": 900,
            "height": 480,
        }
    )
    figure.add_scatter(
        x=tokens, y=[h["train_loss"] for h in history], name="training, mean since the last point", line_color="#0072B2"
    )
    figure.add_scatter(
        x=tokens,
        y=[h["validation_loss"] for h in history],
        name="two held-out works and two pages",
        line_color="#D55E00",
    )
    return figure


@torch.no_grad()
def samples(model, tokenizer) -> list[tuple[str, str, str]]:
    """(prompt, greedy continuation, sampled continuation at temperature 0.8 with seed 0)."""
    found = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        length = inputs["input_ids"].shape[1]
        pad = tokenizer.eos_token_id
        greedy = model.generate(**inputs, max_new_tokens=80, do_sample=False, pad_token_id=pad)
        torch.manual_seed(0)
        sampled = model.generate(
            **inputs, max_new_tokens=80, do_sample=True, temperature=0.8, top_k=0, pad_token_id=pad
        )
        found.append((prompt, tokenizer.decode(greedy[0, length:]), tokenizer.decode(sampled[0, length:])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("training/run"))
    parser.add_argument("--alice", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path, required=True)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.run / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.run / "model")
    record = json.loads((args.run / "history.json").read_text())
    alice = args.alice.read_bytes().decode("utf-8-sig")  # line ends as they are
    texts = {
        "Alice, body, as it stands (CRLF, curly quotes, wrapped)": body(alice),
        "WikiText-2 test": args.wikitext.read_bytes().decode(),
        "pydoc page of textwrap (HTML, held out)": render_module("textwrap"),
        "built-in prose": (PACKAGE / "texts/prose.txt").read_text(encoding="utf-8"),
    }
    measured = {}
    for name, text in texts.items():
        bits, n_tokens = bits_per_byte(model, tokenizer, text)
        measured[name] = {"bits_per_byte": round(bits, 4), "bytes": len(text.encode()), "tokens": n_tokens}
        print(f"{name}: {bits:.3f} bits per byte over {n_tokens:,} tokens")

    loss_curve(record["history"]).write_image("training/loss_curve.png", scale=2)
    result = {"evaluation": measured, **record, "data": json.loads((args.run / "data.json").read_text())}
    Path("training/results.json").write_text(json.dumps(result, indent=1) + "\n")
    text = "\n\n".join(f"prompt:  {p}\ngreedy:  {g}\nsampled: {s}" for p, g, s in samples(model, tokenizer))
    Path("training/samples.txt").write_text(text + "\n", encoding="utf-8")

    (PACKAGE / "texts/page.html").write_text(render_module("textwrap"), encoding="utf-8")
    shutil.copytree(args.run / "model", PACKAGE / "model", dirs_exist_ok=True)
    config = PACKAGE / "model/tokenizer_config.json"
    # The name that every version of transformers knows for a tokenizer.json without a class of its own.
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=1)
    )


if __name__ == "__main__":
    main()
