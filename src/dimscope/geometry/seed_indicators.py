"""Indicators that separate seed rows (rows that cannot have been trained) from the ordinary rows of a table.

An indicator is a deviation of a row: small for one kind of seed row, large for ordinary rows. Seed rows can be of several kinds,
so that each group of them has an indicator of its own. A group counts only where ordinary rows would hardly form it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.special import bdtrc
from torch import Tensor

from dimscope.vectors.table import RowBlock

NEAR = "near the unreachable rows"
ALIKE = "near the unreachable rows in norm and direction"

FOLDS = 8  # parts of a group of seed rows, each measured against the centroid of the others
FEW = 10  # rows; fewer do not show how they scatter, so that they are taken for white noise
CLOSE = 0.1  # a row ten times nearer to seed rows than an ordinary one is not ordinary, however tight they lie
SEPARATED = 0.25  # a radius up to this lies in the gap between seed and ordinary rows
OVERLAP = 0.10  # above it, a group is separate only if no larger share of the ordinary rows lies within it
MARGIN = 1.25  # a cut is in a gap if few more rows lie within it times this
WIDE = 0.6  # distance of two seed rows of a wide group, in units of that of two ordinary rows
WIDE_GROUP = 5  # rows; in so wide a group, fewer do not show where its centre is
SINGLE_GROUP = 5  # ordinary rows around a seed row that has no other seed row near it
CHANCE, SINGLE_CHANCE = 0.005, 0.1  # probability that trained rows taken for seed rows form a group; a group of one
CUTS = np.arange(2.5, 6.01, 0.25)  # in standard deviations; 1% to 10^-9 of a group of white noise lies beyond
NORM_GAP = 4.0  # standard deviations between the norms of two initial rows; 1 pair in 200 is farther apart
RIDGE = 0.1  # of the mean eigenvalue, so that directions that ordinary rows hardly use do not rule the statistic
PURE = 0.75  # of the ordinary rows within a cut, at most; as many trained ones as the density at the cut suggests
ISOTROPIC = 0.1  # mean cosine of two rows; initial values are near 0
MAX_GROUPS = 8  # groups examined for each distance
MAX_PAIRED = 1024  # ordinary rows whose mutual distances are measured


@dataclass(frozen=True, slots=True, eq=False)
class Indicator:
    """A deviation that is small for untrained rows of one kind.

    Attributes:
        evidence: What a small deviation means, in words.
        deviation: Computes the deviation of rows; 0 or more.
        cut: Rows up to this deviation look untrained.
        unit: Median deviation of the ordinary rows.
    """

    evidence: str
    deviation: Callable[[RowBlock], Float[Tensor, " n"]]
    cut: float
    unit: float


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Ordinary rows, with which groups of seed rows are compared.

    Attributes:
        block: A sample of the ordinary rows, float64.
        paired: The positions in it of a smaller sample.
        distances: The distances between the rows of the smaller sample.
        typical: Their median.
    """

    block: RowBlock
    paired: slice
    distances: Float[Tensor, "p p"]
    typical: float


def reference_of(ordinary: RowBlock) -> Reference:
    """Measure the distances between ordinary rows; there must be two rows or more."""
    paired = slice(None, None, math.ceil(len(ordinary.rows) / MAX_PAIRED))
    rows = ordinary.rows[paired]
    distances = torch.cdist(rows, rows)
    first, second = torch.triu_indices(len(rows), len(rows), 1)
    return Reference(ordinary, paired, distances, float(distances[first, second].median()))


