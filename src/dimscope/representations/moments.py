"""Count, sum and Gram matrix of rows, in float64, updated block by block and merged exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 1024  # rows multiplied at once, in the precision of the rows, before they are added up in float64
PANEL = 256  # columns; the Gram is symmetric, so panels below the diagonal are not computed


@dataclass(frozen=True, slots=True)
class Moments:
    """What all linear measures need of N rows: N, their sum and X^T X."""

    count: int
    total: Float[Tensor, " d"]
    gram: Float[Tensor, "d d"]

    @property
    def mean(self) -> Float[Tensor, " d"]:
        return self.total / self.count

    def scatter(self, *, centred: bool) -> Float[Tensor, "d d"]:
        """X^T X, or (X - mean)^T (X - mean)."""
        return self.gram - torch.outer(self.total, self.mean) if centred else self.gram


def moments(blocks: Iterable[Float[Tensor, "_ d"]], *, dtype: torch.dtype | None = None) -> Moments:
    """The moments of all rows of the blocks. `dtype` is that of the products; by default the one of the rows.

    float32 products are summed in float32 over 1,024 rows only, then in float64. Measured on bfloat16 tables of
    151,936 x 896 this leaves singular values with a relative error of 5e-10 times the squared condition number;
    where that is too much, ask for float64 products (three times slower).

    Raises ValueError for no rows.
    """
    count, total, gram = 0, None, None
    for block in blocks:
        for rows in block.to(dtype or block.dtype).split(CHUNK):
            if gram is None or total is None:
                d = rows.shape[1]
                total, gram = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
            count += len(rows)
            total += rows.sum(dim=0, dtype=torch.float64)
            _add_upper_panels(gram, rows)
    if gram is None or total is None or not count:
        raise ValueError("moments of no rows")
    return Moments(count, total, gram.triu() + gram.triu(1).T)


def merge(left: Moments, right: Moments) -> Moments:
    """The moments of both sets of rows together."""
    return Moments(left.count + right.count, left.total + right.total, left.gram + right.gram)


def _add_upper_panels(gram: Float[Tensor, "d d"], rows: Float[Tensor, "n d"]) -> None:
    for start in range(0, rows.shape[1], PANEL):
        stop = min(start + PANEL, rows.shape[1])
        gram[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]
