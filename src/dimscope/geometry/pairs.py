"""All pairs of rows within a radius, exact in all dimensions, and the groups that they form.

To compare all N^2 / 2 pairs in all d dimensions takes too long for a vocabulary. Two cheap tests, which can rule a pair
out but never accept one, leave few pairs to measure:

1. Tiles. Rows are put in an order in which rows close in space are close in the order, and cut into tiles of 128. Two
   tiles whose bounding boxes are further apart than the radius have no pair.

       +--------+                    +--------+
       | tile A |<---- gap > r ----->| tile B |       no row of A is within r of a row of B
       +--------+                    +--------+

2. Projection. Rows of tiles that are close are compared in their 40 leading principal components, by one float32
   product for a whole tile. A projection never lengthens a distance: further apart than r there, further apart in truth.

3. Measurement. The pairs that are left are measured in all d dimensions in float64.

    >>> rows = torch.tensor([[0.0, 0.0], [0.0, 3.0], [4.0, 0.0], [0.0, 3.5]])
    >>> pairs = pairs_within(rows, torch.eye(2), 1.0)
    >>> pairs.first, pairs.second, pairs.distance
    (array([1]), array([3]), array([0.5]))
    >>> connected_groups(pairs, len(rows)).position
    array([1, 3])
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from dimscope.errors import InvalidArgument

TILE = 128  # rows that are compared with others at once
WIDTH = 8192  # rows they are compared with at once
LEADING = 40  # dimensions that prune; of two random rows in 896, one pair in 10 million looks near at correlation 0.99
PACKED = 3  # dimensions that the tiles are packed by
LIMIT = 20_000_000  # pairs; beyond it the radius says nothing about duplicates
ROUNDING = 5e-6  # float32 may be off by this share of the largest squared norm in a squared distance of as many terms


@dataclass(frozen=True, slots=True, repr=False)
class Pairs:
    """Pairs of row positions (first < second) and their distances in float64."""

    first: Int[np.ndarray, " p"]
    second: Int[np.ndarray, " p"]
    distance: Float[np.ndarray, " p"]

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.first)

    def __repr__(self) -> str:
        """Return one line: how many pairs, and their largest distance."""
        return f"Pairs({len(self):,}" + (f", up to {self.distance.max():.6g} apart)" if len(self) else ")")


def pairs_within(
    rows: Float[Tensor, "n d"], components: Float[Tensor, "d m"], radius: float, *, progress: bool = False
) -> Pairs:
    """Return every pair of rows at distance <= radius, with its distance. Exact for any radius; the smaller, the faster.

    Args:
        rows: The rows.
        components: Orthonormal columns to project on; the leading principal components rule out most.
        radius: The largest distance of a pair.
        progress: Whether to show a progress bar.

    Raises:
        InvalidArgument: For a negative radius, or where more than 20 million pairs lie within it.
    """
    if not (math.isfinite(radius) and radius >= 0):
        raise InvalidArgument(f"`radius` must be a finite number, 0 or more, got {radius}")
    projected = rows.float() @ components[:, :LEADING].float()
    projected -= projected.mean(dim=0)
    order = _tile_order(projected[:, :PACKED].numpy())
    parts, total = [], 0
    for first, second in _projected_pairs(_tiled(projected[order], radius), progress):
        part = _measure(rows, order[first], order[second], radius)
        total += len(part)
        if total > LIMIT:
            raise InvalidArgument(f"more than {LIMIT:,} pairs lie within {radius:g}; take a smaller `radius`")
        parts.append(part)
    return _joined(parts)


def _joined(parts: list[Pairs]) -> Pairs:
    none = Pairs(np.empty(0, int), np.empty(0, int), np.empty(0, float))
    parts = parts or [none]
    return Pairs(
        np.concatenate([p.first for p in parts]),
        np.concatenate([p.second for p in parts]),
        np.concatenate([p.distance for p in parts]),
    )


# ---- step 1: tiles ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Projected rows in the order of the tiles, and the bounding box of each tile, from `low` to `high`."""

    rows: Float[Tensor, "n m"]
    low: Float[Tensor, "t m"]
    high: Float[Tensor, "t m"]
    limit: float  # squared radius, and what float32 may be off by


def _tile_order(leading: Float[np.ndarray, "n a"]) -> Int[Tensor, " n"]:
    """Return the order of the tiles: sort-tile-recursive packing (Leutenegger et al. 1997).

    Rows are sorted by the first axis and cut into slabs, each slab is sorted by the second axis and cut again, and so on.
    """
    n = len(leading)
    slabs = max(1, round((n / TILE) ** (1 / 3)))
    group = np.zeros(n, dtype=np.int64)
    for axis in range(leading.shape[1]):
        order = np.lexsort((leading[:, axis], group))
        _, starts, sizes = np.unique(group[order], return_index=True, return_counts=True)
        rank = np.arange(n) - np.repeat(starts, sizes)  # within the group
        group[order] = group[order] * slabs + rank * slabs // np.repeat(sizes, sizes)
    return torch.from_numpy(np.argsort(group, kind="stable"))


def _tiled(ordered: Float[Tensor, "n m"], radius: float) -> _Tiles:
    largest = float(ordered.square().sum(dim=1, keepdim=True).max()) if len(ordered) else 0.0
    tiles = ordered.split(TILE) if len(ordered) else ()
    low = torch.stack([tile.amin(dim=0) for tile in tiles]) if tiles else ordered
    high = torch.stack([tile.amax(dim=0) for tile in tiles]) if tiles else ordered
    return _Tiles(ordered, low, high, radius**2 + ROUNDING * largest)


