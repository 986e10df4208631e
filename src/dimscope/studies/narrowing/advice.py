"""What follows from the table of a plan: methods compared at equal size, the candidate to show, and the advice in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import polars as pl

NARROW, HEALED, DROP, ROUND, DENSE = "narrow", "narrow, healed", "drop layers", "quantise", "dense"
TOLERATED = 0.05  # nats of loss: 5% of perplexity
TENTH = 0.9  # share of the parameters at which the methods are compared in words
SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s", "prefill_ratio", "decode_ratio")
SCHEMA = {
    "method": pl.String, "basis": pl.String, "tied": pl.Boolean, "width": pl.Int64, "layers": pl.Int64, "bits": pl.Int64,
    "parameters": pl.Int64, "bytes": pl.Int64, "loss": pl.Float64, "loss_stderr": pl.Float64, "loss_rise": pl.Float64,
    "loss_rise_stderr": pl.Float64, "kl": pl.Float64, "kl_stderr": pl.Float64, "top_1": pl.Float64,
    "top_1_stderr": pl.Float64, "prefill_tokens_per_s": pl.Float64,
    "decode_tokens_per_s": pl.Float64, "prefill_ratio": pl.Float64, "decode_ratio": pl.Float64, "n_tokens": pl.Int64,
}  # fmt: skip


def with_equal_size(plan: pl.DataFrame) -> pl.DataFrame:
    """Add the columns `kl_dropping` and `loss_rise_dropping`: what dropping layers costs at the same number of parameters.

    Linear interpolation between the two nearest numbers of layers; null beyond them.
    """
    columns = [
        pl.Series(f"{value}_dropping", [_at(plan, DROP, None, value, n) for n in plan["parameters"]], dtype=pl.Float64)
        for value in ("kl", "loss_rise")
    ]
    return plan.with_columns(columns)


def _at(
    plan: pl.DataFrame, method: str, basis: str | None, value: str, position: float, x: str = "parameters"
) -> float | None:
    """Interpolate a value of one method at a number of parameters, or at a speed; the dense model is on each curve."""
    own = plan.filter(pl.col("method") == method)
    own = own if basis is None else own.filter(pl.col("basis") == basis)
    # With a second table a model of full width is not the dense one, but larger.
    dense = plan.filter((pl.col("method") == DENSE) & pl.col("tied").is_in(own["tied"].unique().to_list()))
    return between(pl.concat([own, dense]).drop_nulls(x).sort(x).select(x, value).rows(), position)


def between(curve: Sequence[tuple[float, float]], position: float) -> float | None:
    """Interpolate a curve of (x, y), sorted by x, linearly; None beyond its ends.

    >>> between([(0, 1.0), (10, 2.0)], 5), between([(0, 1.0), (10, 2.0)], 11)
    (1.5, None)
    """
    for (low, before), (high, after) in pairwise(curve):
        if low <= position <= high and high > low:
            return before + (after - before) * (position - low) / (high - low)
    return None


def candidate_name(row: Mapping[str, Any]) -> str:
    """Return the name of a row of the plan: "width 224, raw", "5 layers", "8-bit weights"."""
    names = {
        DENSE: "dense", NARROW: f"width {row['width']}, {row['basis']}", HEALED: f"width {row['width']}, {row['basis']}, healed",
        DROP: f"{row['layers']} layer{'' if row['layers'] == 1 else 's'}", ROUND: f"{row['bits']}-bit weights",
    }  # fmt: skip
    return names[row["method"]]


def best_basis(plan: pl.DataFrame) -> str:
    """Return the basis that has the lowest KL at most widths."""
    narrow = plan.filter(pl.col("method") == NARROW)
    winners = [rows.sort("kl")["basis"][0] for _, rows in narrow.group_by("width", maintain_order=True)]
    return max(dict.fromkeys(winners), key=winners.count)


def shown_candidate(plan: pl.DataFrame) -> dict[str, Any]:
    """Return the candidate to show beside the dense model, and to heal: the advised one, or the widest that is a tenth smaller."""
    good = _tolerable_rows(plan)
    narrow = _best_rows(plan)
    smaller = [row for row in narrow if row["parameters"] <= TENTH * _dense(plan)["parameters"]]
    return good[-1] if good else (smaller or narrow[-1:])[0]


def _dense(plan: pl.DataFrame) -> dict[str, Any]:
    return plan.filter(pl.col("method") == DENSE).row(0, named=True)


def _best_rows(plan: pl.DataFrame) -> list[dict[str, Any]]:
    """Return the candidates of the best basis, the largest first."""
    own = plan.filter((pl.col("method") == NARROW) & (pl.col("basis") == best_basis(plan)))
    return own.sort("parameters", descending=True).rows(named=True)


def _smaller_rows(plan: pl.DataFrame) -> list[dict[str, Any]]:
    limit = _dense(plan)["parameters"]
    return [row for row in _best_rows(plan) if row["parameters"] < limit]


def _better_rows(plan: pl.DataFrame) -> list[dict[str, Any]]:
    """Return those that are smaller than the dense model, and lose less than dropping layers to their size."""
    return [row for row in _smaller_rows(plan) if row["kl_dropping"] is None or row["kl"] < row["kl_dropping"]]


def _tolerable_rows(plan: pl.DataFrame) -> list[dict[str, Any]]:
    return [row for row in _better_rows(plan) if row["loss_rise"] <= TOLERATED]


def advice(plan: pl.DataFrame) -> list[str]:
    """Return what to do with this model, in a few sentences: the first is the advice, the others give the reasons."""
    dense, basis = _dense(plan), best_basis(plan)
    smaller = _smaller_rows(plan)
    compared = [t for t in (_rounded(plan),) if t]
    if not smaller:
        return [
            "Do not narrow this model",
            "No width makes it smaller: two tables have more parameters than one.",
            *compared,
        ]
    compared = [_compared(plan, basis, dense["parameters"], smaller[0]), *compared]
    better, good = _better_rows(plan), _tolerable_rows(plan)
    healed = plan.filter(pl.col("method") == HEALED)
    best_healed = healed.row(0, named=True) if healed.height else None
    if (
        best_healed
        and best_healed["loss_rise"] <= TOLERATED
        and (not good or best_healed["parameters"] <= good[-1]["parameters"])
    ):
        return [
            f"Narrow it to {best_healed['width']} and heal it: {_gain(best_healed, dense)}",
            _tolerable(plan, best_healed),
            *compared,
        ]
    if good:
        return [f"Narrow it to {good[-1]['width']}: {_gain(good[-1], dense)}", _tolerable(plan, good[-1]), *compared]
    if better and best_healed is None:
        why = f"Every smaller width costs more than {TOLERATED:g} nats of loss. Healing may lower that."
        return ["Do not narrow this model without healing it", why, *compared]
    if better and best_healed is not None:
        why = f"Healed at {best_healed['width']}: {_gain(best_healed, dense)}; the limit is {TOLERATED:g} nats."
        return ["Do not narrow this model: even after healing it loses too much", why, *compared]
    return ["Do not narrow this model: dropping layers loses less", *compared]


def _gain(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    return f"{1 - row['parameters'] / dense['parameters']:.0%} fewer parameters, {row['loss_rise']:+.3f} nats of loss"


def _tolerable(plan: pl.DataFrame, row: Mapping[str, Any]) -> str:
    return f"A rise of the loss by up to {TOLERATED:g} nats (5% of perplexity) counts as tolerable.{_faster(plan, row)}"


def _rounded(plan: pl.DataFrame) -> str | None:
    rows = plan.filter(pl.col("method") == ROUND)
    if rows.is_empty():
        return None
    row, dense = rows.row(0, named=True), _dense(plan)
    return (
        f"To save bytes only, round the weights to {row['bits']} bits: {row['bytes'] / dense['bytes']:.0%} of the bytes, and the "
        f"loss changes by {row['loss_rise']:+.4f} nats."
    )


def _faster(plan: pl.DataFrame, row: Mapping[str, Any]) -> str:
    """Return how fast a candidate reads, and whether dropping layers costs less at the same speed."""
    if row["prefill_ratio"] is None:
        return ""
    dropping = _at(plan, DROP, None, "kl", row["prefill_ratio"], "prefill_ratio")
    cheaper = dropping is not None and dropping < row["kl"]
    rest = (
        f"; dropping layers to the same speed costs less ({dropping:.3f} nats of KL, not {row['kl']:.3f})"
        if cheaper
        else ""
    )
    return f" A prompt is read {row['prefill_ratio']:.2f} times as fast{rest}."


def _compared(plan: pl.DataFrame, basis: str, parameters: int, first: Mapping[str, Any]) -> str:
    """Compare narrowing with dropping layers at a tenth fewer parameters, or at the size of the widest candidate."""
    size = TENTH * parameters
    own, dropping = _at(plan, NARROW, basis, "loss_rise", size), _at(plan, DROP, None, "loss_rise", size)
    if own is None:
        size, own = first["parameters"], first["loss_rise"]
        dropping = _at(plan, DROP, None, "loss_rise", size)
    other = "" if dropping is None else f", dropping layers by {dropping:+.3f}"
    return f"With {1 - size / parameters:.0%} fewer parameters, narrowing ({basis}) changes the loss by {own:+.3f} nats{other}."
