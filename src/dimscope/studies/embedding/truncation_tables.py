"""The table `truncation`: what fewer dimensions keep of the neighbours and similarities of a sample of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.geometry.metrics import NEIGHBOR_OVERLAP, SIMILARITY_CORRELATION
from dimscope.geometry.truncation import Kept, kept_dimensions, standard_error
from dimscope.studies.embedding.populations import RowSet
from dimscope.vectors.table import VectorTable

QUERIES, CANDIDATES, FITTED = 500, 10_000, 10_000  # rows at most: with them 150,000 x 896 takes seconds
LEAST = 4  # rows for each nearest neighbour: with fewer, nearly all rows are neighbours

SCHEMA = {
    "table": pl.String, "rows": pl.String, "method": pl.String, "size": pl.Int64, "metric": pl.String, "seed": pl.Int64,
    "value": pl.Float64, "stderr": pl.Float64, "n_tokens": pl.Int64, "neighbors": pl.Int64, "candidates": pl.Int64,
    "fitted": pl.Int64,
}  # fmt: skip


def truncation_frame(population: RowSet, copies: Sequence[int], neighbors: int, seed: int) -> pl.DataFrame:
    """Return overlap and rank correlation by method and size; no rows where the table is too small.

    Half of the rows, at most 10,000, are for the fit of PCA. Queries and neighbours are among the others.

    Args:
        population: The rows that lead.
        copies: Rows to leave out: the order of equal rows among the neighbours is arbitrary.
        neighbors: Nearest neighbours of a query.
        seed: Seed of the sample and of the random methods.
    """
    table = replace(population.table, excluded=population.table.excluded | frozenset(copies))
    n_fitted = min(FITTED, table.n_used // 2)
    n_rows = min(CANDIDATES, table.n_used - n_fitted)
    if n_rows < max(LEAST * neighbors, 2) or table.dim < 2:
        return pl.DataFrame(schema=SCHEMA)
    sample = _sample(table, n_fitted + n_rows, seed)
    n_queries = min(QUERIES, n_rows)
    kept = kept_dimensions(sample[n_fitted:], sample[:n_fitted], n_queries, neighbors, seed)
    head = population.table_name, population.rows
    tail = n_queries, neighbors, n_rows, n_fitted
    rows = [(*head, *row, *tail) for one in kept for row in _rows(one)]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _rows(kept: Kept) -> list[tuple[str, int, str, int | None, float, float]]:
    measured = ((NEIGHBOR_OVERLAP, kept.overlap), (SIMILARITY_CORRELATION, kept.correlation))
    return [
        (kept.method, kept.size, metric, kept.seed, float(values.double().mean()), standard_error(values))
        for metric, values in measured
    ]


def _sample(table: VectorTable, n: int, seed: int) -> Float[Tensor, "n d"]:
    """Draw rows in random order, divided by the largest of their numbers."""
    used = torch.tensor([i for i in range(table.n_rows) if i not in table.excluded])
    rows = table.rows(used[torch.randperm(len(used), generator=torch.Generator().manual_seed(seed))[:n]])
    return (rows.double() / max(float(rows.abs().max()), torch.finfo(torch.float64).tiny)).float()
