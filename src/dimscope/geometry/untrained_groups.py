"""Groups of rows that look untrained together, and the ball in which each group lies.

Two searches propose balls. `seed_balls` divides seed rows by their distances. `alike_balls` needs no seed rows: rows that are
nearly equal have the same signs in random projections. `is_separate` compares a ball with the ordinary rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.special import bdtrc
from torch import Tensor

from dimscope.vectors.table import VectorTable

SHORT = "norm far below the median"
SEED = "near a group of seed rows"
ALIKE = "nearly equal to several other rows"

MAX_GROUPS = 8  # of either kind
WIDE = 0.6  # distance of two seed rows of a group, in units of that of two ordinary rows
DEVIATIONS = 3  # standard deviations that a radius lies above the median distance of a group
FEW = 10  # rows; fewer do not show how they scatter, so that they are taken for white noise
CLOSE = 0.1  # a row ten times nearer to a group than an ordinary row is not ordinary, however tight the group is
SEPARATED = 0.25  # a radius up to this share of the distance of an ordinary row lies in a gap
MARGIN = 1.1  # a ball this much larger shows how many ordinary rows lie around the ball
OVERLAP = 0.2  # of the rows in a ball; more ordinary rows than that just outside mean that the ball cuts through them
CHANCE = 0.0125  # probability that as many ordinary rows, drawn in place of the seed rows, share a ball like this
FEWEST_ALIKE = 3  # rows; pairs of trained rows can be nearly equal
ALIKE_RADIUS = 0.2  # largest difference of rows that are nearly equal, as a share of their norm
ALIKE_SHARE = 0.05  # of the rows; where more have such neighbours, the table is clustered, and training can have made the clusters
N_PROJECTIONS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Ball:
    """A part of the space in which rows look untrained.

    Attributes:
        sign: What it means to be inside, in words.
        centre: The mean of the rows of the group, or the origin.
        radius: The distance up to which a row looks untrained.
    """

    sign: str
    centre: Float[Tensor, " d"]
    radius: float


def seed_balls(seed: Float[Tensor, "s d"], typical: float) -> list[Ball]:
    """Divide seed rows into groups of two or more rows that are nearer to each other than ordinary rows are.

    Args:
        seed: Seed rows.
        typical: Median distance of two ordinary rows.
    """
    return [ball_of(seed[members], SEED) for members in _clusters(seed, WIDE * typical, 2)]


def alike_balls(table: VectorTable, ids: Int[Tensor, " n"], projections: Float[Tensor, "n p"]) -> list[Ball]:
    """Find groups of three or more rows of a table that are nearly equal.

    Rows that agree in the signs of about log2 n projections share a cell. Neighbours within a cell are candidates if all their
    projections are nearly equal.

    Args:
        table: The table.
        ids: The rows that are searched.
        projections: Their directions and log norms, as `projected` returns them.
    """
    n = len(projections)
    if n < FEWEST_ALIKE:
        return []
    bits = (projections[:, :N_PROJECTIONS] > projections[:, :N_PROJECTIONS].mean(dim=0)).long()
    n_bits = min(N_PROJECTIONS, math.ceil(math.log2(n)) + 2)
    weights = 2 ** torch.arange(n_bits)
    dense = torch.zeros(n, dtype=torch.bool)
    for part in (bits[:, :n_bits], bits[:, N_PROJECTIONS - n_bits :]):
        dense |= _has_near_neighbour(part @ weights, projections)
    if not 0 < int(dense.sum()) <= max(ALIKE_SHARE * n, FEWEST_ALIKE):
        return []
    candidates = projections[dense]
    groups = _clusters(candidates, ALIKE_RADIUS, FEWEST_ALIKE)
    balls = (ball_of(table.rows(ids[dense][members]), ALIKE) for members in groups)
    return [ball for ball in balls if ball.radius <= ALIKE_RADIUS * float(ball.centre.norm())]


def projected(rows: Float[Tensor, "n d"], norms: Float[Tensor, " n"]) -> Float[Tensor, "n p"]:
    """Project the directions of rows at random, and add the log norm; a difference of 1% moves the result by about 0.01."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(rows.shape[1], N_PROJECTIONS, generator=generator) / math.sqrt(N_PROJECTIONS)
    return torch.cat([rows.float() @ random / norms.float()[:, None], norms.log().float()[:, None]], dim=1)


