"""The tables of the embedding study, one function each: objects in, a tidy frame out. Nothing here reads or writes files."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.checkpoints.vocabulary import Vocabulary
from dimscope.geometry.dimension import Dimension, isoscore, linear_dimensions
from dimscope.geometry.isotropy import mean_cosine, partition_isotropy, row_norms
from dimscope.geometry.neighbors import NeighborIndex, drop_self, hubness
from dimscope.geometry.nulls import (
    gavish_donoho_rank,
    noise_edge,
    noise_scale,
    permuted_moments,
    permuted_spectrum,
    white_noise_spectrum,
)
from dimscope.geometry.pairs import Groups, Pairs, diameter
from dimscope.geometry.spectrum import Spectrum, principal_components, spectrum
from dimscope.geometry.untrained import UntrainedScores, untrained_scores
from dimscope.vectors.moments import Moments
from dimscope.vectors.table import VectorTable

COMPONENTS = 10  # coordinates kept for the map and for neighbours in a projection


def vocabulary_frame(vocabulary: Vocabulary) -> pl.DataFrame:
    """id, piece, label, bytes, category, reason: one row per row of the table."""
    tokens = vocabulary.tokens
    return pl.DataFrame(
        {
            "id": [t.id for t in tokens],
            "piece": [t.piece for t in tokens],
            "label": [t.label for t in tokens],
            "bytes": [t.data for t in tokens],
            "category": [t.category for t in tokens],
            "reason": [t.reason for t in tokens],
        },
        schema={
            "id": pl.Int64,
            "piece": pl.String,
            "label": pl.String,
            "bytes": pl.Binary,
            "category": pl.String,
            "reason": pl.String,
        },
    )


def seed_ids(vocabulary: Vocabulary) -> list[int]:
    """Rows that no text can have trained: beyond the tokenizer, or unreachable for it."""
    return [t.id for t in vocabulary.tokens if t.category in ("beyond", "unreachable")]


def score_untrained(vocabulary: Vocabulary, table: VectorTable) -> UntrainedScores:
    """Under-trained scores of a table, seeded with the rows that no text can have trained."""
    return untrained_scores(
        table, torch.tensor([i for i in seed_ids(vocabulary) if i not in table.excluded], dtype=torch.int64)
    )


def tokens_frame(vocabulary: Vocabulary, table: VectorTable, of: Moments, found: UntrainedScores) -> pl.DataFrame:
    """The vocabulary with each row's norm, principal coordinates and under-trained score. Excluded rows have nulls."""
    components = principal_components(of, COMPONENTS)
    mean = of.mean.float()
    ids, coordinates = [], []
    for block_ids, rows in table.blocks():
        ids.append(block_ids)
        coordinates.append((rows.float() - mean) @ components.float())
    projected = torch.cat(coordinates).numpy()
    measured = pl.DataFrame(
        {"id": torch.cat(ids).numpy(), "norm": row_norms(table).float().numpy()}
        | {f"pc{c + 1}": projected[:, c] for c in range(projected.shape[1])}
        | {
            "untrained_score": pl.Series(found.scores, dtype=pl.Float32)
            if found.scores is not None
            else pl.Series([None] * table.n_used, dtype=pl.Float32),
            "untrained": found.flagged,
        }
    )
    joined = (
        vocabulary_frame(vocabulary)
        .join(measured, on="id", how="left")
        .with_columns(pl.col("untrained").fill_null(False))
    )
    return joined.with_columns(untrained_reason=_untrained_reason(found))


def _untrained_reason(found: UntrainedScores) -> pl.Expr:
    if found.scores is None:
        return pl.lit(None, dtype=pl.String)
    near = pl.format("lies with the untrainable rows (score {})", pl.col("untrained_score").cast(pl.Float64).round(4))
    both = pl.when(pl.col("reason").is_not_null()).then(pl.format("{}; {}", "reason", near)).otherwise(near)
    return pl.when(pl.col("untrained")).then(both)


def spectrum_frame(side: str, table: VectorTable, of: Moments, draws: int, seed: int) -> pl.DataFrame:
    """Singular values, centred and not, beside those of a Gaussian table and of the column-permuted table."""
    shuffled = permuted_moments(table, draws=draws, seed=seed)
    parts = []
    for centred in (True, False):
        measured = spectrum(of, centred=centred)
        share = measured.explained_variance_ratio
        permuted = permuted_spectrum(shuffled, centred=centred)
        parts.append(
            pl.DataFrame(
                {
                    "table": [side] * len(share),
                    "preprocess": [measured.preprocess] * len(share),
                    "index": np.arange(1, len(share) + 1),
                    "singular_value": measured.singular_values.numpy(),
                    "explained_variance_ratio": share.numpy(),
                    "cumulative": share.cumsum(0).numpy(),
                    "gaussian_singular_value": gaussian_like(measured).singular_values.numpy(),
                    "permuted_singular_value": permuted.mean.singular_values.numpy(),
                    "permuted_sd": permuted.sd.numpy(),
                }
            )
        )
    return pl.concat(parts)


