"""Intrinsic dimension of a cloud from distances to nearest neighbours: TwoNN, GRIDE over scales, Levina-Bickel.

Every estimator takes the density for even out to the neighbours that it uses. Above d of about 10 a few thousand
points lie too far apart for that, and all come out low: compare with `white_noise_dimension` of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dimscope.errors import InvalidArgument
from dimscope.geometry.half_samples import Replicated, half_samples, random_groups
from dimscope.geometry.metrics import GRIDE, LEVINA_BICKEL, TWO_NN, TWO_NN_LEAST_SQUARES
from dimscope.geometry.pairs import LEADING, Pairs, median_row, pairs_within

FEWEST = 8  # distinct rows for an estimate
COPY = 1e-3  # rows this much closer than rows are otherwise are copies
PROBES = 256  # rows that tell how close rows are otherwise
LONG = 32.0  # rows more than this many times as far from the median row as others usually are do not move the centre
ROWS_AT_ONCE = 512  # rows whose distances to all others are computed at once
BLURRED = 1e-12  # share of the squared norm below which a squared distance is mostly rounding
TIED = 1e-9  # a logarithm of a ratio of distances below which they are equal

Key = tuple[str, int | None]
"""The metric of an estimate and its scale: n1 of GRIDE, k of Levina-Bickel, None for TwoNN."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """An intrinsic dimension, its number of points, and its differences between half-samples.

    The standard error comes from half-samples, since points share their neighbours, and those of a group depend on each
    other. The published formulas, for independent points, give errors too small by 1.2 to 9.5 times, more at larger scales.

    Attributes:
        metric: Name of the estimator.
        scale: n1 of GRIDE, k of Levina-Bickel, None for TwoNN.
        value: The number of dimensions.
        n_used: Points that it comes from; with `n_dropped` the number of rows.
        n_dropped: Copies, and points whose nearest neighbour is lost in rounding.
        differences: Between the halves of each division; empty where none were computed.
    """

    metric: str
    scale: int | None
    value: float
    n_used: int
    n_dropped: int = 0
    differences: tuple[float, ...] = ()

    @property
    def replicated(self) -> Replicated:
        """Return the value with its differences between half-samples."""
        return Replicated(self.value, self.differences)

    @property
    def stderr(self) -> float | None:
        """Return the standard error; None without half-samples."""
        return self.replicated.interval().stderr


def intrinsic_dimensions(
    rows: Float[Tensor, "n d"], *, k: int = 20, groups: Int[np.ndarray, " n"] | None = None, errors: bool = True
) -> list[Estimate]:
    """Estimate the intrinsic dimension by TwoNN in two ways, GRIDE at several scales, and Levina-Bickel.

    GRIDE compares neighbours n1 and 2 n1 for n1 = 1, 2, 4, ... while 2 n1 <= N / 4; Levina-Bickel uses k neighbours (< N).
    N is the number of rows that `distinct_rows` leaves; distances are in float64. All have a low bias above d of about 10, which grows
    with d and falls only slowly with N: of 2,048 rows of white noise TwoNN reads 9.7 in 10 dimensions and 32 in 50.
    GRIDE at larger n1 and Levina-Bickel reach further and read lower still. [] where fewer than 8 rows are left, or
    where nine rows in ten have their two nearest neighbours equally far away (a lattice).

    Args:
        rows: The points.
        k: Neighbours of Levina-Bickel.
        groups: The number of the group of each row, for errors; rows of no group (-1) are in no half-sample. By default
            rows are taken for independent.
        errors: Whether errors are computed, which takes about as long again.

    Raises:
        InvalidArgument: For k < 2.
    """
    if k < 2:
        raise InvalidArgument(f"`k` must be 2 or more, got {k}: Levina-Bickel compares distances to several neighbours")
    distinct = distinct_rows(rows)
    if len(distinct) < FEWEST:
        return []
    scales = [1 << i for i in range((len(distinct) // 8).bit_length())]
    k = min(k, len(distinct) - 1)
    groups = random_groups(len(distinct)) if groups is None else groups[distinct.numpy()]
    centred = _centred(rows[distinct])
    logs = _log_distances(centred, max(k, 2 * scales[-1]))
    n = len(logs)
    if n < FEWEST or np.quantile(logs[:, 1] - logs[:, 0], 0.9) < TIED:
        return []
    estimates = _estimates(logs, k, scales)
    halves = _half_estimates(centred, groups, k, scales) if errors else []
    return [
        Estimate(
            *key,
            value,
            n,
            len(rows) - n,
            tuple(one[key] - two[key] for one, two in halves if key in one and key in two),
        )
        for key, value in estimates.items()
    ]


@cache
def white_noise_dimension(n: int, dim: int) -> dict[Key, float]:
    """Return the `intrinsic_dimensions` of n x dim Gaussian numbers of seed 0, by metric and scale: the null."""
    rows = torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {(e.metric, e.scale): e.value for e in intrinsic_dimensions(rows, errors=False)}


def gaussian_dimension(rows: Float[Tensor, "n d"], seed: int = 0) -> dict[Key, float]:
    """Return the `intrinsic_dimensions` of as many Gaussian rows of the same covariance, by metric and scale.

    What these reach too needs no curved or clustered cloud: the spread along the principal components explains it.
    """
    generator = torch.Generator().manual_seed(seed)
    centred = rows.double() - rows.double().mean(dim=0)
    # Independent mixtures of the centred rows have their covariance, without a decomposition of it.
    mixing = torch.randn(len(rows), len(rows), dtype=torch.float64, generator=generator) / math.sqrt(
        max(len(rows) - 1, 1)
    )
    return {(e.metric, e.scale): e.value for e in intrinsic_dimensions(mixing @ centred, errors=False)}


def distinct_rows(rows: Float[Tensor, "n d"], radius: float | None = None) -> Int[Tensor, " m"]:
    """Return rising positions of rows more than `radius` apart, with every other row within it of an earlier one of them.

    By default the radius is 1e-3 times the median distance from a row to the nearest other, where others within 1e-3 of
    the 90% quantile of all distances do not count. In dimension 2 or more hardly any rows come as close by chance;
    along a line one in 500 does, and TwoNN rises by 1%. Where all rows are equal the radius is 0: the first is left.

    Raises:
        InvalidArgument: For a negative radius, or where more than 20 million pairs lie within it.
    """
    n, d = rows.shape
    if n < 2:
        return torch.arange(n)
    centred = _centred(rows)
    widest = centred[~_is_long(centred)].square().sum(dim=0).topk(min(LEADING, d)).indices
    axes = torch.eye(d, dtype=torch.float64)[:, widest]
    return _net(pairs_within(centred, axes, _copy_radius(centred) if radius is None else radius), n)


def _is_long(rows: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
    """Return which rows are more than 32 times as far from the median row as rows usually are, copies of it aside."""
    distances = (rows - median_row(rows)).norm(dim=1)
    return distances > LONG * distances[distances > 0].median()  # NaN, thus none, where all rows are equal


def _centred(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return rows in float64 minus the mean of those that are not long."""
    # A massive row moves the mean of all so far that the distances between the others are lost in rounding.
    rows = rows.double()
    return rows - rows[~_is_long(rows)].mean(dim=0)


