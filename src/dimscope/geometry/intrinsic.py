"""Intrinsic dimension of a cloud from distances to nearest neighbours: TwoNN, GRIDE over scales, Levina-Bickel.

Every estimator takes the density for even out to the neighbours that it uses. Above d of about 10 a few thousand
points lie too far apart for that, and all come out low: compare with `white_noise_dimension` of the same shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dimscope.errors import InvalidArgument
from dimscope.geometry.metrics import GRIDE, LEVINA_BICKEL, TWO_NN, TWO_NN_LEAST_SQUARES
from dimscope.geometry.pairs import LEADING, Pairs, median_row, pairs_within

FEWEST = 8  # distinct rows for an estimate
COPY = 1e-3  # rows this much closer than rows are otherwise are copies
PROBES = 256  # rows that tell how close rows are otherwise
LONG = 32.0  # rows more than this many times as far from the median row as others usually are do not move the centre
ROWS_AT_ONCE = 512  # rows whose distances to all others are computed at once
BLURRED = 1e-12  # share of the squared norm below which a squared distance is mostly rounding
TIED = 1e-9  # a logarithm of a ratio of distances below which they are equal


@dataclass(frozen=True, slots=True)
class Estimate:
    """An intrinsic dimension and its number of points; n_used + n_dropped is the number of rows.

    The standard error is for independent points. Neighbours share distances, so the true spread is larger: on uniform
    cubes 1.2 to 1.6 times for TwoNN and Levina-Bickel, and for GRIDE rising with the scale to 3.6 times at n2 = N / 4.
    """

    metric: str
    scale: int | None  # n1 of GRIDE, k of Levina-Bickel, None for TwoNN
    value: float
    stderr: float | None
    n_used: int
    n_dropped: int = 0  # copies, and points whose nearest neighbour is lost in rounding


def intrinsic_dimensions(rows: Float[Tensor, "n d"], *, k: int = 20) -> list[Estimate]:
    """Estimate the intrinsic dimension by TwoNN in two ways, GRIDE at several scales, and Levina-Bickel.

    GRIDE compares neighbours n1 and 2 n1 for n1 = 1, 2, 4, ... while 2 n1 <= N / 4; Levina-Bickel uses k neighbours (< N).
    N is the number of rows that `distinct_rows` leaves; distances are in float64. All have a low bias above d of about 10, which grows
    with d and falls only slowly with N: of 2,048 rows of white noise TwoNN reads 9.7 in 10 dimensions and 32 in 50.
    GRIDE at larger n1 and Levina-Bickel reach further and read lower still. [] where fewer than 8 rows are left, or
    where nine rows in ten have their two nearest neighbours equally far away (a lattice).

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
    logs = _log_distances(rows[distinct], max(k, 2 * scales[-1]))
    n = len(logs)
    if n < FEWEST or np.quantile(logs[:, 1] - logs[:, 0], 0.9) < TIED:
        return []
    estimates = [*_two_nn(logs), *(_gride(logs, n1) for n1 in scales), _levina_bickel(logs, k)]
    return [replace(estimate, n_dropped=len(rows) - n) for estimate in estimates]


@cache
def white_noise_dimension(n: int, dim: int) -> dict[tuple[str, int | None], float]:
    """Return the `intrinsic_dimensions` of n x dim Gaussian numbers of seed 0, by metric and scale: the null."""
    rows = torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {(e.metric, e.scale): e.value for e in intrinsic_dimensions(rows)}


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


def _log_distances(rows: Float[Tensor, "n d"], k: int) -> Float[np.ndarray, "m k"]:
    """Return ln of the distances to the k nearest others, rising, without points whose nearest is lost in rounding."""
    rows = _centred(rows)
    squares = rows.square().sum(dim=1)
    parts = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        own = slice(start, start + ROWS_AT_ONCE)
        tile = torch.addmm(squares, rows[own], rows.T, alpha=-2)
        tile.diagonal(start).fill_(math.inf)  # the row itself
        nearest = tile.topk(k, largest=False).values + squares[own, None]
        parts.append(nearest[nearest[:, 0] > BLURRED * squares[own]].log() / 2)
    return torch.cat(parts).numpy()


def _two_nn(logs: Float[np.ndarray, "n k"]) -> list[Estimate]:
    """Estimate d from mu = r2 / r1 which follows Pareto(d) (Facco et al. 2017): (N - 1) / sum ln mu, and the slope of -ln(1 - F) on ln mu.

    The slope is of a line through the origin over the lowest 90%, F = i / N. Its residuals are dependent: no error.
    """
    log_mu = np.sort(logs[:, 1] - logs[:, 0])
    n = len(log_mu)
    likely = (n - 1) / float(log_mu.sum())
    low = log_mu[: int(0.9 * n)]
    heights = -np.log1p(-np.arange(1, len(low) + 1) / n)
    slope = float(low @ heights / (low @ low))
    return [
        Estimate(TWO_NN, None, likely, likely / math.sqrt(n), n),
        Estimate(TWO_NN_LEAST_SQUARES, None, slope, None, n),
    ]


def _gride(logs: Float[np.ndarray, "n k"], n1: int) -> Estimate:
    """Return the most likely d for mu = r_{2 n1} / r_{n1} (Denti et al. 2022), its error from the observed information.

    f(mu | d) = d (mu^d - 1)^(n2 - n1 - 1) / (mu^(d (n2 - 1) + 1) B(n2 - n1, n1)). With L = ln mu and n2 = 2 n1, d times
    the score is N + (n1 - 1) sum dL / (e^dL - 1) - n1 d sum L. It falls with d, from 0 or more at N / (n1 sum L) to 0
    or less at N / sum L, so it has one root. Ties (L = 0) enter as the limit L -> 0.
    """
    from scipy.optimize import brentq
    from scipy.special import exprel  # (e^x - 1) / x, exact near 0 and inf where it overflows

    log_mu = logs[:, 2 * n1 - 1] - logs[:, n1 - 1]
    n, total = len(log_mu), float(log_mu.sum())

    def score(d: float) -> float:
        return n + (n1 - 1) * (1 / exprel(d * log_mu)).sum() - n1 * d * total

    d = brentq(score, n / total / n1 / 2, 2 * n / total)
    information = n + (n1 - 1) * (1 / (exprel(d * log_mu) * exprel(-d * log_mu))).sum()
    return Estimate(GRIDE, n1, d, d / math.sqrt(information), n)


def _levina_bickel(logs: Float[np.ndarray, "n k"], k: int) -> Estimate:
    """Return 1 over the mean of 1 / m(x), 1 / m(x) = sum_{j<k} ln(T_k / T_j) / (k - 1) (Levina & Bickel 2004).

    The mean of the inverses is the maximum likelihood of all points together (MacKay & Ghahramani 2005): N (k - 1)
    exponentials of rate d.
    """
    value = 1 / float((logs[:, k - 1 : k] - logs[:, : k - 1]).mean())
    return Estimate(LEVINA_BICKEL, k, value, value / math.sqrt(len(logs) * (k - 1)), len(logs))
