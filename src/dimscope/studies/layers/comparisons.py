"""Which differences between profiles are beyond their errors: paired by windows, and all layers of a profile at once."""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import polars as pl

from dimscope.geometry.half_samples import UNITS, Replicated
from dimscope.texts.window_sums import CONFIDENCE, Interval, t_quantile

HALF = 0.5  # a component: smaller differences of counts are not told


def replicated(row: dict[str, Any]) -> Replicated:
    """Return the value of a row of a profile with its differences between half-samples."""
    return Replicated(row["value"], tuple(row.get("halves") or ()))


def differences(real: pl.DataFrame, other: pl.DataFrame) -> dict[int, Interval]:
    """Return how far a profile is above another one, at each layer that both have, with intervals for all at once."""
    both = real.join(other, on="layer", suffix="_other").sort("layer")
    gaps = {}
    for row in both.iter_rows(named=True):
        there = {"value": row["value_other"], "halves": row.get("halves_other")}
        gaps[row["layer"]] = replicated(row).minus(replicated(there)).interval(both.height)
    return gaps


def beyond(real: pl.DataFrame, other: pl.DataFrame) -> tuple[list[int], list[int]]:
    """Return the layers where a profile of counts is clearly below, and clearly above another one.

    Clearly: the 95% interval of the difference, for all layers at once, is on one side of 0, and the difference is at
    least half a component. Layers without an error are in neither list.
    """
    clear = {layer: d for layer, d in differences(real, other).items() if d.low is not None and abs(d.value) >= HALF}
    below = [layer for layer, d in clear.items() if d.high is not None and d.high < 0]
    return below, [layer for layer, d in clear.items() if d.low is not None and d.low > 0]


def has_errors(*profiles: pl.DataFrame) -> bool:
    """Whether the differences of profiles have errors."""
    return all("halves" in points.columns and points["halves"].is_not_null().any() for points in profiles)


def margin(real: pl.DataFrame, other: pl.DataFrame) -> str:
    """Return what differences were judged by, for brackets in a sentence."""
    if not has_errors(real, other):
        return "the sample is too small for an error"
    return f"95% intervals for all layers at once, from {UNITS} groups of windows"


def extremes(points: pl.DataFrame) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Return the rows of a profile with the highest and the lowest value, and whether these differ beyond their errors.

    Any two layers could have been these, so the interval is for all pairs at once.
    """
    ordered = points.sort("value", descending=True, maintain_order=True)
    top, bottom = ordered.row(0, named=True), ordered.row(-1, named=True)
    gap = replicated(top).minus(replicated(bottom)).interval(max(points.height * (points.height - 1) // 2, 1))
    return top, bottom, gap.low is not None and gap.low > 0


def clearly_below(points: pl.DataFrame, column: str) -> list[int]:
    """Return the layers where the value of a profile is clearly below another column, for all layers at once.

    The other column is of simulated rows, whose error is taken for as large as that of the value, as a share of it.
    """
    gap = pl.col(column) - pl.col("value")
    error = pl.col("stderr") * (1 + (pl.col(column) / pl.col("value")) ** 2).sqrt()
    return points.filter(gap > t_quantile(UNITS - 1, points.height) * error)["layer"].to_list()


def above_chance(rows: pl.DataFrame) -> list[int]:
    """Return the layers whose overlap is clearly above that of random spaces, for all layers at once (Bonferroni).

    Args:
        rows: One row for each layer of the table `similarity`.
    """
    quantile = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2 / max(rows.height, 1))
    edge = pl.col("overlap_null") + quantile * pl.col("overlap_null_sd")
    return rows.filter(pl.col("overlap") > edge)["layer"].to_list()


def intervals_apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows with a `value`, `low` and `high` of independent samples differ by more than both margins, added as errors.

    False where either has no interval.
    """
    if one["low"] is None or other["low"] is None:
        return False
    margins = [(row["high"] - row["low"]) / 2 for row in (one, other)]
    return abs(one["value"] - other["value"]) > math.hypot(*margins)
