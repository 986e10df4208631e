"""The k directions of the residual stream that are kept: orthonormal bases, from a table alone or a calibration pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.errors import InvalidArgument
from dimscope.interventions.maps import LinearMap
from dimscope.interventions.perturbations import make_map
from dimscope.interventions.table_summary import TableSummary
from dimscope.narrowing.calibration import Calibration

RAW_KEPT = 4  # leading directions of the raw stream that are always kept: those of massive tokens


def _of_table(name: str) -> Callable[[TableSummary, int, int], Float[Tensor, "d k"]]:
    def basis(table: TableSummary, width: int, seed: int) -> Float[Tensor, "d k"]:
        change = make_map(name, table, width, seed)
        assert isinstance(change, LinearMap)
        return change.left

    return basis


FROM_TABLE = {
    "random": _of_table("project"),
    "coordinates": _of_table("coordinates"),
    "embedding": _of_table("truncate"),
}
"""Bases from the embedding table alone: random directions, its strongest coordinates, its principal directions."""


def _leading(moment: Float[Tensor, "d d"], k: int) -> Float[Tensor, "d k"]:
    return torch.linalg.eigh(moment)[1].flip(1)[:, :k]


def _raw(calibration: Calibration, width: int) -> Float[Tensor, "d k"]:
    return _leading(calibration.raw, width)


def _normalised(calibration: Calibration, width: int) -> Float[Tensor, "d k"]:
    # A massive first token is one state among many once it is normalised, and yet the model cannot do without it.
    first = _leading(calibration.raw, min(RAW_KEPT, width))
    rest = torch.eye(len(first), dtype=torch.float64) - first @ first.T
    others = _leading(rest @ calibration.normalised @ rest, width - first.shape[1])
    return torch.linalg.qr(torch.cat([first, others], dim=1))[0]


FROM_TEXT = {"raw": _raw, "normalised": _normalised}
"""Bases from a calibration pass: principal directions of the stream, and of its normalised states (the default)."""

LEARNED = "learned"  # begins as `normalised`, see dimscope.narrowing.learning
BASES = (*FROM_TABLE, *FROM_TEXT, LEARNED)


def make_basis(
    name: str, source: TableSummary | Calibration, width: int, *, centred: bool, seed: int = 0
) -> Float[Tensor, "d k"]:
    """Return a basis by its name.

    Args:
        name: One of BASES.
        source: The embedding table for a name in FROM_TABLE, else the calibration.
        width: k.
        centred: Whether the norms of the model take out the mean; then the rank is k - 1.
        seed: Random seed, where the basis is random.
    """
    kept = width - centred
    if isinstance(source, TableSummary):
        return orthonormal(FROM_TABLE[name](source, kept, seed), centred)
    return orthonormal(FROM_TEXT["normalised" if name == LEARNED else name](source, kept), centred)


def orthonormal(directions: Float[Tensor, "d _"], centred: bool) -> Float[Tensor, "d k"]:
    """Return orthonormal columns with the span of some directions; differentiable.

    For centred norms k columns of k - 1 directions: the directions, made orthogonal to the ones of R^d, times a basis of
    the complement of the ones of R^k. P^T x has mean zero then, and P ignores the mean of x.
    """
    if not centred:
        return torch.linalg.qr(directions)[0]
    kept = directions.shape[1]
    return _without_mean(directions) @ _without_mean(torch.eye(kept + 1).to(directions)[:, :kept]).T


def directions_of(basis: Float[Tensor, "d k"], centred: bool) -> Float[Tensor, "d _"]:
    """Return the directions from which `orthonormal` makes this basis again."""
    return basis @ _without_mean(torch.eye(basis.shape[1]).to(basis)[:, :-1]) if centred else basis


def _without_mean(directions: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
    # QR completes directions that depend on the ones.
    return torch.linalg.qr(torch.cat([directions.new_ones(len(directions), 1), directions], dim=1))[0][:, 1:]


@dataclass(frozen=True, slots=True)
class DiagonalisingBasis:
    """A basis in which the gain of the final norm is diagonal, and that gain."""

    basis: Float[Tensor, "d k"]
    gain: Float[Tensor, " k"]


def diagonalising_basis(basis: Float[Tensor, "d k"], gain: Float[Tensor, " d"]) -> DiagonalisingBasis:
    """Return the basis of the same span in which one table serves as input and as output table best.

    The head is E diag(g) P. In the eigenvectors R of P^T diag(g) P = R diag(c) R^T it is E P R diag(c), the input table
    times a gain, but for what diag(g) turns out of the span: nothing at full width, nor where all gains are alike.
    """
    values, vectors = torch.linalg.eigh(basis.T @ (gain[:, None] * basis))
    return DiagonalisingBasis(basis @ vectors, values)


def check_basis(name: str) -> None:
    """Check the name of a basis.

    Raises:
        InvalidArgument: It is unknown.
    """
    if name not in BASES:
        raise InvalidArgument(f"`bases` must be {', '.join(BASES)}, got {name!r}")
