"""The tables about rows and pairs of rows, one function each: objects in, a tidy frame out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.checkpoints.vocabulary import Vocabulary
from dimscope.geometry.correlation import standardised
from dimscope.geometry.isotropy import row_norms
from dimscope.geometry.neighbors import NeighborIndex, drop_self
from dimscope.geometry.pairs import Groups, diameter
from dimscope.geometry.spectrum import principal_components
from dimscope.geometry.untrained import SHORT, ZERO, UntrainedScores, untrained_scores
from dimscope.vectors.moments import Moments
from dimscope.vectors.table import VectorTable

COMPONENTS = 10  # coordinates kept for the map and for neighbours in a projection


def vocabulary_frame(vocabulary: Vocabulary) -> pl.DataFrame:
    """Return id, piece, label, bytes, category and reason of every row of the table."""
    rows = [(t.id, t.piece, t.label, t.data, t.category, t.reason) for t in vocabulary.tokens]
    text = pl.String
    schema = {"id": pl.Int64, "piece": text, "label": text, "bytes": pl.Binary, "category": text, "reason": text}
    return pl.DataFrame(rows, schema=schema, orient="row")


def seed_ids(vocabulary: Vocabulary) -> list[int]:
    """Return the rows that no text can have trained: beyond the tokenizer, or unreachable for it."""
    return [t.id for t in vocabulary.tokens if t.category in ("beyond", "unreachable")]


def score_untrained(vocabulary: Vocabulary, table: VectorTable) -> UntrainedScores:
    """Score the rows of a table, seeded with the rows that no text can have trained."""
    return untrained_scores(
        table, torch.tensor([i for i in seed_ids(vocabulary) if i not in table.excluded], dtype=torch.int64)
    )


def tokens_frame(
    vocabulary: Vocabulary, table: VectorTable, moments: Moments, untrained: UntrainedScores
) -> pl.DataFrame:
    """Describe every row: its token, norm, principal coordinates and under-trained score. Excluded rows have nulls."""
    components = principal_components(moments, COMPONENTS)
    mean = moments.mean.float()
    ids, coordinates = [], []
    for block_ids, rows in table.blocks():
        ids.append(block_ids)
        coordinates.append((rows.float() - mean) @ components.float())
    projected = torch.cat(coordinates).numpy()
    scores = [None] * table.n_used if untrained.scores is None else untrained.scores
    measured = pl.DataFrame(
        {"id": torch.cat(ids).numpy(), "norm": row_norms(table).float().numpy()}
        | {f"pc{c + 1}": projected[:, c] for c in range(projected.shape[1])}
        | {"untrained_score": pl.Series(scores, dtype=pl.Float32), "untrained": untrained.flagged}
        | {"untrained_sign": pl.Series([sign or None for sign in untrained.signs], dtype=pl.String)}
    )
    joined = vocabulary_frame(vocabulary).join(measured, on="id", how="left")
    reason = _untrained_reason(untrained.median_norm)
    return joined.with_columns(pl.col("untrained").fill_null(False), untrained_reason=reason)


def _untrained_reason(median_norm: float) -> pl.Expr:
    """Return why a flagged row looks untrained, with the number that shows it, after the reason of its category."""
    sign = pl.col("untrained_sign")
    norm = (pl.col("norm").cast(pl.Float64) / median_norm).round_sig_figs(2)
    score = pl.col("untrained_score").cast(pl.Float64).round(4)
    detailed = (
        pl.when(sign == ZERO)
        .then(sign)
        .when(sign == SHORT)
        .then(pl.format("{}: {} of it", sign, norm))
        .otherwise(pl.format("{} (score {})", sign, score))
    )
    both = pl.when(pl.col("reason").is_not_null()).then(pl.format("{}; {}", "reason", detailed)).otherwise(detailed)
    return pl.when(sign.is_not_null()).then(both)


def correlation_frame(ids: list[int], labels: list[str], matrix: Float[Tensor, "n n"]) -> pl.DataFrame:
    """Return one row per token: id, label, and its correlations with all the tokens in the same order."""
    values = matrix.float().numpy()
    return pl.DataFrame(
        {"id": ids, "label": labels, "r": pl.Series(values, dtype=pl.Array(pl.Float32, values.shape[1]))}
    )


def groups_frame(groups: Groups, ids: Int[Tensor, " n"], vocabulary: Vocabulary, name: str) -> pl.DataFrame:
    """Return the members of groups: the group's number (column `name`), id, label, category, size."""
    members = ids[torch.from_numpy(groups.position)].tolist()
    tokens = [vocabulary.tokens[i] for i in members]
    frame = pl.DataFrame(
        {
            name: groups.group,
            "id": members,
            "label": [t.label for t in tokens],
            "category": [t.category for t in tokens],
        },
        schema={name: pl.Int64, "id": pl.Int64, "label": pl.String, "category": pl.String},
    )
    return frame.with_columns(size=pl.len().over(name).cast(pl.Int64))


