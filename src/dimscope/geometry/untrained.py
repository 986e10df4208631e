"""Tokens that training hardly touched, from the geometry of the table alone, without a list of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dimscope.vectors.table import VectorTable

MIN_SEED = 3  # rows; fewer say nothing about how untrained rows scatter
FOLDS = 8  # parts of the seed rows, each measured against the centroid of the others
CLOSE = 0.1  # a row ten times nearer to the seed rows than an ordinary one is not ordinary, however tight they lie
SEPARATED = 0.25  # a threshold up to this lies in the gap between seed and ordinary rows
OVERLAP = 0.10  # above it, seed rows stand apart only if no larger share of the ordinary rows lies within it


@dataclass(frozen=True, slots=True)
class UntrainedScores:
    """`scores`: distance to the centroid of the seed rows, in units of the median ordinary row: 0 at it, 1 ordinary.

    `threshold` is None where seed rows do not stand apart from the ordinary ones (or where there are too few), and
    then nothing is flagged.
    """

    scores: Float[np.ndarray, " n"] | None
    threshold: float | None
    flagged: Bool[np.ndarray, " n"]
    n_seed: int


def untrained_scores(table: VectorTable, seed_ids: Int[Tensor, " s"]) -> UntrainedScores:
    """Score every row by its distance to rows that cannot have been trained.

    Seed rows are those beyond the tokenizer, of bytes that no text holds, and of tokens that no text produces. They stay at
    their initial values, shrink to zero under weight decay, or (under a tied softmax) are pushed together: each time
    they lie near their own centroid and far from trained rows (Land & Bartolo 2024, arXiv 2405.05417, whose
    indicators are this distance and the norm). The centroid is the median of the seed rows, coordinate by coordinate, so that
    trained ones among them (chat tokens, say) do not move it. The threshold is the median score of seed rows, each
    taken against the centroid of others, plus three standard deviations, estimated from the nearer half of them for
    the same reason; at least 0.1.
    """
    nothing = np.zeros(table.n_used, dtype=bool)
    if len(seed_ids) < MIN_SEED:
        return UntrainedScores(None, None, nothing, len(seed_ids))
    centroid = table.rows(seed_ids).double().median(dim=0).values
    held_out = _held_out_distances(table.rows(seed_ids).double())
    ids, distances = [], []
    for block_ids, rows in table.blocks():
        ids.append(block_ids)
        distances.append((rows.double() - centroid).norm(dim=1))
    distance = torch.cat(distances).numpy()
    is_seed = torch.isin(torch.cat(ids), seed_ids).numpy()
    ordinary = distance[~is_seed]
    if not len(ordinary) or (unit := float(np.median(ordinary))) == 0:
        return UntrainedScores(None, None, nothing, len(seed_ids))
    scores = distance / unit
    quartile, median = np.quantile(held_out / unit, [0.25, 0.5])
    threshold = max(CLOSE, float(median + 3 * 1.4826 * (median - quartile)))
    if threshold > SEPARATED and np.mean(scores[~is_seed] <= threshold) > OVERLAP:
        return UntrainedScores(scores, None, nothing, len(seed_ids))
    return UntrainedScores(scores, threshold, scores <= threshold, len(seed_ids))


def _held_out_distances(seed: Float[Tensor, "s d"]) -> Float[np.ndarray, " s"]:
    """Return the distance of each seed row to the median of the seed rows outside its fold.

    A centroid fitted on a row lies nearer to it than to any other: few seed rows would seem to lie together.
    """
    fold = torch.arange(len(seed)) % FOLDS
    distances = torch.empty(len(seed), dtype=torch.float64)
    for f in range(min(FOLDS, len(seed))):
        distances[fold == f] = (seed[fold == f] - seed[fold != f].median(dim=0).values).norm(dim=1)
    return distances.numpy()
