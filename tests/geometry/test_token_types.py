"""States by the type of their token: the parts add up, and planted vocabulary and context come back."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from dimscope.geometry.half_samples import groups_of, half_samples
from dimscope.geometry.token_types import one_of_each, same_type_neighbors, type_spectra, variance_between_types


def planted(n=400, n_types=40, d=12, share=0.8, seed=0):
    """Return rows of which this share of the variance is that of the means of their types, and the types."""
    rng = np.random.default_rng(seed)
    types = rng.integers(0, n_types, n) * 7 + 3
    means = rng.normal(size=(7 * n_types + 3, d)) * np.sqrt(share)
    return torch.from_numpy(means[types] + rng.normal(size=(n, d)) * np.sqrt(1 - share)), types


def test_one_of_each_type_is_any_of_its_positions():
    types = np.array([5, 5, 2, 5, 9, 2])
    seen = set()
    for seed in range(40):
        chosen = one_of_each(types, seed)
        assert sorted(types[chosen]) == [2, 5, 9]
        assert (np.diff(chosen) > 0).all()
        seen |= set(chosen.tolist())
    assert seen == set(range(6))


def test_the_parts_add_up_and_have_the_ranks_of_their_numbers():
    rows, types = planted(n=60, n_types=20, d=50)
    parts = type_spectra(rows, types)
    whole, between, within = (s.singular_values.square().sum() for s in (parts.all_rows, parts.between, parts.within))
    assert float(between + within) == pytest.approx(float(whole), rel=1e-12)
    assert len(parts.between.singular_values) == parts.n_types - 1
    assert len(parts.within.singular_values) == 60 - parts.n_types
    assert float(parts.within.singular_values[-1]) > 1e-6


def test_the_parts_are_those_of_the_means_and_of_the_rest_by_numpy():
    rows, types = planted(n=200, n_types=15)
    x = rows.numpy()
    means = np.stack([x[types == t].mean(axis=0) for t in types])
    parts = type_spectra(rows, types)
    for spectrum, part in ((parts.between, means - x.mean(axis=0)), (parts.within, x - means)):
        expected = np.linalg.svd(part, compute_uv=False)[: len(spectrum.singular_values)]
        np.testing.assert_allclose(spectrum.singular_values, expected, rtol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_the_share_between_types_is_the_planted_one_whatever_the_number_of_types(share):
    """Uncorrected, 200 types of 400 rows would hold half of the variance by chance."""
    groups = groups_of(np.repeat(np.arange(8), 50))
    for n_types in (10, 200):
        values = [
            variance_between_types(*planted(n_types=n_types, share=share, seed=s, d=60), groups).value for s in range(8)
        ]
        assert np.mean(values) == pytest.approx(share, abs=0.05)


def test_equal_states_of_a_type_are_all_vocabulary_and_types_of_one_row_have_no_share():
    rows, types = planted(share=1.0)
    groups = np.zeros(len(types), dtype=np.int64)
    assert variance_between_types(rows, types, groups).value == pytest.approx(1)
    assert np.isnan(variance_between_types(rows, np.arange(len(rows)), groups).value)
    far = rows + 1e6  # the means of equal rows are rounded
    assert not type_spectra(far, types).within.singular_values.any()


def test_halves_of_the_share_are_those_of_the_rows_of_each_half():
    rows, types = planted()
    groups = groups_of(np.repeat(np.arange(10), 40))

    def share(half):
        return variance_between_types(rows[torch.from_numpy(half)], types[half], groups[half]).value

    expected = [share(one) - share(two) for one, two in half_samples(groups)]
    np.testing.assert_allclose(variance_between_types(rows, types, groups).differences, expected, atol=1e-12)


def test_neighbours_of_the_same_type_by_brute_force():
    rows, types = planted(share=0.6)
    nearest = NearestNeighbors(n_neighbors=1).fit(rows.numpy()).kneighbors(return_distance=False)[:, 0]
    got = same_type_neighbors(rows, types)
    assert got.share == pytest.approx((types[nearest] == types).mean())
    pairs = types[:, None] == types[None]
    assert got.by_chance == pytest.approx((pairs.sum() - len(types)) / (len(types) * (len(types) - 1)))


def test_types_without_meaning_have_neighbours_by_chance():
    rows, types = planted(n=2000, share=0.0)
    got = same_type_neighbors(rows, types)
    assert got.share == pytest.approx(got.by_chance, abs=4 * np.sqrt(got.by_chance / 2000))
