"""Neighbors of a query: a token, an id, a phrase, or an expression such as `king - man + woman`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.checkpoints.vocabulary import Vocabulary
from dimscope.errors import InvalidArgument
from dimscope.geometry.neighbors import NeighborIndex, NeighborMetric, build_index
from dimscope.geometry.spectrum import principal_components
from dimscope.studies.embedding import tables
from dimscope.studies.embedding.source import EmbeddingSource
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
    """Read a query. ` + ` and ` - ` between spaces make an expression; `#123` is the row 123.

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
    """Return the signed sum of the terms, float64; the rows of a term are averaged, or summed.

    The sum grows with the number of tokens and drifts towards their common mean; it matters for Euclidean neighbors.
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


def project(moments: Moments, rows: Float[Tensor, "n d"], k: int) -> Projection:
    """Project rows onto the k leading components of the centred table that has these moments."""
    components = principal_components(moments, k)
    return Projection((rows - moments.mean.float()) @ components.float(), moments.mean, components)


@dataclass(frozen=True, slots=True, eq=False)
class SearchSpace:
    """Where neighbors are searched: all dimensions, or the leading components."""

    name: str
    index: NeighborIndex
    projection: Projection | None = None

    def locate(self, vector: Float[Tensor, " d"]) -> Float[Tensor, " k"]:
        """Return the coordinates of a vector in this space."""
        return vector if self.projection is None else self.projection.apply(vector)


def search_spaces(
    source: EmbeddingSource, components: int, metric: NeighborMetric = "cosine", name: str | None = None
) -> list[SearchSpace]:
    """Return all dimensions of a source, and its first components where there are to be some.

    Args:
        source: The vectors to search.
        components: Dimensions of the projection; 0 leaves it out.
        metric: The similarity or distance.
        name: What tables call the space of all dimensions; by default with their number.
    """
    ids, rows = source.loaded
    whole = source.index if metric == "cosine" else build_index(ids, rows, metric)
    spaces = [SearchSpace(name or f"all {source.table.dim} dimensions", whole)]
    if components:
        projection = project(source.moments, rows, components)
        index = build_index(ids, projection.rows, metric)
        spaces.append(SearchSpace(f"first {components} components", index, projection))
    return spaces


def find_neighbors(
    query: Query, vector: Float[Tensor, " d"], spaces: Sequence[SearchSpace], vocabulary: Vocabulary, k: int
) -> pl.DataFrame:
    """Return the k nearest tokens in each space, other than those of the query itself.

    Returns:
        Columns query, space, rank, id, label, category, and cosine or distance.
    """
    own, frames = set(query.ids), []
    for space in spaces:
        ids, scores = space.index.search(space.locate(vector)[None], k + len(own))
        nearest = [(i, s) for i, s in zip(ids[0].tolist(), scores[0].tolist(), strict=True) if i not in own][:k]
        tokens = [vocabulary.tokens[i] for i, _ in nearest]
        rows = [
            (query.text, space.name, rank, token.id, token.label, token.category, score)
            for rank, (token, (_, score)) in enumerate(zip(tokens, nearest, strict=True), 1)
        ]
        column = "distance" if space.index.metric == "euclidean" else "cosine"
        frames.append(pl.DataFrame(rows, schema=NEIGHBORS | {column: pl.Float64}, orient="row"))
    return pl.concat(frames)


def neighbor_tables(
    source: EmbeddingSource,
    texts: str | Sequence[str],
    *,
    k: int = 20,
    metric: NeighborMetric = "cosine",
    components: int | None = None,
    combine: Combine = "mean",
) -> dict[str, pl.DataFrame]:
    """Return the neighbors of each query in all dimensions and in the first components, as one table per query.

    Args:
        source: The vectors to search, and the names of their rows.
        texts: The queries; a single string is one query.
        k: Neighbors per query and space.
        metric: The similarity or distance.
        components: Dimensions of the projection: 10 by default, or d where that is less; 0 leaves the projection out.
        combine: How the tokens of a phrase are combined.

    Raises:
        InvalidArgument: A query names an excluded row, or `parse_query` refuses it.
    """
    table = source.table
    if components is None:
        components = min(tables.COMPONENTS, table.dim)
    if not 0 <= components <= table.dim:
        raise InvalidArgument(f"`components` must be 0 to {table.dim}, got {components}")
    queries = [parse_query(text, source.vocabulary) for text in ([texts] if isinstance(texts, str) else texts)]
    if bad := sorted(table.excluded & {i for query in queries for i in query.ids}):
        raise InvalidArgument(f"row {bad[0]} holds NaN or Inf, so it has no neighbors")
    spaces = search_spaces(source, components, metric)
    return {
        query.text: find_neighbors(query, query_vector(query, table, combine), spaces, source.vocabulary, k)
        for query in queries
    }
