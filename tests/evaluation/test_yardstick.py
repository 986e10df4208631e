"""The scale of the KL, and whether a text can tell anything: by planted intervals, and tokens of a known entropy."""

import math

import numpy as np
import pytest
import torch

from dimscope.evaluation.unigrams import reads_context, unigram_entropy
from dimscope.evaluation.yardstick import MARKS, compared, judge, upper_end
from dimscope.texts.window_sums import Interval
from dimscope.texts.windows import Window


@pytest.mark.parametrize(
    ("kl", "wanted"),
    [
        (Interval(0.02, 0.004, 0.01, 0.03, 8), "within"),
        (Interval(0.02, 0.004, 0.009, 0.031, 8), "undecided"),
        (Interval(0.04, 0.004, 0.029, 0.05, 8), "undecided"),
        (Interval(0.04, 0.004, 0.031, 0.05, 8), "above"),
        (Interval(0.001, None, None, None, 1), "undecided"),
        (Interval(math.inf, None, None, None, 8), "above"),
    ],
)
def test_a_kl_is_judged_by_its_interval(kl, wanted):
    assert judge(kl) == wanted
    assert (compared(kl).split(", ")[1].split(" the ")[0] == wanted) == (wanted != "undecided")


def test_the_marks_are_those_of_rounding_and_an_overflow_has_no_upper_end():
    assert [(mark.kl, mark.name) for mark in MARKS] == [
        (0.0015, "rounding to 8 bits"), (0.03, "rounding to 4 bits"), (0.45, "rounding to 2 bits"),
    ]  # fmt: skip
    ends = [upper_end(Interval(v, None, None, h, 1)) for v, h in ((math.nan, None), (0.1, None), (0.1, 0.2))]
    assert ends == [math.inf, 0.1, 0.2]


def windows_of(ids: np.ndarray) -> list[Window]:
    n_bytes = torch.ones(ids.shape[1], dtype=torch.int64)
    return [Window(i, torch.from_numpy(row), n_bytes.cumsum(0), n_bytes, 0) for i, row in enumerate(ids)]


def test_the_entropy_of_unigrams_is_that_of_their_distribution_from_few_tokens_too():
    """1,000 equally likely tokens have ln 1000 = 6.9 nats; 400 draws of them give a plug-in entropy of 5.8."""
    draws = np.random.default_rng(0).integers(1000, size=(4, 101))
    counts = np.unique(draws[:, 1:], return_counts=True)[1] / 400
    assert -(counts * np.log(counts)).sum() < 5.9
    assert unigram_entropy(windows_of(draws)) == pytest.approx(math.log(1000), rel=0.03)
    two = np.tile([0, 1], (4, 200))
    assert unigram_entropy(windows_of(two)) == pytest.approx(math.log(2), rel=0.01)


def test_a_text_can_tell_where_the_loss_is_clearly_below_its_entropy():
    assert reads_context(Interval(4.0, 0.1, 3.7, 4.3, 8), 5.0)
    assert not reads_context(Interval(4.8, 0.1, 4.5, 5.1, 8), 5.0)
