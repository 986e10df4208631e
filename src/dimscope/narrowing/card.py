"""The model card of a narrowed checkpoint: what was done, what it cost, what is in the files. Every number is a measured one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GGUF_Q8, GGUF_K = 32, 256  # numbers in a block of the formats of llama.cpp
TILE = 64  # that GPUs multiply at full speed


def hints(width: int) -> list[str]:
    """What engines beside transformers make of a width."""
    told = []
    if width % GGUF_Q8:
        told.append(f"GGUF: Q8_0 needs a multiple of {GGUF_Q8}, so this width cannot be quantised with it.")
    elif width % GGUF_K:
        told.append(f"GGUF: K-quants need a multiple of {GGUF_K}; Q8_0 works.")
    if width % TILE:
        told.append(
            f"GPUs multiply fastest at multiples of {TILE}; the nearest are {width // TILE * TILE} and {-(-width // TILE) * TILE}."
        )
    return told


def not_smaller(account: Mapping[str, Any]) -> bool:
    """Whether the files hold as much as before, or more: a tied model is untied, and its second table may outweigh the cut."""
    return account["narrow_parameters"] >= account["dense_parameters"]


def model_card(facts: Mapping[str, Any]) -> str:
    """The text of README.md from what was measured; parts that were not measured are left out."""
    account, dense = facts["account"], facts["model"]
    lines = [
        "---", "library_name: transformers", f"base_model: {dense}", "tags: [dimscope, narrowed]", "---", "",
        f"# {facts['title']}, {facts['width']} of {facts['dim']} dimensions", "",
        f"The hidden size of `{dense}` cut from {facts['dim']} to {facts['width']} by one orthonormal map on the residual stream "
        f"(basis: {facts['basis']}), with the gains of its norms folded in. A standard checkpoint: stock `transformers` loads it, without "
        "custom code.", "",
        "| | dense | narrow |", "|---|---|---|",
        f"| parameters in the files | {account['dense_parameters']:,} | {account['narrow_parameters']:,} |",
        f"| bytes of weights | {account['dense_bytes']:,} | {account['narrow_bytes']:,} |",
    ]  # fmt: skip
    for row in facts.get("measured", ()):
        lines.append(f"| {row['metric']} | {row['dense']} | {row['narrow']} |")
    lines.append("")
    if not_smaller(account):
        lines += ["**Not smaller than the dense model: do not use it for its size.**", ""]
    if account["untied"]:
        lines += [
            f"The dense model reads and predicts with one table; here they are two, of {account['table_parameters']:,} "
            "parameters each, since the gain of the final norm is folded into one of them only.", "",
        ]  # fmt: skip
    lines += [
        "Heads, head size, KV cache, rotary embeddings and the work of attention over positions are as before: only the width of "
        "the residual stream shrank.", "",
    ]  # fmt: skip
    if facts.get("judged_on"):
        lines += [f"Measured on {facts['judged_on']}.", ""]
    lines += [*(f"* {hint}" for hint in hints(facts["width"])), ""]
    lines += ["Made with:", "", f"    {facts['command']}", ""]
    return "\n".join(lines)
