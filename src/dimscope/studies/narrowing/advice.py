"""What the table of a plan says: ways compared at equal size, the candidate that is shown, and the advice in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import polars as pl

NARROW, HEALED, DROP, ROUND, DENSE = "narrow", "narrow, healed", "drop layers", "quantise", "dense"
TOLERATED = 0.05  # nats of loss: 5% of perplexity
TENTH = 0.9  # of the parameters, at which the ways are compared in words
SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s", "prefill_ratio", "decode_ratio")
SCHEMA = {
    "method": pl.String, "basis": pl.String, "tied": pl.Boolean, "width": pl.Int64, "layers": pl.Int64, "bits": pl.Int64,
    "parameters": pl.Int64, "bytes": pl.Int64, "loss": pl.Float64, "loss_rise": pl.Float64, "loss_rise_stderr": pl.Float64,
    "kl": pl.Float64, "kl_stderr": pl.Float64, "top_1": pl.Float64, "prefill_tokens_per_s": pl.Float64,
    "decode_tokens_per_s": pl.Float64, "prefill_ratio": pl.Float64, "decode_ratio": pl.Float64, "n_tokens": pl.Int64,
}  # fmt: skip


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
    # With a second table a model of full width is not the dense one, but larger.
    dense = plan.filter((pl.col("method") == DENSE) & pl.col("tied").is_in(own["tied"].unique().to_list()))
    return between(pl.concat([own, dense]).drop_nulls(x).sort(x).select(x, value).rows(), place)


def between(curve: Sequence[tuple[float, float]], place: float) -> float | None:
    """The height of a curve of rising places, on the straight line between two of them; None beyond its ends."""
    for (low, before), (high, after) in pairwise(curve):
        if low <= place <= high and high > low:
            return before + (after - before) * (place - low) / (high - low)
    return None


def candidate_name(row: Mapping[str, Any]) -> str:
    """How a row of the plan is called: "width 224, raw", "5 layers", "8-bit weights"."""
    named = {
        DENSE: "dense", NARROW: f"width {row['width']}, {row['basis']}", HEALED: f"width {row['width']}, {row['basis']}, healed",
        DROP: f"{row['layers']} layer{'' if row['layers'] == 1 else 's'}", ROUND: f"{row['bits']}-bit weights",
    }  # fmt: skip
    return named[row["method"]]


def best_basis(plan: pl.DataFrame) -> str:
    """The one with the lowest KL at most widths."""
    narrow = plan.filter(pl.col("method") == NARROW)
    winners = [rows.sort("kl")["basis"][0] for _, rows in narrow.group_by("width", maintain_order=True)]
    return max(dict.fromkeys(winners), key=winners.count)


def shown_candidate(plan: pl.DataFrame) -> dict[str, Any]:
    """The candidate that is shown beside the dense model, and healed: the advised one, or the widest that is a tenth smaller."""
    good = _tolerable_rows(plan)
    narrow = _best_rows(plan)
    smaller = [row for row in narrow if row["parameters"] <= TENTH * _dense(plan)["parameters"]]
    return good[-1] if good else (smaller or narrow[-1:])[0]


def _dense(plan: pl.DataFrame) -> dict[str, Any]:
    return plan.filter(pl.col("method") == DENSE).row(0, named=True)


def _best_rows(plan: pl.DataFrame) -> list[dict[str, Any]]:
    """The candidates of the best basis, the largest first."""
    own = plan.filter((pl.col("method") == NARROW) & (pl.col("basis") == best_basis(plan)))
    return own.sort("parameters", descending=True).rows(named=True)


def _smaller_rows(plan: pl.DataFrame) -> list[dict[str, Any]]:
    limit = _dense(plan)["parameters"]
    return [row for row in _best_rows(plan) if row["parameters"] < limit]


def _better_rows(plan: pl.DataFrame) -> list[dict[str, Any]]:
    """Those that are smaller than the dense model, and lose less than leaving out layers at their size."""
    return [row for row in _smaller_rows(plan) if row["kl_dropping"] is None or row["kl"] < row["kl_dropping"]]


def _tolerable_rows(plan: pl.DataFrame) -> list[dict[str, Any]]:
    return [row for row in _better_rows(plan) if row["loss_rise"] <= TOLERATED]


def advice(plan: pl.DataFrame) -> list[str]:
    """What to do with this model, in a few sentences: the first is the advice, the others say why."""
    dense, basis = _dense(plan), best_basis(plan)
    smaller = _smaller_rows(plan)
    compared = [t for t in (_rounded(plan),) if t]
    if not smaller:
        return [
            "Do not narrow this model",
            "No width that was tried makes it smaller: two tables weigh more than one.",
            *compared,
        ]
    compared = [_compared(plan, basis, dense["parameters"], smaller[0]), *compared]
    better, good = _better_rows(plan), _tolerable_rows(plan)
    healed = plan.filter(pl.col("method") == HEALED)
    mended = healed.row(0, named=True) if healed.height else None
    if mended and mended["loss_rise"] <= TOLERATED and (not good or mended["parameters"] <= good[-1]["parameters"]):
        return [
            f"Narrow it to {mended['width']} and heal it: {_gain(mended, dense)}",
            _tolerable(plan, mended),
            *compared,
        ]
    if good:
        return [f"Narrow it to {good[-1]['width']}: {_gain(good[-1], dense)}", _tolerable(plan, good[-1]), *compared]
    if better and mended is None:
        why = f"Every smaller width costs more than {TOLERATED:g} nats of loss. Narrowed and then healed it may do."
        return ["Do not narrow this model without healing it", why, *compared]
    if better and mended is not None:
        why = f"Healed at {mended['width']}: {_gain(mended, dense)}; more than {TOLERATED:g} is not tolerable here."
        return ["Do not narrow this model: even healed it loses too much", why, *compared]
    return ["Do not narrow this model: dropping layers loses less", *compared]


def _gain(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    return f"{1 - row['parameters'] / dense['parameters']:.0%} fewer parameters, {row['loss_rise']:+.3f} nats of loss"


def _tolerable(plan: pl.DataFrame, row: Mapping[str, Any]) -> str:
    return f"Up to {TOLERATED:g} nats count as tolerable here.{_faster(plan, row)}"


def _rounded(plan: pl.DataFrame) -> str | None:
    rows = plan.filter(pl.col("method") == ROUND)
    if rows.is_empty():
        return None
    row, dense = rows.row(0, named=True), _dense(plan)
    return (
        f"For the bytes alone, round the weights: {row['bits']} bits leave {row['bytes'] / dense['bytes']:.0%} of them and change "
        f"the loss by {row['loss_rise']:+.4f} nats."
    )


def _faster(plan: pl.DataFrame, row: Mapping[str, Any]) -> str:
    """How fast a candidate reads, and whether as much speed is to be had for less."""
    if row["prefill_ratio"] is None:
        return ""
    dropping = _at(plan, DROP, None, "kl", row["prefill_ratio"], "prefill_ratio")
    cheaper = dropping is not None and dropping < row["kl"]
    rest = f"; dropping layers is as fast for less ({dropping:.3f} nats of KL, not {row['kl']:.3f})" if cheaper else ""
    return f" A prompt is read {row['prefill_ratio']:.2f} times as fast{rest}."


def _compared(plan: pl.DataFrame, basis: str, parameters: int, first: Mapping[str, Any]) -> str:
    """Narrowing beside dropping layers at a tenth fewer parameters, or at the size of the widest candidate."""
    size = TENTH * parameters
    own, dropping = _at(plan, NARROW, basis, "loss_rise", size), _at(plan, DROP, None, "loss_rise", size)
    if own is None:
        size, own = first["parameters"], first["loss_rise"]
        dropping = _at(plan, DROP, None, "loss_rise", size)
    other = "" if dropping is None else f", dropping layers {dropping:+.3f}"
    return f"With {1 - size / parameters:.0%} fewer parameters narrowing ({basis}) changes the loss by {own:+.3f} nats{other}."
