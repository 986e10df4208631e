"""One family for every linear "effective dimension": Hill numbers of a spectrum, counts and ratios.

D_q(p) = (sum p_i^q)^(1 / (1 - q)) with p from sigma or from lambda = sigma^2. Published names differ only in
preprocessing, spectrum and q, so every function here says which it is; docs/definitions.md has the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.geometry.metrics import (
    EFFECTIVE_RANK_LAMBDA,
    EFFECTIVE_RANK_SIGMA,
    NUMERICAL_RANK,
    PARTICIPATION_RATIO,
    PARTICIPATION_RATIO_CORRECTED,
    STABLE_RANK,
    VARIANCE_COUNT,
    variance_count_name,
)
from dimscope.geometry.spectrum import Spectrum

THRESHOLDS = (0.80, 0.90, 0.95, 0.99)
PREFERRED_PERCENT = 95.0  # the threshold of the variance count that texts and figures use, where it was computed
FLOAT32_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True)
class Dimension:
    """A linear dimension with the definition that it was computed by.

    Attributes:
        metric: Name of the measure, see `geometry.metrics`.
        preprocess: "centred" or "uncentred".
        spectrum: "sigma" or "lambda".
        order: q of the Hill number; None for variance counts.
        value: The number of dimensions.
        null: The same of white noise of the same shape, where it was computed.
    """

    metric: str
    preprocess: str
    spectrum: str
    order: float | None
    value: float
    null: float | None = None


def hill_number(p: Float[Tensor, " m"], q: float) -> float:
    """Compute D_q of a distribution p (normalised here): 1 <= D_q <= number of non-zero entries, falling in q.

    Hill 1973. q = 0 counts entries, 1 is exp of the entropy, 2 the participation ratio, inf 1 / max p. 0 for p = 0.

    >>> hill_number(torch.tensor([1.0, 1.0, 1.0, 1.0]), 2)
    4.0
    """
    p = p[p > 0].double()
    if not len(p):
        return 0.0
    p = p / p.sum()
    if q == 1:
        return float((-(p * p.log()).sum()).exp())
    if math.isinf(q):
        return float(1 / p.max())
    largest = p.max()  # taken out of the powers, which underflow for large q
    return float((p / largest).pow(q).sum() ** (1 / (1 - q)) * largest ** (q / (1 - q)))


def variance_count(of: Spectrum, threshold: float) -> int:
    """Return the least k with sum_{i<=k} p_i >= threshold: how many components have that share of the variance.

    A count from 1 to the rank: the 0-based index of the first component past the threshold is one less.
    """
    cumulative = of.explained_variance_ratio.cumsum(0)
    if not len(cumulative) or cumulative[-1] == 0:
        return 0
    return min(int((cumulative < threshold - 1e-12).sum()) + 1, len(cumulative))


def numerical_rank(of: Spectrum, tolerance: float | None = None) -> int:
    """Count singular values above `tolerance` times the largest; by default d times the eps of float32.

    The default does not grow with N, so that it means the same for a window and for a stream.
    """
    values = of.singular_values
    relative = of.dim * FLOAT32_EPS if tolerance is None else tolerance
    return int((values > relative * values.max()).sum()) if len(values) else 0


def participation_ratio(of: Spectrum) -> float:
    """Compute (sum lambda)^2 / sum lambda^2, the Hill number of order 2; biased low unless N >> d."""
    return hill_number(of.singular_values.square(), 2)


def participation_ratio_corrected(of: Spectrum) -> float:
    """Compute the participation ratio without the bias of N independent Gaussian rows.

    tr(Sigma^2) is estimated without bias by [n^2 tr S^2 - n (tr S)^2] / ((n - 1)(n + 2)), n = N - 1, and
    (tr Sigma)^2 by (tr S)^2 - 2 tr(Sigma^2) / n (moments of the Wishart distribution). The rows of an embedding table are
    neither independent nor Gaussian: it is a correction of size, not a confidence statement. NaN where n < 2, or where the
    estimate of tr(Sigma^2) is not positive.
    """
    n = of.n_rows - of.centred
    if n < 2:
        return math.nan
    eigenvalues = of.singular_values.square() / n
    trace, square = float(eigenvalues.sum()), float(eigenvalues.square().sum())
    unbiased = (n**2 * square - n * trace**2) / ((n - 1) * (n + 2))
    # What rounding leaves of a difference of equal numbers is no estimate.
    return (trace**2 - 2 * unbiased / n) / unbiased if unbiased > 1e-12 * square else math.nan


def effective_rank(of: Spectrum, *, of_lambda: bool) -> float:
    """Compute exp of the entropy of the normalised spectrum, of sigma (Roy & Vetterli 2007) or of lambda."""
    values = of.singular_values
    return hill_number(values.square() if of_lambda else values, 1)


def stable_rank(of: Spectrum) -> float:
    """Compute ||X||_F^2 / ||X||_2^2, the Hill number of lambda of order infinity."""
    return hill_number(of.singular_values.square(), math.inf)


def isoscore(of: Spectrum) -> float:
    """Compute (D_2 - 1) / (d - 1) of the centred spectrum: 0 on a line, 1 for a flat spectrum (Rudman et al. 2022, by identity)."""
    return (participation_ratio(of) - 1) / (of.dim - 1) if of.dim > 1 else math.nan


def percent(metric: str) -> float:
    """Return the threshold of a variance count in percent.

    >>> percent("variance count 95%")
    95.0
    """
    return float(metric.removeprefix(VARIANCE_COUNT).removesuffix("%"))


def preferred_count(metrics: Iterable[str]) -> str | None:
    """Return the variance count that texts and figures use: that of 95% if it is among the metrics, else the largest one."""
    counts = {percent(metric): metric for metric in metrics if metric.startswith(f"{VARIANCE_COUNT} ")}
    return counts.get(PREFERRED_PERCENT) or (counts[max(counts)] if counts else None)


def linear_dimensions(
    of: Spectrum, thresholds: tuple[float, ...] = THRESHOLDS, *, tolerance: float | None = None
) -> list[Dimension]:
    """Return every member of the family for one spectrum: a count per threshold, and six others.

    Args:
        of: The spectrum, centred or not.
        thresholds: Shares of the variance for the variance counts.
        tolerance: Of the numerical rank, relative to the largest singular value; by default d eps(float32).
    """
    measures = [
        *((variance_count_name(t), "lambda", None, variance_count(of, t)) for t in thresholds),
        (NUMERICAL_RANK, "sigma", 0.0, numerical_rank(of, tolerance)),
        (PARTICIPATION_RATIO, "lambda", 2.0, participation_ratio(of)),
        (PARTICIPATION_RATIO_CORRECTED, "lambda", 2.0, participation_ratio_corrected(of)),
        (EFFECTIVE_RANK_SIGMA, "sigma", 1.0, effective_rank(of, of_lambda=False)),
        (EFFECTIVE_RANK_LAMBDA, "lambda", 1.0, effective_rank(of, of_lambda=True)),
        (STABLE_RANK, "lambda", math.inf, stable_rank(of)),
    ]
    return [Dimension(metric, of.preprocess, source, order, float(value)) for metric, source, order, value in measures]
