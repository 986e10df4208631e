"""What a perturbation may know of a table, and chains of perturbations made from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.interventions.maps import LinearMap, RowMap, compose, mapped_moments
from dimscope.interventions.perturbations import make_map
from dimscope.vectors.moments import Moments, moments
from dimscope.vectors.table import VectorTable


@dataclass(frozen=True, slots=True)
class Directions:
    """Orthonormal directions of a table as columns, from the widest on, and the energy along each."""

    energies: Float[Tensor, " d"]
    vectors: Float[Tensor, "d d"]


class TableSummary:
    """The moments of a table, and the directions in which it is widest, computed when first used."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    @property
    def dim(self) -> int:
        """Return the number of dimensions, d."""
        return len(self.moments.total)

    @property
    def norm(self) -> float:
        """Return the Frobenius norm of the table, ||W||_F."""
        return math.sqrt(float(self.moments.gram.trace()))

    @property
    def std(self) -> float:
        """Return the standard deviation of all entries."""
        n = self.moments.count * self.dim
        return math.sqrt(max(self.norm**2 / n - (float(self.moments.total.sum()) / n) ** 2, 0.0))

    @cached_property
    def directions(self) -> Directions:
        """Return the right singular vectors of the table as it is, with the squared singular values."""
        return _directions(self.moments.scatter(centred=False))

    @cached_property
    def components(self) -> Directions:
        """Return the principal components: the directions of the centred table."""
        return _directions(self.moments.scatter(centred=True))


def _directions(symmetric: Float[Tensor, "d d"]) -> Directions:
    values, vectors = torch.linalg.eigh(symmetric)
    return Directions(values.clamp_min(0).flip(0), vectors.flip(1))


def summarise_table(table: VectorTable) -> TableSummary:
    """Read a table once, with float64 products: exact errors are differences of nearly equal numbers."""
    return TableSummary(moments((rows for _, rows in table.blocks()), dtype=torch.float64))


def step_seed(seed: int, number: int) -> int:
    """Return the seed of a step of a chain: that of the chain for the first, streams of their own for the others."""
    return (seed + number * 0x9E3779B97F4A7C15) % 2**63


def make_chain(steps: Sequence[tuple[str, float]], table: TableSummary, seed: int = 0) -> RowMap:
    """Return perturbations one after the other as one map.

    The step after a linear one is made for the table that the linear one leaves. Noise and rounding do not change what
    the next step knows of the table.

    Args:
        steps: Name and strength of each perturbation.
        table: The table before the first step.
        seed: Seed of the chain.

    Raises:
        InvalidArgument: A name is unknown, or a strength out of range.
    """
    maps: list[RowMap] = []
    for number, (name, strength) in enumerate(steps):
        change = make_map(name, table, strength, step_seed(seed, number))
        maps.append(change)
        if isinstance(change, LinearMap) and len(maps) < len(steps):
            table = TableSummary(mapped_moments(change, table.moments))
    return maps[0] if len(maps) == 1 else compose(maps)