def _copy_radius(centred: Float[Tensor, "n d"]) -> float:
    # 1e-3 of the root mean square distance would not do: one massive row swells it until all others are copies, and
    # half of 2,000 points on a line lie closer by nature. The quantile ignores massive rows, and bears 9 copies in 10.
    step = math.ceil(len(centred) / PROBES)
    distances = torch.cdist(centred[::step], centred)
    apart = COPY * distances[:, ::step].quantile(0.9)
    nearest = distances.masked_fill(distances <= apart, math.inf).amin(dim=1).median()
    return COPY * float(nearest) if nearest.isfinite() else 0.0


def _net(pairs: Pairs, n: int) -> Int[Tensor, " m"]:
    # Not connected groups: where a cloud is denser than the radius they chain it up into one row, however far it goes.
    # Here a row is dropped only for a remaining one within the radius. Copies of one row come out the same either way.
    dropped = np.zeros(n, dtype=bool)
    order = np.argsort(pairs.first, kind="stable")
    firsts, starts = np.unique(pairs.first[order], return_index=True)
    for first, others in zip(firsts, np.split(pairs.second[order], starts[1:]), strict=False):
        if not dropped[first]:  # final: pairs that could drop it have a smaller first
            dropped[others] = True
    return torch.from_numpy(np.flatnonzero(~dropped))