def seed_indicators(seed: RowBlock, short: Bool[Tensor, " s"], reference: Reference) -> list[Indicator]:
    """Return an indicator for each group of seed rows that is separate from the ordinary rows.

    Four searches take the seed rows that the one before left over: groups much closer together than ordinary rows,
    groups that share norm and random direction, wide groups, and single seed rows amid ordinary ones.

    Args:
        seed: The seed rows.
        short: Which of them are zero or far shorter than the median. They form no group but that of rows close to each other:
            initial values lie around them.
        reference: The ordinary rows.
    """
    if reference.typical == 0:
        return []
    indicators: list[Indicator] = []
    left = torch.ones(len(seed.ids), dtype=torch.bool)
    distances = torch.cdist(seed.rows, seed.rows)
    searches = (
        (distances <= CLOSE * reference.typical, 2, partial(_ball, seed, reference, CLOSE)),
        (distances <= SEPARATED * reference.typical, 2, partial(_ball, seed, reference, SEPARATED)),
        (_equal_norms(seed), 2, partial(_shell, seed, reference, directions_of(reference.block))),
        (distances <= WIDE * reference.typical, WIDE_GROUP, partial(_ball, seed, reference, WIDE)),
        (distances <= CLOSE * reference.typical, 1, partial(_ball, seed, reference, CLOSE)),
    )
    for near, least, indicator_of in searches:
        indicators += _groups(seed, near, left, least, indicator_of)
        left &= ~short
    return indicators


def _groups(
    seed: RowBlock, near: Tensor, left: Tensor, least: int, indicator_of: Callable[[Tensor], Indicator | None]
) -> list[Indicator]:
    """Return indicators of groups of `least` or more seed rows, the largest first, and clear their rows in `left`.

    A group is a row and those near it (leader clustering).
    """
    indicators = []
    candidates = left.clone()
    for _ in range(MAX_GROUPS):
        neighbours = (near & candidates).sum(dim=1) * candidates
        leader = int(neighbours.argmax())
        if neighbours[leader] < least:
            break
        members = near[leader] & candidates
        indicator = indicator_of(members)
        if indicator is not None:
            indicators.append(indicator)
            inside = indicator.deviation(seed) <= indicator.cut
            left &= ~inside
            candidates &= ~inside
        candidates &= ~members
    return indicators


def _separate(seed: RowBlock, reference: Reference, indicator: Indicator, local: Float[Tensor, " p"]) -> bool:
    """Return whether random ordinary rows in place of the seed rows would hardly form a group like this.

    The probability that so many fall within the cut is binomial. It is multiplied by the number of places where ordinary
    rows lie as densely: the sum of 1 / n over rows with n rows around them counts each place once.

    Args:
        seed: All seed rows.
        reference: The ordinary rows.
        indicator: The deviation from the group.
        local: The share of ordinary rows that are as near to an ordinary row as the rows of the group are to each other.
    """
    deviation = indicator.deviation(reference.block)
    inside = int((deviation <= indicator.cut).sum())
    beyond = int((deviation <= MARGIN * indicator.cut).sum())
    share = inside / len(deviation)
    in_gap = indicator.cut <= SEPARATED * indicator.unit or beyond <= (1 + OVERLAP) * inside
    if not in_gap and (share > OVERLAP or beyond > 2 * inside):
        return False
    n_seed = len(seed.ids)
    n_group = int((indicator.deviation(seed) <= indicator.cut).sum())
    if n_group == 1 and inside < SINGLE_GROUP:
        return False
    smoothed = (inside + 1) / (len(deviation) + 1)
    places = max(1.0, float(((local >= smoothed / 2) / local).mean()))
    chance = places * float(bdtrc(n_group - 1, n_seed, smoothed))
    # Many seed rows allow for more groups, and for a choice among them.
    return chance <= (SINGLE_CHANCE if n_group == 1 else CHANCE * min(1.0, FEW / n_seed))


def _valley(deviations: Float[Tensor, " n"]) -> float:
    """Return the cut around which the fewest ordinary rows lie, from deviations in standard deviations of a group."""
    counts = np.array([int(((deviations > c - 0.5) & (deviations <= c + 0.5)).sum()) for c in CUTS])
    return float(CUTS[counts == counts.min()].mean())


# ---- groups by location ----------------------------------------------------------------------------------------------


