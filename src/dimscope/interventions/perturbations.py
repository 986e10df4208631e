"""The perturbations by name: one decorated function each, from a summary of a table and a strength to a map of rows.

A new perturbation is one such function in this file. It carries its title, unit and mark, so that the command line, the
study of damage and its figures know it by its name. Listing perturbations imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from dimscope import interventions
from dimscope.errors import InvalidArgument

if TYPE_CHECKING:
    from dimscope.interventions.maps import GaussianNoise, LinearMap, RowMap, RowQuantisation
    from dimscope.interventions.table_summary import Directions, TableSummary

Unit = Literal["dimensions", "standard deviations", "factor", "bits", ""]
LARGEST_BITS = 16


@dataclass(frozen=True, slots=True)
class Mark:
    """How a kind of thing is drawn: colour, marker symbol and line dash."""

    colour: str
    symbol: str = "circle"
    dash: str = "solid"


@runtime_checkable
class Maker(Protocol):
    """A function from the summary of a table, a strength and a seed to a map of rows."""

    __name__: str

    def __call__(self, table: TableSummary, strength: float, seed: int, /) -> RowMap:
        """Return the map of rows."""
        ...


ErrorFormula = Callable[["TableSummary", float], float]
"""From the summary of a table and a strength to ||W - W'||_F."""


@dataclass(frozen=True, slots=True)
class Perturbation:
    """A kind of change of a table.

    Attributes:
        name: As in options and in tables: the name of the function, with hyphens.
        title: As in a sentence.
        about: What it does, in one line.
        unit: What its strength counts; "" for a perturbation without a strength.
        mark: How figures draw it.
        make: Makes the map of rows.
        expected: The error that theory expects: exactly, or on average over seeds. None without a closed form.
        random: Whether it depends on the seed.
        stronger: Whether a larger strength is a "gentler" or a "harsher" change; None where it is neither.
        keeps: Whether the strength is the number of dimensions that are kept.
    """

    name: str
    title: str
    about: str
    unit: Unit
    mark: Mark
    make: Maker
    expected: ErrorFormula | None
    random: bool
    stronger: Literal["gentler", "harsher"] | None
    keeps: bool


PERTURBATIONS: dict[str, Perturbation] = {}


def perturbation(
    title: str,
    unit: Unit,
    mark: Mark,
    *,
    expected: ErrorFormula | None,
    random: bool = False,
    stronger: Literal["gentler", "harsher"] | None = None,
    keeps: bool = False,
) -> Callable[[Maker], Maker]:
    """Register a function as the perturbation of its name; the first line of its docstring says what it does.

    The arguments are those of `Perturbation`.
    """

    def register(make: Maker) -> Maker:
        name = make.__name__.replace("_", "-")
        about = (make.__doc__ or "").strip().splitlines()[0]
        PERTURBATIONS[name] = Perturbation(name, title, about, unit, mark, make, expected, random, stronger, keeps)
        return make

    return register


def find_perturbation(name: str) -> Perturbation:
    """Return the perturbation of a name.

    Raises:
        InvalidArgument: There is none of that name.
    """
    if name not in PERTURBATIONS:
        raise InvalidArgument(f"a perturbation is one of {', '.join(PERTURBATIONS)}, got {name!r}")
    return PERTURBATIONS[name]


def check_strength(name: str, strength: float, dim: int) -> None:
    """Check a strength for tables of `dim` dimensions.

    Raises:
        InvalidArgument: The name is unknown, or the strength is out of range.
    """
    unit = find_perturbation(name).unit
    if unit == "dimensions" and not (0 <= strength <= dim and strength == int(strength)):
        raise InvalidArgument(f"{name} takes a number of dimensions from 0 to {dim}, got {strength:.12g}")
    if unit == "standard deviations" and not 0 <= strength < math.inf:
        raise InvalidArgument(f"{name} takes standard deviations from 0 on, got {strength:.12g}")
    if unit == "bits" and not (2 <= strength <= LARGEST_BITS and strength == int(strength)):
        raise InvalidArgument(f"{name} takes a number of bits from 2 to {LARGEST_BITS}, got {strength:.12g}")
    if not math.isfinite(strength):
        raise InvalidArgument(f"{name} takes a finite number, got {strength:.12g}")


