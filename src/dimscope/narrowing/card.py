"""The model card of a narrow checkpoint: how it was made, what it costs, what is in the files. Every number is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dimscope.narrowing.assembly import Account

GGUF_BLOCK, GGUF_SUPERBLOCK = 32, 256  # weights that Q8_0 and K-quants round together; a row is a whole number of them
GGUF_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0"}
"""What llama-quantize writes instead of a K-quant where a row is no whole number of superblocks."""
TILE = 64  # that GPUs multiply at full speed
LLAMA_CPP_LOADS = ("llama", "mistral", "qwen3", "gemma")
"""The families for which llama.cpp reads the head size from the file; for qwen2 and phi it is width / heads."""


@dataclass(frozen=True, slots=True)
class NarrowFacts:
    """How a narrow model was made. None stands for what was not done.

    Attributes:
        model: Name or path of the dense model.
        title: Its human-readable name.
        on_hub: Whether the dense model is on the hub.
        dim: Hidden size of the dense model.
        width: Hidden size of the narrow model.
        basis: Name of the basis of the kept directions.
        family: Model type of the narrow model.
        width_step: Every width of the narrow model is a multiple of it.
        tied: Whether one table is both input and output table.
        export: Model type of the narrow model, where it is another than that of the dense one.
        calibrated_on: Windows of the calibration.
        learned_steps: Steps in which the basis was learned.
        heal_steps: Steps of healing that were run.
        lora: Rank of the low-rank updates by which it was healed.
        healed: Whether healing improved held-out text, so that its weights are kept.
        trained_on: Windows of the training.
        evaluated_on: Windows of the measured numbers.
        tie_cost: KL in nats that one table costs compared with two, before any training.
        command: The command line.
        seconds: How long it took.
        warnings: What the user should know of the texts.
    """

    model: str
    title: str
    on_hub: bool
    dim: int
    width: int
    basis: str
    family: str
    tied: bool
    width_step: int = 1
    export: str | None = None
    calibrated_on: str | None = None
    learned_steps: int | None = None
    heal_steps: int | None = None
    lora: int | None = None
    healed: bool | None = None
    trained_on: str | None = None
    evaluated_on: str | None = None
    tie_cost: float | None = None
    command: str = ""
    seconds: float | None = None
    warnings: Sequence[str] = ()


def hints(facts: NarrowFacts) -> list[str]:
    """Return what engines other than transformers do with the family and the width of a narrow model."""
    lines = [*_loading(facts), *_quantisation(facts.width)]
    if facts.width % TILE:
        every = math.lcm(TILE, facts.width_step)
        widths = (facts.width // every * every, -(-facts.width // every) * every)
        nearest = " and ".join(str(w) for w in widths if 0 < w <= facts.dim)
        lines.append(f"GPUs multiply fastest at multiples of {TILE}{nearest and f'; nearest: {nearest}'}.")
    return lines


def _loading(facts: NarrowFacts) -> list[str]:
    """Return which engines load a narrow model: its head size is not its width / heads."""
    if facts.width == facts.dim:
        return []
    if facts.family in LLAMA_CPP_LOADS:
        return ["llama.cpp loads this family at any width; its `convert_hf_to_gguf.py` must know the tokenizer."]
    other = (
        " `--export-as llama` writes an equal model that llama.cpp loads; its width is a multiple of its number of heads."
        if facts.family == "qwen2"
        else ""
    )
    return [
        f"llama.cpp does not load a narrow {facts.family}: there the queries of this family are as wide as the hidden state.{other} "
        "vLLM's own class of this family has the same limit; "
        "`vllm serve DIR --model-impl transformers` uses the class of transformers, which reads `head_dim` "
        "(vLLM was not tested)."
    ]


def _quantisation(width: int) -> list[str]:
    """Return which formats of GGUF round rows as long as the hidden state."""
    rows = "the table, the head and the weights of queries, keys, values, gate and up"
    if width % GGUF_SUPERBLOCK == 0:
        return []
    if width % GGUF_BLOCK == 0:
        others = ", ".join(f"{other} instead of {kind}" for kind, other in GGUF_FALLBACKS.items())
        return [
            f"GGUF: the width is no multiple of {GGUF_SUPERBLOCK}, so llama-quantize writes {rows} as {others}. "
            "Q8_0 and Q4_0 stay what they are."
        ]
    return [
        f"GGUF: the width is no multiple of {GGUF_BLOCK}, so llama-quantize refuses this model; "
        f"`convert_hf_to_gguf.py --outtype q8_0` writes {rows} as F16."
    ]


def not_smaller(account: Account) -> bool:
    """Whether the narrow model has as many parameters as the dense one, or more: a second table may outweigh the cut."""
    return account.narrow_parameters >= account.dense_parameters


def model_card(facts: NarrowFacts, account: Account, measured: Sequence[Mapping[str, str]] = ()) -> str:
    """Return the text of README.md.

    Args:
        facts: How the checkpoint was made.
        account: Parameters and bytes of the dense and of the narrow model.
        measured: Further rows of the table: `metric`, `dense`, `narrow`.
    """
    dense = facts.model
    lines = [
        "---", "library_name: transformers", *([f"base_model: {dense}"] if facts.on_hub else []),
        "tags: [dimscope, narrowed]", "---", "",
        f"# {facts.title}, {facts.width} of {facts.dim} dimensions", "",
        f"The hidden size of `{dense}` cut from {facts.dim} to {facts.width} by one orthonormal map on the residual stream, "
        "with the gains of its norms folded in. A standard checkpoint: stock `transformers` loads it, without custom code.", "",
        "| | dense | narrow |", "|---|---|---|",
        f"| parameters in the files | {account.dense_parameters:,} | {account.narrow_parameters:,} |",
        f"| bytes of weights | {account.dense_bytes:,} | {account.narrow_bytes:,} |",
        *(f"| {row['metric']} | {row['dense']} | {row['narrow']} |" for row in measured), "",
    ]  # fmt: skip
    if facts.evaluated_on:
        intervals = "In parentheses: 95% intervals over these windows; of a speed, the range of its rounds."
        lines += [f"Measured on {facts.evaluated_on}. {intervals}", ""]
    if not_smaller(account):
        lines += ["**Not smaller than the dense model: its size is no reason to use it.**", ""]
    lines += ["## How it was made", "", *_recipe(facts), "", *_tables(facts, account)]
    lines += [
        "Only the width of the residual stream shrank. Heads, head size, KV cache, rotary embeddings and the cost of attention "
        "over positions are unchanged.", "",
    ]  # fmt: skip
    lines += [*(f"* {hint}" for hint in hints(facts)), ""]
    if facts.command:
        lines += ["Made with:", "", f"    {facts.command}", ""]
    return "\n".join(lines)


def _recipe(facts: NarrowFacts) -> list[str]:
    lines = [f"* Directions kept: {facts.basis}."]
    if facts.export:
        lines.append(f"* Written as {facts.export}, an equivalent family.")
    if facts.calibrated_on:
        lines.append(f"* Calibrated on {facts.calibrated_on}.")
    if facts.learned_steps:
        lines.append(
            f"* The directions were learned in {facts.learned_steps} steps, by KL to the dense model; all weights are functions of them."
        )
    if facts.heal_steps:
        what = f"low-rank updates (rank {facts.lora})" if facts.lora else "all weights"
        lines.append(
            f"* Healed by KL to the dense model in {facts.heal_steps} steps, the norms first, then {what}."
            if facts.healed
            else f"* {facts.heal_steps} steps of healing did not improve held-out text, so the weights are as they were cut."
        )
    if facts.trained_on:
        lines.append(f"* Trained on {facts.trained_on}; the best state on other windows was kept.")
    return lines


def _tables(facts: NarrowFacts, account: Account) -> list[str]:
    if facts.tied:
        cost = facts.tie_cost
        measured = (
            "what that costs was not measured"
            if cost is None
            else f"that costs {round(cost, 4) + 0.0:+.4f} nats of KL compared with two tables, before any training"
        )
        return [f"One table is both input and output table, as in the dense model; {measured}.", ""]
    if account.untied:
        return [
            f"The dense model has one table for input and output; here they are two, of {account.table_parameters:,} "
            "parameters each, since the gain of the final norm is folded into one of them only.", "",
        ]  # fmt: skip
    return []
