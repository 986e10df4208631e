"""Exact nearest neighbours of rows: cosine, centred cosine or Euclidean, in all dimensions or in a projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from dimscope.errors import InvalidArgument

Metric = Literal["cosine", "centred cosine", "euclidean"]
METRICS: tuple[Metric, ...] = ("cosine", "centred cosine", "euclidean")
QUERIES = 1024  # queries scored at once
ROWS = 4096  # rows they are scored against at once: 16 MiB of scores, which stay in the cache
SPARE = 8  # candidates beyond k that are scored again in float64, so that rounding cannot swap ranks


@dataclass(frozen=True, slots=True)
class NeighborIndex:
    """Rows prepared for one metric: found by the largest inner product (minus half the squared norm, if Euclidean)."""

    ids: Int[Tensor, " n"]
    rows: Float[Tensor, "n d"]  # unit rows for the cosines, rows minus their mean for Euclidean
    half_squares: Float[Tensor, " n"] | None
    mean: Float[Tensor, " d"]
    metric: Metric

    def prepare(self, vectors: Float[Tensor, "q d"]) -> Float[Tensor, "q d"]:
        """Vectors of the table's space as the index compares them."""
        shifted = vectors.double() - self.mean
        return shifted if self.metric == "euclidean" else _unit(shifted)

    def search(
        self, vectors: Float[Tensor, "q d"], k: int, *, progress: bool = False
    ) -> tuple[Int[Tensor, "q k"], Float[Tensor, "q k"]]:
        """Token ids and similarities (cosines, or Euclidean distances) of the k nearest rows of each vector, best first.

        Candidates are found in float32 and ranked in float64. With k above the number of rows, all of them.
        """
        k = min(k, len(self.ids))
        queries = self.prepare(vectors)
        found_ids, found = (
            torch.empty(len(queries), k, dtype=torch.int64),
            torch.empty(len(queries), k, dtype=torch.float64),
        )
        chunks = range(0, len(queries), QUERIES)
        for start in tqdm(chunks, desc="neighbours", unit="block", disable=None if progress else True):
            chunk = queries[start : start + QUERIES]
            candidates = self._candidates(chunk.float(), min(k + SPARE, len(self.ids)))
            scores = self._exact(chunk, candidates)
            best, order = scores.topk(k, dim=1)
            found_ids[start : start + QUERIES] = self.ids[candidates.gather(1, order)]
            found[start : start + QUERIES] = best
        return found_ids, found.neg() if self.metric == "euclidean" else found

    def _candidates(self, queries: Float[Tensor, "q d"], k: int) -> Int[Tensor, "q k"]:
        """Positions of the k best rows by float32 score, a tile of rows at a time."""
        scores, positions = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        for start in range(0, len(self.rows), ROWS):
            tile = queries @ self.rows[start : start + ROWS].T
            if self.half_squares is not None:
                tile -= self.half_squares[start : start + ROWS]
            best, order = tile.topk(min(k, tile.shape[1]), dim=1)
            scores, positions = torch.cat([scores, best], dim=1), torch.cat([positions, order + start], dim=1)
        _, order = scores.topk(k, dim=1)
        return positions.gather(1, order)

    def _exact(self, queries: Float[Tensor, "q d"], candidates: Int[Tensor, "q k"]) -> Float[Tensor, "q k"]:
        """Similarities in float64, larger is nearer: cosines, or minus the distance."""
        parts = []
        for wanted, chosen in zip(queries.split(64), candidates.split(64), strict=True):
            rows = self.rows[chosen].double()
            euclidean = self.metric == "euclidean"
            parts.append(-(rows - wanted[:, None]).norm(dim=2) if euclidean else (rows @ wanted[:, :, None]).squeeze(2))
        return torch.cat(parts)


def build_index(ids: Int[Tensor, " n"], rows: Float[Tensor, "n d"], metric: Metric = "cosine") -> NeighborIndex:
    """Prepares rows for searches by one metric. Rows of norm 0 have cosine 0 with everything.

    Raises InvalidArgument for an unknown metric.
    """
    if metric not in METRICS:
        raise InvalidArgument(f"a metric is one of {', '.join(METRICS)}, not {metric!r}")
    mean = rows.mean(dim=0, dtype=torch.float64)
    if metric == "cosine":
        mean = torch.zeros_like(mean)
    # Distances do not change when the mean is taken off, and their float32 error shrinks.
    shifted = rows - mean.float()
    if metric == "euclidean":
        return NeighborIndex(ids, shifted, shifted.double().square().sum(dim=1).div(2).float(), mean, metric)
    return NeighborIndex(ids, _unit(shifted), None, mean, metric)


def _unit(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def hubness(in_degrees: Int[np.ndarray, " n"]) -> float:
    """Skewness of the in-degrees N_k of a kNN graph (Radovanovic et al. 2010).

    0 for a graph whose every row is chosen equally often; above 1 a few hubs are neighbours of very many.
    """
    from scipy.stats import skew

    return float(skew(in_degrees)) if len(set(in_degrees.tolist())) > 1 else 0.0


def drop_self(
    ids: Int[Tensor, "q k1"], scores: Float[Tensor, "q k1"], own: Int[Tensor, " q"]
) -> tuple[Int[Tensor, "q k"], Float[Tensor, "q k"]]:
    """One column less: each query's own id where it was found, else the last."""
    keep = ids != own[:, None]
    keep[:, -1] &= ~keep.all(dim=1)
    shape = (len(ids), ids.shape[1] - 1)
    return ids[keep].view(shape), scores[keep].view(shape)
