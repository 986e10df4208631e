"""What a model generates: the same as stock transformers for one prompt at a time, and the model as it was afterwards."""

from __future__ import annotations

import copy
import logging
import math
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from generating import (
    CAUSAL,
    FEW,
    NEW,
    TEXTS,
    added_to_logits,
    alone,
    end_of,
    likely,
    next_logits,
    prompts_of,
    until_end,
)
from hypothesis import given
from hypothesis import strategies as st
from matrices import PROPERTY
from transformers import GenerationConfig

from dimscope.errors import InvalidArgument
from dimscope.evaluation.generated_text import sample_windows
from dimscope.evaluation.generation import Continuation, Decoding, generate
from dimscope.evaluation.prompts import Prompt, check_context, prepare_prompt

pytestmark = pytest.mark.slow  # generates with every family

# ---- greedy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CAUSAL)
def test_a_greedy_batch_is_what_transformers_says_to_each_prompt_alone(speaker, family):
    model, tokenizer = speaker(family)
    prompts = prompts_of(tokenizer)
    assert len({len(p.ids) for p in prompts}) == len(prompts)
    found = generate(model, tokenizer, prompts, Decoding(max_new_tokens=NEW))
    expected = [alone(model, p.ids, ends=end_of(family)) for p in prompts]
    assert [c.ids for c in found] == expected
    assert [c.text for c in found] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert len({c.ids for c in found}) == len(prompts)
    assert max(len(set(c.ids)) for c in found) > NEW / 2  # not one token over and over
    # and it is the likeliest token at every step, without any cache
    for prompt, continuation in zip(prompts, found, strict=True):
        for n, token in enumerate(continuation.ids):
            assert token == int(next_logits(model, prompt.ids + continuation.ids[:n]).argmax())


@pytest.mark.parametrize("family", FEW)
def test_neither_the_batch_nor_its_order_matters(speaker, family):
    model, tokenizer = speaker(family)
    prompts, decoding = prompts_of(tokenizer), Decoding(max_new_tokens=NEW)
    found = generate(model, tokenizer, prompts, decoding)
    assert generate(model, tokenizer, prompts[::-1], decoding) == found[::-1]
    assert [generate(model, tokenizer, [p], decoding)[0] for p in prompts] == found


@pytest.mark.parametrize("new", [1, 2, 7])
def test_no_more_tokens_are_written_than_asked_for(speaker, new):
    model, tokenizer = speaker("phi")
    model.generation_config.eos_token_id = 511
    added_to_logits(model, torch.zeros(512).index_fill(0, torch.tensor(511), -1e4))
    for method in ("greedy", "sample", "model"):
        found = generate(model, tokenizer, prompts_of(tokenizer), Decoding(method, new))
        assert [len(c.ids) for c in found] == [new] * 4


# ---- ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
def test_an_end_token_stops_its_own_text_and_is_not_in_it(speaker, family):
    """The ends are tokens that two of the texts come to by themselves, at different places."""
    model, tokenizer = speaker(family)
    prompts = prompts_of(tokenizer)
    never = [alone(model, p.ids) for p in prompts]
    ends = [never[0][3], never[1][6]]
    model.generation_config.eos_token_id = ends
    found = generate(model, tokenizer, prompts, Decoding(max_new_tokens=NEW))
    expected = [until_end(ids, ends) for ids in never]
    assert [c.ids for c in found] == expected == [alone(model, p.ids, ends=ends) for p in prompts]
    assert len(found[0].ids) <= 3
    assert len(found[1].ids) <= 6
    assert [c.text for c in found] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    model.generation_config.eos_token_id = ends[0]  # one number is as good as a list of it
    found = generate(model, tokenizer, prompts, Decoding(max_new_tokens=NEW))
    assert [c.ids for c in found] == [until_end(ids, ends[0]) for ids in never]