def _near_tile(tiles: _Tiles, i: int) -> Int[Tensor, " p"]:
    """Return the positions in tile i and the tiles after it that its bounding box does not rule out."""
    low, high = tiles.low, tiles.high
    gap = torch.maximum(low[i:] - high[i], low[i] - high[i:]).clamp_min(0)  # between the boxes, along each axis
    near = torch.nonzero(gap.square().sum(dim=1) <= tiles.limit).squeeze(1) + i
    positions = (near[:, None] * TILE + torch.arange(TILE)).flatten()
    positions = positions[positions < len(tiles.rows)]
    packed = tiles.rows[positions, :PACKED]
    gap = torch.maximum(packed - high[i, :PACKED], low[i, :PACKED] - packed).clamp_min(0)  # from the box to each row
    return positions[gap.square().sum(dim=1) <= tiles.limit]


# ---- step 2: projection ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Operands:
    """Rows with two columns more, such that |a - b|^2 <= limit is one product: left(a) . right(b) >= 0.

    |a - b|^2 <= limit is a . b - |a|^2 / 2 - |b|^2 / 2 + limit / 2 >= 0, so left(a) = (a, (limit - |a|^2) / 2, 1) and
    right(b) = (b, 1, -|b|^2 / 2).
    """

    left: Float[Tensor, "n k"]
    right: Float[Tensor, "n k"]


def _operands(tiles: _Tiles) -> _Operands:
    half = tiles.rows.square().sum(dim=1, keepdim=True) / 2
    ones = torch.ones_like(half)
    return _Operands(
        torch.cat([tiles.rows, tiles.limit / 2 - half, ones], dim=1), torch.cat([tiles.rows, ones, -half], dim=1)
    )


def _projected_pairs(tiles: _Tiles, progress: bool) -> Iterator[tuple[Int[Tensor, " c"], Int[Tensor, " c"]]]:
    """Yield positions (first < second), tile by tile, that are within the radius in the projection."""
    n, operands = len(tiles.rows), _operands(tiles)
    buffer = torch.empty(TILE * WIDTH)  # allocating one for each block would cost more than the product
    for i, start in enumerate(tqdm(range(0, n, TILE), desc="pairs", unit="tile", disable=None if progress else True)):
        own = torch.arange(start, min(start + TILE, n))
        for others in _near_tile(tiles, i).split(WIDTH):
            signs = buffer[: len(own) * len(others)].view(len(own), len(others))
            torch.mm(operands.left[own], operands.right[others].T, out=signs)
            if float(signs.max()) >= 0:
                a, b = torch.nonzero(signs >= 0, as_tuple=True)
                first, second = own[a], others[b]
                once = first < second
                yield first[once], second[once]


# ---- step 3: measurement ---------------------------------------------------------------------------------------------


def _measure(rows: Float[Tensor, "n d"], first: Int[Tensor, " c"], second: Int[Tensor, " c"], radius: float) -> Pairs:
    """Return the candidates that are within the radius in all dimensions, measured in float64."""
    left, a = first.unique(return_inverse=True)
    right, b = second.unique(return_inverse=True)
    x, y = rows[left].double(), rows[right].double()
    centre = x.mean(dim=0)  # near rows stay near it, so that nothing cancels
    x, y = x - centre, y - centre
    x2, y2 = x.square().sum(dim=1), y.square().sum(dim=1)
    squared = (x2[:, None] + y2 - 2 * x @ y.T)[a, b] if len(first) else torch.empty(0, dtype=torch.float64)
    # Products leave fewer than 6 digits of these, or they are too near the radius to decide: measured one by one.
    blurred = (squared <= 1e-10 * (x2[a] + y2[b])) | ((squared - radius**2).abs() <= 1e-9 * (x2[a] + y2[b]))
    for chunk in torch.nonzero(blurred).squeeze(1).split(4096):
        squared[chunk] = (rows[first[chunk]].double() - rows[second[chunk]].double()).square().sum(dim=1)
    distance = squared.clamp_min(0).sqrt()
    within = distance <= radius
    ends = torch.stack([first[within], second[within]])
    return Pairs(ends.amin(dim=0).numpy(), ends.amax(dim=0).numpy(), distance[within].numpy())


# ---- groups ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class Groups:
    """Rows linked by pairs: for each member its position and its group, groups by falling size, members by position."""

    position: Int[np.ndarray, " m"]
    group: Int[np.ndarray, " m"]

    def __repr__(self) -> str:
        """Return one line: how many groups and members."""
        return f"Groups({len(np.unique(self.group)):,} of {len(self.position):,} rows)"


def connected_groups(pairs: Pairs, n_rows: int) -> Groups:
    """Return the connected components, of two rows or more, of the graph whose edges are the pairs."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), dtype=np.int8), (pairs.first, pairs.second)), shape=(n_rows, n_rows))
    _, label = connected_components(graph, directed=False)
    sizes = np.bincount(label)
    members = np.nonzero(sizes[label] > 1)[0]
    ranked = np.argsort(-sizes, kind="stable")
    rank = np.empty_like(ranked)
    rank[ranked] = np.arange(len(ranked))
    order = np.argsort(rank[label[members]], kind="stable")
    return Groups(members[order], rank[label[members]][order])


def diameter(rows: Float[Tensor, "n d"]) -> float:
    """Return the largest distance between two of the rows, in float64, 1,024 x N distances at a time."""
    centred = rows.double() - rows.double().mean(dim=0)
    return max(float(torch.cdist(part, centred).max()) for part in centred.split(1024))
