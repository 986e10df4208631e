"""How evenly the rows of a table point: mean cosine, the partition function, row norms."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.vectors.moments import Moments
from dimscope.vectors.table import VectorTable


def row_norms(table: VectorTable, centre: Float[Tensor, " d"] | None = None) -> Float[Tensor, " n"]:
    """Compute the Euclidean norm of every row, or its distance from `centre`, in float64; rows in table order, excluded ones left out."""
    shift = 0.0 if centre is None else centre.double()
    return torch.cat([(rows.double() - shift).norm(dim=1) for _, rows in table.blocks()])


def mean_cosine(table: VectorTable, centre: Float[Tensor, " d"] | None = None) -> float:
    """Compute the mean cosine over all pairs of different rows, exactly, in O(N d): (||sum u||^2 - N) / (N (N - 1)).

    Ethayarajh 2019. Isotropic rows: 0, standard deviation sqrt(2 / (N (N - 1) d)). Rows of norm 0 are left out.
    """
    total, count = torch.zeros(table.dim, dtype=torch.float64), 0
    for _, rows in table.blocks():
        rows = rows.double() if centre is None else rows.double() - centre
        norms = rows.norm(dim=1, keepdim=True)
        nonzero = norms.squeeze(1) > 0
        total += (rows[nonzero] / norms[nonzero]).sum(dim=0)
        count += int(nonzero.sum())
    return float((total.square().sum() - count) / (count * (count - 1))) if count > 1 else math.nan


def partition_isotropy(table: VectorTable, of: Moments, mean_norm: float, *, centred: bool) -> float:
    """Compute I(W) = min Z(c) / max Z(c), Z(c) = sum_i exp(c . w_i), c over both signs of the eigenvectors of W^T W.

    Mu & Viswanath 2018; 1 is isotropic. It is not scale invariant, so rows are divided by `mean_norm` first.
    """
    _, directions = torch.linalg.eigh(of.scatter(centred=centred))
    directions = (directions / mean_norm).float()
    offset = (of.mean.float() @ directions) if centred else torch.zeros(directions.shape[1])
    log_z = torch.full((2, directions.shape[1]), -math.inf, dtype=torch.float64)
    for _, rows in table.blocks():
        projected = rows.float() @ directions - offset
        both = torch.stack([projected.logsumexp(dim=0), (-projected).logsumexp(dim=0)])
        log_z = torch.logaddexp(log_z, both.double())
    return float((log_z.min() - log_z.max()).exp())