def duplicates_frame(
    groups: Groups, ids: Int[Tensor, " n"], rows: Float[Tensor, "n d"], vocabulary: Vocabulary, radius: float
) -> pl.DataFrame:
    """Return groups of rows linked by distances within the radius, with the largest distance inside each group."""
    widths = [diameter(rows[members]) for members in _members(groups)]
    return _with_numbers(groups_frame(groups, ids, vocabulary, "group"), "group", "diameter", widths).with_columns(
        radius=pl.lit(radius)
    )


def blocks_frame(
    groups: Groups, ids: Int[Tensor, " n"], rows: Float[Tensor, "n d"], vocabulary: Vocabulary
) -> pl.DataFrame:
    """Return blocks of rows linked by high correlations, with the lowest correlation inside each, of linked rows or not."""
    # The distance of two standardised rows is sqrt(2 - 2 r).
    lowest = [1 - diameter(standardised(rows[members].double())) ** 2 / 2 for members in _members(groups)]
    return _with_numbers(groups_frame(groups, ids, vocabulary, "block"), "block", "min_r", lowest)


def _members(groups: Groups) -> list[Int[Tensor, " m"]]:
    return [torch.from_numpy(groups.position[groups.group == g]) for g in range(groups.group.max(initial=-1) + 1)]


def _with_numbers(frame: pl.DataFrame, group: str, name: str, numbers: list[float]) -> pl.DataFrame:
    """Add the number of each group to all of its rows."""
    columns = {group: range(len(numbers)), name: numbers}
    of_group = pl.DataFrame(columns, schema={group: pl.Int64, name: pl.Float64})
    return frame.join(of_group, on=group, how="left", maintain_order="left")


def knn_frame(index: NeighborIndex, queries: Int[Tensor, " q"], rows: Float[Tensor, "q d"], k: int) -> pl.DataFrame:
    """Return the k nearest tokens (cosine) of each query token among all tokens: id, rank, neighbor, cosine."""
    neighbors, scores = drop_self(*index.search(rows, k + 1, progress=True), queries)
    k = neighbors.shape[1]
    return pl.DataFrame(
        {
            "id": queries.repeat_interleave(k).numpy(),
            "rank": np.tile(np.arange(1, k + 1), len(queries)),
            "neighbor": neighbors.flatten().numpy(),
            "cosine": scores.flatten().float().numpy(),
        }
    )


def in_degrees(index: NeighborIndex, k: int) -> Int[Tensor, " n"]:
    """Count how often each row of an index is among the k nearest of the others."""
    positions = torch.arange(len(index.ids))
    neighbors, _ = drop_self(*replace(index, ids=positions).search(index.rows, k + 1), positions)
    return torch.bincount(neighbors.flatten(), minlength=len(positions))


def hubs_frame(ids: Int[Tensor, " n"], degrees: Int[Tensor, " n"], vocabulary: Vocabulary) -> pl.DataFrame:
    """Return id, label and in_degree, the largest in-degree first."""
    labels = [vocabulary.tokens[i].label for i in ids.tolist()]
    frame = pl.DataFrame({"id": ids.numpy(), "label": labels, "in_degree": degrees.numpy()})
    return frame.sort("in_degree", "id", descending=[True, False])
