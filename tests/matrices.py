"""Matrices with known answers, for the tests of the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from hypothesis import settings

from dimscope.geometry.spectrum import Spectrum, spectrum
from dimscope.vectors.moments import moments
from dimscope.vectors.table import VectorTable, table_from_tensor

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)
"""Property tests: the same examples in every run, no folder of them, no deadline on a busy machine."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def gaussian(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return n x d white noise of variance 1."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(d: int, seed: int = 0) -> torch.Tensor:
    """Return a random d x d rotation in float64."""
    return torch.linalg.qr(gaussian(d, d, seed, torch.float64)).Q


def with_singular_values(n: int, values: Sequence[float], seed: int = 0) -> torch.Tensor:
    """Return n x len(values) rows of mean zero in float64 with these singular values, centred or not."""
    left = gaussian(n, len(values), seed, torch.float64)
    left = torch.linalg.qr(left - left.mean(dim=0)).Q
    return left * torch.tensor(values, dtype=torch.float64) @ orthogonal(len(values), seed + 1).T


def table_without(matrix: torch.Tensor, excluded: Iterable[int]) -> VectorTable:
    """Return the table of a matrix whose rows `excluded` do not take part."""
    table = table_from_tensor(matrix)
    return VectorTable(table.n_rows, table.dim, table.dtype, table.read, frozenset(excluded))


def spectrum_of(matrix: torch.Tensor, *, centred: bool = True) -> Spectrum:
    """Return the spectrum of a matrix in memory, from float64 products."""
    return spectrum(moments([matrix], dtype=torch.float64), centred=centred)


def svd_values(matrix: torch.Tensor, *, centred: bool = True) -> np.ndarray:
    """Return the singular values by numpy's SVD in float64: the oracle."""
    x = matrix.double().numpy()
    return np.linalg.svd(x - x.mean(axis=0) if centred else x, compute_uv=False)


def made_spectrum(values: Sequence[float], n_rows: int = 10_000, *, centred: bool = True) -> Spectrum:
    """Return a spectrum with these singular values."""
    return Spectrum(torch.tensor(values, dtype=torch.float64), n_rows, len(values), centred)
