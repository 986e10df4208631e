"""Nearest neighbours against scikit-learn's brute force, in every metric and at every edge."""

from inspect import unwrap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import DTYPES, PROPERTY, gaussian
from sklearn.neighbors import NearestNeighbors

from dimscope.errors import InvalidArgument
from dimscope.geometry import neighbors
from dimscope.geometry.neighbors import NEIGHBOR_METRICS, build_index, drop_self, hubness


def brute(x, queries, k, metric):
    """Return positions and cosines (or distances) by scikit-learn in float64."""
    x, queries = x.double().numpy(), queries.double().numpy()
    if metric == "centred cosine":
        x, queries = x - x.mean(axis=0), queries - x.mean(axis=0)
    index = NearestNeighbors(
        n_neighbors=k, algorithm="brute", metric="euclidean" if metric == "euclidean" else "cosine"
    )
    distance, found = index.fit(x).kneighbors(queries)
    return found, distance if metric == "euclidean" else 1 - distance


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of rows and of queries, so that their borders are crossed."""
    monkeypatch.setattr(neighbors, "ROWS", 64)
    monkeypatch.setattr(neighbors, "QUERIES", 32)


@pytest.mark.parametrize("metric", NEIGHBOR_METRICS)
@pytest.mark.parametrize(("n", "d", "k"), [(300, 10, 7), (65, 3, 1), (200, 50, 200), (40, 2, 12)])
def test_neighbours_are_those_of_scikit_learn(metric, n, d, k):
    x, queries = gaussian(n, d) + 0.7, gaussian(70, d, 1, torch.float64) + 0.7
    ids, scores = build_index(torch.arange(n), x, metric).search(queries, k)
    expected, values = brute(x, queries, k, metric)
    np.testing.assert_array_equal(ids.numpy(), expected)
    np.testing.assert_allclose(scores.numpy(), values, atol=1e-6)  # the rows of the index are float32
    assert scores.dtype == torch.float64


@PROPERTY
@given(
    metric=st.sampled_from(NEIGHBOR_METRICS),
    n=st.integers(1, 90),
    d=st.integers(1, 6),
    k=st.integers(1, 100),
    seed=st.integers(0, 9),
)
def test_scores_are_right_and_sorted_for_any_shape(metric, n, d, k, seed):
    x, queries = gaussian(n, d, seed), gaussian(5, d, seed + 1)
    ids, scores = build_index(torch.arange(n), x, metric).search(queries, k)
    wanted = min(n, k)
    _, values = (
        brute(x, queries, wanted, metric) if metric != "centred cosine" or n > 1 else (None, np.zeros((5, wanted)))
    )
    assert ids.shape == scores.shape == (5, wanted)
    assert all(len(set(row)) == wanted for row in ids.tolist())
    np.testing.assert_allclose(scores.numpy(), values, atol=3e-6)


@pytest.mark.parametrize("metric", NEIGHBOR_METRICS)
def test_one_query_is_answered_as_in_a_batch(metric):
    x, queries = gaussian(200, 9), gaussian(75, 9, 1)  # 64 and more are searched by faiss, where it is installed
    index = build_index(torch.arange(200), x, metric)
    ids, scores = index.search(queries, 5)
    for i, query in list(enumerate(queries))[::9]:
        one_id, one_score = index.search(query[None], 5)
        assert torch.equal(one_id[0], ids[i])
        torch.testing.assert_close(one_score[0], scores[i], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("metric", "dtype"),
    [("cosine", DTYPES[0]), ("centred cosine", DTYPES[1]), ("euclidean", DTYPES[1]), ("cosine", DTYPES[3])],
    ids=str,
)
def test_rows_and_queries_of_every_dtype(metric, dtype):
    x, queries = (gaussian(100, 6) + 0.5).to(dtype), gaussian(4, 6, 1, dtype)
    ids, scores = build_index(torch.arange(100), x, metric).search(queries, 5)
    expected, values = brute(x, queries, 5, metric)
    np.testing.assert_array_equal(ids.numpy(), expected)
    np.testing.assert_allclose(scores.numpy(), values, atol=1e-6)


@pytest.mark.parametrize("metric", NEIGHBOR_METRICS)
def test_answers_are_ids_not_positions(metric):
    x, ids = gaussian(50, 4), torch.arange(50) * 3 + 1000
    found, _ = build_index(ids, x, metric).search(x[:10], 1)
    assert found[:, 0].tolist() == ids[:10].tolist()


@pytest.mark.parametrize("metric", NEIGHBOR_METRICS)
def test_more_neighbours_than_rows_are_all_rows(metric):
    x = gaussian(6, 4)
    ids, scores = build_index(torch.arange(6), x, metric).search(x, 50)
    assert ids.shape == (6, 6)
    assert (ids.sort(dim=1).values == torch.arange(6)).all()
    assert (scores.diff(dim=1) * (1 if metric == "euclidean" else -1) >= 0).all()


def test_zero_rows_have_cosine_zero_with_everything():
    x = gaussian(20, 4)
    x[7] = 0
    ids, scores = build_index(torch.arange(20), x).search(x, 20)
    assert torch.equal(scores[7], torch.zeros(20, dtype=torch.float64))
    assert (scores[ids == 7] == 0).all()


@pytest.mark.parametrize("scale", [1e-12, 1e-25, 1e-35])
def test_rows_that_shrank_to_almost_nothing_keep_their_direction(scale):
    """Weight decay leaves such rows; their squares are zero in float32."""
    x = gaussian(20, 4)
    x[3] = x[11] * scale
    _, scores = build_index(torch.arange(20), x).search(x[11:12], 20)
    assert float(scores.max()) <= 1 + 1e-6
    assert float(scores[0, 1]) == pytest.approx(1, abs=1e-5)


def test_the_centred_cosine_does_not_move_with_the_table_and_the_cosine_does():
    x, queries = gaussian(100, 5), gaussian(6, 5, 1)
    for metric in ("centred cosine", "euclidean"):
        plain = build_index(torch.arange(100), x, metric).search(queries, 4)
        moved = build_index(torch.arange(100), x + 3, metric).search(queries + 3, 4)
        assert torch.equal(plain[0], moved[0])
        torch.testing.assert_close(plain[1], moved[1], atol=1e-5, rtol=0)
    assert not torch.equal(
        build_index(torch.arange(100), x).search(queries, 4)[0],
        build_index(torch.arange(100), x + 3).search(queries + 3, 4)[0],
    )


def test_distances_far_from_the_origin_keep_their_digits():
    x = gaussian(200, 6) + 1000
    ids, scores = build_index(torch.arange(200), x, "euclidean").search(x, 5)
    expected, values = brute(x, x, 5, "euclidean")
    np.testing.assert_array_equal(ids.numpy(), expected)
    np.testing.assert_allclose(scores.numpy()[:, 1:], values[:, 1:], rtol=1e-3)


@pytest.mark.parametrize("spread", [1e-2, 1e-4])
@pytest.mark.parametrize("metric", NEIGHBOR_METRICS)
def test_in_a_tight_cluster_every_row_is_its_own_nearest(metric, spread):
    """200 untrained rows in the same place: many more than the spare candidates, at a distance of `spread` norms."""
    x = gaussian(400, 16)
    x[:200] = 5 * x[0].clone() + spread * 5 * gaussian(200, 16, 1)
    ids, _ = build_index(torch.arange(400), x, metric).search(x[:50], 5)
    expected, _ = brute(x, x[:50], 5, metric)
    assert ids[:, 0].tolist() == expected[:, 0].tolist() == list(range(50))


def test_exact_duplicates_share_the_best_places():
    x = gaussian(60, 4)
    x[10:15] = x[3]
    ids, scores = build_index(torch.arange(60), x).search(x[3:4], 6)
    assert set(ids[0].tolist()) == {3, 10, 11, 12, 13, 14}
    torch.testing.assert_close(scores[0], torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0)


def test_an_unknown_metric_is_refused():
    with pytest.raises(InvalidArgument, match="`metric` must be one of cosine"):
        unwrap(build_index)(torch.arange(3), gaussian(3, 2), "manhattan")  # past the type checker of the tests


@pytest.mark.parametrize("metric", NEIGHBOR_METRICS)
def test_rows_and_queries_are_left_as_they_were(metric):
    x, queries = gaussian(80, 5), gaussian(9, 5, 1, torch.float64)
    before = x.clone(), queries.clone()
    build_index(torch.arange(80), x, metric).search(queries, 4)
    assert torch.equal(x, before[0])
    assert torch.equal(queries, before[1])


# ---- the graph -----------------------------------------------------------------------------------------------------


def test_hubness_is_the_skewness_of_the_in_degrees():
    degrees = np.array([1, 2, 4, 1, 0, 0])
    assert hubness(degrees) == pytest.approx(((degrees - 4 / 3) ** 3).mean() / degrees.std() ** 3)
    assert hubness(-degrees) == pytest.approx(-hubness(degrees))


@pytest.mark.parametrize("degrees", [[2] * 10, [0], [7]])
def test_a_regular_graph_has_no_hubs(degrees):
    assert hubness(np.array(degrees)) == 0


def test_hubs_appear_in_many_dimensions():
    def skewness(d):
        x = gaussian(400, d)
        ids, scores = build_index(torch.arange(400), x, "euclidean").search(x, 11)
        ids, _ = drop_self(ids, scores, torch.arange(400))
        return hubness(np.bincount(ids.flatten().numpy(), minlength=400))

    assert skewness(2) < 0.6
    assert skewness(100) > 2


def test_a_query_itself_is_dropped_wherever_it_stands():
    ids = torch.tensor([[5, 1, 2], [1, 6, 2], [1, 2, 7], [1, 2, 3]])
    scores = torch.tensor([[9.0, 8, 7]] * 4)
    kept_ids, kept_scores = drop_self(ids, scores, torch.tensor([5, 6, 7, 8]))
    assert kept_ids.tolist() == [[1, 2], [1, 2], [1, 2], [1, 2]]
    assert kept_scores.tolist() == [[8, 7], [9, 7], [9, 8], [9, 8]]
    assert ids.tolist()[0] == [5, 1, 2]


def test_duplicates_that_push_the_query_out_of_its_own_list_leave_k_neighbours():
    x = torch.ones(30, 3)
    ids, scores = build_index(torch.arange(30), x).search(x, 6)
    kept, _ = drop_self(ids, scores, torch.arange(30))
    assert kept.shape == (30, 5)
    assert not (kept == torch.arange(30)[:, None]).any()