def _has_near_neighbour(codes: Int[Tensor, " n"], points: Float[Tensor, "n p"]) -> Bool[Tensor, " n"]:
    """Return which rows are nearly equal to the row before or after them, in the order of code and first coordinate."""
    order = torch.argsort(codes + torch.sigmoid(points[:, 0].double()))
    ordered = points[order]
    near = ((ordered[1:] - ordered[:-1]).norm(dim=1) <= ALIKE_RADIUS) & (codes[order].diff() == 0)
    first = torch.nonzero(near).squeeze(1)
    result = torch.zeros(len(codes), dtype=torch.bool)
    result[order[torch.cat([first, first + 1])]] = True
    return result


def _clusters(points: Float[Tensor, "n p"], radius: float, least: int) -> Iterator[Bool[Tensor, " n"]]:
    """Yield the largest groups of points: a point, and those within a radius of it (leader clustering)."""
    near = torch.cdist(points, points) <= radius
    left = torch.ones(len(points), dtype=torch.bool)
    for _ in range(MAX_GROUPS):
        counts = (near & left).sum(dim=1) * left
        if not len(points) or int(counts.max()) < least:
            return
        members = near[int(counts.argmax())] & left
        yield members
        left &= ~members


def ball_of(group: Float[Tensor, "k d"], sign: str) -> Ball:
    """Return the ball in which further rows of a group lie.

    The centre is the origin for rows without a common direction, as initial values are; else it is the mean. A row lies nearer
    to a mean in which it takes part than a further row does: by the factor sqrt((k - 1) / (k + 1)). The standard deviation of
    the distances is that of white noise, or a larger one of the nearer half of the group, because trained rows may be in the other.
    """
    rows = group.double()
    k, d = rows.shape
    centre, factor = rows.mean(dim=0), math.sqrt((k + 1) / (k - 1))
    # Of random directions, k^2 |mean|^2 is the sum of |row|^2, with a relative standard deviation of at most sqrt(2 / d).
    if k * k * float(centre.square().sum()) <= (1 + 3 * math.sqrt(2 / d)) * float(rows.square().sum()):
        centre, factor = torch.zeros_like(centre), 1.0
    distances = (rows - centre).norm(dim=1) * factor
    quartile, median = np.quantile(distances.numpy(), [0.25, 0.5])
    sd = median / math.sqrt(2 * d)
    if k >= FEW:
        sd = max(sd, 1.4826 * (median - quartile))
    return Ball(sign, centre, float(median + DEVIATIONS * sd))


def is_separate(ball: Ball, ordinary: Float[np.ndarray, " n"], seed: Float[np.ndarray, " s"]) -> bool:
    """Return whether a ball lies apart from the ordinary rows.

    Two conditions: few ordinary rows lie just outside, while in the bulk of them there are more than inside; and the ball of
    seed rows holds more of them than as many random ordinary rows would give. The probability of that is binomial,
    divided by the share of ordinary rows inside, because there is space for so many such balls.

    Args:
        ball: The ball.
        ordinary: Distances of ordinary rows to its centre.
        seed: Distances of seed rows to its centre.
    """
    if ball.sign == SHORT:
        return True  # its radius depends on the norms of the ordinary rows
    unit = float(np.median(ordinary))
    inside, n_seed = (int((distances <= ball.radius).sum()) for distances in (ordinary, seed))
    around = int((ordinary <= MARGIN * ball.radius).sum()) - inside
    in_bulk = ball.radius > SEPARATED * unit and around > max(1, OVERLAP * (inside + n_seed))
    if ball.radius >= unit or in_bulk:
        return False
    if ball.sign == ALIKE:
        return inside + n_seed >= FEWEST_ALIKE
    share = (inside + 1) / (len(ordinary) + 1)
    return float(bdtrc(n_seed - 1, len(seed), share)) / share <= CHANCE