def make_map(name: str, table: TableSummary, strength: float = 0.0, seed: int = 0) -> RowMap:
    """Return the map of rows of a perturbation.

    Args:
        name: Name of the perturbation.
        table: Summary of the table that is changed.
        strength: Strength, in the unit of the perturbation; ignored by those without one.
        seed: Seed of a random perturbation.

    Raises:
        InvalidArgument: The name is unknown, or the strength is out of range.
    """
    check_strength(name, strength, table.dim)
    return PERTURBATIONS[name].make(table, strength, seed)


# ---- keeping dimensions: full lines for the common ones, variants share the colour -----------------------------------


def _dropped_norm(directions: Directions, k: float) -> float:
    return math.sqrt(float(directions.energies[int(k) :].sum()))


@perturbation(
    "truncation by SVD", "dimensions", Mark("#3f86cf"),
    expected=lambda table, k: _dropped_norm(table.directions, k), stronger="gentler", keeps=True,
)  # fmt: skip
def truncate(table: TableSummary, k: float, seed: int) -> LinearMap:
    """Keep the k widest directions of the table as it is: the nearest table of rank k (Eckart & Young 1936)."""
    return interventions.maps.projection(table.directions.vectors[:, : int(k)])


@perturbation(
    "centred truncation", "dimensions", Mark("#3f86cf", "circle-open", "dash"),
    expected=lambda table, k: _dropped_norm(table.components, k), stronger="gentler", keeps=True,
)  # fmt: skip
def truncate_centred(table: TableSummary, k: float, seed: int) -> LinearMap:
    """Keep the mean row and the k leading principal components around it (centred PCA)."""
    return interventions.maps.projection(table.components.vectors[:, : int(k)], around=table.moments.mean)


@perturbation(
    "removal of the leading directions", "dimensions", Mark("#3f86cf", "triangle-down", "longdash"),
    expected=lambda table, k: math.sqrt(float(table.directions.energies[: int(k)].sum())), stronger="harsher",
)  # fmt: skip
def remove_leading(table: TableSummary, k: float, seed: int) -> LinearMap:
    """Remove the k widest directions and keep the rest (Mu & Viswanath 2018, uncentred)."""
    return interventions.maps.projection(table.directions.vectors[:, int(k) :])


def _weak_coordinates(table: TableSummary, k: float) -> float:
    return math.sqrt(float(table.moments.gram.diagonal().sort().values[: table.dim - int(k)].sum()))


@perturbation(
    "keeping the strongest coordinates", "dimensions", Mark("#3f86cf", "x", "dot"),
    expected=_weak_coordinates, stronger="gentler", keeps=True,
)  # fmt: skip
def coordinates(table: TableSummary, k: float, seed: int) -> LinearMap:
    """Keep the k coordinates with the most energy and set the others to zero."""
    strongest = table.moments.gram.diagonal().argsort(descending=True, stable=True)[: int(k)]
    return interventions.maps.projection(interventions.maps.identity(table.dim)[:, strongest])


def _projection_error(table: TableSummary, k: float) -> float:
    return table.norm * math.sqrt(1 - k / table.dim)


def _rescaled_error(table: TableSummary, k: float) -> float:
    return table.norm * math.sqrt(table.dim / k - 1) if k else table.norm


