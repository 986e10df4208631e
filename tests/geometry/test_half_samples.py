"""Balanced half-samples: errors of means are the textbook ones, and dependent rows stay together."""

import math

import numpy as np
import pytest
from scipy.stats import t as student

from dimscope.geometry.half_samples import Replicated, groups_of, half_samples, random_groups
from dimscope.texts.window_sums import t_quantile


def mean_of(values, groups):
    halves = [(values[one].mean(), values[two].mean()) for one, two in half_samples(groups)]
    return Replicated(float(values.mean()), tuple(one - two for one, two in halves))


def test_the_error_of_a_mean_is_that_of_the_means_of_the_groups():
    """Seven orthogonal contrasts of eight groups hold all of their variance."""
    values = np.random.default_rng(0).normal(size=(8, 16))
    got = mean_of(values.ravel(), np.repeat(np.arange(8), 16)).interval()
    means = values.mean(axis=1)
    stderr = means.std(ddof=1) / math.sqrt(8)
    assert got.stderr == pytest.approx(stderr, rel=1e-12)
    assert (got.low, got.high) == pytest.approx(student.interval(0.95, 7, values.mean(), stderr))


def test_several_intervals_at_once_are_wider():
    number = Replicated(1.0, (0.2,) * 7)
    assert number.interval(10).high == pytest.approx(1 + student.ppf(1 - 0.025 / 10, 7) * 0.1)
    assert t_quantile(7) == pytest.approx(student.ppf(0.975, 7))


def test_what_two_numbers_share_cancels_in_their_difference():
    rng = np.random.default_rng(1)
    shared, groups = np.repeat(rng.normal(size=8), 16) * 5, np.repeat(np.arange(8), 16)
    one, two = (mean_of(shared + rng.normal(size=128) * 0.1, groups) for _ in range(2))
    assert one.interval().stderr > 0.5
    assert one.minus(two).interval().stderr < 0.05
    assert one.minus(Replicated(0.0)).interval().stderr is None


@pytest.mark.parametrize("n_windows", [8, 11, 16, 40])
def test_groups_are_windows_or_neighbouring_ones_without_their_ends(n_windows):
    windows = np.repeat(np.arange(n_windows) * 3 + 5, 16)
    groups = groups_of(windows)
    assert set(groups) - {-1} == set(range(min(n_windows, 16)))
    inside = groups >= 0
    assert 0.7 < inside.mean() < 0.85
    assert (np.diff(groups[inside]) >= 0).all()
    for window in set(windows):
        assert len(set(groups[inside & (windows == window)])) <= 1


@pytest.mark.parametrize("n_windows", [1, 3, 7])
def test_few_windows_are_cut_into_eight_stretches_that_lie_apart(n_windows):
    groups = groups_of(np.repeat(np.arange(n_windows), -(-800 // n_windows))[:800])
    assert [int((groups == g).sum()) for g in range(8)] == [74] * 8  # of 100; an eighth is lost at each end
    starts = np.flatnonzero(np.diff(groups))
    assert np.diff(starts).min() >= 24


@pytest.mark.parametrize(
    "groups", [random_groups(100), np.repeat(np.arange(11), 12), groups_of(np.repeat(np.arange(8), 20))]
)
def test_halves_are_disjoint_and_hold_whole_groups(groups):
    divisions = list(half_samples(groups))
    assert len(divisions) == 7
    for one, two in divisions:
        assert not (one & two).any()
        assert ((one | two) == (groups >= 0)).all()
        assert not set(groups[one]) & set(groups[two])


def test_few_rows_are_not_divided():
    assert list(half_samples(np.arange(63) % 8)) == []
