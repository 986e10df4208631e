"""Rows that training hardly touched, from the geometry of the table alone, without a list of tokens.

A row without training stays at its initial value, shrinks to zero under weight decay, or is pushed together with the other
untrained rows, because a tied softmax lowers all their logits alike. A table can hold several of these kinds, so that one centre
does not describe them. Each kind lies in a ball that holds few trained rows:

1. around the origin: zero rows, and rows whose norm is far below the median or below a wide gap between the norms;
2. around each group of seed rows, which are rows that no text can have trained (`untrained_groups.seed_balls`);
3. around each group of three or more nearly equal rows, which needs no seed rows (`untrained_groups.alike_balls`).

A ball counts if it is separate from the ordinary rows (`untrained_groups.is_separate`), and the rows inside look untrained.
The indicators of Land & Bartolo 2024 (arXiv 2405.05417) are the norm and the distance to one centre.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dimscope.geometry.untrained_groups import (
    ALIKE,
    CLOSE,
    SEED,
    SHORT,
    Ball,
    alike_balls,
    ball_of,
    is_separate,
    projected,
    seed_balls,
)
from dimscope.vectors.table import VectorTable

MAX_SEED = 1024  # seed rows that are divided into groups
FEWEST_SEED = 3  # seed rows whose mean is worth a score where no group of them is separate
PAIRED = 512  # ordinary rows whose mutual distances are measured
SHORT_SHARE = 0.05  # of the median norm; trained rows have been seen down to 0.3
SHORT_DEVIATIONS = 4  # robust standard deviations of the log norm that a short row lies below the median as well
GAP = 1.4  # least ratio of the norms around a gap, which is a robust standard deviation of the log norm at least
FEWEST_SHORT = 2  # rows below a gap; one row below the others is common
FULL_GAP = 6  # standard deviations that a gap above k rows has at least, divided by k: gaps of chance shrink as 1 / k
HIGHEST_GAP = 0.67  # of the median norm; a gap that starts above is no sign

ZERO = "zero vector"
SIGNS = (ZERO, SHORT, SEED, ALIKE)  # a row with several signs shows the first


@dataclass(frozen=True, slots=True)
class UntrainedScores:
    """The under-trained score of every row.

    Attributes:
        scores: 0 looks untrained, 1 is the median ordinary row; None where nothing can be said.
        threshold: Rows up to this score are flagged; None where nothing is flagged.
        flagged: Whether a row looks untrained.
        n_seed: Number of seed rows.
        signs: For each flagged row, why it looks untrained: one of `SIGNS`; "" for the others.
        median_norm: Median norm of the rows that are neither zero nor seed rows.
    """

    scores: Float[np.ndarray, " n"] | None
    threshold: float | None
    flagged: Bool[np.ndarray, " n"]
    n_seed: int
    signs: Sequence[str]
    median_norm: float


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The rows of a table, in the order of `ids`.

    Attributes:
        table: The table.
        ids: The rows.
        is_seed: Which of them are seed rows.
        norms: Their norms.
        median_norm: Median norm of the rows that are neither zero nor seed rows.
        short: The norm up to which a row is far shorter than the median.
        projections: What `alike_balls` compares, of each row.
    """

    table: VectorTable
    ids: Int[Tensor, " n"]
    is_seed: Bool[Tensor, " n"]
    norms: Float[Tensor, " n"]
    median_norm: float
    short: float
    projections: Float[Tensor, "n p"]

    @property
    def ordinary(self) -> Bool[Tensor, " n"]:
        """Return which rows are neither seed rows nor short."""
        return ~self.is_seed & (self.norms > self.short)


def untrained_scores(table: VectorTable, seed_ids: Int[Tensor, " s"]) -> UntrainedScores:
    """Score every row by its distance to rows that look untrained.

    The score is 0 at the centre of a ball, the threshold at its radius, and 1 at the distance of the median ordinary row; the
    least of these over the balls.

    Args:
        table: The table.
        seed_ids: Rows that cannot have been trained: beyond the tokenizer, or of tokens that no text produces. There may be
            none, and some of them may be trained after all.
    """
    rows = _survey(table, seed_ids)
    if int(rows.ordinary.sum()) < 2:
        return _unflagged(rows, None)
    balls = _candidates(rows)
    distances = _distances(table, rows.norms, balls)
    ordinary, is_seed = rows.ordinary.numpy(), rows.is_seed.numpy()
    kept = [i for i, ball in enumerate(balls) if is_separate(ball, distances[ordinary, i], distances[is_seed, i])]
    if kept:
        return _scored(rows, [balls[i] for i in kept], distances[:, kept])
    return _unflagged(rows, _distances_to_seed(rows))


def _survey(table: VectorTable, seed_ids: Int[Tensor, " s"]) -> _Rows:
    blocks = []
    for ids, block in table.blocks():
        norms = _norms(block)
        blocks.append((ids, norms, projected(block, norms)))
    ids, norms, projections = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    is_seed = torch.isin(ids, seed_ids)
    trained = norms[~is_seed & (norms > 0)].numpy()
    if not len(trained):
        return _Rows(table, ids, is_seed, norms, 0.0, 0.0, projections)
    short = _short_norm(norms[norms > 0].numpy(), trained)
    return _Rows(table, ids, is_seed, norms, float(np.median(trained)), short, projections)