def _log_distances(centred: Float[Tensor, "n d"], k: int) -> Float[np.ndarray, "m k"]:
    """Return ln of the distances to the k nearest others, rising, without points whose nearest is lost in rounding."""
    squares = centred.square().sum(dim=1)
    parts = []
    for start in range(0, len(centred), ROWS_AT_ONCE):
        own = slice(start, start + ROWS_AT_ONCE)
        tile = torch.addmm(squares, centred[own], centred.T, alpha=-2)
        tile.diagonal(start).fill_(math.inf)  # the row itself
        # numpy sorts whole rows several times faster than torch finds the k smallest.
        nearest = np.sort(tile.numpy(), axis=1)[:, :k] + squares[own, None].numpy()
        parts.append(np.log(nearest[nearest[:, 0] > BLURRED * squares[own].numpy()]) / 2)
    return np.concatenate(parts)


def _half_estimates(
    centred: Float[Tensor, "n d"], groups: Int[np.ndarray, " n"], k: int, scales: Sequence[int]
) -> list[tuple[dict[Key, float], dict[Key, float]]]:
    """Return the estimates of both halves of each division, of the scales for which the halves have enough points."""
    pairs = []
    for pair in half_samples(groups):
        fewest = min(np.count_nonzero(half) for half in pair)
        near = [n1 for n1 in scales if 2 * n1 < fewest]
        logs = [_log_distances(centred[torch.from_numpy(half)], max(k, 2 * near[-1])) for half in pair]
        one, two = (_estimates(of_half, k, near) for of_half in logs)
        pairs.append((one, two))
    return pairs


def _estimates(logs: Float[np.ndarray, "n k"], k: int, scales: Sequence[int]) -> dict[Key, float]:
    """Return every estimate by its metric and scale, from ln of the distances to the nearest others."""
    likely, squares = _two_nn(logs)
    gride = {(GRIDE, n1): _gride(logs, n1) for n1 in scales}
    return {
        (TWO_NN, None): likely,
        (TWO_NN_LEAST_SQUARES, None): squares,
        **gride,
        (LEVINA_BICKEL, k): _levina_bickel(logs, k),
    }


def _two_nn(logs: Float[np.ndarray, "n k"]) -> tuple[float, float]:
    """Estimate d from mu = r2 / r1 which follows Pareto(d) (Facco et al. 2017): (N - 1) / sum ln mu, and the slope of -ln(1 - F) on ln mu.

    The slope is of a line through the origin over the lowest 90%, F = i / N.
    """
    log_mu = np.sort(logs[:, 1] - logs[:, 0])
    n = len(log_mu)
    likely = (n - 1) / float(log_mu.sum())
    low = log_mu[: int(0.9 * n)]
    heights = -np.log1p(-np.arange(1, len(low) + 1) / n)
    return likely, float(low @ heights / (low @ low))


def _gride(logs: Float[np.ndarray, "n k"], n1: int) -> float:
    """Return the most likely d for mu = r_{2 n1} / r_{n1} (Denti et al. 2022).

    f(mu | d) = d (mu^d - 1)^(n2 - n1 - 1) / (mu^(d (n2 - 1) + 1) B(n2 - n1, n1)). With L = ln mu and n2 = 2 n1, d times
    the score is N + (n1 - 1) sum dL / (e^dL - 1) - n1 d sum L. It falls with d, from 0 or more at N / (n1 sum L) to 0
    or less at N / sum L, so it has one root. Ties (L = 0) enter as the limit L -> 0.
    """
    from scipy.optimize import brentq
    from scipy.special import exprel  # (e^x - 1) / x, exact near 0 and inf where it overflows

    log_mu = logs[:, 2 * n1 - 1] - logs[:, n1 - 1]
    n, total = len(log_mu), float(log_mu.sum())
    return brentq(
        lambda d: n + (n1 - 1) * (1 / exprel(d * log_mu)).sum() - n1 * d * total, n / total / n1 / 2, 2 * n / total
    )


def _levina_bickel(logs: Float[np.ndarray, "n k"], k: int) -> float:
    """Return 1 over the mean of 1 / m(x), 1 / m(x) = sum_{j<k} ln(T_k / T_j) / (k - 1) (Levina & Bickel 2004).

    The mean of the inverses is the maximum likelihood of all points together (MacKay & Ghahramani 2005): N (k - 1)
    exponentials of rate d.
    """
    return 1 / float((logs[:, k - 1 : k] - logs[:, : k - 1]).mean())
