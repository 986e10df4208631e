"""How evenly the rows of a table point: mean cosine, the partition function, row norms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.vectors.moments import Moments
from dimscope.vectors.table import VectorTable

CHUNK = 512  # rows whose intermediate results stay in the cache of a core: three times as fast as a block at once

SAFE_EXPONENT = 75.0  # exp(75) x 512 is a float32, and its reciprocal is normal


def _chunks(table: VectorTable) -> Iterator[Float[Tensor, "n d"]]:
    return (chunk for _, rows in table.blocks() for chunk in rows.split(CHUNK))


def row_norms(table: VectorTable) -> Float[Tensor, " n"]:
    """Compute the Euclidean norm of every row in float64; rows in table order, excluded ones left out."""
    return torch.cat([rows.double().norm(dim=1) for _, rows in table.blocks()])


@dataclass(frozen=True, slots=True, eq=False)
class RowStatistics:
    """What one pass tells about the rows of a table, measured from a centre.

    Attributes:
        norms: The distance of each row from the centre, in table order; excluded rows are left out.
        mean_cosine: The mean cosine over all pairs of different rows, without rows of norm 0; NaN for fewer than two.
        fourth_powers: The sum of the fourth powers of all entries.
    """

    norms: Float[Tensor, " n"]
    mean_cosine: float
    fourth_powers: float


def row_statistics(table: VectorTable, *centres: Float[Tensor, " d"]) -> list[RowStatistics]:
    """Compute norms, mean cosine and fourth powers of the rows from each of some centres, in float64 and one pass.

    The mean cosine is exact, in O(N d): (||sum u||^2 - N) / (N (N - 1)) for rows u of length 1 (Ethayarajh 2019).
    Isotropic rows: 0, standard deviation sqrt(2 / (N (N - 1) d)).
    """
    norms: list[list[Tensor]] = [[] for _ in centres]
    directions = torch.zeros(len(centres), table.dim, dtype=torch.float64)
    fourth_powers = [0.0] * len(centres)
    for chunk in _chunks(table):
        rows = chunk.double()
        for number, centre in enumerate(centres):
            shifted = rows - centre.double()
            squares = shifted.square()
            norms[number].append(squares.sum(dim=1).sqrt())
            inverse = norms[number][-1].reciprocal()
            directions[number] += inverse.where(inverse.isfinite(), 0.0) @ shifted
            fourth_powers[number] += float(squares.square_().sum())
    distances = [torch.cat(of_centre) for of_centre in norms]
    cosines = [_mean_cosine(total, int((n > 0).sum())) for total, n in zip(directions, distances, strict=True)]
    return [RowStatistics(*of_centre) for of_centre in zip(distances, cosines, fourth_powers, strict=True)]


def _mean_cosine(total: Float[Tensor, " d"], n: int) -> float:
    return float((total.square().sum() - n) / (n * (n - 1))) if n > 1 else math.nan


def partition_isotropy(table: VectorTable, of: Moments, mean_norm: float, *, centred: bool) -> float:
    """Compute I(W) = min Z(c) / max Z(c), Z(c) = sum_i exp(c . w_i), c over both signs of the eigenvectors of W^T W.

    Mu & Viswanath 2018; 1 is isotropic. It is not scale invariant, so rows are divided by `mean_norm` first.
    """
    _, directions = torch.linalg.eigh(of.scatter(centred=centred))
    directions = (directions / mean_norm).float()
    offset = (of.mean.float() @ directions) if centred else torch.zeros(directions.shape[1])
    log_z = torch.full((2, directions.shape[1]), -math.inf, dtype=torch.float64)
    for rows in _chunks(table):
        projected = rows.float() @ directions - offset
        log_z = torch.logaddexp(log_z, _log_sums(projected).double())
    return float((log_z.min() - log_z.max()).exp())


def _log_sums(exponents: Float[Tensor, "n d"]) -> Float[Tensor, "2 d"]:
    """Return log sum exp(x) and log sum exp(-x) of every column; one exponential serves both where float32 holds it."""
    if float(exponents.abs().max()) > SAFE_EXPONENT:
        return torch.stack([exponents.logsumexp(dim=0), (-exponents).logsumexp(dim=0)])
    powers = exponents.exp_()
    return torch.stack([powers.sum(dim=0), powers.reciprocal_().sum(dim=0)]).log()
