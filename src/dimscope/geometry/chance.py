"""What a table without structure reads: the largest singular value, and the participation ratio.

A table without structure has independent entries whose variances are r_i c_j: it explains the norm of every row and the
variance of every column, and nothing else. With n rows, the eigenvalues of X^T X / n have a deterministic limit (Paul &
Silverstein 2009, J. Multivariate Anal. 100; Couillet & Hachem 2014, Random Matrices 3): for z above the upper edge,

    alpha = sum_j c_j / (1 + c_j b) / n,   beta = sum_i r_i / (1 + r_i a) / n,   a = -alpha / z,   b = -beta / z.

For each a in (-1 / max r, 0), b follows from a beta(a) = b alpha(b), and z = -beta / b. The edge is the smallest z. About
it the largest eigenvalue scatters by the Tracy-Widom law of real matrices, at a scale that the square-root end of the
density gives. The formula takes the place of random draws: at 128,256 x 4,096 each draw would cost as much as the study.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

TRACY_WIDOM_95 = 0.9793  # 95% quantile of the Tracy-Widom law for real matrices (Johnstone 2001)
GOLDEN = (5**0.5 - 1) / 2
STEPS = 60  # of a bisection or a golden-section search: both end at the resolution of float64
STEP = 1e-4  # of the difference quotients, relative to the distance from the nearer end


def chance_edge(squared_norms: Float[Tensor, " n"], variances: Float[Tensor, " d"]) -> float:
    """Compute the singular value that 95% of tables with these row norms and column variances stay below.

    Args:
        squared_norms: The squared norm of every centred row.
        variances: The mean square of every centred column.

    Returns:
        0 for a table of zeros.

    >>> round(chance_edge(torch.full((1000,), 50.0), torch.ones(50)), 1)  # white noise: sqrt(N) + sqrt(d) = 38.7
    39.0
    """
    rows, columns = squared_norms.double(), variances.double()
    n = len(rows)
    if not float(rows.sum()) > 0:
        return 0.0
    unit = float(columns.max())
    rows, columns = rows[rows > 0] / rows.mean(), columns[columns > 0] / unit
    largest = float(rows.max())

    def edge_at(share: float) -> float:
        return _point(rows, columns, n, -share / largest)[0]

    best = _smallest(edge_at)
    step = STEP * min(best, 1 - best)
    below, middle, above = (_point(rows, columns, n, -(best + side * step) / largest) for side in (-1, 0, 1))
    z = middle[0]
    curvature, slope = (below[0] - 2 * z + above[0]) / step**2, (above[1] - below[1]) / (2 * step)
    # m(z) = m0 - A sqrt(z - edge); (number of columns x A)^(-2/3) is the scale of the largest eigenvalue.
    amplitude = abs(slope) * (2 / max(curvature, torch.finfo(torch.float64).tiny)) ** 0.5
    scale = (len(columns) * amplitude) ** (-2 / 3) if amplitude > 0 else 0.0
    return ((z + TRACY_WIDOM_95 * scale) * unit * n) ** 0.5


def chance_participation_ratio(
    squared_norms: Float[Tensor, " n"], variances: Float[Tensor, " d"], fourth_powers: float
) -> float:
    """Compute the participation ratio of a table whose entries have random signs and keep their sizes.

    It keeps every row norm and every column variance. The expectation of the sum of squared products of all pairs of rows is
    sum_i s_i^2 + sum_j c_j^2 - sum x_ij^4, with s_i and c_j the sums of squares of each row and column: the products of
    different rows keep the terms of equal columns alone.

    Args:
        squared_norms: The squared norm of every centred row.
        variances: The mean square of every centred column.
        fourth_powers: The sum of the fourth powers of all entries.

    Returns:
        NaN for a table of zeros.

    >>> signs = torch.ones(1000, 50)
    >>> round(chance_participation_ratio(signs.sum(dim=1), signs.mean(dim=0), 50_000.0), 2)  # 1 / (1/50 + 1/1000 - 1/50,000)
    47.66
    """
    rows, columns = squared_norms.double(), variances.double() * len(squared_norms)
    products = float(rows.square().sum() + columns.square().sum()) - fourth_powers
    return float(rows.sum()) ** 2 / products if products > 0 else math.nan


def _point(rows: Float[Tensor, " n"], columns: Float[Tensor, " d"], n: int, a: float) -> tuple[float, float]:
    """Return z and the Stieltjes transform of the eigenvalues of X^T X / n, as functions of a."""
    beta = float((rows / (1 + rows * a)).sum()) / n
    target, low, high = a * beta, -1.0, 0.0  # the largest column variance is 1
    for _ in range(STEPS):
        b = (low + high) / 2
        value = float((columns * b / (1 + columns * b)).sum()) / n
        low, high = (b, high) if value < target else (low, b)
    b = (low + high) / 2
    z = -beta / b
    return z, float((1 / (1 + columns * b)).mean()) / -z


def _smallest(function: Callable[[float], float]) -> float:
    """Return where a function of (0, 1) with a single minimum is smallest."""
    low, high = 1e-9, 1 - 1e-9
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    f_left, f_right = function(left), function(right)
    for _ in range(STEPS):
        if f_left < f_right:
            high, right, f_right = right, left, f_left
            left = high - GOLDEN * (high - low)
            f_left = function(left)
        else:
            low, left, f_left = left, right, f_right
            right = low + GOLDEN * (high - low)
            f_right = function(right)
    return (low + high) / 2
