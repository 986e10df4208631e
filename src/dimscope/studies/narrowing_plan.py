"""The plan: what every width would cost before anything is written, beside dropping layers and rounding weights.

All candidates share one calibration pass and one pass of the dense model, and are judged on the same windows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import polars as pl

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.tensors import DTYPES
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.errors import InvalidArgument
from dimscope.evaluation.generation import Decoding, Prompt, check_room, generate, prepare_prompt
from dimscope.evaluation.throughput import Throughput, throughput
from dimscope.narrowing.bases import LEARNED, check_basis
from dimscope.narrowing.exports import check_export
from dimscope.narrowing.healing import Healed
from dimscope.narrowing.layouts import check_width, layout_of, width_step
from dimscope.results import ResultFolder
from dimscope.studies.narrowing_bench import LENGTH, Bench, NarrowSettings
from dimscope.studies.provenance import checkpoint_facts
from dimscope.studies.reading import context_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2)  # of the width, where none are asked for
ALIGNED = (64, 32, 16, 8)  # what widths are rounded to a multiple of: the first that is an eighth of the width at most
PLANNED = ("random", "raw", "normalised")  # bases, where none are asked for
BITS = 8
NARROW, HEALED, DROP, ROUND, DENSE = "narrow", "narrow, healed", "drop layers", "quantise", "dense"
DECODING = Decoding(max_new_tokens=64)
TOLERATED = 0.05  # nats of loss: 5% of perplexity
SPEEDS = ("prefill", "decode", "prefill_ratio", "decode_ratio")
TENTH = 0.9  # of the parameters, at which the ways are compared in words

SCHEMA = {
    "method": pl.String, "basis": pl.String, "width": pl.Int64, "layers": pl.Int64, "bits": pl.Int64, "parameters": pl.Int64,
    "bytes": pl.Int64, "loss": pl.Float64, "loss_rise": pl.Float64, "loss_rise_stderr": pl.Float64, "kl": pl.Float64,
    "kl_stderr": pl.Float64, "top_1": pl.Float64, "prefill": pl.Float64, "decode": pl.Float64,
    "prefill_ratio": pl.Float64, "decode_ratio": pl.Float64, "n_tokens": pl.Int64,
}  # fmt: skip


def default_widths(checkpoint: Checkpoint, export: str | None = None) -> tuple[int, ...]:
    """Aligned widths at some shares of the model's, as far as its architecture allows them."""
    dim, step = checkpoint.input_table.shape[1], width_step(checkpoint, export) or 1
    aligned = next((a for a in ALIGNED if a <= dim / 8), 1)
    every = math.lcm(step, aligned) if math.lcm(step, aligned) <= dim / 8 else step
    widths = {max(every, round(dim * share / every) * every) for share in SHARES}
    return tuple(sorted((w for w in widths if w < dim), reverse=True))


