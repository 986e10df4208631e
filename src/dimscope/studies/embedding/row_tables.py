"""Tables about the rows of a source for the commands `tokens`, `pairs` and `correlate`."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.errors import InvalidArgument
from dimscope.geometry.correlation import correlated_blocks, correlation_matrix
from dimscope.geometry.neighbors import build_index
from dimscope.geometry.pairs import LEADING, connected_groups, pairs_within
from dimscope.geometry.spectrum import principal_components
from dimscope.studies.embedding import tables
from dimscope.studies.embedding.source import EmbeddingSource

LARGEST_MATRIX = 4096  # tokens
PROBED_ROWS = 256  # whose nearest neighbors bound the closest distance


def tokens_table(source: EmbeddingSource) -> pl.DataFrame:
    """Return every row with its token, norm, principal coordinates and under-trained score."""
    return tables.tokens_frame(source.vocabulary, source.table, source.moments, source.untrained)


def duplicates_table(source: EmbeddingSource) -> pl.DataFrame:
    """Return the groups of rows that are duplicates: within 1% of the median row norm of each other."""
    ids, rows = source.loaded
    pairs = pairs_within(rows, _leading(source), source.near, progress=True)
    return tables.duplicates_frame(connected_groups(pairs, len(rows)), ids, rows, source.vocabulary, source.near)


@dataclass(frozen=True, slots=True, eq=False)
class PairTables:
    """Pairs of rows within a radius.

    Attributes:
        pairs: Ids, labels and distance of each pair, nearest first.
        groups: The groups that the pairs form, as `duplicates_frame` gives them.
        radius: The largest distance of a pair.
        closest: The smallest distance between two rows; None for fewer than two rows.
    """

    pairs: pl.DataFrame
    groups: pl.DataFrame
    radius: float
    closest: float | None


def pair_tables(source: EmbeddingSource, radius: float | None) -> PairTables:
    """Return the pairs of rows within a radius, which is 1% of the mean row norm where it is None."""
    ids, rows = source.loaded
    if radius is None:
        radius = source.near
    within = pairs_within(rows, _leading(source), radius, progress=True)
    labels = pl.Series([token.label for token in source.vocabulary.tokens], dtype=pl.String)
    first, second = ids.numpy()[within.first], ids.numpy()[within.second]
    frame = pl.DataFrame({"first": first, "second": second, "distance": within.distance})
    frame = frame.with_columns(first_label=labels.gather(first), second_label=labels.gather(second)).sort(
        "distance", "first", "second"
    )
    closest = frame["distance"][0] if len(frame) else closest_distance(rows, _leading(source))
    groups = tables.duplicates_frame(connected_groups(within, len(rows)), ids, rows, source.vocabulary, radius)
    return PairTables(frame, groups, radius, closest)


def closest_distance(rows: Float[Tensor, "n d"], components: Float[Tensor, "d k"]) -> float | None:
    """Return the smallest distance between two rows, or None for fewer than two.

    The nearest neighbors of a few rows bound it from above. The exact search for pairs within that bound is then
    cheap, because few pairs are as close.
    """
    if len(rows) < 2:
        return None
    some = rows[:: max(1, len(rows) // PROBED_ROWS)]
    distances = build_index(torch.arange(len(rows)), rows, "euclidean").search(some, 2)[1]
    bound = float(distances[:, 1].min()) * (1 + 1e-4)  # the search rounds in float32
    within = pairs_within(rows, components, bound)
    return float(within.distance.min()) if len(within.distance) else bound


@dataclass(frozen=True, slots=True, eq=False)
class CorrelationTables:
    """Correlations of an id range.

    Attributes:
        matrix: One row per token: id, label, and its correlations with all of them.
        blocks: The blocks that strong correlations link, as `blocks_frame` gives them.
        strongest: The two ids with the largest correlation, and that correlation; None for fewer than two rows.
    """

    matrix: pl.DataFrame
    blocks: pl.DataFrame
    strongest: tuple[int, int, float] | None


def correlation_tables(source: EmbeddingSource, ids: range, at_least: float) -> CorrelationTables:
    """Return the Pearson correlations of some ids, and the blocks linked by correlations of at least `at_least`.

    Raises:
        InvalidArgument: There are more than 4,096 ids, or all of their rows hold NaN or Inf.
    """
    if len(ids) > LARGEST_MATRIX:
        raise InvalidArgument(
            f"`ids` must be at most {LARGEST_MATRIX:,} ids for a correlation matrix, got {len(ids):,}"
        )
    used = torch.tensor([i for i in ids if i not in source.table.excluded], dtype=torch.int64)
    if not len(used):
        raise InvalidArgument(f"rows {ids[0]} to {ids[-1]} all hold NaN or Inf")
    rows = source.table.rows(used)
    groups = correlated_blocks(rows, at_least).groups
    matrix = correlation_matrix(rows)
    labels = [source.vocabulary.tokens[i].label for i in used.tolist()]
    return CorrelationTables(
        tables.correlation_frame(used.tolist(), labels, matrix),
        tables.blocks_frame(groups, used, rows, source.vocabulary),
        _strongest(used.tolist(), matrix),
    )


def _strongest(ids: list[int], matrix: Float[Tensor, "n n"]) -> tuple[int, int, float] | None:
    if len(ids) < 2:
        return None
    pairs = torch.ones_like(matrix, dtype=torch.bool).triu(1)
    first, second = divmod(int(matrix.masked_fill(~pairs, -2.0).argmax()), len(ids))
    return ids[first], ids[second], float(matrix[first, second])


def _leading(source: EmbeddingSource) -> Float[Tensor, "d k"]:
    return principal_components(source.moments, LEADING)
