"""The model card says what was measured, and nothing about what was not done."""

from dataclasses import replace

import pytest

from dimscope.narrowing.assembly import Account
from dimscope.narrowing.card import NarrowFacts, hints, model_card, not_smaller

ACCOUNT = Account(
    dense_parameters=1000, dense_bytes=2000, narrow_parameters=750, narrow_bytes=1500, table_parameters=100, untied=False
)  # fmt: skip
FACTS = NarrowFacts(
    model="owner/model", title="owner/model", on_hub=True, width=24, dim=32, basis="normalised", family="llama", tied=False,
    command="dimscope narrow owner/model --width 24 -o n",
)  # fmt: skip


def test_sizes_measured_numbers_and_the_command_are_in_it():
    card = model_card(FACTS, ACCOUNT, [{"metric": "KL", "dense": "0", "narrow": "0.12"}])
    for line in (
        "base_model: owner/model", "# owner/model, 24 of 32 dimensions", "| parameters in the files | 1,000 | 750 |",
        "| bytes of weights | 2,000 | 1,500 |", "| KL | 0 | 0.12 |", f"    {FACTS.command}",
    ):  # fmt: skip
        assert line in card.splitlines()


def test_nothing_is_said_of_what_was_not_done():
    card = model_card(replace(FACTS, on_hub=False), ACCOUNT)
    assert not [
        word
        for word in ("base_model", "learned", "Healed", "Trained", "Calibrated", "input and output")
        if word in card.split("## ")[1]
    ]
    assert "base_model" not in card
    assert "KL" not in card.split("## ")[0]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"learned_steps": 80}, "learned in 80 steps"),
        ({"heal_steps": 15, "healed": True}, "15 steps, the norms first, then all weights"),
        ({"heal_steps": 20, "healed": True, "lora": 4}, "low-rank updates (rank 4)"),
        ({"heal_steps": 20, "healed": False}, "did not improve held-out text"),
        ({"export": "phi"}, "Written as phi"),
        ({"tied": True, "tie_cost": 0.00123}, "+0.0012 nats"),
        ({"tied": True}, "was not measured"),
        ({"evaluated_on": "8 windows"}, "Measured on 8 windows."),
    ],
)
def test_what_was_done_is_said(facts, words):
    assert words in model_card(replace(FACTS, **facts), ACCOUNT)


def test_a_model_that_did_not_shrink_is_said_not_to():
    larger = replace(ACCOUNT, narrow_parameters=1100, untied=True)
    assert not_smaller(larger)
    assert not not_smaller(ACCOUNT)
    card = model_card(FACTS, larger)
    assert "Not smaller than the dense model" in card
    assert "two, of 100 parameters each" in card


@pytest.mark.parametrize(
    ("facts", "words", "absent"),
    [
        ({"width": 256}, ["llama.cpp loads"], ["GGUF", "GPUs", "vLLM"]),
        ({"width": 64, "family": "qwen3"}, ["llama.cpp loads", "multiple of 256", "Q5_0 instead of Q4_K"], ["refuses", "GPUs"]),
        ({"width": 40}, ["multiple of 32", "refuses", "F16", "nearest: 64."], ["instead of"]),
        ({"width": 256, "family": "qwen2"}, ["does not load", "--export-as llama", "--model-impl transformers"], ["GGUF"]),
        ({"width": 256, "family": "phi"}, ["does not load", "--model-impl transformers"], ["--export-as", "GGUF"]),
        ({"width": 512, "family": "qwen2"}, [], ["load", "GGUF", "GPUs"]),  # full width: heads as in the dense model
        ({"width": 96}, ["nearest: 64 and 128."], []),
        ({"width": 420, "width_step": 14}, ["nearest: 448."], []),
        ({"width": 42, "width_step": 42}, ["multiples of 64."], ["nearest"]),
    ],
)  # fmt: skip
def test_hints_for_engines(facts, words, absent):
    lines = " ".join(hints(replace(FACTS, **{"dim": 512, **facts})))
    assert all(word in lines for word in words)
    assert not any(word in lines for word in absent)