@perturbation(
    "random projection", "dimensions", Mark("#d55e00", "square"),
    expected=_projection_error, random=True, stronger="gentler", keeps=True,
)  # fmt: skip
def project(table: TableSummary, k: float, seed: int) -> LinearMap:
    """Project on the span of k random Gaussian directions and back: P = A A^+ (a uniformly random k-space)."""
    bases = interventions.random_bases
    return interventions.maps.projection(bases.orthonormal_basis(bases.gaussian_columns(table.dim, int(k), seed)))


@perturbation(
    "rescaled random projection", "dimensions", Mark("#b07f00", "diamond"),
    expected=_rescaled_error, random=True, stronger="gentler", keeps=True,
)  # fmt: skip
def project_rescaled(table: TableSummary, k: float, seed: int) -> LinearMap:
    """Multiply the random projection by d / k: inner products are kept on average, and the error is larger."""
    bases = interventions.random_bases
    basis = bases.orthonormal_basis(bases.gaussian_columns(table.dim, int(k), seed))
    return interventions.maps.projection(basis, factor=table.dim / k if k else 0.0)


@perturbation(
    "sparse random projection", "dimensions", Mark("#d55e00", "square-open", "dash"),
    expected=_projection_error, random=True, stronger="gentler", keeps=True,
)  # fmt: skip
def project_sparse(table: TableSummary, k: float, seed: int) -> LinearMap:
    """Project on the span of k random directions with entries -1, 0, 0, 0, 0, 1 (Achlioptas 2003), and back."""
    bases = interventions.random_bases
    return interventions.maps.projection(bases.orthonormal_basis(bases.sparse_columns(table.dim, int(k), seed)))


# ---- keeping all dimensions ------------------------------------------------------------------------------------------


@perturbation(
    "rotation", "", Mark("#82878f", "pentagon"), expected=lambda table, _: math.sqrt(2) * table.norm, random=True
)
def rotate(table: TableSummary, strength: float, seed: int) -> LinearMap:
    """Turn all rows by one random rotation: distances and angles stay, the coordinates do not."""
    bases, dim = interventions.random_bases, table.dim
    return interventions.maps.LinearMap(bases.orthonormal_basis(bases.gaussian_columns(dim, dim, seed)))


@perturbation("scaling", "factor", Mark("#8d79d6", "star"), expected=lambda table, factor: table.norm * abs(factor - 1))
def scale(table: TableSummary, factor: float, seed: int) -> LinearMap:
    """Multiply every row by one number."""
    return interventions.maps.LinearMap(interventions.maps.identity(table.dim) * factor)


def _noise_error(table: TableSummary, strength: float) -> float:
    return strength * table.std * math.sqrt(table.moments.count * table.dim)


@perturbation(
    "noise", "standard deviations", Mark("#009e73", "triangle-up"),
    expected=_noise_error, random=True, stronger="harsher",
)  # fmt: skip
def noise(table: TableSummary, strength: float, seed: int) -> GaussianNoise:
    """Add Gaussian noise in units of the standard deviation of the table's entries: a vector of its own for every token."""
    return interventions.maps.GaussianNoise(strength * table.std, seed)


@perturbation(
    "one shift for all tokens", "standard deviations", Mark("#c45a9c", "cross"),
    expected=_noise_error, random=True, stronger="harsher",
)  # fmt: skip
def shift(table: TableSummary, strength: float, seed: int) -> LinearMap:
    """Add the same random vector to every row, as long as noise of that strength: an error that no average removes."""
    direction = interventions.random_bases.gaussian_columns(table.dim, 1, seed)[:, 0]
    length = strength * table.std * math.sqrt(table.dim)
    return interventions.maps.LinearMap(
        interventions.maps.identity(table.dim), None, direction / direction.norm() * length
    )


@perturbation("rounding", "bits", Mark("#a8703a", "hexagon"), expected=None, stronger="gentler")
def quantise(table: TableSummary, bits: float, seed: int) -> RowQuantisation:
    """Round every row to b bits of its largest entry; the error has no closed form."""
    return interventions.maps.RowQuantisation(int(bits))
