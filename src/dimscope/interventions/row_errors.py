"""Errors measured on the rows themselves: of maps without an exact form, after rounding, and as a model sees them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.interventions.maps import RowMap

if TYPE_CHECKING:
    from dimscope.vectors.table import VectorTable

Norm = Callable[[Float[Tensor, "n d"]], Float[Tensor, "n d"]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """||x - x'||_F / ||x||_F over some rows, and its standard error where they are a sample."""

    value: float
    stderr: float


@dataclass(frozen=True, slots=True)
class RowErrors:
    """What a map does to rows, on a sample of them: relative errors, and how rows turn."""

    n: int
    plain: Ratio
    cast: Ratio  # after rounding to the dtype of the model
    normed: Ratio | None  # of the rows after the first norm of the model, None where it has none
    cosine: float  # between a row and what it becomes; the mean over rows that are not all zeros


@torch.no_grad()
def row_errors(
    rows: Float[Tensor, "n d"], ids: Int[Tensor, " n"], change: RowMap, dtype: torch.dtype, norm: Norm | None = None
) -> RowErrors:
    """Return the errors of a map on some rows.

    Args:
        rows: The rows.
        ids: Their token ids.
        change: The map.
        dtype: Dtype of the model.
        norm: The first norm of the model, which gets the rows in that dtype.
    """
    changed = change(rows if rows.dtype == torch.float64 else rows.float(), ids)
    cast, stored = changed.to(dtype), rows.to(dtype)
    return RowErrors(
        n=len(rows),
        plain=_ratio(rows, changed),
        cast=_ratio(rows, cast),
        normed=None if norm is None else _ratio(norm(stored), norm(cast)),
        cosine=float(_cosines(rows.double(), changed.double()).nanmean()),
    )


def _ratio(before: Float[Tensor, "n d"], after: Float[Tensor, "n d"]) -> Ratio:
    exact, changed = before.double().cpu(), after.double().cpu()
    energies, errors = exact.square().sum(dim=1), (exact - changed).square().sum(dim=1)
    whole = float(energies.sum())
    if not whole:
        return Ratio(0.0, 0.0)
    share = float(errors.sum()) / whole
    # Delta method for a ratio of sums, then for its root.
    spread = math.sqrt(float((errors - share * energies).square().sum())) / whole
    return Ratio(math.sqrt(share), spread / (2 * math.sqrt(share)) if share else 0.0)


def _cosines(before: Float[Tensor, "n d"], after: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Return cosines by row; NaN where one of the two rows is all zeros."""
    product = before.norm(dim=1) * after.norm(dim=1)
    return torch.where(product > 0, (before * after).sum(dim=1) / product, math.nan)


def token_errors(table: VectorTable, change: RowMap) -> pl.DataFrame:
    """Return the error of every token: id, norm of its row, norm of the error, cosine (null for rows of zeros)."""
    parts = []
    for ids, rows in table.blocks():
        changed = change(rows, ids).double()
        exact = rows.double()
        columns = {
            "id": ids, "norm": exact.norm(dim=1), "error": (exact - changed).norm(dim=1), "cosine": _cosines(exact, changed),
        }  # fmt: skip
        parts.append(pl.DataFrame({name: column.numpy() for name, column in columns.items()}))
    return pl.concat(parts).with_columns(pl.col("cosine").fill_nan(None))