@pytest.mark.parametrize("family", ["phi", "llama"])
def test_the_end_token_of_the_tokenizer_holds_where_the_model_names_none(speaker, family):
    model, tokenizer = speaker(family)
    end = tokenizer.eos_token_id
    added_to_logits(model, torch.zeros(512).index_fill(0, torch.tensor(end), 1e4))
    for own in (GenerationConfig(eos_token_id=None), None):
        model.generation_config = own
        found = generate(model, tokenizer, prompts_of(tokenizer), Decoding(max_new_tokens=NEW))
        assert found == [Continuation("", ())] * 4
    model.generation_config = GenerationConfig(eos_token_id=[77])  # the model's own word comes first
    found = generate(model, tokenizer, prompts_of(tokenizer), Decoding(max_new_tokens=NEW))
    assert found == [Continuation("", (end,) * NEW)] * 4  # a special token has no text


def test_without_any_end_token_all_tokens_are_kept(speaker):
    model, tokenizer = speaker("llama")
    prompts = prompts_of(tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    found = generate(model, tokenizer, prompts, Decoding(max_new_tokens=NEW))
    assert [c.ids for c in found] == [alone(model, p.ids) for p in prompts]


def test_tokens_that_the_tokenizer_does_not_know_have_no_text(speaker):
    model, tokenizer = speaker("qwen2", tokenizer_size=400)
    beyond = torch.arange(512) >= 400
    added_to_logits(model, beyond.float() * 1e4)
    found = generate(model, tokenizer, prompts_of(tokenizer), Decoding(max_new_tokens=NEW))
    assert all(min(c.ids) >= 400 and c.text == "" for c in found)


# ---- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
def test_samples_come_again_with_their_seed_and_no_others(speaker, family):
    model, tokenizer = speaker(family)
    prompts = prompts_of(tokenizer)
    found = {seed: generate(model, tokenizer, prompts, Decoding("sample", NEW, seed)) for seed in (0, 1, 2)}
    assert len({tuple(c.ids for c in texts) for texts in found.values()}) == 3
    assert found[0] != generate(model, tokenizer, prompts, Decoding(max_new_tokens=NEW))
    torch.manual_seed(99)  # wherever the program's own random numbers stand
    torch.rand(7)
    assert generate(model, tokenizer, prompts, Decoding("sample", NEW, 1)) == found[1]
    assert generate(model, tokenizer, prompts, Decoding("sample", NEW, 1), on_token=lambda texts: None) == found[1]


@pytest.mark.parametrize("family", FEW)
def test_samples_are_drawn_from_the_distribution_of_the_model_whatever_its_own_config_says(speaker, family):
    """4,000 first tokens by chi-squared; those that are expected least are drawn too."""
    model, tokenizer = speaker(family)
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=3,
        top_p=0.5,
        temperature=0.2,
        repetition_penalty=5.0,
        min_p=0.3,
        eos_token_id=end_of(family),
    )
    prompt = prepare_prompt(tokenizer, TEXTS[0])
    end = end_of(family)
    found = generate(model, tokenizer, [prompt] * 4000, Decoding("sample", 1, 5))
    counts = np.bincount([c.ids[0] if c.ids else end for c in found], minlength=512)
    expected = 4000 * next_logits(model, prompt.ids).softmax(0).numpy()
    assert likely(counts, expected)
    assert counts[expected < 5].sum() > 0


# ---- the model's own config ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
def test_the_config_of_the_model_is_followed_where_it_is_asked_for_and_ignored_where_not(speaker, family):
    model, tokenizer = speaker(family)
    end = end_of(family)
    prompts = prompts_of(tokenizer)
    greedy = [alone(model, p.ids, ends=end) for p in prompts]
    # to a prompt that holds what the model would say, so that a penalty of repeating it is felt
    prompts.append(Prompt("again", prompts[0].ids + greedy[0], False))
    greedy.append(alone(model, prompts[-1].ids, ends=end))
    penalised = [alone(model, p.ids, ends=end, repetition_penalty=8.0) for p in prompts]
    model.generation_config = GenerationConfig(repetition_penalty=8.0, eos_token_id=end, max_length=5)
    assert [c.ids for c in generate(model, tokenizer, prompts, Decoding("model", NEW))] == penalised
    assert [c.ids for c in generate(model, tokenizer, prompts, Decoding("greedy", NEW))] == greedy
    assert penalised != greedy
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, eos_token_id=end)
    assert [c.ids for c in generate(model, tokenizer, prompts, Decoding("model", NEW))] == greedy


