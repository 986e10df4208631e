"""Tokens that training hardly touched, from the geometry of the table alone, without a list of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dimscope.geometry.seed_indicators import Indicator, distance_indicator, reference_of, seed_indicators
from dimscope.vectors.table import RowBlock, VectorTable

MIN_SEED = 3  # rows; fewer say nothing about how untrained rows scatter
MAX_SEED = 2048  # seed rows whose groups are examined
MAX_ORDINARY = 8192  # ordinary rows that groups of seed rows are compared with
SHORT_SHARE = 0.05  # of the median norm; trained rows have been seen down to 0.3
SHORT_DEVIATIONS = 4  # robust standard deviations of the log norm that a short row lies below the median as well

ZERO = "zero vector"
SHORT = "norm far below the median"


@dataclass(frozen=True, slots=True)
class UntrainedScores:
    """The under-trained score of every row.

    Attributes:
        scores: 0 looks untrained, 1 is the median ordinary row; None where nothing can be said.
        threshold: Rows up to this score are flagged. None where neither seed rows nor short rows stand apart from the ordinary
            rows, and then nothing is flagged.
        flagged: Whether a row looks untrained.
        n_seed: Number of seed rows.
        evidence: For each row the kind of evidence that its score comes from; "" for rows that are not flagged.
        median_norm: Median norm of the ordinary rows that are not zero.
    """

    scores: Float[np.ndarray, " n"] | None
    threshold: float | None
    flagged: Bool[np.ndarray, " n"]
    n_seed: int
    evidence: Sequence[str]
    median_norm: float


@dataclass(frozen=True, slots=True, eq=False)
class _Norms:
    """Ids and norms of the rows of a table, which of them are seed rows, and the norm below which a row is short."""

    ids: Int[Tensor, " n"]
    norms: Float[Tensor, " n"]
    is_seed: Bool[Tensor, " n"]
    median: float
    short: float


def untrained_scores(table: VectorTable, seed_ids: Int[Tensor, " s"]) -> UntrainedScores:
    """Score every row by its resemblance to rows that cannot have been trained, and by its norm.

    Seed rows are those beyond the tokenizer, of bytes that no text holds, and of tokens that no text produces. They stay at
    their initial values, shrink to zero under weight decay, or (under a tied softmax) are pushed together (Land & Bartolo 2024, arXiv
    2405.05417, whose indicators are the distance to them and the norm). A table can hold several of these kinds, so seed
    rows are divided into groups, each with a centre and a radius of its own (`seed_indicators`). Rows far shorter than the
    median are untrained whatever the seed rows are.

    The deviation of a row from a group is mapped to a score: 0 at 0, the threshold at the radius, 1 at the median
    ordinary row. The score of a row is the least over the groups.
    """
    norms = _norms(table, seed_ids)
    short = _short_indicator(norms)
    ordinary_ids = norms.ids[~norms.is_seed & (norms.norms > norms.short)]
    if len(seed_ids) < MIN_SEED or len(ordinary_ids) < 2:
        return _scored(table, norms, short)
    seed, ordinary = _sample(table, seed_ids, MAX_SEED), _sample(table, ordinary_ids, MAX_ORDINARY)
    indicators = seed_indicators(seed, seed.rows.norm(dim=1) <= norms.short, reference_of(ordinary)) + short
    if indicators:
        return _scored(table, norms, indicators)
    whole = distance_indicator(seed.rows, ordinary)
    scores = None if whole.unit == 0 else _deviations(table, [whole])[0] / whole.unit
    return _unflagged(norms, scores)


def _norms(table: VectorTable, seed_ids: Int[Tensor, " s"]) -> _Norms:
    ids, parts = [], []
    for block_ids, rows in table.blocks():
        ids.append(block_ids)
        parts.append(rows.double().norm(dim=1))
    norms, is_seed = torch.cat(parts), torch.isin(torch.cat(ids), seed_ids)
    trained = norms[~is_seed & (norms > 0)].numpy()
    if not len(trained):
        return _Norms(torch.cat(ids), norms, is_seed, 0.0, 0.0)
    # The upper quartile, because short rows are among the lower half.
    median, upper = np.quantile(trained, [0.5, 0.75])
    sd = math.log(upper / median) / 0.6745
    return _Norms(torch.cat(ids), norms, is_seed, median, median * min(SHORT_SHARE, math.exp(-SHORT_DEVIATIONS * sd)))


def _short_indicator(norms: _Norms) -> list[Indicator]:
    """Return the norm as an indicator if there are rows that are zero or far shorter than the median."""
    if norms.median == 0 or not bool((norms.norms <= norms.short).any()):
        return []
    return [Indicator(SHORT, lambda block: block.rows.double().norm(dim=1), norms.short, norms.median)]


def _sample(table: VectorTable, ids: Int[Tensor, " n"], largest: int) -> RowBlock:
    """Return the rows of evenly spaced ids, all of them if there are no more than `largest`."""
    chosen = ids[:: math.ceil(len(ids) / largest)]
    return RowBlock(chosen, table.rows(chosen).double())


def _scored(table: VectorTable, norms: _Norms, indicators: list[Indicator]) -> UntrainedScores:
    """Return the least score over the indicators, the first of which sets the threshold."""
    if not indicators:
        return _unflagged(norms, None)
    threshold = indicators[0].cut / indicators[0].unit
    scores, source = np.full(len(norms.ids), np.inf), np.zeros(len(norms.ids), dtype=np.int64)
    for i, (indicator, deviation) in enumerate(zip(indicators, _deviations(table, indicators), strict=True)):
        score = _score(deviation, indicator, threshold)
        source[score < scores] = i
        scores = np.minimum(scores, score)
    flagged = scores <= threshold
    usual = float(np.median(scores[~flagged & ~norms.is_seed.numpy()]))
    # The least of several scores is below 1 for the median ordinary row.
    scores = np.where(flagged, scores, threshold + (scores - threshold) * (1 - threshold) / (usual - threshold))
    evidence = np.array([indicator.evidence for indicator in indicators], dtype=object)[source]
    evidence[norms.norms.numpy() <= norms.short] = SHORT
    evidence[norms.norms.numpy() == 0] = ZERO
    evidence[~flagged] = ""
    return UntrainedScores(scores, threshold, flagged, int(norms.is_seed.sum()), evidence.tolist(), norms.median)


def _unflagged(norms: _Norms, scores: Float[np.ndarray, " n"] | None) -> UntrainedScores:
    n = len(norms.ids)
    return UntrainedScores(scores, None, np.zeros(n, dtype=bool), int(norms.is_seed.sum()), [""] * n, norms.median)


def _deviations(table: VectorTable, indicators: list[Indicator]) -> list[Float[np.ndarray, " n"]]:
    parts: list[list[Tensor]] = [[] for _ in indicators]
    for ids, rows in table.blocks():
        block = RowBlock(ids, rows.double())
        for part, indicator in zip(parts, indicators, strict=True):
            part.append(indicator.deviation(block))
    return [torch.cat(part).numpy() for part in parts]


def _score(deviation: Float[np.ndarray, " n"], of: Indicator, threshold: float) -> Float[np.ndarray, " n"]:
    """Map deviations to scores, linearly from 0 to the cut and from there on: the cut to `threshold`, the unit to 1."""
    inner = threshold * deviation / of.cut
    outer = threshold + (1 - threshold) * (deviation - of.cut) / (of.unit - of.cut)
    return np.where(deviation <= of.cut, inner, outer)
