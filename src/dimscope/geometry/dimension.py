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

from dimscope.geometry.spectrum import Spectrum

THRESHOLDS = (0.80, 0.90, 0.95, 0.99)
COUNT = "variance count "  # and the threshold in percent: the name of a count
PREFERRED_PERCENT = 95.0  # the threshold of the variance count that texts and figures use, where it was computed
FLOAT32_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True)
class Dimension:
    """A linear dimension with the definition it was computed by."""

    metric: str
    preprocess: str  # "centred" or "uncentred"
    spectrum: str  # "sigma" or "lambda"
    order: float | None  # q of the Hill number; None for counts
    value: float


def hill_number(p: Float[Tensor, " m"], q: float) -> float:
    """D_q of a distribution p (normalised here): 1 <= D_q <= number of non-zero entries, falling in q.

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
    """The least k with sum_{i<=k} p_i >= threshold: how many components hold that share of the variance.

    A count from 1 to the rank: the 0-based index of the first component past the threshold is one less.
    """
    cumulative = of.explained_variance_ratio.cumsum(0)
    if not len(cumulative) or cumulative[-1] == 0:
        return 0
    return min(int((cumulative < threshold - 1e-12).sum()) + 1, len(cumulative))


def numerical_rank(of: Spectrum, tolerance: float | None = None) -> int:
    """Singular values above `tolerance` times the largest; by default d times the eps of float32.

    The default does not grow with N, so that it means the same for a window and for a stream.
    """
    values = of.singular_values
    relative = of.dim * FLOAT32_EPS if tolerance is None else tolerance
    return int((values > relative * values.max()).sum()) if len(values) else 0


def participation_ratio(of: Spectrum) -> float:
    """(sum lambda)^2 / sum lambda^2, the Hill number of order 2; biased low unless N >> d."""
    return hill_number(of.singular_values.square(), 2)


def participation_ratio_corrected(of: Spectrum) -> float:
    """The participation ratio with the bias of N independent Gaussian rows taken off.

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
    """exp of the entropy of the normalised spectrum, of sigma (Roy & Vetterli 2007) or of lambda."""
    values = of.singular_values
    return hill_number(values.square() if of_lambda else values, 1)


def stable_rank(of: Spectrum) -> float:
    """||X||_F^2 / ||X||_2^2, the Hill number of lambda of order infinity."""
    return hill_number(of.singular_values.square(), math.inf)


def isoscore(of: Spectrum) -> float:
    """(D_2 - 1) / (d - 1) of the centred spectrum: 0 on a line, 1 for a flat spectrum (Rudman et al. 2022, by identity)."""
    return (participation_ratio(of) - 1) / (of.dim - 1) if of.dim > 1 else math.nan


def percent(metric: str) -> float:
    """The threshold of a variance count in percent.

    >>> percent("variance count 95%")
    95.0
    """
    return float(metric.removeprefix(COUNT).removesuffix("%"))


def preferred_count(metrics: Iterable[str]) -> str | None:
    """Return the variance count that texts and figures use: that of 95% if it is among the metrics, else the largest one."""
    thresholds = {percent(metric): metric for metric in metrics if metric.startswith(COUNT)}
    return thresholds.get(PREFERRED_PERCENT) or (thresholds[max(thresholds)] if thresholds else None)


def linear_dimensions(
    of: Spectrum, thresholds: tuple[float, ...] = THRESHOLDS, *, tolerance: float | None = None
) -> list[Dimension]:
    """Every member of the family for one spectrum; `tolerance` is that of the numerical rank."""
    found = [
        *((f"{COUNT}{100 * t:.6g}%", "lambda", None, variance_count(of, t)) for t in thresholds),
        ("numerical rank", "sigma", 0.0, numerical_rank(of, tolerance)),
        ("participation ratio", "lambda", 2.0, participation_ratio(of)),
        ("participation ratio, corrected", "lambda", 2.0, participation_ratio_corrected(of)),
        ("effective rank (entropy of sigma)", "sigma", 1.0, effective_rank(of, of_lambda=False)),
        ("effective rank (entropy of lambda)", "lambda", 1.0, effective_rank(of, of_lambda=True)),
        ("stable rank", "lambda", math.inf, stable_rank(of)),
    ]
    return [Dimension(metric, of.preprocess, source, order, float(value)) for metric, source, order, value in found]
