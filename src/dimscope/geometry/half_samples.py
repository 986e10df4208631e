"""Errors of numbers that no formula gives, for rows in groups that depend on each other: balanced half-samples.

The groups are divided into two halves in seven ways, such that no two divisions agree more than by chance (the rows of a
Hadamard matrix: McCarthy 1969). A number is computed from each half. The halves are independent, so half of the mean
squared difference estimates the variance of the number of a half, and a quarter that of the number of all rows. The
jackknife is no alternative here: numbers that depend on nearest neighbours change with several rows at once, and it gives
up to twice their error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from dimscope.texts.window_sums import Interval, student_interval

UNITS = 8  # into which groups are merged, so that each half has four
FEWEST_ROWS = 64  # of a sample that is divided
MOST_GROUPS = 16
GAP = 1 / 8  # of a group at each end, whose rows depend on those of the next group


def groups_of(windows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return the number of the group of each row, from 0 on: its window, or several neighbouring windows of many.

    Rows of fewer than 8 windows are cut into 8 stretches of equal length instead. The rows at both ends of a group (an
    eighth each) are in no group (-1), so that those of different groups lie apart where windows follow each other.

    Args:
        windows: The number of the window of each row, in the order of the text.

    >>> groups_of(np.repeat([3, 4, 6, 7, 9, 10, 11, 12], 8)).reshape(8, 8)[2].tolist()
    [-1, 2, 2, 2, 2, 2, 2, -1]
    """
    present, numbers = np.unique(windows, return_inverse=True)
    few = len(present) < UNITS
    most = UNITS if few else min(len(present), MOST_GROUPS)
    groups = np.arange(len(windows)) * most // max(len(windows), 1) if few else numbers * most // len(present)
    sizes = np.bincount(groups, minlength=most)
    places = (np.arange(len(windows)) - np.cumsum(sizes)[groups] + sizes[groups] + 0.5) / sizes[groups]
    return np.where(np.abs(places - 0.5) < 0.5 - GAP, groups, -1)


def random_groups(n: int) -> Int[np.ndarray, " n"]:
    """Return the number of a random group, from 0 to 7, for each of n independent rows."""
    return np.random.default_rng(0).permutation(n) % UNITS


def divisions() -> list[Bool[np.ndarray, " 8"]]:
    """Return which of the eight units are in the first half, for seven divisions."""
    from scipy.linalg import hadamard

    return [signs > 0 for signs in hadamard(UNITS)[1:]]


def half_samples(groups: Int[np.ndarray, " n"]) -> Iterator[tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]]:
    """Yield which rows are in one half, and which in the other, for seven divisions; none for fewer than 64 rows."""
    grouped = groups >= 0
    if np.count_nonzero(grouped) < FEWEST_ROWS:
        return
    for units in divisions():
        first = units[groups % UNITS]
        yield grouped & first, grouped & ~first


@dataclass(frozen=True, slots=True)
class Replicated:
    """A number, and its differences between the two halves of each division; none where there are too few rows."""

    value: float
    differences: tuple[float, ...] = ()

    def minus(self, other: Replicated) -> Replicated:
        """Return the difference to a number of the same rows, or of rows of the same groups: what varies in both cancels."""
        pairs = zip(self.differences, other.differences, strict=False)
        both = tuple(one - two for one, two in pairs) if self.differences and other.differences else ()
        return Replicated(self.value - other.value, both)

    def interval(self, n_statements: int = 1) -> Interval:
        """Return the number with its standard error and 95% interval, by Student's t with seven degrees of freedom.

        Of `n_statements` intervals all cover their numbers at once in 95% of samples (Bonferroni).
        """
        n = len(self.differences)
        if not n:
            return Interval(self.value, None, None, None, 0)
        stderr = math.sqrt(sum(d * d for d in self.differences) / n) / 2
        return student_interval(self.value, stderr, UNITS - 1, UNITS, n_statements)