CONFIGS = (
    {"temperature": 0.5, "top_p": 0.9},  # without do_sample they have no effect
    {"do_sample": False, "temperature": 0.0},
    {"min_new_tokens": 9},
    {"min_length": 14},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[20], [21, 22]]},
    {"suppress_tokens": [30, 31], "begin_suppress_tokens": [40]},
    {"forced_eos_token_id": 5},
    {"exponential_decay_length_penalty": (3, 1.5)},
    {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True},
    {"prompt_lookup_num_tokens": 3},
    {"cache_implementation": "static"},
    {"output_attentions": True, "output_scores": True, "return_dict_in_generate": True},
    {"top_k": 0, "top_p": 1.0, "max_time": 1e-9, "use_cache": False},
)
SPEED = ("prompt_lookup_num_tokens", "cache_implementation", "output_attentions", "output_scores", "max_time")


@pytest.mark.parametrize("own", CONFIGS, ids=lambda own: "-".join(own))
def test_each_prompt_is_continued_as_stock_continues_it_alone(speaker, caplog, monkeypatch, own):
    model, tokenizer = speaker("llama")
    prompts = prompts_of(tokenizer)
    end = alone(model, prompts[0].ids)[4]  # a token that the model likes: it is also the padding of a batch
    effective = {name: value for name, value in own.items() if name not in (*SPEED, "return_dict_in_generate")}
    expected = [alone(model, p.ids, ends=end, **effective) for p in prompts]
    greedy = [alone(model, p.ids, ends=end) for p in prompts]
    model.generation_config = GenerationConfig(**own, eos_token_id=end)
    with transformers_log(caplog, monkeypatch):
        assert [c.ids for c in generate(model, tokenizer, prompts, Decoding("model", NEW))] == expected
        assert [c.ids for c in generate(model, tokenizer, prompts, Decoding("greedy", NEW))] == greedy
        assert caplog.messages == []


def test_prompts_that_are_continued_one_by_one_are_told_together(speaker):
    model, tokenizer = speaker("llama")
    model.generation_config = GenerationConfig(repetition_penalty=1.7, eos_token_id=2)
    heard: list[list[str]] = []
    found = generate(model, tokenizer, prompts_of(tokenizer), Decoding("model", 3), on_token=heard.append)
    assert {len(texts) for texts in heard} == {len(found)}
    assert heard[-1] == [c.text for c in found]
    assert heard[0][1:] == [""] * (len(found) - 1)


@pytest.mark.parametrize("family", FEW)
def test_sampling_by_the_config_of_the_model_stays_among_its_top_k(speaker, family):
    model, tokenizer = speaker(family)
    prompts = prompts_of(tokenizer)
    model.generation_config = GenerationConfig(do_sample=True, top_k=3, eos_token_id=end_of(family))

    def ranks(method: str) -> list[int]:
        found = generate(model, tokenizer, prompts, Decoding(method, NEW, 3))
        before = [p.ids for p in prompts]
        return [
            int((next_logits(model, ids + c.ids[:n]).argsort(descending=True) == token).nonzero())
            for ids, c in zip(before, found, strict=True)
            for n, token in enumerate(c.ids)
        ]

    own = ranks("model")
    assert set(own) == {0, 1, 2}
    assert max(ranks("sample")) > 20
    assert set(ranks("greedy")) == {0}
    first, again, other = (generate(model, tokenizer, prompts, Decoding("model", NEW, s)) for s in (4, 4, 5))
    assert first == again != other


@pytest.mark.parametrize("family", FEW)
def test_beams_are_those_of_transformers_and_tell_nothing_on_the_way(speaker, family):
    model, tokenizer = speaker(family)
    prompts, heard = prompts_of(tokenizer), []
    model.generation_config = GenerationConfig(num_beams=2, eos_token_id=end_of(family))
    found = generate(model, tokenizer, prompts, Decoding("model", NEW), on_token=heard.append)
    assert [c.ids for c in found] == [alone(model, p.ids, ends=end_of(family), num_beams=2) for p in prompts]
    assert heard == []
    greedy = generate(model, tokenizer, prompts, Decoding("greedy", NEW), on_token=heard.append)
    assert greedy != found
    assert heard


def test_a_model_without_a_config_of_its_own_is_greedy(speaker):
    model, tokenizer = speaker("llama")
    prompts = prompts_of(tokenizer)
    expected = generate(model, tokenizer, prompts, Decoding("greedy", NEW))
    model.generation_config = None
    assert generate(model, tokenizer, prompts, Decoding("model", NEW)) == expected
    assert model.generation_config is None


