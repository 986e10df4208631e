"""Dimensions of rows that depend on each other within groups: the participation ratio, and errors of variance counts."""

import itertools

import numpy as np
import pytest
import torch

from dimscope.geometry.dimension import participation_ratio_corrected, variance_count
from dimscope.geometry.grouped import participation_ratio_across, variance_counts
from dimscope.geometry.half_samples import groups_of
from dimscope.geometry.spectrum import decompose, spectrum_of


def across(rows, windows):
    return participation_ratio_across(torch.from_numpy(rows), groups_of(windows))


def test_the_ratio_is_the_mean_over_rows_of_four_different_groups():
    rows = np.random.default_rng(0).normal(size=(10, 3)) + 5
    groups = np.arange(10) // 2
    square, trace, n = 0.0, 0.0, 0
    for i, j, k, m in itertools.permutations(range(10), 4):
        if len({groups[i], groups[j], groups[k], groups[m]}) == 4:
            one, two = rows[i] - rows[k], rows[j] - rows[m]
            square += (one @ two) ** 2 / 4
            trace += (one @ one) * (two @ two) / 4
            n += 1
    assert participation_ratio_across(torch.from_numpy(rows), groups).value == pytest.approx(trace / square, rel=1e-9)


def heavy(rng, n, d):
    """Rows of a t distribution with 3 degrees of freedom: Gaussian rows of random lengths."""
    return rng.normal(size=(n, d)) / np.sqrt(rng.chisquare(3, size=(n, 1)) / 3)


def slow(rng, n, d):
    """Rows of an autoregressive process: each is 0.9 times the one before, plus noise."""
    rows = rng.normal(size=(n, d))
    for i in range(1, n):
        rows[i] = 0.9 * rows[i - 1] + np.sqrt(1 - 0.81) * rows[i]
    return rows


@pytest.mark.parametrize("draw", [heavy, slow])
@pytest.mark.parametrize("length", [1024, 64])
def test_heavy_tails_and_dependent_neighbours_do_not_move_the_ratio(draw, length):
    """The corrected ratio reads 80 for both; the truth is 256."""
    rows = draw(np.random.default_rng(1), 1024, 256)
    got = across(rows, np.arange(1024) // length).interval()
    assert got.value == pytest.approx(256, rel=0.1)
    assert got.low < 256 < got.high
    assert participation_ratio_corrected(spectrum_of(torch.from_numpy(rows))) < 120


def test_the_interval_of_the_ratio_covers_the_truth():
    scales = np.linspace(3, 0.1, 24)
    truth = (scales**2).sum() ** 2 / (scales**4).sum()
    rng, covered, stderrs, values = np.random.default_rng(2), 0, [], []
    for _ in range(80):
        offsets = rng.normal(size=(8, 1, 24)) * scales / 4  # of a window: rows of one depend on each other
        rows = (rng.normal(size=(8, 40, 24)) * scales + offsets).reshape(320, 24)
        got = across(rows, np.repeat(np.arange(8), 40)).interval()
        covered += got.low < truth < got.high
        stderrs.append(got.stderr)
        values.append(got.value)
    assert covered >= 72
    assert np.mean(stderrs) < 2 * np.std(values)


def test_a_constant_offset_changes_nothing():
    rows = np.random.default_rng(3).normal(size=(320, 12))
    windows = np.repeat(np.arange(8), 40)
    assert across(rows + 1e4, windows).value == pytest.approx(across(rows, windows).value, rel=1e-6)


def test_few_groups_give_no_ratio():
    got = participation_ratio_across(torch.randn(90, 4, generator=torch.Generator().manual_seed(0)), np.arange(90) % 3)
    assert np.isnan(got.value)
    assert got.interval().stderr is None


# ---- variance counts -----------------------------------------------------------------------------------------------


def counts_of(rows, windows, thresholds=(0.9, 0.95)):
    tensor = torch.from_numpy(rows)
    of = decompose(tensor)
    return variance_counts(tensor, groups_of(windows), of.axes, of.spectrum.singular_values.square(), thresholds)


def test_the_fractional_count_rounds_up_to_the_count():
    rows = np.random.default_rng(4).normal(size=(320, 24)) * np.linspace(3, 0.1, 24)
    spectrum = spectrum_of(torch.from_numpy(rows))
    for threshold, count in zip((0.9, 0.95), counts_of(rows, np.repeat(np.arange(8), 40)), strict=True):
        assert np.ceil(count.value) == variance_count(spectrum, threshold)


def test_the_error_of_a_count_is_its_spread_over_texts():
    rng, scales = np.random.default_rng(5), np.linspace(3, 0.3, 24)
    runs = []
    for _ in range(60):
        loud = np.exp(rng.normal(size=(8, 1, 24)) * 0.3)  # windows spread their variance differently
        runs.append(
            counts_of((rng.normal(size=(8, 60, 24)) * scales * loud).reshape(480, 24), np.repeat(np.arange(8), 60))[1]
        )
    spread = np.std([run.value for run in runs], ddof=1)
    assert 0.7 < np.sqrt(np.mean([run.interval().stderr ** 2 for run in runs])) / spread < 1.5


def test_decomposition_of_few_and_of_many_rows_has_the_axes_of_its_values():
    for shape in ((30, 50), (200, 12)):
        rows = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        of = decompose(rows)
        projected = (rows - rows.mean(dim=0)) @ of.axes
        torch.testing.assert_close(projected.norm(dim=0), of.spectrum.singular_values)
        torch.testing.assert_close(of.spectrum.singular_values, spectrum_of(rows).singular_values)