def distance_indicator(group: Float[Tensor, "k d"], ordinary: RowBlock) -> Indicator:
    """Return the distance to the centre of a group of rows as an indicator, whether the group is separate or not."""
    centre = _centre(group)

    def distance(block: RowBlock) -> Tensor:
        return (block.rows.double() - centre).norm(dim=1)

    distances = distance(ordinary)
    unit = float(distances.median())
    middle, scatter = _scatter(group)
    radius = middle + scatter * _valley((distances - middle) / scatter) if scatter > 0 else 0.0
    return Indicator(NEAR, distance, max(CLOSE * unit, radius), unit)


def _ball(seed: RowBlock, reference: Reference, ratio: float, members: Tensor) -> Indicator | None:
    """Return the distance to the centre of a group as an indicator, or None if the group is not separate."""
    ball = distance_indicator(seed.rows[members], reference.block)
    if ball.unit == 0:
        return None
    # The distance from a row to the others of its kind is larger than that from their centre.
    limit = 1.5 * ratio * ball.unit
    single = int(members.sum()) == 1
    if single and float(seed.rows[members].norm()) < 2 * limit:
        return None  # short rows are near each other whatever they are
    ball = replace(ball, cut=limit if single else min(ball.cut, limit))
    local = (reference.distances <= math.sqrt(2) * ball.cut).double().mean(dim=1)
    return ball if _separate(seed, reference, ball, local) else None


def _centre(group: Float[Tensor, "k d"]) -> Float[Tensor, " d"]:
    """Return the median of each coordinate, so that a trained row does not move it; the mean of few rows."""
    return group.mean(dim=0) if len(group) < FEW else torch.from_numpy(np.median(group.numpy(), axis=0))


def _scatter(group: Float[Tensor, "k d"]) -> tuple[float, float]:
    """Return the median distance of further rows of a kind from the centre of a group of it, and its standard deviation.

    It comes from rows that did not take part in the centre: a row lies nearer to a centre fitted on it. The scatter is
    estimated from the nearer half of them, because trained rows may be among the others.
    """
    k, d = group.shape
    white = 1 / math.sqrt(2 * d)  # relative standard deviation of the norm of white noise
    if k == 1:
        return 0.0, 0.0
    if k < FEW:
        middle = float(torch.nn.functional.pdist(group).median()) * math.sqrt((1 + 1 / k) / 2)
        return middle, white * middle
    quartile, median = np.quantile(_held_out_distances(group), [0.25, 0.5])
    return float(median), float(max(1.4826 * (median - quartile), white * median))


def _held_out_distances(group: Float[Tensor, "k d"]) -> Float[np.ndarray, " k"]:
    fold = torch.arange(len(group)) % FOLDS
    distances = torch.empty(len(group), dtype=torch.float64)
    for f in range(FOLDS):
        distances[fold == f] = (group[fold == f] - _centre(group[fold != f])).norm(dim=1)
    return distances.numpy()


