"""A row of the tables of the layers study: its columns, the pass that it belongs to, and how it is filled."""

import math
from dataclasses import dataclass
from typing import Any

import polars as pl
from torch import Tensor

from dimscope.geometry.half_samples import Replicated
from dimscope.geometry.spectrum import Spectrum
from dimscope.vectors.moments import Moments

LAYERS = {
    "model": pl.String, "text": pl.String, "condition": pl.String, "seed": pl.Int64, "site": pl.String, "layer": pl.Int64,
    "preprocess": pl.String, "centred": pl.Boolean, "metric": pl.String, "scale": pl.Int64, "value": pl.Float64,
    "stderr": pl.Float64, "low": pl.Float64, "high": pl.Float64, "halves": pl.List(pl.Float64), "null": pl.Float64,
    "gaussian": pl.Float64, "share_of_dim": pl.Float64, "share_of_rank": pl.Float64, "share_of_null": pl.Float64,
    "n_tokens": pl.Int64, "n_dropped": pl.Int64, "dim": pl.Int64,
}  # fmt: skip
PREDICTIONS = {
    "model": pl.String, "text": pl.String, "condition": pl.String, "seed": pl.Int64, "metric": pl.String,
    "value": pl.Float64, "stderr": pl.Float64, "low": pl.Float64, "high": pl.Float64, "n_tokens": pl.Int64,
}  # fmt: skip
TYPES = {"seed": pl.Int64, "layer": pl.Int64, "n_tokens": pl.Int64}  # of columns whose type polars would guess
FEWEST = 3  # rows that a dimension needs
RAW = "raw"  # states as they are

Rows = Tensor | Moments  # few rows themselves, many as their moments


@dataclass(frozen=True, slots=True)
class Pass:
    """The pass that a row belongs to.

    Attributes:
        model: Title of the model.
        text: Name of the text.
        condition: "real", "shuffled", "shuffled across" or "random weights".
        draw: Number of the random draw, from 0 on.
        seed: The same as a column of the tables: the seed of the study plus the draw; None where nothing is random.
    """

    model: str
    text: str
    condition: str
    draw: int = 0
    seed: int | None = None

    def row(self, **values: Any) -> dict[str, Any]:
        """Return a row of a table about this pass."""
        return {"model": self.model, "text": self.text, "condition": self.condition, "seed": self.seed, **values}

    def with_columns(self, frame: pl.DataFrame, **constants: Any) -> pl.DataFrame:
        """Return a frame about this pass, with its columns and other constant ones."""
        literals = {name: pl.lit(value, dtype=TYPES.get(name)) for name, value in self.row(**constants).items()}
        return frame.with_columns(**literals)


@dataclass(frozen=True, slots=True)
class Preprocessed:
    """The spectrum of the rows of a site after one preprocessing, and how many rows were dropped."""

    preprocess: str
    spectrum: Spectrum
    n_dropped: int = 0


def row(metric: str, value: float, n: int, dim: int, **columns: Any) -> dict[str, Any]:
    """Return a row of the table; `columns` override those of raw and centred rows."""
    usual = {"preprocess": RAW, "centred": True, "null": None, "n_dropped": 0}
    return usual | {"metric": metric, "value": float(value), "n_tokens": n, "dim": dim} | columns


def dimension_row(
    metric: str, value: float, n: int, dim: int, null: float | None, *, rank: float | None = None, **columns: Any
) -> dict[str, Any]:
    """Return a row about a number of dimensions, also as a share of the width, of the rank and of white noise."""
    shares = {
        "share_of_dim": value / dim, "share_of_rank": _ratio(value, rank), "share_of_null": _ratio(value, null)
    }  # fmt: skip
    return row(metric, value, n, dim, null=null, **shares, **columns)


def _ratio(value: float, whole: float | None) -> float | None:
    return value / whole if whole and math.isfinite(whole) else None


def with_error(measured: dict[str, Any], number: Replicated, *, interval: bool = True) -> dict[str, Any]:
    """Return a row with the error of its value, and with its 95% interval unless the value depends on the sample size."""
    error = number.interval()
    ends = {"low": error.low, "high": error.high} if interval else {}
    return measured | {"stderr": error.stderr, "halves": list(number.differences) or None} | ends
