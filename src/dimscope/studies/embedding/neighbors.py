"""Neighbours of a query: a token, an id, a phrase, or an expression such as `king - man + woman`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.vocabulary import Vocabulary, read_vocabulary
from dimscope.errors import InvalidArgument
from dimscope.geometry.neighbors import NeighborIndex, NeighborMetric, build_index
from dimscope.geometry.spectrum import moments_of, principal_components
from dimscope.vectors.moments import Moments
from dimscope.vectors.table import VectorTable

Combine = Literal["mean", "sum"]
NEIGHBORS = {
    "query": pl.String,
    "space": pl.String,
    "rank": pl.Int64,
    "id": pl.Int64,
    "label": pl.String,
    "category": pl.String,
}


@dataclass(frozen=True, slots=True)
class Query:
    """Signed terms, each a list of token ids whose rows are combined."""

    text: str
    terms: tuple[tuple[int, tuple[int, ...]], ...]  # (sign, token ids)

    @property
    def ids(self) -> tuple[int, ...]:
        """Return the ids of all terms."""
        return tuple(i for _, ids in self.terms for i in ids)


def parse_query(text: str, vocabulary: Vocabulary) -> Query:
    """Reads a query. ` + ` and ` - ` between spaces make an expression; `#123` is the row 123.

    A text alone is taken as typed, leading space and all. In an expression, where spaces separate, a word means the
    token with a leading space if there is one (`king` is ` king`), since that is how words stand in running text.

    Raises InvalidArgument for an empty query or a row outside the table, TokenizerMissing for text without tokenizer.
    """
    parts = re.split(r" ([+-]) ", text)
    alone = len(parts) == 1
    signs = [1, *(1 if sign == "+" else -1 for sign in parts[1::2])]
    terms = tuple(
        (sign, _term_ids(part if alone else part.strip(), vocabulary, alone))
        for sign, part in zip(signs, parts[::2], strict=True)
    )
    if any(not ids for _, ids in terms):
        raise InvalidArgument(f"the query {text!r} has an empty term")
    return Query(text, terms)


def _term_ids(term: str, vocabulary: Vocabulary, alone: bool) -> tuple[int, ...]:
    if match := re.fullmatch(r"#(\d+)", term):
        row = int(match[1])
        if row >= len(vocabulary.tokens):
            raise InvalidArgument(f"the table has rows 0 to {len(vocabulary.tokens) - 1}; there is no row {row}")
        return (row,)
    spaced = vocabulary.ids(f" {term}") if not alone and term else []
    return tuple(spaced if len(spaced) == 1 else vocabulary.ids(term))


def query_vector(query: Query, table: VectorTable, combine: Combine = "mean") -> Float[Tensor, " d"]:
    """The signed sum of the terms, float64; the rows of a term are averaged, or summed.

    The sum grows with the number of tokens and drifts towards their common mean; it matters for Euclidean neighbours.
    """
    vector = torch.zeros(table.dim, dtype=torch.float64)
    for sign, ids in query.terms:
        rows = table.rows(torch.tensor(ids)).double()
        vector += sign * (rows.mean(dim=0) if combine == "mean" else rows.sum(dim=0))
    return vector


@dataclass(frozen=True, slots=True)
class Projection:
    """Rows in the leading principal components, and the map that takes other vectors there."""

    rows: Float[Tensor, "n k"]
    mean: Float[Tensor, " d"]
    components: Float[Tensor, "d k"]

    def apply(self, vector: Float[Tensor, " d"]) -> Float[Tensor, " k"]:
        """Return the coordinates of another vector."""
        return (vector.double() - self.mean) @ self.components


def project(of: Moments, rows: Float[Tensor, "n d"], k: int) -> Projection:
    """Rows in the k leading components of the centred table whose moments are `of`."""
    components = principal_components(of, k)
    return Projection((rows - of.mean.float()) @ components.float(), of.mean, components)


def find_neighbors(
    query: Query, vector: Float[Tensor, " d"], index: NeighborIndex, vocabulary: Vocabulary, k: int, space: str
) -> pl.DataFrame:
    """The k nearest tokens other than those of the query itself: query, space, rank, id, label, category, similarity."""
    own = set(query.ids)
    ids, scores = index.search(vector[None], k + len(own))
    found = [(i, s) for i, s in zip(ids[0].tolist(), scores[0].tolist(), strict=True) if i not in own][:k]
    column = "distance" if index.metric == "euclidean" else "cosine"
    tokens = [vocabulary.tokens[i] for i, _ in found]
    return pl.DataFrame(
        {
            "query": [query.text] * len(found),
            "space": [space] * len(found),
            "rank": range(1, len(found) + 1),
            "id": [i for i, _ in found],
            "label": [t.label for t in tokens],
            "category": [t.category for t in tokens],
            column: [s for _, s in found],
        },
        schema=NEIGHBORS | {column: pl.Float64},
    )


def neighbor_tables(
    checkpoint: Checkpoint,
    table: VectorTable,
    texts: str | Sequence[str],
    *,
    k: int = 20,
    metric: NeighborMetric = "cosine",
    components: int | None = None,
    combine: Combine = "mean",
) -> dict[str, pl.DataFrame]:
    """Return the neighbours of each query in all dimensions and in the first components, as one table per query.

    Args:
        checkpoint: The model, for its vocabulary.
        table: The vectors to search.
        texts: The queries; a single string is one query.
        k: Neighbours per query and space.
        metric: The similarity or distance.
        components: Dimensions of the projection: 10 by default, or d where that is less; 0 leaves the projection out.
        combine: How the tokens of a phrase are combined.

    Raises:
        InvalidArgument: A query names an excluded row, or `parse_query` refuses it.
    """
    if components is None:
        components = min(10, table.dim)
    if not 0 <= components <= table.dim:
        raise InvalidArgument(f"components go from 0 to {table.dim}, not {components}")
    vocabulary = read_vocabulary(checkpoint.source, table.n_rows)
    queries = [parse_query(text, vocabulary) for text in ([texts] if isinstance(texts, str) else texts)]
    if bad := sorted(table.excluded & {i for q in queries for i in q.ids}):
        raise InvalidArgument(f"row {bad[0]} holds NaN or Inf, so it has no neighbours")
    ids, rows = table.load()
    spaces: list[tuple[str, Projection | None, NeighborIndex]] = [
        (f"all {table.dim} dimensions", None, build_index(ids, rows, metric))
    ]
    if components:
        projected = project(moments_of(table), rows, components)
        spaces.append((f"first {components} components", projected, build_index(ids, projected.rows, metric)))
    results = {}
    for query in queries:
        vector = query_vector(query, table, combine)
        frames = [
            find_neighbors(query, vector if p is None else p.apply(vector), index, vocabulary, k, space)
            for space, p, index in spaces
        ]
        results[query.text] = pl.concat(frames)
    return results
