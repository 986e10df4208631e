"""Which k directions of the residual stream are kept: orthonormal bases, from a table alone or from a calibration pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.errors import InvalidArgument
from dimscope.interventions.maps import LinearMap
from dimscope.interventions.perturbations import TableSummary, make_map
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

BASES = (*FROM_TABLE, *FROM_TEXT)


def check_basis(name: str) -> None:
    """Raises InvalidArgument for an unknown basis."""
    if name not in BASES:
        raise InvalidArgument(f"--basis is one of {', '.join(BASES)}, not {name!r}")