# ---- groups by norm and direction ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """How unlike the directions of ordinary rows a direction is.

    The statistic of a row is u^T B^-1 u, u = x / |x|, B the second moments of the directions of the ordinary rows plus a ridge: the
    likelihood ratio of a uniform and an angular central Gaussian distribution (Tyler 1987) depends on it alone.

    Attributes:
        inverse: B^-1.
        sample_ids: The rows that B was computed from; the statistic leaves the row itself out of B.
        mean: Expectation of the statistic for a uniformly random direction.
        sd: Its standard deviation.
        tells: Whether it tells ordinary rows from random directions: whether it is below the mean by more than a standard
            deviation for the median ordinary row.
    """

    inverse: Float[Tensor, "d d"]
    sample_ids: Tensor
    mean: float
    sd: float
    tells: bool = True

    def deviation(self, block: RowBlock) -> Float[Tensor, " n"]:
        """Compute by how many standard deviations the statistic is below its expectation; 0 if it tells nothing."""
        if not self.tells:
            return torch.zeros(len(block.ids), dtype=torch.float64)
        return ((self.mean - self.statistic(block)) / self.sd).clamp(min=0)

    def statistic(self, block: RowBlock) -> Float[Tensor, " n"]:
        """Compute the statistic; NaN for zero rows."""
        u = block.rows.double()
        u = u / u.norm(dim=1, keepdim=True)
        value = ((u @ self.inverse) * u).sum(dim=1)
        fitted = torch.isin(block.ids, self.sample_ids)
        weight = u.shape[1] / len(self.sample_ids)
        return torch.where(fitted, value / (1 - weight * value), value)  # Sherman-Morrison


def directions_of(ordinary: RowBlock) -> Directions:
    """Fit the directions of ordinary rows; rows of norm 0 must not be among them."""
    u = ordinary.rows / ordinary.rows.norm(dim=1, keepdim=True)
    n, d = u.shape
    inverse = torch.linalg.inv(u.T @ u * (d / n) + RIDGE * torch.eye(d, dtype=torch.float64))
    mean = float(inverse.trace()) / d
    variance = 2 * (d * float(inverse.square().sum()) - (d * mean) ** 2) / (d * d * (d + 2))
    fit = Directions(inverse, ordinary.ids, mean, math.sqrt(max(variance, (1e-6 * mean) ** 2)))
    return replace(fit, tells=bool(fit.deviation(ordinary).median() > 1))


def _equal_norms(seed: RowBlock) -> Tensor:
    """Return which pairs of seed rows have norms as near as those of white noise."""
    log_norms = seed.rows.norm(dim=1).log()
    return (log_norms[:, None] - log_norms).abs() <= NORM_GAP / math.sqrt(2 * seed.rows.shape[1])


def _shell(seed: RowBlock, reference: Reference, directions: Directions, members: Tensor) -> Indicator | None:
    """Return the deviation from initial values in norm and direction as an indicator, or None if it does not separate.

    White noise is isotropic, and in d dimensions its norms have a relative standard deviation of 1 / sqrt(2 d).
    """
    group = seed.rows[members]
    k, d = group.shape
    if not _isotropic(group):
        return None
    log_norms = group.norm(dim=1).log()
    middle = float(log_norms.median())
    width = math.sqrt((1 + 1 / k) / (2 * d))
    if k >= FEW:
        width = max(width, 1.4826 * float((log_norms - middle).abs().median()))

    def deviation(block: RowBlock) -> Tensor:
        by_norm = (block.rows.double().norm(dim=1).log() - middle).abs() / width
        inside = torch.nonzero(by_norm <= MARGIN * CUTS[-1]).squeeze(1)  # the direction of the others does not matter
        part = RowBlock(block.ids[inside], block.rows[inside])
        by_norm[inside] = torch.hypot(by_norm[inside], directions.deviation(part))
        return by_norm

    ordinary = deviation(reference.block)
    shell = Indicator(ALIKE, deviation, _valley(ordinary), float(ordinary.median()))
    edge = int(((ordinary - shell.cut).abs() <= 0.5).sum())  # per standard deviation
    if edge * shell.cut > PURE * int((ordinary <= shell.cut).sum()):
        return None
    paired = reference.block.rows[reference.paired].norm(dim=1).log()
    local = ((paired[:, None] - paired).abs() <= shell.cut * width).double().mean(dim=1)
    return shell if shell.unit > shell.cut and _separate(seed, reference, shell, local) else None


def _isotropic(group: Float[Tensor, "k d"]) -> bool:
    """Return whether the mean cosine of two rows of a group is near 0."""
    k, d = group.shape
    total = float((group / group.norm(dim=1, keepdim=True)).sum(dim=0).square().sum())
    n_pairs = k * (k - 1)
    return (total - k) / n_pairs <= max(ISOTROPIC, 3 * math.sqrt(2 / (n_pairs * d)))
