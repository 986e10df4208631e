"""How alike two clouds of the same N tokens are, whatever their widths: debiased linear CKA and subspace overlap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

FLOAT64 = torch.finfo(torch.float64)


def centred_gram(rows: Float[Tensor, "n d"]) -> Float[Tensor, " m"]:
    """Compute the U-centred linear Gram matrix as the unit vector of its m = n (n - 1) / 2 entries above the diagonal, float64.

    u_ij = k_ij - (r_i + r_j) / (n - 2) + (sum r) / ((n - 1)(n - 2)), k = X X^T with a diagonal of zeros, r its row
    sums; every row of u then sums to 0 (Szekely & Rizzo 2014). The sum of u_ij v_ij over i != j is n (n - 3) times
    HSIC_1 (Song et al. 2007). Unchanged by rotation, translation and scaling of the rows.

    The zero vector where u is 0 up to rounding, and u tells nothing of the cloud: all rows equal, all but one equal,
    and more generally rows orthogonal to each other after some translation. NaN where a row is not finite.

    Raises:
        ValueError: For n < 4, where every u is 0.
    """
    n = len(rows)
    if n < 4:
        raise ValueError(f"a U-centred Gram matrix needs at least 4 rows, got {n}")
    centred = _centred(rows)
    gram = centred @ centred.T
    rounding = 16 * FLOAT64.eps * gram.trace()  # every k_ij is off by some eps |x_i| |x_j|
    gram.fill_diagonal_(0)
    means = gram.sum(dim=1) / (n - 2)
    means -= means.sum() / (2 * (n - 1))
    gram.sub_(means).sub_(means[:, None])
    above = gram[torch.ones_like(gram, dtype=torch.bool).triu_(1)]
    norm = above.norm()
    return torch.zeros_like(above) if norm <= rounding else above.div_(norm)


def debiased_cka(left: Float[Tensor, "l m"], right: Float[Tensor, "r m"]) -> Float[Tensor, "l r"]:
    """Compute the debiased linear CKA of all pairs of stacked `centred_gram` vectors: HSIC_1(K, L) / sqrt(HSIC_1(K, K) HSIC_1(L, L)).

    1 for clouds that differ by rotation, translation and scale. Over all pairings of the tokens of any two clouds it
    has mean 0 and standard deviation sqrt(2 / (n (n - 3))) exactly (U-centred matrices are an irreducible
    representation of the permutations, of dimension n (n - 3) / 2), so it can be slightly negative where the biased
    form, for independent clouds of width p, is p / (n - 1 + p). NaN where either vector is zero.
    Song et al. 2007; Nguyen et al. 2021.
    """
    undefined = ~(left.any(dim=1)[:, None] & right.any(dim=1))
    return (left @ right.T).clamp(-1, 1).masked_fill(undefined, torch.nan)


def leading_subspace(rows: Float[Tensor, "n d"], k: int) -> Float[Tensor, "d k"]:
    """Compute the k leading principal components of the centred rows as orthonormal columns, float64, by the smaller Gram matrix.

    A component of singular value s is accurate to about eps (s_1 / s)^2. Fewer columns where the rank is below k:
    singular values up to sqrt(max(n, d) eps) s_1 (about 6e-7 s_1 at 1,600) are what rounding leaves in a Gram matrix,
    and have no direction. No columns where all rows are equal.
    """
    centred = _centred(rows)
    n, d = centred.shape
    values, vectors = torch.linalg.eigh(centred @ centred.T if n < d else centred.T @ centred)
    rank = int((values > max(n, d) * FLOAT64.eps * values[-1]).sum())
    leading = vectors.flip(1)[:, : min(k, rank)]
    # X^T u has length sigma, and is orthogonal to the others only as far as the Gram matrix could tell.
    return torch.linalg.qr(centred.T @ leading).Q if n < d else leading


@dataclass(frozen=True, slots=True)
class SubspaceOverlap:
    """How much of the smaller of two subspaces lies in the other, beside the same of random subspaces of those widths.

    Attributes:
        overlap: The share of the smaller that lies in the other.
        null: The expected overlap of random subspaces.
        null_sd: Its standard deviation.
        k: Columns of the smaller.
    """

    overlap: float
    null: float
    null_sd: float
    k: int


def subspace_overlap(left: Float[Tensor, "d k"], right: Float[Tensor, "d j"]) -> SubspaceOverlap:
    """Compute the mean squared cosine of the principal angles between the spans of orthonormal columns: ||L^T R||_F^2 / min(k, j).

    0 for orthogonal subspaces, 1 where one holds the other. A random j-dimensional projector is (j / d) I in
    expectation, so ||L^T R||_F^2 is k j / d, and the null is max(k, j) / d. Its variance under random rotations is
    2 k (d - k) j (d - j) / (d^2 (d - 1) (d + 2)) (from the fourth moments of their entries: Collins & Sniady 2006).
    NaN where either has no columns. Bjorck & Golub 1973.
    """
    small, large = sorted((left.double(), right.double()), key=lambda basis: basis.shape[1])
    (d, k), j = small.shape, large.shape[1]
    cosines = torch.linalg.svdvals(large.T @ small).clamp(max=1)
    null_sd = math.sqrt(2 * (d - k) * j * (d - j) / max(k * (d - 1) * (d + 2), 1)) / d
    return SubspaceOverlap(float(cosines.square().mean()), j / d, null_sd, k)


def _centred(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return rows minus their mean, over their largest entry, in float64: no product overflows, equal rows are exactly 0."""
    shifted = rows.double() - rows[0].double()
    shifted = shifted - shifted.mean(dim=0)
    return shifted / shifted.abs().max().clamp_min(FLOAT64.tiny)
