"""The perturbations by name: each one decorated function from a table's moments and a strength to a map of rows.

Adding one is writing such a function here; the library and the command line find it by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.errors import InvalidArgument
from dimscope.interventions.maps import (
    GaussianNoise,
    LinearMap,
    RowMap,
    RowQuantisation,
    compose,
    mapped_moments,
)
from dimscope.vectors.moments import Moments, moments
from dimscope.vectors.table import VectorTable

LARGEST_BITS = 16


class TableSummary:
    """What a perturbation may know of a table: its moments, and the directions in which it is widest."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    @property
    def dim(self) -> int:
        return len(self.moments.total)

    @property
    def norm(self) -> float:
        """||W||_F."""
        return math.sqrt(float(self.moments.gram.trace()))

    @property
    def std(self) -> float:
        """The standard deviation of all entries."""
        n = self.moments.count * self.dim
        return math.sqrt(max(self.norm**2 / n - (float(self.moments.total.sum()) / n) ** 2, 0.0))

    @cached_property
    def directions(self) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
        """Squared singular values in falling order, and the right singular vectors as columns (uncentred)."""
        return _falling(self.moments.scatter(centred=False))

    @cached_property
    def components(self) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
        """The same of the centred table: its principal components."""
        return _falling(self.moments.scatter(centred=True))


def summarise(table: VectorTable) -> TableSummary:
    """One pass over a table, with float64 products: exact errors are differences of nearly equal numbers."""
    return TableSummary(moments((rows for _, rows in table.blocks()), dtype=torch.float64))