def gaussian_like(measured: Spectrum) -> Spectrum:
    """The expected spectrum of a Gaussian table of the same shape and standard deviation."""
    n = measured.n_rows - measured.centred
    std = math.sqrt(float(measured.singular_values.square().sum()) / (n * measured.dim))
    return white_noise_spectrum(measured.n_rows, measured.dim, std, centred=measured.centred)


def dimensions_frame(side: str, spectra: pl.DataFrame, n_rows: int, dim: int) -> pl.DataFrame:
    """Every linear dimension of the family, beside its value on the two nulls of the same shape."""
    rows = []
    for preprocess in ("centred", "uncentred"):
        part = spectra.filter(table=side, preprocess=preprocess)

        def family(column: str, part: pl.DataFrame = part, centred: bool = preprocess == "centred") -> list[Dimension]:
            return linear_dimensions(Spectrum(torch.from_numpy(part[column].to_numpy().copy()), n_rows, dim, centred))

        values = [family(f"{c}singular_value") for c in ("", "gaussian_", "permuted_")]
        rows += [
            (side, d.metric, preprocess, d.spectrum, d.order, d.value, gaussian.value, permuted.value, n_rows, dim)
            for d, gaussian, permuted in zip(*values, strict=True)
        ]
    names = (
        "table",
        "metric",
        "preprocess",
        "spectrum",
        "order",
        "value",
        "null_gaussian",
        "null_permuted",
        "n_tokens",
        "dim",
    )
    return pl.DataFrame(
        rows, schema=dict(zip(names, (*[pl.String] * 4, *[pl.Float64] * 4, *[pl.Int64] * 2), strict=True)), orient="row"
    )


def measures_frame(side: str, table: VectorTable, of: Moments) -> pl.DataFrame:
    """Single numbers about a table: noise fit, isotropy, norms."""
    from scipy.stats import spearmanr

    n, d = table.n_used, table.dim
    centred = spectrum(of, centred=True)
    scale = noise_scale(centred)
    edge = noise_edge(centred, scale)
    norms = row_norms(table)
    used = [i for i in range(table.n_rows) if i not in table.excluded]
    mean_norm, centred_norm = float(norms.mean()), float(row_norms(table, of.mean).mean())
    cosine_sd = math.sqrt(2 / (n * (n - 1) * d)) if n > 1 else None
    rank_correlation = float(spearmanr(used, norms.numpy()).statistic) if float(norms.std()) > 0 else math.nan
    rows = [
        (
            "energy of the mean",
            "none",
            float(n * of.mean.square().sum() / of.gram.trace()),
            None,
            1 / n,
            "share of the sum of squares",
        ),
        (
            "noise scale",
            "centred",
            scale,
            None,
            None,
            "standard deviation of the white noise with the same median singular value",
        ),
        (
            "Marchenko-Pastur edge",
            "centred",
            edge,
            None,
            None,
            "singular value; exceeded by one white-noise table in 100",
        ),
        ("spikes above the edge", "centred", float((centred.singular_values > edge).sum()), None, 0.0, "count"),
        ("Gavish-Donoho rank", "centred", float(gavish_donoho_rank(centred)), None, 0.0, "count"),
        ("mean cosine", "none", mean_cosine(table), cosine_sd, 0.0, "stderr: of isotropic rows"),
        ("mean cosine", "centred", mean_cosine(table, of.mean), cosine_sd, 0.0, "stderr: of isotropic rows"),
        (
            "partition isotropy",
            "none",
            partition_isotropy(table, of, mean_norm, centred=False),
            None,
            1.0,
            "rows scaled to mean norm 1",
        ),
        (
            "partition isotropy",
            "centred",
            partition_isotropy(table, of, centred_norm, centred=True),
            None,
            1.0,
            "rows scaled to mean norm 1",
        ),
        ("IsoScore", "centred", isoscore(centred), None, isoscore(gaussian_like(centred)), None),
        ("mean norm", "none", mean_norm, float(norms.std() / math.sqrt(n)), None, None),
        (
            "norm-rank correlation",
            "none",
            rank_correlation,
            1 / math.sqrt(max(n - 1, 1)),
            0.0,
            "Spearman, norm against token id",
        ),
    ]
    return measures(side, rows, n)


