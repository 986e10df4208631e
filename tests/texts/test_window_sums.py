"""Sums by window: groups of many windows, merging, and intervals by the jackknife beside closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from dimscope.texts.window_sums import GROUPS, WindowSums, interval, jackknife


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def filled(windows, values):
    sums = WindowSums(2)
    for window, value in zip(windows, values, strict=True):
        sums.add(window, torch.tensor([value, 1.0]))
    return sums


def test_the_error_of_a_mean_of_windows_is_the_textbook_one():
    values = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = interval(filled(range(8), values.tolist()).stacked(), mean)
    stderr = float(values.std()) / math.sqrt(8)
    assert got.value == pytest.approx(float(values.mean()))
    assert got.stderr == pytest.approx(stderr)
    assert (got.low, got.high) == pytest.approx(student.interval(0.95, 7, float(values.mean()), stderr))
    assert got.n_groups == 8


def test_one_window_has_no_error():
    got = interval(filled([0], [3.0]).stacked(), mean)
    assert (got.value, got.stderr, got.low, got.high) == (3.0, None, None, None)


def test_many_windows_share_groups_of_neighbours_whatever_their_order():
    values = np.random.default_rng(0).normal(size=1000).tolist()
    forwards, backwards = filled(range(1000), values), filled(range(999, -1, -1), values[::-1])
    assert len(forwards.groups) <= GROUPS
    assert forwards.span == backwards.span == 16
    torch.testing.assert_close(forwards.stacked(), backwards.stacked())
    torch.testing.assert_close(forwards.stacked()[0, 0], torch.tensor(sum(values[:16]), dtype=torch.float64))


def test_shards_of_unequal_length_merge_to_the_sums_of_all_windows():
    values = np.random.default_rng(1).normal(size=300).tolist()
    whole = filled(range(300), values)
    left, right = filled(range(40), values[:40]), filled(range(40, 300), values[40:])
    for one, other in ((left, right), (filled(range(40, 300), values[40:]), filled(range(40), values[:40]))):
        one.merge(other)
        assert one.span == whole.span
        torch.testing.assert_close(one.stacked(), whole.stacked())


def test_a_file_gives_back_the_sums():
    sums = filled([0, 5, 130], [1.0, 2.0, 4.0])
    back = WindowSums.from_tensors(dict(sums.tensors("loss")), "loss")
    assert (back.width, back.span, sorted(back.groups)) == (2, 4, [0, 1, 32])
    torch.testing.assert_close(back.stacked(), sums.stacked())


def test_the_interval_covers_the_truth_in_19_of_20_texts_of_dependent_positions():
    """Positions of a window share an offset, so an error over positions would cover the truth in one text of three."""
    rng = np.random.default_rng(2)
    n_texts, n_windows, n_positions = 400, 8, 64
    offsets = rng.normal(size=(n_texts, n_windows, 1))
    values = offsets + rng.normal(size=(n_texts, n_windows, n_positions))
    covered = 0
    for text in values:
        sums = torch.from_numpy(np.stack([text.sum(axis=1), np.full(n_windows, n_positions)], axis=1))
        got = interval(sums, mean)
        covered += got.low <= 0 <= got.high
    assert 0.92 <= covered / n_texts <= 0.98


def test_a_jackknife_of_no_groups_is_no_error():
    assert jackknife(1.0, torch.empty(0)).stderr is None
