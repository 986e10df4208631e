"""Whose number is it? The rows of a table that a number is about: all of them, the trained ones, one per group of copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import polars as pl
import torch

from dimscope.checkpoints.vocabulary import CATEGORIES
from dimscope.geometry.dimension import participation_ratio
from dimscope.geometry.metrics import PARTICIPATION_RATIO
from dimscope.geometry.spectrum import spectrum
from dimscope.studies.embedding.context import copy_ids
from dimscope.studies.embedding.source import EmbeddingSource, TableSide
from dimscope.vectors.moments import Moments, moments, subtract
from dimscope.vectors.table import VectorTable

Rows = Literal["trained", "all", "distinct"]
UNTRAINABLE = ("beyond", "unreachable")  # categories of rows that no text can have trained
COPIES, UNTRAINED = "copies", "untrained"

INFLUENCE = {
    "table": pl.String, "left_out": pl.String, "n_tokens": pl.Int64, "metric": pl.String, "value": pl.Float64,
    "value_all": pl.Float64,
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class RowSet:
    """Rows of one table.

    Attributes:
        table_name: The name of the table in result tables: "input", "output" or "vectors".
        rows: Which rows: "trained" are those that text can have trained and that do not look under-trained; "distinct"
            are one row per group of near-duplicates.
        table: The table, with all other rows excluded.
        moments: Its moments.
    """

    table_name: str
    rows: Rows
    table: VectorTable
    moments: Moments


def row_sets(source: EmbeddingSource, duplicates: pl.DataFrame | None = None) -> list[RowSet]:
    """Return the populations of every table of a source; vectors have no untrained rows.

    Args:
        source: The model or the vectors.
        duplicates: The table `duplicates` of the leading table. None leaves the distinct rows out.
    """
    sets: list[RowSet] = []
    for side in source.sides:
        if source.checkpoint is not None:
            sets.append(_without(side, "trained", untrained_ids(source)))
        sets.append(RowSet(side.name, "all", side.table, side.moments))
        if duplicates is not None and side.name == source.side:
            sets.append(_without(side, "distinct", copy_ids(duplicates)))
    return sets


def per_population(populations: Sequence[RowSet], frame: Callable[[RowSet], pl.DataFrame]) -> pl.DataFrame:
    """Return a frame for every population; populations of the same rows share one computation."""
    computed: dict[tuple[str, frozenset[int]], pl.DataFrame] = {}
    frames = []
    for population in populations:
        key = (population.table_name, population.table.excluded)
        if key not in computed:
            computed[key] = frame(population)
        frames.append(computed[key].with_columns(rows=pl.lit(population.rows)))
    return pl.concat(frames)


def untrained_ids(source: EmbeddingSource) -> list[int]:
    """Return the rows that look under-trained, or that no text can have trained."""
    table = source.table
    used = [i for i in range(table.n_rows) if i not in table.excluded]
    flagged = {used[position] for position in source.untrained.flagged.nonzero()[0].tolist()}
    return sorted(flagged | {i for i in used if source.vocabulary.tokens[i].category in UNTRAINABLE})


def _without(side: TableSide, rows: Rows, ids: Sequence[int]) -> RowSet:
    """Return the rows of a table without some; their moments are subtracted, so that no second pass is needed."""
    left = [i for i in ids if i not in side.table.excluded]
    if not left or len(left) >= side.table.n_used - 1:  # too few rows would be left to measure
        return RowSet(side.name, rows, side.table, side.moments)
    table = replace(side.table, excluded=side.table.excluded | frozenset(left))
    return RowSet(side.name, rows, table, subtract(side.moments, moments_of_rows(side.table, left)))


def moments_of_rows(table: VectorTable, ids: Sequence[int]) -> Moments:
    """Compute the moments of some rows in float64."""
    parts = torch.tensor(sorted(ids)).split(8192)
    return moments((table.rows(part) for part in parts), dtype=torch.float64)


def influence_frame(source: EmbeddingSource, duplicates: pl.DataFrame) -> pl.DataFrame:
    """Return what the participation ratio becomes without each category of rows, the untrained rows and the copies."""
    side, frames = source.sides[0], []
    whole = participation_ratio(spectrum(side.moments, centred=True))
    for name, ids in _groups(source, duplicates):
        kept = _without(side, "all", ids)
        if kept.table is not side.table:
            value = participation_ratio(spectrum(kept.moments, centred=True))
            n = side.table.n_used - kept.table.n_used
            frames.append((side.name, name, n, PARTICIPATION_RATIO, value, whole))
    return pl.DataFrame(frames, schema=INFLUENCE, orient="row").fill_nan(None)


def _groups(source: EmbeddingSource, duplicates: pl.DataFrame) -> Iterator[tuple[str, list[int]]]:
    """Yield names and ids of the rows that may be left out: every category but the ordinary one."""
    tokens = source.vocabulary.tokens
    for category in CATEGORIES[1:]:
        yield category, [token.id for token in tokens if token.category == category]
    yield UNTRAINED, untrained_ids(source) if source.checkpoint is not None else []
    yield COPIES, copy_ids(duplicates)
