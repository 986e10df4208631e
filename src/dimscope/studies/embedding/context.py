"""The rows of the embedding tables that the page speaks of."""

from typing import Any

import polars as pl

from dimscope.page.section import Tables

NAMES = {"input": "input table", "output": "output table", "vectors": "vectors"}
"""What the page calls each table, in the order in which it shows them."""


def measure(tables: Tables, metric: str, preprocess: str | None = None) -> dict[str, Any] | None:
    """Return the row of measures.parquet for this metric of the first table, or None where it was not measured."""
    if "measures" not in tables:
        return None
    rows = _of_table(tables["measures"].filter(pl.col("metric") == metric), None)
    if preprocess is not None:
        rows = rows.filter(pl.col("preprocess") == preprocess)
    # By default the page speaks of the centred table.
    rows = rows.sort(pl.col("preprocess") != "centred", maintain_order=True)
    return rows.row(0, named=True) if rows.height and rows["value"][0] is not None else None


def dimension(tables: Tables, metric: str, table: str | None = None) -> dict[str, Any] | None:
    """Return the row of dimensions.parquet for this metric of a centred table, or None where it was not measured."""
    if "dimensions" not in tables:
        return None
    frame = tables["dimensions"].filter(preprocess="centred")
    rows = _of_table(frame, table).filter(metric=metric)
    return rows.row(0, named=True) if rows.height and rows["value"][0] is not None else None


def explained_variance(tables: Tables) -> list[float]:
    """Return the share of variance of each component of the first table, centred, or nothing without a spectrum."""
    if "spectrum" not in tables:
        return []
    rows = _of_table(tables["spectrum"].filter(preprocess="centred"), None).sort("index")
    return rows["explained_variance_ratio"].to_list()


def _of_table(frame: pl.DataFrame, table: str | None) -> pl.DataFrame:
    """Return the rows about a table, by default the first one that the page shows."""
    sides = [table] if table is not None else table_sides(frame)
    return frame.filter(pl.col("table") == sides[0]) if sides else frame


def table_sides(frame: pl.DataFrame) -> list[str]:
    """Return which tables a frame measures: ["input"], ["input", "output"] for an untied model, or ["vectors"]."""
    return [side for side in NAMES if (frame["table"] == side).any()]
