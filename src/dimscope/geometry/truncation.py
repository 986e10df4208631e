"""What fewer dimensions keep: the nearest neighbours and the similarity ranks of vectors in their first k coordinates.

The coordinates are those of the vectors themselves (truncation), the same in random order, principal components, or those of
a random rotation. All are orthogonal, so that the inner products of the first k coordinates add up to those of all d: one pass
over the coordinates gives every k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.geometry.spectrum import principal_components
from dimscope.vectors.moments import moments

TRUNCATION, PCA, COORDINATES, ROTATION = "truncation", "PCA", "random coordinates", "random rotation"
DRAWS = {COORDINATES: 3, ROTATION: 10}  # seeds; the second is what other methods are tested against
SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16, 3 / 64, 1 / 32, 1 / 64)
MIXINGS = 3  # rounds of signs and a cosine transform after which a rotation is as good as uniform (Yu et al. 2016)
COMPARED = 100  # rows among which the similarities of a query are ranked
RESOLUTION = 1e-6  # of similarities in float32, as a share of the largest


def sizes_of(dim: int) -> list[int]:
    """Return the numbers of dimensions that are tried, all below `dim`.

    >>> sizes_of(64)
    [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 56]
    """
    return sorted({size for share in SHARES if 1 <= (size := round(dim * share)) < dim})


@dataclass(frozen=True, slots=True, eq=False)
class FullWidth:
    """Neighbours and similarities of the first q rows in all dimensions.

    Attributes:
        neighbors: The nearest other rows of each query by cosine.
        compared: Some other rows for each query.
        ranks: The ranks of their cosines, centred and of norm 1; zeros where all cosines are equal.
    """

    neighbors: Int[Tensor, "q k"]
    compared: Int[Tensor, "q c"]
    ranks: Float[Tensor, "q c"]


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What the first `size` coordinates keep of each query.

    Attributes:
        method: The coordinates.
        seed: The seed of random coordinates; None for others.
        size: How many of them.
        overlap: The share of the nearest neighbours that are still the nearest.
        correlation: The Spearman correlation of its cosines with those in all dimensions.
    """

    method: str
    seed: int | None
    size: int
    overlap: Float[Tensor, " q"]
    correlation: Float[Tensor, " q"]


def kept_dimensions(
    rows: Float[Tensor, "n d"], fitted: Float[Tensor, "m d"], n_queries: int, n_neighbors: int, seed: int
) -> Iterator[Kept]:
    """Yield what every method keeps in every size of `sizes_of`.

    Args:
        rows: The rows among which neighbours are sought; the first `n_queries` of them are the queries.
        fitted: Other rows, from which PCA takes its mean and its components.
        n_queries: The number of queries.
        n_neighbors: The number of nearest neighbours; fewer than `rows`.
        seed: Seed of the compared rows and of the random methods.
    """
    reference = full_width(rows, n_queries, n_neighbors, seed)
    components, constants = pca_coordinates(rows, fitted)
    runs: list[tuple[str, int | None]] = [(PCA, None), (TRUNCATION, None)]
    runs += [(method, seed + draw) for method, n in DRAWS.items() for draw in range(n)]
    for method, own in runs:
        if method == PCA:
            parts = kept_by_size(components, reference, constants)
        elif method == TRUNCATION:
            parts = kept_by_size(rows, reference)
        else:
            assert own is not None
            parts = kept_by_size((permuted if method == COORDINATES else rotated)(rows, own), reference)
        yield from (Kept(method, own, size, overlap, correlation) for size, overlap, correlation in parts)


def full_width(rows: Float[Tensor, "n d"], n_queries: int, n_neighbors: int, seed: int) -> FullWidth:
    """Find the neighbours and rank the similarities of the first rows in all dimensions."""
    n = len(rows)
    cosines = _scores(rows[:n_queries] @ rows.T, rows.square().sum(dim=1), 0.0)
    order = torch.rand(n_queries, n, generator=torch.Generator().manual_seed(seed))
    order.fill_diagonal_(-1.0)  # never with itself
    compared = order.topk(min(COMPARED, n - 1), dim=1).indices
    return FullWidth(_nearest(cosines, n_neighbors), compared, _ranks(cosines.gather(1, compared)))