@contextmanager
def transformers_log(caplog, monkeypatch):
    """Catch the log of transformers, which hands on to others only where CI is set."""
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", False)
    caplog.set_level(logging.WARNING, logger="transformers")  # commands that ran in this process may have raised it
    logger.addHandler(caplog.handler)
    caplog.clear()
    try:
        yield logger
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    "own", [{"max_length": 5}, {"do_sample": True, "top_k": 5, "temperature": 0.7, "max_length": 5}]
)
def test_transformers_has_nothing_to_warn_of(speaker, caplog, monkeypatch, own):
    model, tokenizer = speaker("llama")
    model.generation_config = GenerationConfig(**own, eos_token_id=2)
    with transformers_log(caplog, monkeypatch) as logger:
        for method in ("greedy", "sample", "model"):
            generate(model, tokenizer, prompts_of(tokenizer), Decoding(method, 6))
        sample_windows(model, tokenizer, count=2, length=8, seed=0)
        assert caplog.messages == []
        logger.warning("heard")
        assert caplog.messages == ["heard"]


# ---- nothing is left -----------------------------------------------------------------------------------------------


def settings(own: GenerationConfig) -> dict[str, Any]:
    return copy.deepcopy(own.__dict__)


def interrupted(texts: list[str]) -> None:
    raise KeyboardInterrupt


def failing(module: Any, args: Any, out: Any) -> Any:
    raise RuntimeError("planted")


@pytest.mark.parametrize("method", ["greedy", "sample", "model"])
@pytest.mark.parametrize("family", FEW)
def test_config_random_numbers_and_hooks_are_as_before_after_success_an_exception_or_ctrl_c(speaker, family, method):
    model, tokenizer = speaker(family)
    model.generation_config = own = GenerationConfig(do_sample=True, top_k=7, max_length=9, eos_token_id=end_of(family))
    prompts, decoding = prompts_of(tokenizer), Decoding(method, 4, 3)
    torch.manual_seed(17)
    before, state = settings(own), torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def check() -> None:
        assert model.generation_config is own
        assert settings(own) == before
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert not model.training

    generate(model, tokenizer, prompts, decoding)
    check()
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, prompts, decoding, on_token=interrupted)
    check()
    handle = model.get_output_embeddings().register_forward_hook(failing)
    with pytest.raises(RuntimeError, match="planted"):
        generate(model, tokenizer, prompts, decoding)
    with pytest.raises(RuntimeError, match="planted"):
        sample_windows(model, tokenizer, count=2, length=8, seed=0)
    handle.remove()
    check()
    sample_windows(model, tokenizer, count=2, length=8, seed=0)
    check()


# ---- on the way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["greedy", "sample", "model"])
@pytest.mark.parametrize("family", FEW)
def test_the_texts_are_told_after_every_token_and_the_last_are_the_final_ones(speaker, family, method):
    model, tokenizer = speaker(family)
    prompts, heard = prompts_of(tokenizer), []
    ends = [alone(model, prompts[0].ids)[2]]
    model.generation_config.eos_token_id = ends
    found = generate(model, tokenizer, prompts, Decoding(method, NEW, 1), on_token=heard.append)
    assert len(heard) == NEW  # a text of the four is without an end
    assert max(len(c.ids) for c in found) == NEW
    for n, texts in enumerate(heard, 1):
        assert texts == [tokenizer.decode(c.ids[:n], skip_special_tokens=True) for c in found]
    assert heard[-1] == [c.text for c in found]
    if method == "greedy":
        assert min(len(c.ids) for c in found) <= 2


def test_telling_ends_with_the_last_text(speaker):
    """All texts end at once: the end token is the last that is written, and nobody is told of more."""
    model, tokenizer = speaker("llama")
    heard: list[list[str]] = []
    ids = alone(model, prompts_of(tokenizer)[0].ids)
    model.generation_config.eos_token_id = ids[4]
    found = generate(model, tokenizer, prompts_of(tokenizer)[:1], Decoding(max_new_tokens=NEW), on_token=heard.append)
    assert found[0].ids == until_end(ids, ids[4])
    assert len(heard) == len(found[0].ids) + 1
    assert heard[-1] == heard[-2] == [found[0].text]


