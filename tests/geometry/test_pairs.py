"""Pairs within a radius against all pairs measured one by one, and the groups that they form."""

import math
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import DTYPES, PROPERTY, gaussian
from scipy.spatial.distance import pdist

from dimscope.errors import InvalidArgument
from dimscope.geometry import pairs as module
from dimscope.geometry.pairs import TILE, Pairs, connected_groups, diameter, pairs_within
from dimscope.geometry.spectrum import principal_components
from dimscope.vectors.moments import moments


def components_of(x, k=32):
    return principal_components(moments([x], dtype=torch.float64), k)


def found_in(x, radius, components=None):
    found = pairs_within(x, components_of(x) if components is None else components, radius)
    assert (found.first < found.second).all()
    assert len(found) == len(found.first) == len(found.second) == len(found.distance)
    pairs = dict(
        zip(zip(found.first.tolist(), found.second.tolist(), strict=True), found.distance.tolist(), strict=True)
    )
    assert len(pairs) == len(found)  # each once
    return pairs


def brute(x, radius):
    a, b = np.triu_indices(len(x), 1)
    distance = pdist(x.double().numpy()) if len(x) > 1 else np.empty(0)
    kept = distance <= radius
    return dict(zip(zip(a[kept].tolist(), b[kept].tolist(), strict=True), distance[kept].tolist(), strict=True))


def same(found, expected):
    """The same pairs; distances as good as products are before pairs are measured one by one: 1e-10 of the squares."""
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), [expected[pair] for pair in found], rtol=5e-6)


@pytest.mark.parametrize(
    ("n", "d", "share"),
    [
        (TILE - 28, 5, 0),
        (TILE, 40, 0.1),
        (TILE + 1, 3, 1),
        (300, 60, 0.001),
        (300, 60, 0.7),
        (400, 2, 0.01),
        (150, 1, 0.1),
    ],
)
def test_pairs_are_those_of_brute_force(n, d, share):
    x = gaussian(n, d)
    # Between two distances, so that the last bit of either decides nothing.
    distances = np.sort(pdist(x.double().numpy()))
    at = min(round(share * len(distances)), len(distances) - 1)
    radius = (distances[at - 1] + distances[at]) / 2 if 0 < share < 1 else share * distances[-1] * 1.01
    same(found_in(x, float(radius)), brute(x, float(radius)))


@PROPERTY
@given(
    n=st.integers(1, 60),
    d=st.integers(1, 8),
    copies=st.integers(0, 20),
    seed=st.integers(0, 99),
    radius=st.floats(0, 4),
    tile=st.integers(1, 70),
)
def test_pairs_are_those_of_brute_force_for_any_shape_and_tile(n, d, copies, seed, radius, tile):
    x = gaussian(n, d, seed)
    x[: min(copies, n)] = x[-1].clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE", tile)
        patch.setattr(module, "WIDTH", 16)
        same(found_in(x, radius), brute(x, radius))


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
@pytest.mark.parametrize("offset", [0, 3])
def test_planted_duplicates_are_all_that_radius_zero_finds(scale, offset):
    x = gaussian(400, 20) * scale + offset * scale
    x[[5, 399, 17]] = x[3].clone()
    x[200] = x[201]
    assert found_in(x, 0.0) == {
        (3, 5): 0,
        (3, 17): 0,
        (3, 399): 0,
        (5, 17): 0,
        (5, 399): 0,
        (17, 399): 0,
        (200, 201): 0,
    }


def test_near_duplicates_have_their_distance_to_nine_digits():
    x = gaussian(300, 50)
    for row, step in enumerate((1e-6, 1e-4, 1e-2)):
        x[100 + row] = x[row] + step * torch.eye(50)[row]
    found = found_in(x, 0.02)
    assert found.keys() == {(0, 100), (1, 101), (2, 102)}
    for (a, b), distance in found.items():
        assert distance == pytest.approx(float((x[a].double() - x[b].double()).norm()), rel=1e-9)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_hardly_any_rows(n):
    x = torch.zeros(n, 4)
    assert found_in(x, 1.0, torch.eye(4)) == ({(0, 1): 0} if n == 2 else {})


