"""The same measures of noise of the same shape: Marchenko-Pastur, Gavish-Donoho, column-permuted tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.geometry.spectrum import Spectrum, spectrum, table_moments
from dimscope.vectors.moments import Moments
from dimscope.vectors.table import VectorTable

TRACY_WIDOM_99 = 2.0234  # 99% quantile of the Tracy-Widom law for real matrices (Johnstone 2001)
STRETCHES = 64  # pieces of the table in every permuted block


def marchenko_pastur_quantiles(n_rows: int, dim: int, shares: Float[np.ndarray, " q"]) -> Float[np.ndarray, " q"]:
    """Compute quantiles of the non-zero eigenvalues of X^T X / max(N, d) for N x d white noise of variance 1.

    The density sqrt((b - x)(x - a)) / (2 pi beta x) on [a, b] = (1 -+ sqrt beta)^2, beta = min/max of N and d
    (Marchenko & Pastur 1967), integrated on x = 1 + beta - 2 sqrt(beta) cos(t), which removes the square-root ends.
    """
    beta = min(n_rows, dim) / max(n_rows, dim)
    t = np.linspace(0, math.pi, 20_001)
    x = 1 + beta - 2 * math.sqrt(beta) * np.cos(t)
    # At beta = 1 density and x both vanish at t = 0; their ratio (1 + cos t) / 2 tends to 1 there.
    density = np.divide(np.sin(t) ** 2, x, out=np.ones_like(t), where=x > 0)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.interp(shares, cumulative / cumulative[-1], x)


def white_noise_spectrum(n_rows: int, dim: int, std: float, *, centred: bool) -> Spectrum:
    """Return the expected singular values of an N x d Gaussian table: Marchenko-Pastur quantiles, not uniform ones."""
    n = n_rows - centred
    rank = min(n, dim)
    shares = 1 - (np.arange(rank) + 0.5) / rank
    eigenvalues = marchenko_pastur_quantiles(n, dim, shares) * max(n, dim)
    return Spectrum(torch.from_numpy(std * np.sqrt(eigenvalues)), n_rows, dim, centred)


def noise_scale(of: Spectrum) -> float:
    """Compute the standard deviation of the white noise whose median singular value is that of the spectrum."""
    n = of.n_rows - of.centred
    median = marchenko_pastur_quantiles(n, of.dim, np.array([0.5]))[0] * max(n, of.dim)
    return float(of.singular_values.quantile(0.5)) / math.sqrt(median)


def noise_edge(of: Spectrum, scale: float) -> float:
    """Compute the singular value that white noise of this scale exceeds once in 100 tables (Johnstone 2001).

    The largest eigenvalue lies at mu + sigma TW, mu = (sqrt(n - 1) + sqrt d)^2, sigma = (sqrt(n - 1) + sqrt d)
    (1 / sqrt(n - 1) + 1 / sqrt d)^(1/3).
    """
    a, b = math.sqrt(max(of.n_rows - of.centred - 1, 1)), math.sqrt(of.dim)
    return scale * math.sqrt((a + b) ** 2 + TRACY_WIDOM_99 * (a + b) * (1 / a + 1 / b) ** (1 / 3))


def gavish_donoho_rank(of: Spectrum) -> int:
    """Count singular values above omega(beta) times their median: the optimal hard threshold for unknown white noise.

    Gavish & Donoho 2014 (arXiv 1305.5870): omega = lambda(beta) / sqrt(median of Marchenko-Pastur).
    """
    n = of.n_rows - of.centred
    beta = min(n, of.dim) / max(n, of.dim)
    optimal = math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))
    omega = optimal / math.sqrt(marchenko_pastur_quantiles(n, of.dim, np.array([0.5]))[0])
    return int((of.singular_values > omega * of.singular_values.quantile(0.5)).sum())


@dataclass(frozen=True, slots=True)
class PermutedSpectrum:
    """The spectrum of a table with every column permuted by itself: mean over draws, and standard deviation."""

    mean: Spectrum
    sd: Float[Tensor, " m"]  # NaN for one draw


def permuted_moments(table: VectorTable, *, draws: int, seed: int) -> list[Moments]:
    """Compute the moments of the table with every column permuted by itself, once for each draw.

    Parallel analysis (Horn 1965; permutations: Buja & Eyuboglu 1992): columns keep their values, so their
    variances and tails, and lose their correlations with each other.
    """
    return [
        table_moments(partial(_permuted_blocks, table, seed + draw), table.n_used, table.dim) for draw in range(draws)
    ]


def permuted_spectrum(draws: list[Moments], *, centred: bool) -> PermutedSpectrum:
    """Return mean and spread of the singular values over the draws of `permuted_moments`."""
    runs = [spectrum(of, centred=centred) for of in draws]
    values = torch.stack([r.singular_values for r in runs])
    sd = values.std(dim=0) if len(runs) > 1 else torch.full_like(values[0], math.nan)
    return PermutedSpectrum(Spectrum(values.mean(dim=0), runs[0].n_rows, runs[0].dim, centred), sd)


def _permuted_blocks(table: VectorTable, seed: int) -> Iterator[Float[Tensor, "_ d"]]:
    """Yield blocks whose columns are permuted within the block; a block consists of stretches from the whole table.

    The rows of a block are shuffled and each column is then rotated by an offset of its own, so that any two
    columns are matched at random. Stretches from everywhere keep trends along the token ids from surviving.
    """
    generator = torch.Generator().manual_seed(seed)
    for rows in _scattered_blocks(table):
        n, d = rows.shape
        if n < d:  # too few offsets for all columns: a permutation for each
            yield rows.gather(0, torch.rand(n, d, generator=generator).argsort(dim=0))
            continue
        order = torch.randperm(n, generator=generator)
        index = (torch.arange(n)[:, None] + torch.randperm(n, generator=generator)[:d]) % n
        yield rows[order].gather(0, index)


def _scattered_blocks(table: VectorTable) -> Iterator[Float[Tensor, "_ d"]]:
    size = 128
    starts = torch.arange(0, table.n_rows, size)
    n_blocks = max(1, len(starts) // STRETCHES)
    for b in range(n_blocks):
        ids = torch.cat([torch.arange(s, min(s + size, table.n_rows)) for s in starts[b::n_blocks].tolist()])
        if table.excluded:
            ids = ids[torch.tensor([i not in table.excluded for i in ids.tolist()])]
        if len(ids):
            yield table.rows(ids)
