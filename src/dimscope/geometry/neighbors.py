"""Exact nearest neighbours of rows: cosine, centred cosine or Euclidean, in all dimensions or in a projection."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from dimscope.errors import InvalidArgument

NeighborMetric = Literal["cosine", "centred cosine", "euclidean"]
NEIGHBOR_METRICS: tuple[NeighborMetric, ...] = ("cosine", "centred cosine", "euclidean")
QUERIES = 1024  # queries scored at once
ROWS = 4096  # rows they are scored against at once: 16 MiB of scores, which stay in the cache
BATCH = 64  # queries from which faiss is worth its own set-up
SPARE = 8  # candidates beyond k that are scored again in float64
ROUNDING = 3e-6  # float32 may be off by this share of |query| x |row| in a score


class Neighbors(NamedTuple):
    """The nearest rows of each of q vectors, best first: ids, and cosines or Euclidean distances in `scores`."""

    ids: Int[Tensor, "q k"]
    scores: Float[Tensor, "q k"]


@dataclass(frozen=True, slots=True, repr=False)
class NeighborIndex:
    """Rows prepared for one metric: candidates by float32 products of `keys`, ranks by float64 from `rows` themselves."""

    ids: Int[Tensor, " n"]
    rows: Float[Tensor, "n d"]
    keys: Float[Tensor, "n d"]  # unit rows for the cosines, rows minus their mean for Euclidean
    half_squares: Float[Tensor, " n"] | None  # Euclidean only: nearest is largest q . key - |key|^2 / 2
    mean: Float[Tensor, " d"]  # what is taken off first; zero for the plain cosine
    lengths: Float[Tensor, " n"]  # norms of the rows minus the mean, float64; 1 for a zero row
    metric: NeighborMetric

    def __repr__(self) -> str:
        """Return one line: metric and shape."""
        return f"NeighborIndex({self.metric}, {self.rows.shape[0]:,} x {self.rows.shape[1]:,})"

    def prepare(self, vectors: Float[Tensor, "q d"]) -> Float[Tensor, "q d"]:
        """Return vectors of the space of the table in the form that the index compares."""
        shifted = vectors.double() - self.mean
        return shifted if self.metric == "euclidean" else _unit(shifted)

    def search(self, vectors: Float[Tensor, "q d"], k: int, *, progress: bool = False) -> Neighbors:
        """Return the k nearest rows of each vector, best first; all rows where there are fewer.

        Exact: candidates come from float32, with everything within its rounding among them, and are ranked in float64.
        """
        k = min(k, len(self.ids))
        queries = self.prepare(vectors)
        ids = torch.empty(len(queries), k, dtype=torch.int64)
        similarities = torch.empty(len(queries), k, dtype=torch.float64)
        chunks = range(0, len(queries), QUERIES)
        for start in tqdm(chunks, desc="neighbours", unit="block", disable=None if progress else True):
            chunk = queries[start : start + QUERIES]
            scores, candidates = self._candidates(chunk.float(), min(k + SPARE, len(self.ids)))
            best, order = self._exact(chunk, candidates).topk(k, dim=1)
            positions = candidates.gather(1, order)
            # Where the last candidate is within rounding of the k-th, rows beyond it may be nearer.
            least = scores[:, k - 1] - self._rounding(chunk)
            crowded = scores[:, -1] >= least if candidates.shape[1] < len(self.ids) else torch.zeros(len(chunk)).bool()
            for q in torch.nonzero(crowded).squeeze(1).tolist():
                best[q], positions[q] = self._search_one(chunk[q], least[q], k)
            ids[start : start + QUERIES], similarities[start : start + QUERIES] = self.ids[positions], best
        return Neighbors(ids, similarities.neg() if self.metric == "euclidean" else similarities)

    def _rounding(self, queries: Float[Tensor, "q d"]) -> Float[Tensor, " q"]:
        """Return how far off the float32 scores of each query may be."""
        longest = 1.0 if self.half_squares is None else (2 * self.half_squares.max()).sqrt()
        return ROUNDING * queries.norm(dim=1).float() * longest

    def _scores(self, queries: Float[Tensor, "q d"], start: int, stop: int) -> Float[Tensor, "q n"]:
        tile = queries @ self.keys[start:stop].T
        return tile if self.half_squares is None else tile.sub_(self.half_squares[start:stop])

    def _candidates(self, queries: Float[Tensor, "q d"], k: int) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
        """Return float32 scores and positions of the k best rows, best first, a tile of rows at a time."""
        faiss = _faiss() if self.half_squares is None and len(queries) >= BATCH else None
        if faiss is not None:
            scores, positions = faiss.knn(queries.numpy(), self.keys.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
            return torch.from_numpy(scores), torch.from_numpy(positions)
        scores, positions = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        for start in range(0, len(self.keys), ROWS):
            tile = self._scores(queries, start, start + ROWS)
            best, order = tile.topk(min(k, tile.shape[1]), dim=1)
            scores, positions = torch.cat([scores, best], dim=1), torch.cat([positions, order + start], dim=1)
        best, order = scores.topk(k, dim=1)
        return best, positions.gather(1, order)

    def _search_one(
        self, query: Float[Tensor, " d"], least: Tensor, k: int
    ) -> tuple[Float[Tensor, " k"], Int[Tensor, " k"]]:
        """Return the k nearest among all rows whose float32 score reaches `least`."""
        scores = self._scores(query[None].float(), 0, len(self.keys))[0]
        candidates = torch.nonzero(scores >= least).squeeze(1)
        best, order = self._exact(query[None], candidates[None])[0].topk(k)
        return best, candidates[order]

    def _exact(self, queries: Float[Tensor, "q d"], candidates: Int[Tensor, "q k"]) -> Float[Tensor, "q k"]:
        """Return similarities in float64, larger is nearer: cosines, or minus the distance."""
        parts = []
        for part, positions in zip(queries.split(64), candidates.split(64), strict=True):
            rows = self.rows[positions].double()
            if self.metric != "cosine":
                rows -= self.mean
            if self.metric == "euclidean":
                parts.append(-(rows - part[:, None]).norm(dim=2))
            else:
                parts.append((rows @ part[:, :, None]).squeeze(2) / self.lengths[positions])
        return torch.cat(parts)


def build_index(ids: Int[Tensor, " n"], rows: Float[Tensor, "n d"], metric: NeighborMetric = "cosine") -> NeighborIndex:
    """Prepare rows for searches by one metric. Rows of norm 0 have cosine 0 with everything.

    Raises:
        InvalidArgument: For an unknown metric.
    """
    if metric not in NEIGHBOR_METRICS:
        raise InvalidArgument(f"`metric` must be one of {', '.join(NEIGHBOR_METRICS)}, got {metric!r}")
    mean = rows.mean(dim=0, dtype=torch.float64)
    if metric == "cosine":
        mean = torch.zeros_like(mean)
    keys = (rows - mean.to(rows.dtype)).float()  # distances do not change, and their float32 error shrinks
    shifted = norms(rows) if metric == "cosine" else norms_from(rows, mean)
    lengths = torch.where(shifted > 0, shifted, 1.0)
    if metric == "euclidean":
        half_squares = (norms(keys).squeeze(1).square() / 2).float()
        return NeighborIndex(ids, rows, keys, half_squares, mean, lengths.squeeze(1), metric)
    return NeighborIndex(ids, rows, keys.div_(_divisors(keys)), None, mean, lengths.squeeze(1), metric)


def _unit(rows: Float[Tensor, "n *k d"]) -> Float[Tensor, "n *k d"]:
    return rows / _divisors(rows)


def _divisors(rows: Float[Tensor, "n *k d"]) -> Float[Tensor, "n *k 1"]:
    """Return the norms in the dtype of the rows; 1 where a row is zero."""
    lengths = norms(rows)
    return torch.where(lengths > 0, lengths, 1.0).to(rows.dtype)


def norms(rows: Float[Tensor, "n *k d"]) -> Float[Tensor, "n *k 1"]:
    """Compute norms in float64, where squares of small numbers do not underflow, a block of rows at a time."""
    return torch.cat([part.double().norm(dim=-1, keepdim=True) for part in rows.split(8192)])


def norms_from(rows: Float[Tensor, "n d"], centre: Float[Tensor, " d"]) -> Float[Tensor, "n 1"]:
    """Compute distances of rows from a centre, in float64, a block of rows at a time."""
    return torch.cat([(part.double() - centre).norm(dim=-1, keepdim=True) for part in rows.split(8192)])


@cache
def _faiss() -> ModuleType | None:
    """Return faiss where its extra is installed: its blocked search of many queries is faster than product and topk."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its bindings import deprecated names
            return import_module("faiss")
    except ImportError:
        return None


def hubness(in_degrees: Int[np.ndarray, " n"]) -> float:
    """Compute the skewness of the in-degrees N_k of a kNN graph (Radovanovic et al. 2010).

    0 for a graph whose every row is chosen equally often; above 1 a few hubs are neighbours of very many.
    """
    from scipy.stats import skew

    return float(skew(in_degrees)) if len(set(in_degrees.tolist())) > 1 else 0.0


def drop_self(ids: Int[Tensor, "q k1"], scores: Float[Tensor, "q k1"], own: Int[Tensor, " q"]) -> Neighbors:
    """Return one column less: without the own id of each query where it is among the neighbours, else without the last."""
    others = ids != own[:, None]
    others[:, -1] &= ~others.all(dim=1)
    shape = (len(ids), ids.shape[1] - 1)
    return Neighbors(ids[others].view(shape), scores[others].view(shape))
