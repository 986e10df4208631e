"""Random directions: Gaussian, sparse, and orthonormal bases of what they span. All float64, each from one seed."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def gaussian_columns(dim: int, k: int, seed: int) -> Float[Tensor, "d k"]:
    """Return `k` vectors of independent standard normal entries, as columns."""
    return torch.randn(dim, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sparse_columns(dim: int, k: int, seed: int) -> Float[Tensor, "d k"]:
    """Return `k` vectors of entries -1, 0, 0, 0, 0, 1 with equal probability, as columns (Achlioptas 2003)."""
    draws = torch.rand(dim, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (draws < 1 / 6).double() - (draws > 5 / 6).double()


def orthonormal_basis(columns: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """Return an orthonormal basis of the span of the columns; of Gaussian ones it is uniformly random (Mezzadri 2007)."""
    q, r = torch.linalg.qr(columns)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # Householder reflections alone prefer one sign
