"""Tokens per second: of the tokens that were really read and generated, in turns, and of medians."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from dimscope.evaluation import throughput as module
from dimscope.evaluation.throughput import ROUNDS, Spread, Throughput, speed_ratio, throughput


@pytest.fixture
def model(checkpoint) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint("llama"))


def test_each_model_reads_the_prompt_at_once_and_generates_one_by_one_in_turns(model, checkpoint):
    other = AutoModelForCausalLM.from_pretrained(checkpoint("gpt2")).train()
    lengths: list[tuple[str, int]] = []
    for name, of in (("one", model), ("other", other)):
        of.get_input_embeddings().register_forward_hook(
            lambda module, args, out, name=name: lengths.append((name, out.shape[1]))
        )
    speeds = throughput({"one": model, "other": other}, read=7, written=3)
    assert set(speeds) == {"one", "other"}
    assert all(speed.prefill.low > 0 < speed.decode.low for speed in speeds.values())
    turn = [(name, n) for name in ("one", "other") for n in (7, 1, 1, 1)]
    back = turn[4:] + turn[:4]
    assert lengths == ((back + turn) * ROUNDS)[: len(turn) * (ROUNDS + 1)]
    assert other.training


def test_speeds_are_medians_of_the_rounds_with_their_spread_without_the_first_round(model, monkeypatch):
    """The clock is read before the prompt, after it, and after the last token."""
    spans = [(100.0, 100.0), (1.0, 4.0), (4.0, 2.0), (2.0, 50.0)]
    times, now = [], 0.0
    for read, written in spans:
        times += [now, now + read, now + read + written]
        now = times[-1]
    monkeypatch.setattr(module, "ROUNDS", 3)
    monkeypatch.setattr(module.time, "perf_counter", iter(times).__next__)
    speed = throughput({"model": model}, read=8, written=2)["model"]
    assert (speed.prefill, speed.decode) == (Spread(4.0, 2.0, 8.0), Spread(0.5, 0.04, 1.0))


def test_a_ratio_is_taken_round_by_round():
    """A machine that gets twice as slow in one round makes no spread of the ratio."""
    base, model = Throughput((100, 50, 100), (10, 10, 10)), Throughput((120, 60, 120), (9, 11, 10))
    ratio = speed_ratio(model, base)
    assert (ratio.prefill, ratio.decode) == (Spread(1.2, 1.2, 1.2), Spread(1.0, 0.9, 1.1))


def test_the_median_lies_between_the_extremes_of_the_rounds_in_99_of_100_runs():
    rounds = np.random.default_rng(0).lognormal(size=(2000, ROUNDS))  # the median is 1
    covered = np.mean((rounds.min(axis=1) <= 1) & (rounds.max(axis=1) >= 1))
    assert covered == pytest.approx(1 - 2 / 2**ROUNDS, abs=0.005)


def test_of_eleven_models_as_fast_as_their_base_none_is_faster_in_every_round_in_19_of_20_plans():
    ratios = np.random.default_rng(0).lognormal(size=(2000, 11, ROUNDS))
    assert np.mean((ratios.min(axis=2) > 1).any(axis=1)) <= 0.05