def measures(side: str, rows: list[tuple], n_tokens: int) -> pl.DataFrame:
    """Rows of (metric, preprocess, value, stderr, null, note) as the tidy frame."""
    names = ("table", "metric", "preprocess", "value", "stderr", "null", "n_tokens", "note")
    types = (pl.String, pl.String, pl.String, pl.Float64, pl.Float64, pl.Float64, pl.Int64, pl.String)
    full = [(side, *row[:-1], n_tokens, row[-1]) for row in rows]
    return pl.DataFrame(full, schema=dict(zip(names, types, strict=True)), orient="row")


def untrained_measures(side: str, found: UntrainedScores, n_tokens: int) -> pl.DataFrame:
    """How many seed rows there were, and the threshold of the score (null where seed rows do not stand apart)."""
    rows = [
        ("seed rows", "none", float(found.n_seed), None, None, "rows beyond the tokenizer or unreachable"),
        ("untrained threshold", "none", found.threshold, None, None, "score at or below which a row is flagged"),
    ]
    return measures(side, rows, n_tokens)


def correlation_frame(ids: list[int], labels: list[str], matrix: Float[Tensor, "n n"]) -> pl.DataFrame:
    """One row per token: id, label, and its correlations with all the tokens in the same order."""
    values = matrix.float().numpy()
    return pl.DataFrame(
        {"id": ids, "label": labels, "r": pl.Series(values, dtype=pl.Array(pl.Float32, values.shape[1]))}
    )


def groups_frame(groups: Groups, ids: Int[Tensor, " n"], vocabulary: Vocabulary, name: str) -> pl.DataFrame:
    """Members of groups: the group's number (column `name`), id, label, category, size."""
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
    """Groups of rows linked by distances within the radius, with the largest distance inside each group."""
    frame = groups_frame(groups, ids, vocabulary, "group")
    n_groups = int(groups.group.max()) + 1 if len(groups.group) else 0
    widths = [diameter(rows[torch.from_numpy(groups.position[groups.group == g])]) for g in range(n_groups)]
    spans = pl.DataFrame(
        {"group": range(n_groups), "diameter": widths}, schema={"group": pl.Int64, "diameter": pl.Float64}
    )
    return frame.join(spans, on="group", how="left", maintain_order="left").with_columns(radius=pl.lit(radius))


def blocks_frame(groups: Groups, pairs: Pairs, ids: Int[Tensor, " n"], vocabulary: Vocabulary) -> pl.DataFrame:
    """Blocks of correlated tokens, with the least correlation among the linked pairs of each block."""
    frame = groups_frame(groups, ids, vocabulary, "block")
    block_of = np.full(len(ids), -1, dtype=np.int64)
    block_of[groups.position] = groups.group
    least = (
        pl.DataFrame(
            {"block": block_of[pairs.first], "r": 1 - np.square(pairs.distance) / 2},
            schema={"block": pl.Int64, "r": pl.Float64},
        )
        .group_by("block")
        .agg(min_r=pl.col("r").min())
    )
    return frame.join(least, on="block", how="left", maintain_order="left")


def knn_frame(index: NeighborIndex, queries: Int[Tensor, " q"], rows: Float[Tensor, "q d"], k: int) -> pl.DataFrame:
    """The k nearest tokens (cosine) of each query token among all tokens: id, rank, neighbor, cosine."""
    found, scores = drop_self(*index.search(rows, k + 1, progress=True), queries)
    k = found.shape[1]
    return pl.DataFrame(
        {
            "id": queries.repeat_interleave(k).numpy(),
            "rank": np.tile(np.arange(1, k + 1), len(queries)),
            "neighbor": found.flatten().numpy(),
            "cosine": scores.flatten().float().numpy(),
        }
    )


def in_degrees(index: NeighborIndex, k: int) -> Int[Tensor, " n"]:
    """How often each row of an index is among the k nearest of the others."""
    places = torch.arange(len(index.ids))
    found, _ = drop_self(*replace(index, ids=places).search(index.rows, k + 1), places)
    return torch.bincount(found.flatten(), minlength=len(places))


def hubs_frame(ids: Int[Tensor, " n"], degrees: Int[Tensor, " n"], vocabulary: Vocabulary) -> pl.DataFrame:
    """id, label, in_degree: the most sought neighbours first."""
    labels = [vocabulary.tokens[i].label for i in ids.tolist()]
    frame = pl.DataFrame({"id": ids.numpy(), "label": labels, "in_degree": degrees.numpy()})
    return frame.sort("in_degree", "id", descending=[True, False])


def hubness_measure(side: str, hubs: pl.DataFrame, null: float | None) -> pl.DataFrame:
    """Skewness of the in-degrees; `null` is that of Gaussian rows of the same shape, where it was computed."""
    note = "kNN graph among the rows counted; null: Gaussian rows of the same shape"
    return measures(
        side, [("hubness skewness", "none", hubness(hubs["in_degree"].to_numpy()), None, null, note)], len(hubs)
    )
