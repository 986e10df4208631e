"""Fewer dimensions: closed forms for what they keep, and scikit-learn and scipy as independent implementations."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.decomposition import PCA as SklearnPCA
from sklearn.neighbors import NearestNeighbors

from dimscope.geometry import truncation
from dimscope.geometry.truncation import COORDINATES, PCA, ROTATION, TRUNCATION, kept_dimensions, sizes_of

N, M, D, QUERIES, NEIGHBORS = 300, 500, 16, 120, 5


def gaussian(n: int, d: int = D, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def measured(
    rows: torch.Tensor, fitted: torch.Tensor, n_queries: int = QUERIES
) -> dict[str, dict[int, tuple[float, float]]]:
    """Return the mean overlap and the mean correlation of each method and size, over the draws of random methods."""
    values: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for kept in kept_dimensions(rows, fitted, n_queries, NEIGHBORS, 0):
        pair = float(kept.overlap.mean()), float(kept.correlation.mean())
        values.setdefault(kept.method, {}).setdefault(kept.size, []).append(pair)
    return {m: {size: tuple(np.mean(v, axis=0)) for size, v in sizes.items()} for m, sizes in values.items()}


@pytest.fixture(scope="module")
def structured() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with a mean and directions of unequal variance, mixed by a random matrix: for evaluation and for the fit."""
    rows = (gaussian(N + M) * torch.linspace(3, 0.2, D)) @ gaussian(D, seed=1) + gaussian(1, seed=2)
    return rows[:N], rows[N:]


def in_space(method: str, rows: np.ndarray, fitted: np.ndarray, size: int) -> np.ndarray:
    """Return rows as a method with `size` dimensions represents them."""
    if method == TRUNCATION:
        return rows[:, :size]
    pca = SklearnPCA(size, svd_solver="full").fit(fitted)
    return pca.inverse_transform(pca.transform(rows))


@pytest.mark.parametrize("method", [TRUNCATION, PCA])
def test_neighbours_and_ranks_are_those_of_scikit_learn_and_scipy(structured, method) -> None:
    rows, fitted = (part.double().numpy() for part in structured)
    reference = truncation.full_width(structured[0], QUERIES, NEIGHBORS, 0)

    def neighbours(of: np.ndarray) -> np.ndarray:
        index = NearestNeighbors(n_neighbors=NEIGHBORS + 1, metric="cosine").fit(of)
        return index.kneighbors(of[:QUERIES], return_distance=False)[:, 1:]

    def cosines(of: np.ndarray, query: int) -> np.ndarray:
        unit = of / np.linalg.norm(of, axis=1, keepdims=True)
        return unit[reference.compared[query].numpy()] @ unit[query]

    full = neighbours(rows)
    kept = [k for k in kept_dimensions(*structured, QUERIES, NEIGHBORS, 0) if k.method == method]
    assert [k.size for k in kept] == sizes_of(D)
    for one in kept:
        space = in_space(method, rows, fitted, one.size)
        if one.size > 1 or method == PCA:  # the first coordinate alone has cosines -1 and 1 only
            own = neighbours(space)
            expected = [len(set(a) & set(b)) / NEIGHBORS for a, b in zip(full, own, strict=True)]
            np.testing.assert_allclose(one.overlap, expected, atol=1e-6)
        for query in (0, 7, QUERIES - 1):
            rho = spearmanr(cosines(rows, query), cosines(space, query)).statistic
            assert float(one.correlation[query]) == pytest.approx(rho, abs=1e-4)


def test_a_query_is_compared_with_other_rows_once_each() -> None:
    reference = truncation.full_width(gaussian(50), 20, NEIGHBORS, 0)
    own = torch.arange(20)[:, None]
    assert not (reference.compared == own).any()
    assert not (reference.neighbors == own).any()
    assert all(len(set(row)) == 49 for row in reference.compared.tolist())


def test_rows_of_rank_r_need_r_dimensions_by_pca_and_all_by_truncation() -> None:
    rank = 6
    rows = gaussian(N + M, rank) @ gaussian(rank, seed=1)  # a random subspace of D dimensions
    kept = measured(rows[:N], rows[N:])
    assert kept[PCA][rank][0] == pytest.approx(1, abs=0.005)  # ties of float32
    assert kept[PCA][rank][1] == pytest.approx(1, abs=1e-4)
    assert kept[PCA][4][0] < 0.8
    assert kept[TRUNCATION][rank][0] < 0.7
    assert kept[TRUNCATION][14][0] < 0.99


def test_pca_gains_nothing_over_a_random_rotation_where_all_directions_are_alike() -> None:
    kept = measured(gaussian(N), gaussian(4000, seed=1))
    for size in sizes_of(D):
        for method in (PCA, TRUNCATION, COORDINATES):
            assert kept[method][size] == pytest.approx(kept[ROTATION][size], abs=0.05)


def test_truncation_equals_pca_where_the_leading_coordinates_hold_the_variance() -> None:
    rows = gaussian(N + 4000) * 0.6 ** torch.arange(D)
    kept = measured(rows[:N], rows[N:])
    for size in sizes_of(D)[1:]:  # one coordinate has cosines -1 and 1 only, and PCA has that of the mean beside it
        assert kept[TRUNCATION][size] == pytest.approx(kept[PCA][size], abs=0.03)
    assert kept[TRUNCATION][4][0] > kept[ROTATION][4][0] + 0.3


def test_an_offset_of_all_rows_is_kept_by_pca() -> None:
    """With the mean added back: cosines about the origin, of which a large offset leaves little to the components."""
    rows = gaussian(N + M) * 0.5 ** torch.arange(D) + 5
    kept = measured(rows[:N], rows[N:])
    assert kept[PCA][12][0] > 0.97
    assert kept[PCA][2][0] > kept[TRUNCATION][2][0]


def test_random_rotations_are_orthogonal_and_differ_by_seed() -> None:
    for dim in (2, 5, 64):
        matrix = truncation.rotated(torch.eye(dim), 3)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), atol=1e-5, rtol=0)
    one, other = (truncation.rotated(torch.eye(64), seed) for seed in (0, 1))
    assert float((one * other).sum().abs()) < 20  # of 64 for equal ones
    # Every coordinate is spread over all others, as a uniformly random rotation does: fourth moments of 3 / d^2.
    assert float((one**4).sum(dim=1).mean()) == pytest.approx(3 / 64, rel=0.25)


def test_zero_rows_and_a_zero_coordinate_give_finite_numbers() -> None:
    rows = gaussian(60, 4)
    rows[3] = 0
    rows[:, 0] = 0
    for kept in kept_dimensions(rows, gaussian(60, 4, seed=1), 20, NEIGHBORS, 0):
        assert bool(kept.overlap.isfinite().all() & kept.correlation.isfinite().all())
        assert float(kept.overlap.max()) <= 1
        if kept.method == TRUNCATION and kept.size == 1:
            assert float(kept.correlation.abs().max()) == 0


def test_sizes_are_below_the_dimension_and_include_the_halves() -> None:
    assert sizes_of(1) == []
    assert sizes_of(2) == [1]
    assert sizes_of(384) == [6, 12, 18, 24, 36, 48, 72, 96, 144, 192, 240, 288, 336]


def test_the_standard_error_is_that_of_a_mean() -> None:
    values = torch.tensor([0.2, 0.4, 0.9, 0.5])
    assert truncation.standard_error(values) == pytest.approx(np.std(values.numpy(), ddof=1) / 2)
    assert truncation.standard_error(values[:1]) == 0