# ---- damaged models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("family", FEW)
def test_logits_that_are_no_numbers_do_not_end_it(speaker, family, value):
    model, tokenizer = speaker(family)
    prompts = prompts_of(tokenizer)
    some = torch.zeros(512).index_fill(0, torch.tensor([5, 7, 300]), value)
    for added in (torch.full((512,), value), some):
        handle = added_to_logits(model, added)
        for method in ("greedy", "sample", "model"):
            found = generate(model, tokenizer, prompts, Decoding(method, 5))
            assert all(0 <= i < 512 for c in found for i in c.ids)
        for window in sample_windows(model, tokenizer, count=2, length=9, seed=0):
            assert end_of(family) not in window.ids[window.n_prefix :]
        handle.remove()


@pytest.mark.parametrize("family", FEW)
def test_a_model_in_half_precision_that_overflows_goes_on(speaker, family):
    model, tokenizer = speaker(family, torch.float16)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(3e4)
        model.get_output_embeddings().weight.mul_(3e4)
        logits = model(input_ids=torch.tensor([[40, 50, 60]])).logits
    assert not bool(torch.isfinite(logits).all())
    for method in ("greedy", "sample"):
        found = generate(model, tokenizer, prompts_of(tokenizer), Decoding(method, 5))
        assert all(0 <= i < 512 for c in found for i in c.ids)


def test_the_last_token_that_there_is_room_for_can_be_written(speaker):
    """GPT-2's table of positions ends at 64: one token more would be an error."""
    model, tokenizer = speaker("gpt2")
    prompt, decoding = Prompt("", tuple(range(10, 62)), False), Decoding(max_new_tokens=12)
    check_context([prompt], decoding.max_new_tokens, model.config.max_position_embeddings)
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    assert len(generate(model, tokenizer, [prompt], decoding)[0].ids) == 12


def test_small_temperatures_of_the_config_of_the_model_stand_an_overflow(speaker):
    model, tokenizer = speaker("llama")
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.5, num_return_sequences=3)
    handle = model.lm_head.register_forward_hook(
        lambda module, args, out: out.index_fill(-1, torch.tensor([7]), math.inf)
    )
    try:
        [written] = generate(model, tokenizer, [prepare_prompt(tokenizer, "The sea")], Decoding("model", 4))
    finally:
        handle.remove()
    assert written.ids == (7, 7, 7, 7)


@pytest.mark.parametrize("own", [{"penalty_alpha": 0.6, "top_k": 4}, {"do_sample": True, "temperature": 0.0}])
def test_a_config_of_the_model_that_cannot_be_followed_is_one_line(speaker, own):
    model, tokenizer = speaker("llama")
    model.generation_config = GenerationConfig(**own)
    with pytest.raises(
        InvalidArgument, match=r"as its generation config asks \([^\n`]+\); take `decoding` greedy or sample$"
    ):
        generate(model, tokenizer, [prepare_prompt(tokenizer, "The sea")], Decoding("model", 4))


# ---- repetition ----------------------------------------------------------------------------------------------------


@PROPERTY
@given(ids=st.lists(st.integers(0, 2), max_size=40))
def test_repetition_is_the_share_of_stretches_of_four_that_stood_there_before(ids):
    found = Continuation("", tuple(ids)).repetition
    if len(ids) < 4:
        assert found is None
    else:
        stretches = [ids[i : i + 4] for i in range(len(ids) - 3)]
        again = sum(any(earlier == s for earlier in stretches[:i]) for i, s in enumerate(stretches))
        assert found == pytest.approx(again / len(stretches), abs=1e-15)


def test_repetition_is_nothing_for_new_text_nearly_all_for_one_token_and_unknown_below_four():
    assert Continuation("", tuple(range(50))).repetition == 0
    assert Continuation("", (7,) * 103).repetition == pytest.approx(0.99)
    assert Continuation("", (1, 2, 3, 4, 1, 2, 3, 4)).repetition == pytest.approx(0.2)
    assert Continuation("", (1, 2, 1, 2)).repetition == 0
    assert all(Continuation("", (1,) * n).repetition is None for n in range(4))
