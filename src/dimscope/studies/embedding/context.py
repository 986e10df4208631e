"""The rows of the embedding tables that the page speaks of."""

from typing import Any

import polars as pl

from dimscope.geometry.metrics import CHANCE_PARTICIPATION_RATIO, PARTICIPATION_RATIO
from dimscope.page.section import Tables
from dimscope.page.wording import against

NAMES = {"input": "input table", "output": "output table", "vectors": "vectors"}
"""What the page calls each table, in the order in which it shows them."""


LEADING = ("trained", "all")
"""The rows that the page speaks of, in order of preference."""


def measure(
    tables: Tables, metric: str, preprocess: str | None = None, rows: str | None = None
) -> dict[str, Any] | None:
    """Return the row of measures.parquet for this metric of the first table, or None where it was not measured."""
    if "measures" not in tables:
        return None
    part = of_rows(of_table(tables["measures"].filter(pl.col("metric") == metric)), rows)
    if preprocess is not None:
        part = part.filter(pl.col("preprocess") == preprocess)
    # By default the page speaks of the centred table.
    return _first(part.sort(pl.col("preprocess") != "centred", maintain_order=True))


def dimension(tables: Tables, metric: str, table: str | None = None, rows: str | None = None) -> dict[str, Any] | None:
    """Return the row of dimensions.parquet for this metric of a centred table, or None where it was not measured."""
    if "dimensions" not in tables:
        return None
    frame = tables["dimensions"].filter(preprocess="centred", metric=metric)
    return _first(of_rows(of_table(frame, table), rows))


def participation_ratio_against(tables: Tables, row: dict[str, Any]) -> str:
    """Compare a participation ratio, given as its row of dimensions.parquet, with the strictest null that was measured."""
    chance = None
    if "measures" in tables:
        chance = _first(
            tables["measures"].filter(metric=CHANCE_PARTICIPATION_RATIO, table=row["table"], rows=row["rows"])
        )
    if chance is None:
        return against(row["value"], row["null_gaussian"])
    return against(row["value"], chance["value"], "a random table with the same norms and column variances")


def _first(frame: pl.DataFrame) -> dict[str, Any] | None:
    return frame.row(0, named=True) if frame.height and frame["value"][0] is not None else None


def explained_variance(tables: Tables) -> list[float]:
    """Return the share of variance of each component of all rows of the first table, centred, or nothing."""
    if "spectrum" not in tables:
        return []
    rows = of_rows(of_table(tables["spectrum"].filter(preprocess="centred")), "all").sort("index")
    return rows["explained_variance_ratio"].to_list()


def of_table(frame: pl.DataFrame, table: str | None = None) -> pl.DataFrame:
    """Return the part about a table, by default the first one that the page shows."""
    sides = [table] if table is not None else table_sides(frame)
    return frame.filter(pl.col("table") == sides[0]) if sides else frame


def of_rows(frame: pl.DataFrame, rows: str | None = None) -> pl.DataFrame:
    """Return the part about some rows, by default those that lead: the trained ones, else all."""
    present = [name for name in LEADING if (frame["rows"] == name).any()]
    chosen = rows or (present[0] if present else "all")
    return frame.filter(pl.col("rows") == chosen)


def rows_phrase(tables: Tables, table: str | None = None) -> str:
    """Return the rows that lead in words: "the 4,061 trained rows", or "all 4,224 rows" where none is left out."""
    lead = dimension(tables, PARTICIPATION_RATIO, table)
    whole = dimension(tables, PARTICIPATION_RATIO, table, "all")
    if lead is None or whole is None:
        return "the rows"
    if lead["n_tokens"] == whole["n_tokens"]:
        return f"all {whole['n_tokens']:,} rows"
    return f"the {lead['n_tokens']:,} {lead['rows']} rows"


def table_sides(frame: pl.DataFrame) -> list[str]:
    """Return which tables a frame measures: ["input"], ["input", "output"] for an untied model, or ["vectors"]."""
    return [side for side in NAMES if (frame["table"] == side).any()]


def copy_ids(duplicates: pl.DataFrame) -> list[int]:
    """Return all rows of the groups of near-duplicates but the first of each group."""
    return duplicates.filter(pl.col("id") > pl.col("id").min().over("group"))["id"].to_list()