def _norms(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Compute norms in float32, or in float64 where the squares could leave its range."""
    norms = rows.norm(dim=1).double()
    extreme = ~((norms > 1e-15) & (norms < 1e15))
    norms[extreme] = rows[extreme].double().norm(dim=1)
    return norms


def _short_norm(norms: Float[np.ndarray, " n"], trained: Float[np.ndarray, " m"]) -> float:
    """Return the norm up to which rows are far shorter than the median: a share of it, or the middle of a gap if that is higher.

    Args:
        norms: All norms but those of zero rows.
        trained: Those of rows that are not seed rows.
    """
    # The upper quartile, because short rows are among the lower half.
    median, upper = np.log(np.quantile(trained, [0.5, 0.75]))
    sd = (upper - median) / 0.6745
    short = median + min(math.log(SHORT_SHARE), -SHORT_DEVIATIONS * sd)
    logs = np.sort(np.log(norms))
    gaps = np.diff(logs)
    first = 0  # row above the last gap
    for i in np.nonzero((gaps >= max(math.log(GAP), sd)) & (logs[:-1] <= median + math.log(HIGHEST_GAP)))[0].tolist():
        if i + 1 >= FEWEST_SHORT and gaps[i] >= FULL_GAP * sd / (i + 1 - first):
            short, first = max(short, logs[i] + gaps[i] / 2), i + 1
    return math.exp(short)


def _candidates(rows: _Rows) -> list[Ball]:
    """Return the ball around the origin, and the balls around groups of seed rows and of nearly equal rows."""
    long = rows.norms > rows.short
    sample = rows.table.rows(_thinned(rows.ids[rows.ordinary], PAIRED))
    typical = float(torch.nn.functional.pdist(sample).median())
    seed = rows.table.rows(_thinned(rows.ids[rows.is_seed & long], MAX_SEED))
    balls = seed_balls(seed, typical) + alike_balls(rows.table, rows.ids[long], rows.projections[long])
    balls = [replace(ball, radius=max(ball.radius, CLOSE * typical)) for ball in balls]
    if not bool(long.all()):
        balls.append(Ball(SHORT, torch.zeros(rows.table.dim, dtype=torch.float64), rows.short))
    return balls


def _distances_to_seed(rows: _Rows) -> Float[np.ndarray, " n"] | None:
    """Return the distances to the mean of all seed rows, in units of the median ordinary row; None for too few seed rows."""
    n_seed = int(rows.is_seed.sum())
    if n_seed < FEWEST_SEED:
        return None
    ball = ball_of(rows.table.rows(_thinned(rows.ids[rows.is_seed], MAX_SEED)), SEED)
    distances = _distances(rows.table, rows.norms, [ball])[:, 0]
    unit = float(np.median(distances[rows.ordinary.numpy()]))
    return distances / unit if unit > 0 else None


def _thinned(ids: Int[Tensor, " n"], most: int) -> Int[Tensor, " m"]:
    """Return evenly spaced ids, all of them if there are no more than `most`."""
    return ids[:: max(1, math.ceil(len(ids) / most))]


def _distances(table: VectorTable, norms: Float[Tensor, " n"], balls: Sequence[Ball]) -> Float[np.ndarray, "n b"]:
    """Compute the distance of every row to the centres of balls, accurate to about 0.001 of the norms."""
    if not balls:
        return np.empty((table.n_used, 0))
    centres = torch.stack([ball.centre for ball in balls])
    lengths = centres.norm(dim=1)
    units = (centres / lengths.clamp(min=1e-300)[:, None]).float()
    products = torch.cat([block.float() @ units.T for _, block in table.blocks()]).double() * lengths
    return (norms[:, None].square() - 2 * products + lengths.square()).clamp(min=0).sqrt().numpy()


def _unflagged(rows: _Rows, scores: Float[np.ndarray, " n"] | None) -> UntrainedScores:
    n = len(rows.ids)
    return UntrainedScores(scores, None, np.zeros(n, dtype=bool), int(rows.is_seed.sum()), [""] * n, rows.median_norm)


def _scored(rows: _Rows, balls: Sequence[Ball], distances: Float[np.ndarray, "n b"]) -> UntrainedScores:
    """Return the least score over the balls: linear from 0 at the centre to the threshold at the radius, and on to 1."""
    radii = np.array([ball.radius for ball in balls])
    units = np.median(distances[rows.ordinary.numpy()], axis=0)
    threshold = float((radii / units).max())
    inside = distances <= radii
    inner = threshold * distances / radii
    outer = threshold + (1 - threshold) * (distances - radii) / (units - radii)
    scores = np.where(inside, inner, outer).min(axis=1)
    flagged = np.asarray(inside.any(axis=1))
    # The least of several scores is below 1 for the median ordinary row.
    usual = float(np.median(scores[~flagged & ~rows.is_seed.numpy()]))
    scores = np.where(flagged, scores, threshold + (scores - threshold) * (1 - threshold) / (usual - threshold))
    return UntrainedScores(
        scores, threshold, flagged, int(rows.is_seed.sum()), _signs(rows, balls, inside), rows.median_norm
    )


def _signs(rows: _Rows, balls: Sequence[Ball], inside: Bool[np.ndarray, "n b"]) -> list[str]:
    """Return the first sign of each row."""
    signs = np.full(len(rows.ids), "", dtype=object)
    for sign in reversed(SIGNS):
        column = [i for i, ball in enumerate(balls) if ball.sign == sign]
        signs[inside[:, column].any(axis=1)] = sign
    signs[rows.norms.numpy() == 0] = ZERO
    return signs.tolist()
