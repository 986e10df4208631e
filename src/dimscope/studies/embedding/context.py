"""The rows of the embedding tables that the page speaks of."""

from typing import Any

import polars as pl

from dimscope.page.section import Tables


def measure(tables: Tables, metric: str, preprocess: str | None = None, table: str = "input") -> dict[str, Any] | None:
    """Return the row of measures.parquet for this metric, or None where it was not measured."""
    if "measures" not in tables:
        return None
    rows = tables["measures"].filter((pl.col("metric") == metric) & (pl.col("table") == table))
    if preprocess is not None:
        rows = rows.filter(pl.col("preprocess") == preprocess)
    # Unless told otherwise the page speaks of the centred table.
    rows = rows.sort(pl.col("preprocess") != "centred", maintain_order=True)
    return rows.row(0, named=True) if rows.height and rows["value"][0] is not None else None


def dimension(tables: Tables, metric: str, preprocess: str = "centred", table: str = "input") -> dict[str, Any] | None:
    """Return the row of dimensions.parquet for this metric, or None where it was not measured."""
    if "dimensions" not in tables:
        return None
    frame = tables["dimensions"]
    rows = frame.filter(
        (pl.col("metric") == metric) & (pl.col("preprocess") == preprocess) & (pl.col("table") == table)
    )
    return rows.row(0, named=True) if rows.height and rows["value"][0] is not None else None


def explained_variance(tables: Tables) -> list[float]:
    """Return the share of variance of each component of the centred input table, or nothing without a spectrum."""
    if "spectrum" not in tables:
        return []
    rows = tables["spectrum"].filter((pl.col("table") == "input") & (pl.col("preprocess") == "centred")).sort("index")
    return rows["explained_variance_ratio"].to_list()


def table_sides(frame: pl.DataFrame) -> list[str]:
    """Return which tables a frame measures: ["input"], or ["input", "output"] for an untied model."""
    return [side for side in ("input", "output") if (frame["table"] == side).any()]