def plan_narrowing(
    checkpoint: Checkpoint,
    folder: ResultFolder,
    settings: NarrowSettings,
    *,
    widths: Sequence[int] = (),
    bases: Sequence[str] = (),
    announce: Callable[[str], object] | None = None,
) -> tuple[dict[str, Any], dict[str, pl.DataFrame]]:
    """Candidates of all widths and bases, layers dropped, weights rounded: the facts, and the table `plan`, a row for each.

    Finished candidates in the folder are used again. Raises InvalidArgument, and what opening, running and reading raise.
    """
    began = time.monotonic()
    layout, export = layout_of(checkpoint), check_export(checkpoint, settings.export)
    chosen = tuple(sorted(set(widths), reverse=True)) or default_widths(checkpoint, export)
    kinds = tuple(dict.fromkeys(bases)) or PLANNED
    for basis in kinds:
        check_basis(basis)
    for width in chosen:
        check_width(checkpoint, layout, width, export)
    if not chosen:
        raise InvalidArgument(f"{checkpoint.title}: no width below its {checkpoint.input_table.shape[1]} is allowed")
    bench = Bench(checkpoint, settings, trains=LEARNED in kinds, announce=announce)
    prompts = _prompts(bench)
    work = _Candidates(bench, folder)
    rows = [work.row("dense", lambda: bench.dense, {"method": DENSE})]
    for width in chosen:
        for number, basis in enumerate(kinds):
            made = {"method": NARROW, "basis": basis, "width": width}
            timed = number == 0  # the directions make no difference to the speed
            row = work.row(f"{basis}-{width}", lambda b=basis, w=width: bench.candidate(b, w).model, made, timed=timed)
            rows.append(row if timed else row.with_columns(rows[-1].select(SPEEDS)))
    n_layers = int(checkpoint.config.num_hidden_layers) if checkpoint.config else 0
    for n in _dropped(n_layers):
        rows.append(work.row(f"without-{n}", lambda n=n: bench.without(n), {"method": DROP, "layers": n_layers - n}))
    rows.append(work.row(f"bits-{BITS}", lambda: bench.quantised(BITS), {"method": ROUND, "bits": BITS}, timed=False))
    shown = shown_candidate(pl.concat(rows))
    healed: list[Healed] = []

    def mended() -> PreTrainedModel:
        healed.append(
            bench.heal(bench.candidate(shown["basis"], shown["width"]), shown["width"], store=folder.path / "training")
        )
        return healed[0].model

    if settings.heal:
        what = {"method": HEALED, "basis": shown["basis"], "width": shown["width"]}
        rows.append(work.row(f"healed-{shown['width']}", mended, what | {"steps": settings.heal}))
    found = pl.concat(rows)
    tables = {"plan": folder.table("plan", {"rows": found.rows()}, lambda: with_equal_size(found))}
    if settings.prompts:
        made = {"healed": settings.heal, "basis": shown["basis"], "width": shown["width"], "prompts": settings.prompts}

        def written() -> pl.DataFrame:
            small = (
                (healed[0].model if healed else mended())
                if settings.heal
                else bench.candidate(shown["basis"], shown["width"]).model
            )
            return _texts(bench, small, prompts)

        tables["narrow_texts"] = folder.table("narrow_texts", made | {"recipe": bench.recipe(0, bench.tied)}, written)
    else:
        folder.drop("narrow_texts")
    plan = tables["plan"]
    told = {
        "advice": list(advice(plan)), "texts": list(bench.texts), "window_length": bench.length, "tied": bench.tied,
        "widths": list(chosen), "bases": list(kinds), "dim": checkpoint.input_table.shape[1], "n_layers": n_layers,
        "n_windows": {name: len(getattr(bench.reading, name)) for name in ("calibration", "judged", "training")},
        "export": export, "shown": {"basis": shown["basis"], "width": shown["width"]}, "heal": settings.heal,
        "kv_bytes_per_token": _cache(bench),
        **asdict(bench.placement),
    }  # fmt: skip
    facts = checkpoint_facts(checkpoint) | {
        "study": {"narrowing": told}, "tables": {"narrowing": list(tables)}, "warnings": [],
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    return facts, tables


def _cache(bench: Bench) -> int:
    """Bytes of keys and values of a token in the dtype of the checkpoint: the same at every width."""
    config: Any = bench.checkpoint.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * DTYPES[bench.checkpoint.input_table.dtype].itemsize


def _dropped(n_layers: int) -> list[int]:
    """How many layers are taken away, in a few steps up to half of them."""
    return sorted({n for n in (1, 2, 3, *(round(n_layers / part) for part in (6, 4, 3, 2))) if 0 < n <= n_layers / 2})


class _Candidates:
    """Makes, judges and times one candidate after the other; each is on disk before the next begins."""

    def __init__(self, bench: Bench, folder: ResultFolder) -> None:
        self.bench, self.folder = bench, folder
        self.seconds: list[float] = []

    def row(
        self, name: str, make: Callable[[], PreTrainedModel], what: Mapping[str, Any], *, timed: bool = True
    ) -> pl.DataFrame:
        given = {"recipe": self.bench.recipe(0, self.bench.tied), "timed": timed, **what}
        return self.folder.table(f"candidates/{name}", given, lambda: self._measured(name, make(), what, timed))

    def _measured(self, name: str, model: PreTrainedModel, what: Mapping[str, Any], timed: bool) -> pl.DataFrame:
        bench = self.bench
        found = bench.judge(model)
        read = min(LENGTH, bench.length)
        # Speeds are told against the dense model in the same minute: machines get busy and idle again.
        speed = _speeds(throughput({"dense": bench.dense, name: model}, read=read), name) if timed else {}
        size = {"parameters": sum(p.numel() for p in model.parameters()), "bytes": self._bytes(model, what.get("bits"))}
        judged = {
            key: getattr(found, key) for key in ("loss", "loss_rise", "loss_rise_stderr", "kl", "kl_stderr", "top_1")
        }
        bench.say(f"{name}: {size['parameters'] / 1e6:.1f}M parameters, KL {found.kl:.4f}")
        row = (
            dict.fromkeys(SCHEMA)
            | {key: value for key, value in what.items() if key in SCHEMA}
            | size
            | judged
            | speed
            | {"n_tokens": found.n_positions}
        )
        return pl.DataFrame([row], schema=SCHEMA)

    def _bytes(self, model: PreTrainedModel, bits: int | None) -> int:
        """Of the weights as they would be stored: in the dtype of the checkpoint, or rounded, with a scale for each row."""
        stored = DTYPES[self.bench.checkpoint.input_table.dtype].itemsize
        if bits is None:
            return stored * sum(p.numel() for p in model.parameters())
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = sum(p.numel() for p in model.parameters() if p.ndim != 2)
        return sum(p.numel() * bits // 8 + len(p) * stored for p in matrices) + stored * others


def _speeds(speed: Mapping[str, Throughput], name: str) -> dict[str, float]:
    dense, own = speed["dense"], speed[name]
    ratios = {"prefill_ratio": own.prefill / dense.prefill, "decode_ratio": own.decode / dense.decode}
    return {"prefill": own.prefill, "decode": own.decode, **ratios}


def _prompts(bench: Bench) -> list[Prompt]:
    tokenizer = require_tokenizer(bench.checkpoint.source)
    prompts = [prepare_prompt(tokenizer, prompt) for prompt in bench.settings.prompts]
    check_room(prompts, DECODING, context_of(bench.checkpoint))
    return prompts


def _texts(bench: Bench, small: PreTrainedModel, prompts: Sequence[Prompt]) -> pl.DataFrame:
    """What the dense model and a narrow one say to every prompt, greedily."""
    tokenizer = require_tokenizer(bench.checkpoint.source)
    small.generation_config = deepcopy(bench.dense.generation_config)  # it knows where a text ends
    told = [generate(model, tokenizer, prompts, DECODING) for model in (bench.dense, small)]
    rows = [(prompt.text, dense.text, narrow.text) for prompt, dense, narrow in zip(prompts, *told, strict=True)]
    return pl.DataFrame(rows, schema=["prompt", "dense", "narrow"], orient="row")


# ---- what it says ---------------------------------------------------------------------------------------------------


def with_equal_size(plan: pl.DataFrame) -> pl.DataFrame:
    """The plan with `kl_dropping` and `loss_rise_dropping`: what dropping layers costs at as many real parameters.

    Read off the straight line between the two nearest numbers of layers; null beyond them.
    """
    columns = [
        pl.Series(f"{value}_dropping", [_at(plan, DROP, None, value, n) for n in plan["parameters"]], dtype=pl.Float64)
        for value in ("kl", "loss_rise")
    ]
    return plan.with_columns(columns)


def _at(
    plan: pl.DataFrame, method: str, basis: str | None, value: str, place: float, x: str = "parameters"
) -> float | None:
    """A value of one way at a number of parameters (or a speed), on the line between its neighbours and the dense model."""
    own = plan.filter(pl.col("method") == method)
    own = own if basis is None else own.filter(pl.col("basis") == basis)
    dense = plan.filter(pl.col("method") == DENSE)
    curve = pl.concat([own, dense]).drop_nulls(x).sort(x).select(x, value).rows()
    for (low, before), (high, after) in pairwise(curve):
        if low <= place <= high and high > low:
            return before + (after - before) * (place - low) / (high - low)
    return None


def candidate_name(row: Mapping[str, Any]) -> str:
    """How a row of the plan is called: "width 224, raw", "5 layers", "8-bit weights"."""
    named = {
        DENSE: "dense", NARROW: f"width {row['width']}, {row['basis']}", HEALED: f"width {row['width']}, {row['basis']}, healed",
        DROP: f"{row['layers']} layers", ROUND: f"{row['bits']}-bit weights",
    }  # fmt: skip
    return named[row["method"]]


def best_basis(plan: pl.DataFrame) -> str:
    """The one with the lowest KL at most widths."""
    narrow = plan.filter(pl.col("method") == NARROW)
    winners = [rows.sort("kl")["basis"][0] for _, rows in narrow.group_by("width", maintain_order=True)]
    return max(dict.fromkeys(winners), key=winners.count)


def shown_candidate(plan: pl.DataFrame) -> dict[str, Any]:
    """The candidate that is shown beside the dense model, and healed: of the best basis the widest that is a tenth smaller."""
    narrow = plan.filter((pl.col("method") == NARROW) & (pl.col("basis") == best_basis(plan))).sort(
        "width", descending=True
    )
    dense = plan.filter(pl.col("method") == DENSE)["parameters"][0]
    smaller = narrow.filter(pl.col("parameters") <= TENTH * dense)
    return (smaller if smaller.height else narrow[-1:]).row(0, named=True)


def advice(plan: pl.DataFrame) -> list[str]:
    """What to do with this model, in a few sentences: the first is the advice, the others say why."""
    dense = plan.filter(pl.col("method") == DENSE).row(0, named=True)
    basis = best_basis(plan)
    narrow = plan.filter((pl.col("method") == NARROW) & (pl.col("basis") == basis)).sort("parameters", descending=True)
    smaller = [row for row in narrow.iter_rows(named=True) if row["parameters"] < dense["parameters"]]
    quantised = plan.filter(pl.col("method") == ROUND).row(0, named=True)
    instead = (
        f"Rounding the weights to {quantised['bits']} bits leaves {quantised['bytes'] / dense['bytes']:.0%} of the bytes and "
        f"changes the loss by {quantised['loss_rise']:+.4f} nats."
    )
    if not smaller:
        why = "No width that was tried makes it smaller: its two tables weigh more than its one did."
        return ["Do not narrow this model", why, instead]
    compared = [_compared(plan, basis, dense["parameters"], smaller[0])]
    compared += [t for t in (_after_healing(plan, dense["parameters"]), instead) if t]
    better = [row for row in smaller if row["kl_dropping"] is None or row["kl"] < row["kl_dropping"]]
    good = [row for row in better if row["loss_rise"] <= TOLERATED]
    if good:
        row = good[-1]
        faster = _faster(plan, row)
        return [
            f"Narrow it to {row['width']}: {1 - row['parameters'] / dense['parameters']:.0%} fewer parameters, "
            f"{row['loss_rise']:+.3f} nats of loss",
            f"Up to {TOLERATED:g} nats count as tolerable here, before any healing.{faster}", *compared,
        ]  # fmt: skip
    if better:
        why = f"Every smaller width costs more than {TOLERATED:g} nats of loss. Narrowed and then healed it may do."
        return ["Do not narrow this model without healing it", why, *compared]
    return ["Do not narrow this model: dropping layers loses less", *compared]


def _faster(plan: pl.DataFrame, row: Mapping[str, Any]) -> str:
    """How fast a candidate reads, and whether as much speed is to be had for less."""
    if row["prefill_ratio"] is None:
        return ""
    dropping = _at(plan, DROP, None, "kl", row["prefill_ratio"], "prefill_ratio")
    cheaper = dropping is not None and dropping < row["kl"]
    rest = f"; dropping layers is as fast for less ({dropping:.3f} nats of KL, not {row['kl']:.3f})" if cheaper else ""
    return f" A prompt is read {row['prefill_ratio']:.2f} times as fast{rest}."


def _after_healing(plan: pl.DataFrame, parameters: int) -> str | None:
    healed = plan.filter(pl.col("method") == HEALED)
    if healed.is_empty():
        return None
    row = healed.row(0, named=True)
    return (
        f"Narrowed to {row['width']} ({1 - row['parameters'] / parameters:.0%} fewer parameters) and healed, it changes the loss "
        f"by {row['loss_rise']:+.3f} nats."
    )


def _compared(plan: pl.DataFrame, basis: str, parameters: int, first: Mapping[str, Any]) -> str:
    """Narrowing beside dropping layers at a tenth fewer parameters, or at the size of the widest candidate."""
    size = TENTH * parameters
    own, dropping = _at(plan, NARROW, basis, "loss_rise", size), _at(plan, DROP, None, "loss_rise", size)
    if own is None:
        size, own = first["parameters"], first["loss_rise"]
        dropping = _at(plan, DROP, None, "loss_rise", size)
    other = "" if dropping is None else f", dropping layers {dropping:+.3f}"
    return f"With {1 - size / parameters:.0%} fewer parameters narrowing ({basis}) changes the loss by {own:+.3f} nats{other}."
