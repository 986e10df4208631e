"""States by the type of their token: one of each type, the means of the types, and what is left when these are removed.

A token that occurs often has many states. How these differ from each other is context; how the means of the types differ
is vocabulary. The scatter of all states is exactly the sum of the two (one-way analysis of variance).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dimscope.geometry.half_samples import FEWEST_ROWS, UNITS, Replicated, divisions
from dimscope.geometry.spectrum import Spectrum, spectrum_of

ROWS_AT_ONCE = 512  # rows whose distances to all others are computed at once
ROUNDING = 1e-24  # a share of the sum of squares that float64 may leave of equal rows minus their mean


def one_of_each(types: Int[np.ndarray, " n"], seed: int = 0) -> Int[np.ndarray, " m"]:
    """Return rising positions, one of each type, chosen at random.

    >>> one_of_each(np.array([7, 5, 7, 7])).tolist() in ([0, 1], [1, 2], [1, 3])
    True
    """
    order = np.random.default_rng(seed).permutation(len(types))
    return np.sort(order[np.unique(types[order], return_index=True)[1]])


@dataclass(frozen=True, slots=True)
class SameTypeNeighbors:
    """How often the nearest neighbour of a row has the type of the row, and how often a random other row has it."""

    share: float
    by_chance: float


def same_type_neighbors(rows: Float[Tensor, "n d"], types: Int[np.ndarray, " n"]) -> SameTypeNeighbors:
    """Compute the share of rows whose nearest other row (Euclidean) is of the same type; NaN for fewer than two rows.

    Of several nearest rows at the same distance, such as copies, one counts.
    """
    n = len(rows)
    if n < 2:
        return SameTypeNeighbors(float("nan"), float("nan"))
    centred = rows.double() - rows.double().mean(dim=0)
    squares = centred.square().sum(dim=1)
    nearest = []
    for start in range(0, n, ROWS_AT_ONCE):
        tile = torch.addmm(squares, centred[start : start + ROWS_AT_ONCE], centred.T, alpha=-2)
        tile.diagonal(start).fill_(torch.inf)  # the row itself
        nearest.append(tile.argmin(dim=1))
    counts = np.unique(types, return_counts=True)[1].astype(np.float64)
    same = types[torch.cat(nearest).numpy()] == types
    return SameTypeNeighbors(float(same.mean()), float((counts * (counts - 1)).sum() / (n * (n - 1))))


@dataclass(frozen=True, slots=True)
class TypeSpectra:
    """The spectra of N rows of T types, all three in units of the same rows: their squares add up.

    Attributes:
        all_rows: Of the rows, minus their mean.
        between: Of the rows with each replaced by the mean of its type: T - 1 dimensions at most.
        within: Of the rows minus the mean of their type: N - T dimensions at most.
        n_types: T.
    """

    all_rows: Spectrum
    between: Spectrum
    within: Spectrum
    n_types: int


def variance_between_types(
    rows: Float[Tensor, "n d"], types: Int[np.ndarray, " n"], groups: Int[np.ndarray, " n"]
) -> Replicated:
    """Return the share of the variance between types, corrected for their number: epsilon squared (Kelley 1935).

    1 - (SS_within / (N - T)) / (SS_all / (N - 1)): 0 in expectation where types are assigned at random, at any N, and 1
    where all rows of a type are equal. NaN where no type has two rows.

    Args:
        rows: The rows.
        types: The type of each.
        groups: The group of each, for the error; see `half_samples`.
    """
    centred = rows.double() - rows.double().mean(dim=0)
    # The plain way: where all rows of a type are equal, nothing is left of their variance, not even a rounding error.
    within, whole = (float(part.square().sum()) for part in (without_type_means(centred, types), centred))
    value = _epsilon_squared(len(rows), len(np.unique(types)), within, whole)
    halves = _half_shares(centred, types, groups)
    return Replicated(value, halves if np.isfinite(halves).all() else ())


def _epsilon_squared(n: int, n_types: int, within: float, whole: float) -> float:
    return 1 - within / (n - n_types) * (n - 1) / whole if n > n_types and whole > 0 else float("nan")


def _half_shares(
    centred: Float[Tensor, "n d"], types: Int[np.ndarray, " n"], groups: Int[np.ndarray, " n"]
) -> tuple[float, ...]:
    """Return the differences between half-samples, from sums over the rows of each type in each of eight units."""
    grouped = groups >= 0
    if np.count_nonzero(grouped) < FEWEST_ROWS:
        return ()
    rows, units = centred[torch.from_numpy(grouped)], groups[grouped] % UNITS
    names, of_type = np.unique(types[grouped], return_inverse=True)
    cells = torch.from_numpy(units * len(names) + of_type)
    shape = (UNITS, len(names))
    sums = torch.zeros(UNITS * len(names), rows.shape[1], dtype=torch.float64).index_add_(0, cells, rows)
    sums, counts = sums.view(*shape, -1), torch.bincount(cells, minlength=UNITS * len(names)).view(shape)
    squares = torch.zeros(UNITS, dtype=torch.float64).index_add_(0, torch.from_numpy(units), rows.square().sum(dim=1))

    def share(half: Bool[np.ndarray, " 8"]) -> float:
        chosen = torch.from_numpy(half)
        of_types, of_counts, square = sums[chosen].sum(dim=0), counts[chosen].sum(dim=0), float(squares[chosen].sum())
        present, n = of_counts > 0, int(of_counts.sum())
        between = float((of_types[present].square().sum(dim=1) / of_counts[present]).sum())
        whole = square - float(of_types.sum(dim=0).square().sum()) / max(n, 1)
        return _epsilon_squared(n, int(present.sum()), square - between, whole)

    return tuple(share(half) - share(~half) for half in divisions())


def without_type_means(rows: Float[Tensor, "n d"], types: Int[np.ndarray, " n"]) -> Float[Tensor, "n d"]:
    """Return rows in float64 minus the mean of the rows of their type."""
    _, groups, counts = np.unique(types, return_inverse=True, return_counts=True)
    exact, index = rows.double(), torch.from_numpy(groups)
    return exact - _means(exact, index, torch.from_numpy(counts))[index]


def _means(rows: Float[Tensor, "n d"], groups: Int[Tensor, " n"], counts: Int[Tensor, " t"]) -> Float[Tensor, "t d"]:
    sums = torch.zeros(len(counts), rows.shape[1], dtype=torch.float64).index_add_(0, groups, rows)
    return sums / counts[:, None]


def type_spectra(rows: Float[Tensor, "n d"], types: Int[np.ndarray, " n"]) -> TypeSpectra:
    """Decompose the variance of rows into that between the means of their types and that within types.

    Row counts of the spectra are those of independent rows of white noise with as many dimensions: T of the T means, and
    N - T + 1 of what is left.
    """
    _, groups, counts = np.unique(types, return_inverse=True, return_counts=True)
    groups, counts = torch.from_numpy(groups), torch.from_numpy(counts)
    centred = rows.double() - rows.double().mean(dim=0)
    means = _means(centred, groups, counts)
    n, n_types = len(rows), len(counts)
    between = spectrum_of(means * counts.double().sqrt()[:, None], centred=False).singular_values[: n_types - 1]
    rest = centred - means[groups]
    # Where a token always has the same state, what rounding leaves of the difference is no context.
    rest = rest if float(rest.square().sum()) > ROUNDING * float(centred.square().sum()) else torch.zeros_like(rest)
    within = spectrum_of(rest, centred=False).singular_values[: n - n_types]
    d = rows.shape[1]
    return TypeSpectra(
        spectrum_of(rows), Spectrum(between, n_types, d, True), Spectrum(within, n - n_types + 1, d, True), n_types
    )
