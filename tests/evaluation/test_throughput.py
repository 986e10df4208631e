"""Tokens per second: of the tokens that were really read and generated, in turns, and of medians."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from dimscope.evaluation import throughput as module
from dimscope.evaluation.throughput import ROUNDS, Throughput, throughput


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
    assert all(speed.prefill > 0 < speed.decode for speed in speeds.values())
    turn = [(name, n) for name in ("one", "other") for n in (7, 1, 1, 1)]
    assert lengths == turn * (ROUNDS + 1)
    assert other.training


def test_speeds_are_tokens_over_median_seconds_without_the_first_round(model, monkeypatch):
    """The clock is read before the prompt, after it, and after the last token."""
    spans = [(100.0, 100.0), (1.0, 4.0), (3.0, 2.0), (2.0, 50.0)]
    times, now = [], 0.0
    for read, written in spans:
        times += [now, now + read, now + read + written]
        now = times[-1]
    monkeypatch.setattr(module.time, "perf_counter", iter(times).__next__)
    assert throughput({"model": model}, read=8, written=2) == {"model": Throughput(prefill=4.0, decode=0.5)}
