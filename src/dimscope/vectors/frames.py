"""N x d vectors from the columns of a frame or Parquet file: one column of lists, or all numeric columns."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor

from dimscope.errors import InvalidArgument
from dimscope.vectors.table import VectorTable

if TYPE_CHECKING:
    import polars as pl

    class _Column(Protocol):
        def to_numpy(self) -> np.ndarray: ...

    class Frame(Protocol):
        """What polars and pandas frames have in common."""

        @property
        def columns(self) -> Iterable[str]:
            """Return the names of the columns."""
            ...

        def __getitem__(self, name: str, /) -> _Column:
            """Return a column."""
            ...


LABEL = "label"  # the column of labels where there are several of strings
SPAN_BYTES = 256 << 20  # of a Parquet file that are decoded at once: a row group is decoded anew for every read


def is_frame(source: object) -> "TypeGuard[Frame]":
    """Return whether this is a polars or pandas frame; neither package is imported for it."""
    package = type(source).__module__.partition(".")[0]
    return package in ("polars", "pandas") and type(source).__name__ in ("DataFrame", "LazyFrame")


def table_from_frame(frame: "Frame", key: str | None) -> VectorTable:
    """Return the vectors of a polars or pandas frame, with its labels.

    Raises:
        InvalidArgument: for a frame without vectors, with several list columns and no `key`, or with ragged lists.
    """
    is_pandas = type(frame).__module__.startswith("pandas")
    return _table(_from_pandas(frame).lazy() if is_pandas else cast("pl.DataFrame", frame).lazy(), "frame", key)


def table_from_parquet(path: Path, key: str | None) -> VectorTable:
    """Return the vectors of a Parquet file, with its labels. At most 256 MiB of rows, or one row group, are decoded at once.

    Raises:
        InvalidArgument: as `table_from_frame`.
    """
    import polars as pl

    return _table(pl.scan_parquet(path, glob=False), str(path), key)


def _from_pandas(frame: "Frame") -> "pl.DataFrame":
    import polars as pl

    columns = {str(name): frame[name].to_numpy() for name in frame.columns}
    # Columns of lists or strings are arrays of objects, from which polars infers the type.
    return pl.DataFrame({name: v.tolist() if v.dtype == object else v for name, v in columns.items()}, strict=False)


def _table(frame: "pl.LazyFrame", label: str, key: str | None) -> VectorTable:
    import polars as pl

    schema = frame.collect_schema()
    columns = _vector_columns(schema, label, key)
    is_list = schema[columns[0]].is_nested()
    dtype = _common_float([_number_type(schema[name]) for name in columns])
    n_rows = int(frame.select(pl.len()).collect().item())
    if not n_rows:
        raise InvalidArgument(f"{label}: vectors must have at least one row, got a frame without rows")
    vectors = frame.select(columns)
    dim = _list_length(vectors, label) if is_list else len(columns)
    decode = _list_decoder(label, dim, dtype) if is_list else _column_decoder(dtype)
    per_span = max(1, SPAN_BYTES // (dim * dtype.itemsize))
    names = _labels(frame, schema)
    return VectorTable(n_rows, dim, str(dtype), _SpanReader(vectors, decode, per_span).read, labels=names)


def _vector_columns(schema: "pl.Schema", label: str, key: str | None) -> list[str]:
    """Return the one column of lists, or all numeric columns. Raises InvalidArgument where that is not clear."""
    lists = [name for name, dtype in schema.items() if dtype.is_nested() and _number_type(dtype).is_numeric()]
    if key is not None:
        if key not in lists:
            raise InvalidArgument(
                f"{label}: {key!r} is no column of lists of numbers; those are {', '.join(lists) or 'none'}"
            )
        return [key]
    if len(lists) > 1:
        raise InvalidArgument(
            f"{label}: several columns hold lists of numbers ({', '.join(lists)}); name one with `key`"
        )
    columns = lists or [name for name, dtype in schema.items() if dtype.is_numeric()]
    if not columns:
        raise InvalidArgument(
            f"{label}: no column of lists of numbers and no numeric columns; the columns are {_names(schema)}"
        )
    return columns


def _names(schema: "pl.Schema") -> str:
    return ", ".join(f"{name} ({dtype})" for name, dtype in list(schema.items())[:10]) or "none"


def _number_type(dtype: "pl.DataType") -> "pl.DataType":
    """Return the type of the numbers in a column: that of the elements for a column of lists."""
    return getattr(dtype, "inner", dtype)


def _common_float(dtypes: list[Any]) -> np.dtype:
    """Return float32 where it holds the numbers of all columns exactly, else float64."""
    import polars as pl

    narrow = {pl.Float32, pl.Int8, pl.Int16, pl.UInt8, pl.UInt16}
    half = getattr(pl, "Float16", None)
    return np.dtype(np.float32 if all(dtype in narrow or dtype == half for dtype in dtypes) else np.float64)


def _labels(frame: "pl.LazyFrame", schema: "pl.Schema") -> tuple[str, ...] | None:
    """Return the labels: of the column "label", or the only one of strings. Missing ones are empty strings."""
    import polars as pl

    strings = [name for name, dtype in schema.items() if dtype in (pl.String, pl.Categorical, pl.Enum)]
    name = LABEL if LABEL in strings else strings[0] if len(strings) == 1 else None
    if name is None:
        return None
    return tuple(frame.select(pl.col(name).cast(pl.String).fill_null("")).collect().to_series().to_list())


def _list_length(vectors: "pl.LazyFrame", label: str) -> int:
    first = vectors.head(1).collect().to_series()[0]
    if first is None or not len(first):
        raise InvalidArgument(f"{label}: row 0 holds no numbers")
    return len(first)


def _list_decoder(label: str, dim: int, dtype: np.dtype) -> "Callable[[pl.DataFrame, int], Tensor]":
    def decode(frame: "pl.DataFrame", start: int) -> Tensor:
        import polars as pl

        column = frame.to_series()
        column = column.arr.to_list() if column.dtype == pl.Array else column
        lengths = column.list.len().fill_null(0).to_numpy()
        if len(ragged := np.flatnonzero(lengths != dim)):
            i = int(ragged[0])
            raise InvalidArgument(
                f"{label}: vectors must all have the same length: row {start + i} has {lengths[i]} numbers, row 0 has {dim}"
            )
        # Numbers that are missing become NaN, so that their rows are found with the other non-finite ones.
        numbers = column.explode().cast(pl.Float32 if dtype == np.float32 else pl.Float64).fill_null(float("nan"))
        return torch.from_numpy(numbers.to_numpy().reshape(-1, dim).copy())

    return decode


def _column_decoder(dtype: np.dtype) -> "Callable[[pl.DataFrame, int], Tensor]":
    def decode(frame: "pl.DataFrame", start: int) -> Tensor:
        import polars as pl

        wide = pl.Float32 if dtype == np.float32 else pl.Float64
        numbers = frame.select(pl.all().cast(wide).fill_null(float("nan"))).to_numpy()
        return torch.from_numpy(np.array(numbers, dtype=dtype, order="C"))

    return decode


@dataclass(slots=True)
class _SpanReader:
    """Reads rows from a span of `size` rows that stays decoded until rows outside it are read."""

    frame: "pl.LazyFrame"
    decode: "Callable[[pl.DataFrame, int], Tensor]"
    size: int
    first: int = 0
    rows: Tensor = field(default_factory=lambda: torch.empty(0))

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` in the dtype of the table."""
        parts = []
        while start < stop:
            if not self.first <= start < self.first + len(self.rows):
                self.first = start // self.size * self.size
                self.rows = self.decode(self.frame.slice(self.first, self.size).collect(), self.first)
            end = min(stop, self.first + len(self.rows))
            parts.append(self.rows[start - self.first : end - self.first])
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)
