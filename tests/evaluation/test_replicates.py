"""Intervals over windows and seeds: closed forms of planted values, and how often they cover the truth."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import t

from dimscope.evaluation.replicates import Replicates, replicates


def of(values: np.ndarray, seeds=None) -> Replicates:
    """Return the mean of values by seed and window, one position in each."""
    sums = torch.from_numpy(np.stack([values, np.ones_like(values)], axis=-1))
    return replicates(range(len(values)) if seeds is None else seeds, sums, lambda s: s[..., 0] / s[..., 1])


def test_the_variance_is_that_over_windows_plus_that_over_seeds():
    values = np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])  # windows one apart, seeds one apart
    got = of(values).interval()
    windows, seeds = 1 / 3, 0.5 / 2
    assert (got.value, got.stderr) == pytest.approx((2.5, math.sqrt(windows + seeds)))
    margin = math.hypot(t.ppf(0.975, 2) * math.sqrt(windows), t.ppf(0.975, 1) * math.sqrt(seeds))
    assert (got.low, got.high) == pytest.approx((2.5 - margin, 2.5 + margin))


@pytest.mark.parametrize("values", [[[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]], [[1.0, 2.0, 3.0]]])
def test_intervals_that_hold_at_once_are_wider_by_the_quantiles(values):
    """Of four statements each may be false for noise in 1.25% of samples: 0.625% to each side."""
    one, four = of(np.array(values)).interval(), of(np.array(values)).interval(4)
    windows, seeds = 1 / 3, np.var(np.mean(values, axis=1), ddof=1) / 2 if len(values) > 1 else 0.0
    quantiles = [t.ppf(1 - 0.00625, freedom) for freedom in (2, 1)]
    assert (one.value, one.stderr) == (four.value, four.stderr)
    assert four.high - four.value == pytest.approx(
        math.hypot(quantiles[0] * math.sqrt(windows), quantiles[1] * math.sqrt(seeds))
    )


def test_a_difference_is_paired_by_window_and_seed():
    noise = np.random.default_rng(0).standard_normal((3, 5))
    gap = of(noise + 1).minus(of(noise))
    assert gap is not None
    got = gap.interval()
    assert (got.value, got.low, got.high) == pytest.approx((1, 1, 1))
    alone = of(noise[:1], [None])
    assert of(noise).minus(alone).seeds == (0, 1, 2)
    assert of(noise, (0, 1, 2)).minus(of(noise, (3, 4, 5))) is None


def test_one_seed_of_something_random_is_not_repeated_and_one_window_has_no_interval():
    values = np.ones((1, 4))
    assert (of(values).repeated, of(values, [None]).repeated) == (False, True)
    assert of(values[:, :1]).interval().high is None


def test_seeds_without_a_finite_number_are_left_out():
    values = np.array([[1.0, 2.0], [math.nan, 1.0], [3.0, 4.0]])
    assert of(values).seeds == (0, 2)


def test_one_of_seven_intervals_over_few_seeds_misses_the_truth_in_1_of_20_repetitions():
    """Each may miss it in 0.7%; those with the degrees of freedom of Welch and Satterthwaite miss it in 2.3%."""
    rng, missed, n = np.random.default_rng(1), 0, 1500
    for _ in range(n):
        got = of(0.3 * rng.normal(size=(1, 8)) + rng.normal(size=(3, 1))).interval(7)
        missed += not got.low <= 0 <= got.high
    assert missed / n <= 0.012


def test_the_interval_covers_the_truth_in_19_of_20_repetitions():
    """Windows and seeds each shift the values; their noise together is counted twice, so that it covers rather more."""
    rng, covered, n = np.random.default_rng(1), 0, 400
    for _ in range(n):
        values = rng.normal(size=(1, 8)) + rng.normal(size=(4, 1)) + 0.5 * rng.normal(size=(4, 8))
        got = of(values).interval()
        covered += got.low <= 0 <= got.high
    assert 0.93 <= covered / n <= 0.99
