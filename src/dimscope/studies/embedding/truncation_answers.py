"""How many dimensions are needed, and whether PCA or truncation gains anything: answers from the table `truncation`.

Each statement is false for noise in at most one case of twenty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import polars as pl

from dimscope.geometry.metrics import NEIGHBOR_OVERLAP, SIMILARITY_CORRELATION
from dimscope.geometry.truncation import PCA, ROTATION, TRUNCATION
from dimscope.page.section import Tables, table

ANSWERED = (PCA, TRUNCATION, ROTATION)  # random coordinates have too few draws for an interval
TARGETS = ((NEIGHBOR_OVERLAP, 0.9), (NEIGHBOR_OVERLAP, 0.95), (SIMILARITY_CORRELATION, 0.95))
ALPHA = 0.05
COMPARISONS = 3  # PCA and truncation with a random rotation, and with each other


@dataclass(frozen=True, slots=True)
class Needed:
    """How many dimensions a method needs for a target.

    Attributes:
        size: The smallest size from which on every larger one reaches the target beyond doubt; all dimensions if none does.
        possible: The smallest size that may reach it.
    """

    size: int
    possible: int


@dataclass(frozen=True, slots=True)
class Difference:
    """What one method keeps and another one keeps, the means over all sizes, and whether noise can explain the difference."""

    value: float
    other: float
    clear: bool

    @property
    def more(self) -> bool:
        """Whether the first method clearly keeps more."""
        return self.clear and self.value > self.other

    @property
    def fewer(self) -> bool:
        """Whether the first method clearly keeps less."""
        return self.clear and self.value < self.other


def truncation_of(tables: Tables) -> pl.DataFrame | None:
    """Return the table `truncation`, or None where it is missing or empty."""
    return table(tables, "truncation")


def curve(frame: pl.DataFrame, method: str, metric: str) -> pl.DataFrame:
    """Return size, value, stderr and degrees of freedom of a method, smallest size first.

    The error over queries is common to all draws of a random method; that over draws shrinks with their number.
    """
    of_method = frame.filter(method=method, metric=metric)
    n_draws, n_queries = pl.len(), pl.col("n_tokens").first()
    over_draws = pl.col("value").var().fill_null(0.0) / n_draws
    return (
        of_method.group_by("size")
        .agg(
            pl.col("value").mean(),
            stderr=(over_draws + (pl.col("stderr") ** 2).mean()).sqrt(),
            degrees=pl.when(n_draws > 1).then(n_draws).otherwise(n_queries).cast(pl.Int64) - 1,
        )
        .sort("size")
    )


def needed(frame: pl.DataFrame, method: str, metric: str, target: float, dim: int) -> Needed:
    """Return how many dimensions a method needs.

    Sizes are tested from the largest down, and the first one that may miss the target ends the tests: in that order no
    correction for their number is due. The correction is for the number of methods and targets.
    """
    share = ALPHA / (len(ANSWERED) * len(TARGETS))
    size = possible = dim
    certain = True
    for row in curve(frame, method, metric).sort("size", descending=True).iter_rows(named=True):
        margin = _quantile(1 - share, row["degrees"]) * row["stderr"]
        certain = certain and row["value"] - margin >= target
        if certain:
            size = row["size"]
        if row["value"] + margin < target:
            break
        possible = row["size"]
    return Needed(size, possible)


def difference(frame: pl.DataFrame, method: str, other: str, metric: str = NEIGHBOR_OVERLAP) -> Difference:
    """Compare the means over all sizes of PCA or truncation with those of the random rotations, or with each other.

    A random rotation differs from the others: the test asks whether the method could be one more of them. Two fixed methods
    are compared by their errors over queries, as if these were independent.
    """
    share = 1 - ALPHA / (2 * COMPARISONS)
    own = curve(frame, method, metric)
    value = float(own["value"].to_numpy().mean())
    if other == ROTATION:
        draws = frame.filter(method=other, metric=metric).group_by("seed").agg(pl.col("value").mean())["value"]
        n, mean, spread = len(draws), float(draws.to_numpy().mean()), float(draws.to_numpy().std(ddof=1))
        margin = _quantile(share, n - 1) * spread * math.sqrt(1 + 1 / n)
    else:
        second = curve(frame, other, metric)
        mean = float(second["value"].to_numpy().mean())
        errors = [float(one["stderr"].to_numpy().mean()) for one in (own, second)]
        margin = _quantile(share, own["degrees"][0]) * math.hypot(*errors)
    return Difference(value, mean, abs(value - mean) > max(margin, 1e-6))


def answer(tables: Tables, dim: int, row: str) -> str:
    """Return how many dimensions keep 90% of the neighbours by PCA and by truncation; nothing where it was not measured."""
    frame = truncation_of(tables)
    if frame is None:
        return ""
    pca, cut = (needed(frame, method, NEIGHBOR_OVERLAP, 0.9, dim) for method in (PCA, TRUNCATION))
    what, largest = (
        f"90% of the {frame['neighbors'][0]} nearest neighbours of a {row}",
        int(frame["size"].to_numpy().max()),
    )
    if pca.size == cut.size == dim:
        verb = "keeps" if pca.possible == cut.possible == dim else "is certain to keep"
        return f"With up to {largest:,} of {dim:,} dimensions, neither PCA nor truncation {verb} {what}"
    if pca.size == cut.size:
        return f"PCA and truncation both keep {what} in {pca.size:,} of {dim:,} dimensions"
    if pca.size == dim:
        return f"Truncation keeps {what} in {cut.size:,} of {dim:,} dimensions, PCA {_in_words(pca, dim, largest)}"
    return f"PCA keeps {what} in {pca.size:,} of {dim:,} dimensions, truncation {_in_words(cut, dim, largest)}"


def _in_words(needed: Needed, dim: int, largest: int) -> str:
    if needed.size < dim:
        return f"in {needed.size:,}"
    return f"needs more than {largest:,}" if needed.possible == dim else "may need all"


def _quantile(share: float, degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf(share, max(degrees, 1)))