def kept_by_size(
    rows: Float[Tensor, "n d"], reference: FullWidth, constants: Float[Tensor, " d"] | None = None
) -> Iterator[tuple[int, Float[Tensor, " q"], Float[Tensor, " q"]]]:
    """Yield size, overlap and correlation for the leading coordinates of rows.

    Args:
        rows: Rows in some coordinates, in the order of the reference.
        reference: Their neighbours and ranks in all dimensions.
        constants: The square of a further coordinate that all rows share, for each number of leading coordinates; zero by default.
    """
    n_queries = len(reference.neighbors)
    is_neighbor = torch.zeros(n_queries, len(rows), dtype=torch.bool).scatter_(1, reference.neighbors, True)
    products, squares, start = torch.zeros(n_queries, len(rows)), torch.zeros(len(rows)), 0
    for size in sizes_of(rows.shape[1]):
        part = rows[:, start:size]
        products.addmm_(part[:n_queries], part.T)
        squares += part.square().sum(dim=1)
        start = size
        scores = _scores(products, squares, 0.0 if constants is None else float(constants[size - 1]))
        correlation = (_ranks(scores.gather(1, reference.compared)) * reference.ranks).sum(dim=1)
        nearest = _nearest(scores, reference.neighbors.shape[1])
        yield size, is_neighbor.gather(1, nearest).float().mean(dim=1), correlation


def pca_coordinates(
    rows: Float[Tensor, "n d"], fitted: Float[Tensor, "m d"]
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " d"]]:
    """Return rows in the principal components of other rows, and the squared norm of the mean outside of the first k.

    The k leading components V of the centred rows approximate a row x by `V Vᵀ (x - m) + m`: the mean is added back. This
    approximation has the coordinates `Vᵀ x`, and one more that is the same for all rows: the norm of the part of m outside V.
    """
    of_fitted = moments([fitted], dtype=torch.float64)
    components = principal_components(of_fitted, rows.shape[1])
    mean = of_fitted.mean @ components
    constants = (mean.square().sum() - mean.square().cumsum(0)).clamp(min=0)
    return rows @ components.float(), constants.float()


def permuted(rows: Float[Tensor, "n d"], seed: int) -> Float[Tensor, "n d"]:
    """Return the coordinates of rows in random order."""
    return rows[:, torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(seed))]


def rotated(rows: Float[Tensor, "n d"], seed: int) -> Float[Tensor, "n d"]:
    """Rotate rows at random: signs and a cosine transform, three times, then an order (Yu et al. 2016, arXiv 1610.09072).

    This takes d log d operations a row, where a uniformly random matrix takes d^2, and d^3 to draw.
    """
    from scipy.fft import dct

    generator, dim = torch.Generator().manual_seed(seed), rows.shape[1]
    values = rows.numpy()
    for _ in range(MIXINGS):
        signs = torch.randint(0, 2, (dim,), generator=generator).mul_(2).sub_(1)
        values = dct(values * signs.float().numpy(), axis=1, norm="ortho")
    return torch.from_numpy(values)[:, torch.randperm(dim, generator=generator)]


def standard_error(values: Float[Tensor, " q"]) -> float:
    """Compute the standard error of a mean over queries; 0 for one query."""
    return float(values.double().std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def _scores(products: Float[Tensor, "q n"], squares: Float[Tensor, " n"], constant: float) -> Float[Tensor, "q n"]:
    """Return cosines up to a factor for each query, which changes no rank. A zero row has cosine 0 with everything."""
    lengths = (squares + constant).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    return (products + constant).mul_(inverse) if constant else products * inverse


def _nearest(scores: Float[Tensor, "q n"], k: int) -> Int[Tensor, "q k"]:
    """Return the best rows of each query but itself."""
    return scores.fill_diagonal_(-torch.inf).topk(k, dim=1).indices


def _ranks(values: Float[Tensor, "q c"]) -> Float[Tensor, "q c"]:
    """Return the ranks in each row, ties at their mean, centred and of norm 1. Differences within rounding are ties."""
    from scipy.stats import rankdata

    unit = RESOLUTION * values.abs().amax(dim=1, keepdim=True)
    steps = (values / torch.where(unit > 0, unit, 1.0)).round()
    ordered, order = steps.sort(dim=1)
    ranks = torch.empty_like(values).scatter_(1, order, torch.arange(1.0, values.shape[1] + 1).expand_as(values))
    tied = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
    if bool(tied.any()):  # the general way takes ten times as long
        ranks[tied] = torch.from_numpy(rankdata(steps[tied].numpy(), axis=1)).float()
    centred = ranks - ranks.mean(dim=1, keepdim=True)
    lengths = centred.norm(dim=1, keepdim=True)
    return centred / torch.where(lengths > 0, lengths, 1.0)