@pytest.mark.parametrize("n", [5, 300])
def test_rows_that_are_all_the_same_are_all_pairs(n):
    assert len(found_in(torch.full((n, 6), 0.3), 0.0, torch.eye(6))) == n * (n - 1) // 2


def test_a_distance_equal_to_the_radius_is_within_it():
    """Whole numbers have exact distances: the grid's neighbours at 1 and its diagonals at sqrt 2."""
    x = torch.cartesian_prod(*[torch.arange(6.0)] * 3) + 100
    for radius in (1.0, math.sqrt(2), 2.0):
        same(found_in(x, radius), brute(x, radius))


def radius_between(distances, share):
    """Return a radius between two distances at this share of all, so that the last bit of a distance decides nothing."""
    distances = np.concatenate([[0.0], np.sort(distances), [2 * distances.max()]])
    gaps = np.flatnonzero(distances[1:] > (1 + 1e-9) * distances[:-1])
    at = gaps[min(int(share * len(gaps)), len(gaps) - 1)]
    return float(distances[at] + distances[at + 1]) / 2


@PROPERTY
@given(
    n=st.integers(2, 60),
    d=st.integers(1, 8),
    decades=st.integers(0, 36),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    tile=st.integers(1, 70),
)
def test_pairs_of_rows_of_very_different_lengths_are_those_of_brute_force(n, d, decades, share, seed, tile):
    random = torch.Generator().manual_seed(seed)
    x = gaussian(n, d, seed) * 10 ** (decades * (2 * torch.rand(n, 1, generator=random) - 1))
    third = n // 3
    x[:third] = x[third : 2 * third]  # copies and near copies at every length
    x[:third:2] *= 1 + 1e-4 * gaussian(len(range(0, third, 2)), 1, seed + 1)
    radius = radius_between(pdist(x.double().numpy()), share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE", tile)
        patch.setattr(module, "WIDTH", 16)
        same(found_in(x, radius), brute(x, radius))


def lengthened(x, count, factor):
    x = x.clone()
    x[1 :: len(x) // count] *= factor
    return x


LONG_ROWS = [(1, 300.0), (10, 1e4), (1, 1e18), (1, 1e37), (60, 1e3)]


@pytest.mark.parametrize(("count", "factor"), LONG_ROWS)
def test_a_few_long_rows_change_no_pair_of_the_others_and_add_hardly_any_work(count, factor, monkeypatch):
    x = gaussian(3000, 64)
    x[2000:2055] = x[100:155] + 1e-3 * gaussian(55, 64, 1)
    work = {"compared": 0, "measured": 0}
    near_tile, measure = module._near_tile, module._measure

    def counted_near_tile(tiles, i):
        near = near_tile(tiles, i)
        work["compared"] += TILE * len(near)
        return near

    def counted_measure(rows, first, second, radius):
        work["measured"] += len(first)
        return measure(rows, first, second, radius)

    monkeypatch.setattr(module, "_near_tile", counted_near_tile)
    monkeypatch.setattr(module, "_measure", counted_measure)
    alone, usual = found_in(x, 0.02), dict(work)
    assert len(alone) == 55
    work.update(compared=0, measured=0)
    long = lengthened(x, count, factor)
    long_rows = set((long != x).any(dim=1).nonzero().flatten().tolist())
    expected = {pair: distance for pair, distance in alone.items() if not long_rows & set(pair)}
    assert len(expected) >= 50
    same(found_in(long, 0.02), expected)
    assert work["compared"] <= 1.5 * usual["compared"]
    assert work["measured"] <= 1.5 * usual["measured"] + count**2


def test_components_may_be_any_orthonormal_columns_and_fewer_than_32():
    x = gaussian(200, 10)
    expected = brute(x, 2.5)
    assert expected
    for components in (torch.eye(10), torch.eye(10)[:, :1], torch.eye(10, dtype=torch.float64)[:, 3:7]):
        same(found_in(x, 2.5, components), expected)


def test_a_spread_of_many_sizes_is_exact():
    """Clusters of one size inside clusters of another, far from the origin."""
    x = (
        50 * gaussian(8, 12).repeat_interleave(50, 0)
        + gaussian(40, 12, 1).repeat_interleave(10, 0)
        + 1e-3 * gaussian(400, 12, 2)
    )
    for radius in (1e-3, 5e-3, 3.0, 8.0):
        same(found_in(x, radius), brute(x, radius))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_dtype(dtype):
    x = gaussian(200, 8, dtype=dtype)
    x[150] = x[20]
    same(found_in(x, 1.7), brute(x, 1.7))


def test_too_many_pairs_are_refused_with_the_radius(monkeypatch):
    monkeypatch.setattr(module, "LIMIT", 1000)
    with pytest.raises(InvalidArgument, match=r"more than 1,000 pairs lie within 1e\+09; take a smaller `radius`"):
        pairs_within(gaussian(300, 5), torch.eye(5), 1e9)
    assert len(pairs_within(gaussian(45, 5), torch.eye(5), 1e9)) == 990


@pytest.mark.parametrize("radius", [-1e-9, math.nan, math.inf])
def test_a_radius_that_is_none_is_refused(radius):
    with pytest.raises(InvalidArgument, match=r"`radius` must be a finite number, 0 or more, got"):
        pairs_within(gaussian(5, 2), torch.eye(2), radius)


def test_rows_and_components_are_left_as_they_were():
    x = gaussian(300, 5)
    components = components_of(x)
    before = x.clone(), components.clone()
    pairs_within(x, components, 1.0)
    assert torch.equal(x, before[0])
    assert torch.equal(components, before[1])


# ---- groups --------------------------------------------------------------------------------------------------------


def pairs_of(*ends):
    first, second = np.array(ends, dtype=np.int64).reshape(-1, 2).T
    return Pairs(first, second, np.zeros(len(first)))


def groups_by_search(ends, n):
    """Return the components of two or more, the largest first, by breadth-first search."""
    linked = {i: set() for i in range(n)}
    for a, b in ends:
        linked[a].add(b)
        linked[b].add(a)
    seen, groups = set(), []
    for start in range(n):
        if start in seen or not linked[start]:
            continue
        queue, members = deque([start]), {start}
        while queue:
            for other in linked[queue.popleft()] - members:
                members.add(other)
                queue.append(other)
        seen |= members
        groups.append(sorted(members))
    return groups


EDGES = st.lists(
    st.tuples(st.integers(0, 29), st.integers(0, 29)).filter(lambda e: e[0] < e[1]), max_size=25, unique=True
)


@PROPERTY
@given(ends=EDGES)
def test_groups_are_the_connected_components(ends):
    found = connected_groups(pairs_of(*ends), 30)
    groups = [
        found.position[found.group == g].tolist() for g in range(int(found.group.max()) + 1 if len(found.group) else 0)
    ]
    assert sorted(groups) == sorted(groups_by_search(ends, 30))
    assert all(members == sorted(members) for members in groups)
    sizes = [len(members) for members in groups]
    assert sizes == sorted(sizes, reverse=True)
    assert (np.diff(found.group) >= 0).all()


def test_a_chain_is_one_group_and_singles_are_none():
    found = connected_groups(pairs_of((0, 1), (4, 9), (9, 7)), 10)
    assert found.position.tolist() == [4, 7, 9, 0, 1]
    assert found.group.tolist() == [0, 0, 0, 1, 1]


def test_no_pairs_form_no_groups():
    found = connected_groups(pairs_of(), 5)
    assert len(found.position) == len(found.group) == 0


@pytest.mark.parametrize("n", [1, 2, 40])
def test_the_diameter_is_the_largest_distance(n):
    x = gaussian(n, 6) + 50
    assert diameter(x) == pytest.approx(float(pdist(x.double().numpy()).max()) if n > 1 else 0, abs=1e-9)


def test_the_diameter_of_duplicates_is_zero():
    assert diameter(torch.full((40, 6), 0.1)) == pytest.approx(0, abs=1e-12)
