"""Which k directions of the residual stream are kept: orthonormal bases, from a table alone or from a calibration pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.errors import InvalidArgument
from dimscope.interventions.maps import LinearMap
from dimscope.interventions.perturbations import make_map
from dimscope.interventions.table_summary import TableSummary
from dimscope.narrowing.calibration import Calibration

RAW_KEPT = 4  # leading directions of the raw stream that are kept whatever the norms make of them: massive tokens


def _of_table(name: str) -> Callable[[TableSummary, int, int], Float[Tensor, "d k"]]:
    def made(table: TableSummary, width: int, seed: int) -> Float[Tensor, "d k"]:
        change = make_map(name, table, width, seed)
        assert isinstance(change, LinearMap)
        return change.left

    return made


FROM_TABLE = {
    "random": _of_table("project"),
    "coordinates": _of_table("coordinates"),
    "embedding": _of_table("truncate"),
}
"""Bases that the embedding table alone gives: random (as in the notebook), its strongest coordinates, its widest directions."""


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
"""Bases from a calibration pass: widest directions of the stream, and of what its norms make of it (the default)."""

LEARNED = "learned"  # begins as `normalised`, see dimscope.narrowing.learning
BASES = (*FROM_TABLE, *FROM_TEXT, LEARNED)


def make_basis(
    name: str, known: TableSummary | Calibration, width: int, *, centred: bool, seed: int = 0
) -> Float[Tensor, "d k"]:
    """A basis by its name, from the table or the calibration that it needs, for norms with or without a mean."""
    kept = width - centred
    if isinstance(known, TableSummary):
        return fitted(FROM_TABLE[name](known, kept, seed), centred)
    return fitted(FROM_TEXT["normalised" if name == LEARNED else name](known, kept), centred)


def fitted(directions: Float[Tensor, "d _"], centred: bool) -> Float[Tensor, "d k"]:
    """Orthonormal columns with the span of the given ones; differentiable.

    For centred norms of k - 1 directions k columns: the directions, made orthogonal to the ones of R^d, onto a basis of
    what is orthogonal to the ones of R^k. P^T x has mean zero then, and P does not see the mean of x.
    """
    if not centred:
        return torch.linalg.qr(directions)[0]
    kept = directions.shape[1]
    return _without_mean(directions) @ _without_mean(torch.eye(kept + 1).to(directions)[:, :kept]).T


def directions_of(basis: Float[Tensor, "d k"], centred: bool) -> Float[Tensor, "d _"]:
    """The directions from which `fitted` makes a basis again."""
    return basis @ _without_mean(torch.eye(basis.shape[1]).to(basis)[:, :-1]) if centred else basis


def _without_mean(directions: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
    # QR completes what the ones make dependent, as where the given directions span them.
    return torch.linalg.qr(torch.cat([directions.new_ones(len(directions), 1), directions], dim=1))[0][:, 1:]


def tied_to(basis: Float[Tensor, "d k"], gain: Float[Tensor, " d"]) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
    """The basis of the same span in which one table serves both sides best, and the gain of the final norm there.

    The head is E diag(g) P. In the eigenvectors R of P^T diag(g) P = R diag(c) R^T it is E P R diag(c), the input table
    times a gain, but for what diag(g) turns out of the span: nothing at full width, nor where all gains are alike.
    """
    values, vectors = torch.linalg.eigh(basis.T @ (gain[:, None] * basis))
    return basis @ vectors, values


def check_basis(name: str) -> None:
    """Raises InvalidArgument for an unknown basis."""
    if name not in BASES:
        raise InvalidArgument(f"`bases` must be {', '.join(BASES)}, got {name!r}")