def _falling(symmetric: Float[Tensor, "d d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    values, vectors = torch.linalg.eigh(symmetric)
    return values.clamp_min(0).flip(0), vectors.flip(1)


@runtime_checkable
class Maker(Protocol):
    """A function from a table, a strength and a seed to a map of rows."""

    __name__: str

    def __call__(self, table: TableSummary, strength: float, seed: int, /) -> RowMap: ...


Expected = Callable[[TableSummary, float], float]


@dataclass(frozen=True, slots=True)
class Perturbation:
    """A way to perturb a table: how its strength is called, how a map is made, and the error that theory expects."""

    name: str
    strength: str  # "dimensions", "standard deviations", "factor", "bits" or "" where it has none
    make: Maker  # (table, strength, seed)
    expected: Expected | None  # ||W - W'||_F in expectation, or exactly; None where there is no closed form
    random: bool  # whether it depends on the seed
    about: str


PERTURBATIONS: dict[str, Perturbation] = {}


def perturbation(strength: str, *, expected: Expected | None, random: bool = False) -> Callable[[Maker], Maker]:
    """Registers a function under its own name, with underscores as hyphens; the first line of its docstring is its help."""

    def register(make: Maker) -> Maker:
        name = make.__name__.replace("_", "-")
        about = (make.__doc__ or "").strip().splitlines()[0]
        PERTURBATIONS[name] = Perturbation(name, strength, make, expected, random, about)
        return make

    return register


def find_perturbation(name: str) -> Perturbation:
    """The perturbation of a name. Raises InvalidArgument for an unknown one."""
    if name not in PERTURBATIONS:
        raise InvalidArgument(f"a perturbation is one of {', '.join(PERTURBATIONS)}, not {name!r}")
    return PERTURBATIONS[name]


def check_strength(name: str, strength: float, dim: int) -> None:
    """Raises InvalidArgument for an unknown name, and for a strength that it cannot have in `dim` dimensions."""
    unit = find_perturbation(name).strength
    if unit == "dimensions" and not (0 <= strength <= dim and strength == int(strength)):
        raise InvalidArgument(f"{name} takes a number of dimensions from 0 to {dim}, not {strength:.12g}")
    if unit == "standard deviations" and not 0 <= strength < math.inf:
        raise InvalidArgument(f"{name} takes standard deviations from 0 on, not {strength:.12g}")
    if unit == "bits" and not (2 <= strength <= LARGEST_BITS and strength == int(strength)):
        raise InvalidArgument(f"{name} takes a number of bits from 2 to {LARGEST_BITS}, not {strength:.12g}")
    if not math.isfinite(strength):
        raise InvalidArgument(f"{name} takes a number, not {strength:.12g}")


def make_map(name: str, table: TableSummary, strength: float = 0.0, seed: int = 0) -> RowMap:
    """The map of a perturbation at a strength. Raises InvalidArgument for an unknown name or a strength out of range."""
    check_strength(name, strength, table.dim)
    return PERTURBATIONS[name].make(table, strength, seed)


def step_seed(seed: int, number: int) -> int:
    """The seed of a step of a chain: that of the chain for the first, streams of their own for the others."""
    return (seed + number * 0x9E3779B97F4A7C15) % 2**63


def make_chain(steps: Sequence[tuple[str, float]], table: TableSummary, seed: int = 0) -> RowMap:
    """Perturbations one after the other, as (name, strength). Raises what `make_map` raises.

    After linear ones the next is made for the table as it is then; noise and rounding do not change what it knows.
    """
    maps: list[RowMap] = []
    for number, (name, strength) in enumerate(steps):
        change = make_map(name, table, strength, step_seed(seed, number))
        maps.append(change)
        if isinstance(change, LinearMap) and len(maps) < len(steps):
            table = TableSummary(mapped_moments(change, table.moments))
    return maps[0] if len(maps) == 1 else compose(maps)


def _tail(values: Float[Tensor, " d"], k: float) -> float:
    return math.sqrt(float(values[int(k) :].sum()))


@perturbation("dimensions", expected=lambda t, k: _tail(t.directions[0], k))
def truncate(table: TableSummary, k: float, seed: int) -> LinearMap:
    """Keeps the k widest directions of the table as it is: the nearest table of rank k (Eckart & Young 1936)."""
    leading = table.directions[1][:, : int(k)]
    return LinearMap(leading, leading.T, orthonormal=True)


@perturbation("dimensions", expected=lambda t, k: _tail(t.components[0], k))
def truncate_centred(table: TableSummary, k: float, seed: int) -> LinearMap:
    """Keeps the mean row and the k leading principal components around it (centred PCA)."""
    leading, mean = table.components[1][:, : int(k)], table.moments.mean
    return LinearMap(leading, leading.T, mean - (mean @ leading) @ leading.T, orthonormal=True)


@perturbation("dimensions", expected=lambda t, k: math.sqrt(float(t.directions[0][: int(k)].sum())))
def remove_leading(table: TableSummary, k: float, seed: int) -> LinearMap:
    """Takes the k widest directions away and keeps the rest (Mu & Viswanath 2018, uncentred)."""
    rest = table.directions[1][:, int(k) :]
    return LinearMap(rest, rest.T, orthonormal=True)


@perturbation(
    "dimensions",
    expected=lambda t, k: math.sqrt(float(t.moments.gram.diagonal().sort().values[: t.dim - int(k)].sum())),
)
def coordinates(table: TableSummary, k: float, seed: int) -> LinearMap:
    """Keeps the k coordinates with the most energy and sets the others to zero."""
    kept = table.moments.gram.diagonal().argsort(descending=True, stable=True)[: int(k)]
    chosen = torch.eye(table.dim, dtype=torch.float64)[:, kept]
    return LinearMap(chosen, chosen.T, orthonormal=True)


def _projected(table: TableSummary, k: float) -> float:
    return table.norm * math.sqrt(1 - k / table.dim)


def _rescaled(table: TableSummary, k: float) -> float:
    return table.norm * math.sqrt(table.dim / k - 1) if k else table.norm


@perturbation("dimensions", expected=_projected, random=True)
def project(table: TableSummary, k: float, seed: int) -> LinearMap:
    """Projects on the span of k random Gaussian directions and back: P = A A^+ (a uniformly random k-space)."""
    basis = _orthonormal(_gaussian(table.dim, int(k), seed))
    return LinearMap(basis, basis.T, orthonormal=True)


@perturbation("dimensions", expected=_rescaled, random=True)
def project_rescaled(table: TableSummary, k: float, seed: int) -> LinearMap:
    """The random projection times d / k, so that inner products are kept on average: the error rises, the length does not fall."""
    basis = _orthonormal(_gaussian(table.dim, int(k), seed))
    return LinearMap(basis * (table.dim / k if k else 0.0), basis.T, orthonormal=True)


@perturbation("dimensions", expected=_projected, random=True)
def project_sparse(table: TableSummary, k: float, seed: int) -> LinearMap:
    """Projects on the span of k random directions with entries -1, 0, 0, 0, 0, 1 (Achlioptas 2003), and back."""
    draws = torch.rand(table.dim, int(k), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    basis = _orthonormal((draws < 1 / 6).double() - (draws > 5 / 6).double())
    return LinearMap(basis, basis.T, orthonormal=True)


@perturbation("", expected=lambda t, _: math.sqrt(2) * t.norm, random=True)
def rotate(table: TableSummary, strength: float, seed: int) -> LinearMap:
    """Turns all rows by one random rotation: distances and angles stay, the coordinates do not."""
    return LinearMap(_orthonormal(_gaussian(table.dim, table.dim, seed)))


@perturbation("factor", expected=lambda t, c: t.norm * abs(c - 1))
def scale(table: TableSummary, factor: float, seed: int) -> LinearMap:
    """Multiplies every row by one number."""
    return LinearMap(torch.eye(table.dim, dtype=torch.float64) * factor)


@perturbation("standard deviations", expected=lambda t, a: a * t.std * math.sqrt(t.moments.count * t.dim), random=True)
def noise(table: TableSummary, strength: float, seed: int) -> GaussianNoise:
    """Adds Gaussian noise in units of the standard deviation of the table's entries; no linear map, T x d work a look-up."""
    return GaussianNoise(strength * table.std, seed)


@perturbation("standard deviations", expected=lambda t, a: a * t.std * math.sqrt(t.moments.count * t.dim), random=True)
def shift(table: TableSummary, strength: float, seed: int) -> LinearMap:
    """Adds the same random vector to every row, as long as noise of that strength: an error that no average takes away."""
    direction = _gaussian(table.dim, 1, seed)[:, 0]
    length = strength * table.std * math.sqrt(table.dim)
    return LinearMap(torch.eye(table.dim, dtype=torch.float64), None, direction / direction.norm() * length)


@perturbation("bits", expected=None)
def quantise(table: TableSummary, bits: float, seed: int) -> RowQuantisation:
    """Rounds every row to b bits of its largest entry; no linear map, and the error has no closed form."""
    return RowQuantisation(int(bits))


def _gaussian(rows: int, columns: int, seed: int) -> Float[Tensor, "d k"]:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _orthonormal(columns: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """An orthonormal basis of the columns; of Gaussian ones it is uniformly random (Mezzadri 2007)."""
    q, r = torch.linalg.qr(columns)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # Householder reflections alone prefer one sign
