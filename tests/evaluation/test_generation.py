"""What a model says, against stock transformers given one prompt at a time, and that nothing of it is left in the model."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from matrices import PROPERTY
from models import FAMILIES
from scipy.stats import chisquare
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dimscope.errors import InvalidArgument
from dimscope.evaluation.generation import (
    Continuation,
    Decoding,
    Prompt,
    begin_ids,
    check_room,
    generate,
    has_template,
    prepare_prompt,
    sample_windows,
)

CAUSAL = [name for name, family in FAMILIES.items() if family.output]
BYTE_LEVEL = [name for name in CAUSAL if FAMILIES[name].tokenizer == "byte_bpe"]
TEXTS = ("The keeper", "She laughed at them both and put the kettle on the stove.", "In")
NEW = 12
END = {"byte_bpe": 1, "sentencepiece": 2}


def end_of(family: str) -> int:
    return END[FAMILIES[family].tokenizer]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are much faster on one thread where others use the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def case(checkpoint) -> Callable[..., tuple[Any, Any]]:
    """Return `case(family, dtype=torch.float32, **arguments)`: a fresh model that does not repeat itself, and its tokenizer.

    Weights ten times as large as usual and an output table of its own: what it says depends on all that it read.
    """
    transformers.utils.logging.disable_progress_bar()

    def make(family: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> tuple[Any, Any]:
        spread = "init_std" if family == "opt" else "initializer_range"
        folder = checkpoint(family, tied=False, **{spread: 0.3}, **arguments)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        return model, AutoTokenizer.from_pretrained(folder)

    return make


def prompts_of(tokenizer: Any) -> list[Prompt]:
    """Return prompts of different lengths, among them one with the end token at its beginning and inside."""
    end = tokenizer.eos_token_id
    odd = Prompt("odd", (end, end, 40, 50, end, 60), False)
    return [*(prepare_prompt(tokenizer, text) for text in TEXTS), odd]


def alone(model: Any, ids: tuple[int, ...], new: int = NEW, ends: Any = None, **options: Any) -> tuple[int, ...]:
    """Return what stock transformers writes after one prompt, which needs no padding, up to the first end token."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        written = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=new, eos_token_id=ends, pad_token_id=0, **{"do_sample": False, **options},
        )  # fmt: skip
    finally:
        model.generation_config = own
    return until_end(tuple(written[0, len(ids) :].tolist()), ends)


def until_end(ids: tuple[int, ...], ends: Any) -> tuple[int, ...]:
    ends = ends if isinstance(ends, list) else [ends]
    return ids[: next((n for n, i in enumerate(ids) if i in ends), len(ids))]


@torch.no_grad()
def next_logits(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0, -1].double()


def added_to_logits(model: Any, added: torch.Tensor | float) -> Any:
    """Add numbers to all logits of a model; returns the handle of the hook."""
    return model.get_output_embeddings().register_forward_hook(lambda module, args, out: out + added)


def likely(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Whether chi-squared gives p above 1e-5; tokens expected less than five times are counted together."""
    rare = expected < 5
    found, wanted = ([*values[~rare], values[rare].sum()] for values in (counts, expected))
    return chisquare(found, wanted).pvalue > 1e-5


# ---- greedy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CAUSAL)
def test_a_greedy_batch_is_what_transformers_says_to_each_prompt_alone(case, family):
    model, tokenizer = case(family)
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


@pytest.mark.parametrize("family", CAUSAL)
def test_neither_the_batch_nor_its_order_matters(case, family):
    model, tokenizer = case(family)
    prompts, decoding = prompts_of(tokenizer), Decoding(max_new_tokens=NEW)
    found = generate(model, tokenizer, prompts, decoding)
    assert generate(model, tokenizer, prompts[::-1], decoding) == found[::-1]
    assert [generate(model, tokenizer, [p], decoding)[0] for p in prompts] == found


@pytest.mark.parametrize("new", [1, 2, 7])
def test_no_more_tokens_are_written_than_asked_for(case, new):
    model, tokenizer = case("phi")
    model.generation_config.eos_token_id = 511
    added_to_logits(model, torch.zeros(512).index_fill(0, torch.tensor(511), -1e4))
    for method in ("greedy", "sample", "model"):
        found = generate(model, tokenizer, prompts_of(tokenizer), Decoding(method, new))
        assert [len(c.ids) for c in found] == [new] * 4


# ---- ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CAUSAL)
def test_an_end_token_stops_its_own_text_and_is_not_in_it(case, family):
    """The ends are tokens that two of the texts come to by themselves, at different places."""
    model, tokenizer = case(family)
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
def test_the_end_token_of_the_tokenizer_holds_where_the_model_names_none(case, family):
    model, tokenizer = case(family)
    end = tokenizer.eos_token_id
    added_to_logits(model, torch.zeros(512).index_fill(0, torch.tensor(end), 1e4))
    for own in (GenerationConfig(eos_token_id=None), None):
        model.generation_config = own
        found = generate(model, tokenizer, prompts_of(tokenizer), Decoding(max_new_tokens=NEW))
        assert found == [Continuation("", ())] * 4
    model.generation_config = GenerationConfig(eos_token_id=[77])  # the model's own word comes first
    found = generate(model, tokenizer, prompts_of(tokenizer), Decoding(max_new_tokens=NEW))
    assert found == [Continuation("", (end,) * NEW)] * 4  # a special token has no text


def test_without_any_end_token_all_tokens_are_kept(case):
    model, tokenizer = case("llama")
    prompts = prompts_of(tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    found = generate(model, tokenizer, prompts, Decoding(max_new_tokens=NEW))
    assert [c.ids for c in found] == [alone(model, p.ids) for p in prompts]


def test_tokens_that_the_tokenizer_does_not_know_have_no_text(case):
    model, tokenizer = case("qwen2", tokenizer_size=400)
    beyond = torch.arange(512) >= 400
    added_to_logits(model, beyond.float() * 1e4)
    found = generate(model, tokenizer, prompts_of(tokenizer), Decoding(max_new_tokens=NEW))
    assert all(min(c.ids) >= 400 and c.text == "" for c in found)


# ---- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CAUSAL)
def test_samples_come_again_with_their_seed_and_no_others(case, family):
    model, tokenizer = case(family)
    prompts = prompts_of(tokenizer)
    found = {seed: generate(model, tokenizer, prompts, Decoding("sample", NEW, seed)) for seed in (0, 1, 2)}
    assert len({tuple(c.ids for c in texts) for texts in found.values()}) == 3
    assert found[0] != generate(model, tokenizer, prompts, Decoding(max_new_tokens=NEW))
    torch.manual_seed(99)  # wherever the program's own random numbers stand
    torch.rand(7)
    assert generate(model, tokenizer, prompts, Decoding("sample", NEW, 1)) == found[1]
    assert generate(model, tokenizer, prompts, Decoding("sample", NEW, 1), told=lambda texts: None) == found[1]


@pytest.mark.parametrize("family", CAUSAL)
def test_samples_are_drawn_from_the_distribution_of_the_model_whatever_its_own_config_says(case, family):
    """4,000 first tokens by chi-squared; those that are expected least are drawn too."""
    model, tokenizer = case(family)
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


@pytest.mark.parametrize("family", CAUSAL)
def test_the_config_of_the_model_is_followed_where_it_is_asked_for_and_ignored_where_not(case, family):
    model, tokenizer = case(family)
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


@pytest.mark.parametrize("family", CAUSAL)
def test_sampling_by_the_config_of_the_model_stays_among_its_top_k(case, family):
    model, tokenizer = case(family)
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


@pytest.mark.parametrize("family", CAUSAL)
def test_beams_are_those_of_transformers_and_tell_nothing_on_the_way(case, family):
    model, tokenizer = case(family)
    prompts, heard = prompts_of(tokenizer), []
    model.generation_config = GenerationConfig(num_beams=2, eos_token_id=end_of(family))
    found = generate(model, tokenizer, prompts, Decoding("model", NEW), told=heard.append)
    assert [c.ids for c in found] == [alone(model, p.ids, ends=end_of(family), num_beams=2) for p in prompts]
    assert heard == []
    greedy = generate(model, tokenizer, prompts, Decoding("greedy", NEW), told=heard.append)
    assert greedy != found
    assert heard


def test_a_model_without_a_config_of_its_own_is_greedy(case):
    model, tokenizer = case("llama")
    prompts = prompts_of(tokenizer)
    expected = generate(model, tokenizer, prompts, Decoding("greedy", NEW))
    model.generation_config = None
    assert generate(model, tokenizer, prompts, Decoding("model", NEW)) == expected
    assert model.generation_config is None


@pytest.mark.parametrize(
    "own", [{"max_length": 5}, {"do_sample": True, "top_k": 5, "temperature": 0.7, "max_length": 5}]
)
def test_transformers_has_nothing_to_warn_of(case, caplog, monkeypatch, own):
    """Its logger hands on to others only where CI is set, so it is kept from that, and the handler put on it."""
    model, tokenizer = case("llama")
    model.generation_config = GenerationConfig(**own, eos_token_id=2)
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    try:
        for method in ("greedy", "sample", "model"):
            generate(model, tokenizer, prompts_of(tokenizer), Decoding(method, 6))
        sample_windows(model, tokenizer, count=2, length=8, seed=0)
        assert caplog.messages == []
        logger.warning("heard")
        assert caplog.messages == ["heard"]
    finally:
        logger.removeHandler(caplog.handler)


# ---- nothing is left -----------------------------------------------------------------------------------------------


def settings(own: GenerationConfig) -> dict[str, Any]:
    return copy.deepcopy(own.__dict__)


def interrupted(texts: list[str]) -> None:
    raise KeyboardInterrupt


def failing(module: Any, args: Any, out: Any) -> Any:
    raise RuntimeError("planted")


@pytest.mark.parametrize("method", ["greedy", "sample", "model"])
@pytest.mark.parametrize("family", CAUSAL)
def test_config_random_numbers_and_hooks_are_as_before_after_success_an_exception_or_ctrl_c(case, family, method):
    model, tokenizer = case(family)
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
        generate(model, tokenizer, prompts, decoding, told=interrupted)
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
@pytest.mark.parametrize("family", CAUSAL)
def test_the_texts_are_told_after_every_token_and_the_last_are_the_final_ones(case, family, method):
    model, tokenizer = case(family)
    prompts, heard = prompts_of(tokenizer), []
    ends = [alone(model, prompts[0].ids)[2]]
    model.generation_config.eos_token_id = ends
    found = generate(model, tokenizer, prompts, Decoding(method, NEW, 1), told=heard.append)
    assert len(heard) == NEW  # a text of the four is without an end
    assert max(len(c.ids) for c in found) == NEW
    for n, texts in enumerate(heard, 1):
        assert texts == [tokenizer.decode(c.ids[:n], skip_special_tokens=True) for c in found]
    assert heard[-1] == [c.text for c in found]
    if method == "greedy":
        assert min(len(c.ids) for c in found) <= 2


def test_telling_ends_with_the_last_text(case):
    """All texts end at once: the end token is the last that is written, and nobody is told of more."""
    model, tokenizer = case("llama")
    heard: list[list[str]] = []
    ids = alone(model, prompts_of(tokenizer)[0].ids)
    model.generation_config.eos_token_id = ids[4]
    found = generate(model, tokenizer, prompts_of(tokenizer)[:1], Decoding(max_new_tokens=NEW), told=heard.append)
    assert found[0].ids == until_end(ids, ids[4])
    assert len(heard) == len(found[0].ids) + 1
    assert heard[-1] == heard[-2] == [found[0].text]


# ---- damaged models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("family", CAUSAL)
def test_logits_that_are_no_numbers_do_not_end_it(case, family, value):
    model, tokenizer = case(family)
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


@pytest.mark.parametrize("family", CAUSAL)
def test_a_model_in_half_precision_that_overflows_goes_on(case, family):
    model, tokenizer = case(family, torch.float16)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(3e4)
        model.get_output_embeddings().weight.mul_(3e4)
        logits = model(input_ids=torch.tensor([[40, 50, 60]])).logits
    assert not bool(torch.isfinite(logits).all())
    for method in ("greedy", "sample"):
        found = generate(model, tokenizer, prompts_of(tokenizer), Decoding(method, 5))
        assert all(0 <= i < 512 for c in found for i in c.ids)


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


# ---- prompts -------------------------------------------------------------------------------------------------------

SYSTEM = "Answer in rhyme."
# a beginning token where there is one, turns between markers of plain text, the turn of the model opened
TURNS = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITHOUT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
)


@pytest.fixture(params=["gpt2", "llama", "bert"])
def tokenizer(request, checkpoint) -> Any:
    """Return a tokenizer of each kind, of the test's own: byte-level BPE, SentencePiece, WordPiece."""
    return AutoTokenizer.from_pretrained(checkpoint(request.param))


@pytest.fixture
def chatty(tokenizer) -> Any:
    tokenizer.chat_template = TURNS if tokenizer.bos_token else TURNS.replace("{{ bos_token }}", "[CLS]")
    return tokenizer


@pytest.mark.parametrize("system", [None, SYSTEM, ""])
@pytest.mark.parametrize("template", ["auto", "chat"])
def test_a_prompt_in_a_template_has_the_ids_of_transformers(chatty, template, system):
    said = [] if system is None else [{"role": "system", "content": system}]
    messages = [*said, {"role": "user", "content": "How deep is it?"}]
    expected = chatty.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]
    found = prepare_prompt(chatty, "How deep is it?", template, system)
    assert found == Prompt("How deep is it?", tuple(expected), True)
    written = chatty.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert written.endswith("How deep is it?\n<assistant>")
    # the special token once, as the template writes it: not a second time by the tokenizer, and nothing at the end
    first = chatty.convert_tokens_to_ids(chatty.bos_token or "[CLS]")
    assert found.ids[0] == first
    assert found.ids.count(first) == 1
    assert ("<system>" in written) == (system is not None)
    assert system is None or f"<system>{system}\n" in written


def test_a_plain_prompt_stays_plain_beside_a_template(chatty):
    found = prepare_prompt(chatty, TEXTS[1], "plain")
    chatty.chat_template = None
    assert found == prepare_prompt(chatty, TEXTS[1], "plain") == prepare_prompt(chatty, TEXTS[1])
    assert not found.chat


@pytest.mark.parametrize("text", [*TEXTS, "  two spaces", "zwei Wörter – und 冬", "line\nline\n", "1907"])
def test_a_plain_prompt_is_the_text_as_the_tokenizer_begins_it(tokenizer, text):
    """GPT-2 puts nothing around a text, Llama <s> before it, BERT [CLS] before and [SEP] after it."""
    whole = tokenizer(text)["input_ids"]
    if tokenizer.sep_token_id is not None:
        assert whole[-1] == tokenizer.sep_token_id
        whole = whole[:-1]
    assert prepare_prompt(tokenizer, text) == Prompt(text, tuple(whole), False)
    assert not has_template(tokenizer)


@pytest.mark.parametrize(("around", "n_before"), [("<s> $A </s>", 1), ("$A </s>", 0), ("<s> <s> $A", 2)])
def test_what_a_tokenizer_puts_after_a_text_is_not_in_a_prompt(checkpoint, around, n_before):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    bare = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert len(tokenizer(TEXTS[0])["input_ids"]) == len(bare) + around.count("s>")
    assert prepare_prompt(tokenizer, TEXTS[0]).ids == (1,) * n_before + tuple(bare)


def test_without_a_template_a_prompt_is_plain_and_has_no_system_prompt(tokenizer):
    assert prepare_prompt(tokenizer, TEXTS[0], "auto", SYSTEM) == prepare_prompt(tokenizer, TEXTS[0], "plain")
    with pytest.raises(InvalidArgument) as caught:
        prepare_prompt(tokenizer, TEXTS[0], "chat")
    assert str(caught.value) == (
        "this model's tokenizer has no chat template; leave `chat` out to pass the prompt as it is"
    )


def test_a_template_that_takes_no_system_prompt_says_so_in_its_own_words(chatty):
    chatty.chat_template = WITHOUT_SYSTEM.replace("{{ bos_token }}", chatty.bos_token or "[CLS]")
    for template in ("auto", "chat"):
        with pytest.raises(InvalidArgument) as caught:
            prepare_prompt(chatty, TEXTS[0], template, SYSTEM)
        assert str(caught.value) == "the chat template does not take this prompt: System role not supported"
        assert prepare_prompt(chatty, TEXTS[0], template).chat
    assert not prepare_prompt(chatty, TEXTS[0], "plain", SYSTEM).chat


def test_a_template_that_leaves_the_system_prompt_out_is_refused(chatty):
    chatty.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert prepare_prompt(chatty, TEXTS[0], "chat").chat
    with pytest.raises(InvalidArgument, match="ignores a system prompt"):
        prepare_prompt(chatty, TEXTS[0], "chat", SYSTEM)


@pytest.mark.parametrize("broken", ["{{ messages[0].content", "{{ messages[7].content }}", "{{ nothing.at.all }}"])
def test_a_template_that_is_broken_is_one_line(chatty, broken):
    chatty.chat_template = broken
    with pytest.raises(InvalidArgument, match=r"^the chat template does not take this prompt: [^\n]+$"):
        prepare_prompt(chatty, TEXTS[0])


def test_an_empty_prompt_is_refused_where_nothing_stands_before_a_text(tokenizer):
    prefix = tokenizer("")["input_ids"][:1]  # <s>, [CLS], or none
    if prefix:
        assert prepare_prompt(tokenizer, "") == Prompt("", tuple(prefix), False)
        return
    for template in ("auto", "plain"):
        with pytest.raises(InvalidArgument) as caught:
            prepare_prompt(tokenizer, "", template)
        assert str(caught.value) == (
            "the prompt is empty, and this tokenizer puts nothing before a text; give it a word"
        )
    tokenizer.chat_template = TURNS
    assert prepare_prompt(tokenizer, "").chat


# ---- room ----------------------------------------------------------------------------------------------------------


def test_a_prompt_that_leaves_no_room_is_refused_with_all_numbers():
    short, long = Prompt("short", (1,) * 5, False), Prompt("a long one", (1,) * 57, False)
    check_room([short, long], Decoding(max_new_tokens=7), 64)
    check_room([short, long], Decoding(max_new_tokens=10**6), None)
    check_room([], Decoding(), 1)
    with pytest.raises(InvalidArgument) as caught:
        check_room([short, long], Decoding(max_new_tokens=8), 64)
    assert str(caught.value) == (
        "the prompt 'a long one' has 57 tokens, and 8 new ones make 65: the model reads at most 64; "
        "shorten it, or take a smaller `new_tokens`"
    )


@pytest.mark.parametrize("length", [40, 41, 4000])
def test_a_long_prompt_is_shown_by_its_beginning(length):
    text = ("word\n" * length)[:length]
    with pytest.raises(InvalidArgument) as caught:
        check_room([Prompt(text, (1,) * 60, False)], Decoding(max_new_tokens=9), 64)
    shown = text if length == 40 else text[:37] + "..."
    assert f"the prompt {shown!r} has 60 tokens" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_last_token_that_there_is_room_for_can_be_written(case):
    """GPT-2's table of positions ends at 64: one token more would be an error."""
    model, tokenizer = case("gpt2")
    prompt, decoding = Prompt("", tuple(range(10, 62)), False), Decoding(max_new_tokens=12)
    check_room([prompt], decoding, model.config.max_position_embeddings)
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    assert len(generate(model, tokenizer, [prompt], decoding)[0].ids) == 12


# ---- windows that the model writes ---------------------------------------------------------------------------------


def ascii_only(model: Any, tokenizer: Any) -> Any:
    """Let a model write printable ASCII and spaces alone, whatever it would like to."""
    pieces = [tokenizer.convert_ids_to_tokens(i) for i in range(512)]
    plain = [p.replace("Ġ", "").replace("▁", "") for p in pieces]
    kept = [all("!" <= c <= "~" for c in p) and not p.startswith("<") for p in plain]
    return added_to_logits(model, torch.where(torch.tensor(kept), 0.0, -1e4))


@pytest.mark.parametrize("length", [9, 40])
@pytest.mark.parametrize("family", CAUSAL)
def test_windows_have_their_length_their_beginning_and_no_end_inside(case, family, length):
    """Also where the model would end at once, by any of its end tokens."""
    model, tokenizer = case(family)
    ends = [end_of(family), 300, 301]
    model.generation_config.eos_token_id = ends
    added_to_logits(model, torch.zeros(512).index_fill(0, torch.tensor(ends), 50.0))
    found = sample_windows(model, tokenizer, count=5, length=length, seed=3)
    # Llama's tokenizer puts <s> before a text; GPT-2's nothing, but has a token that begins one
    begin = [tokenizer.bos_token_id]
    assert begin_ids(tokenizer) == begin
    assert [w.index for w in found] == list(range(5))
    for window in found:
        assert window.ids.shape == window.ends.shape == window.n_bytes.shape == (length,)
        assert window.ids.dtype == window.ends.dtype == window.n_bytes.dtype == torch.int64
        assert window.n_prefix == 1
        assert window.ids[:1].tolist() == begin
        assert not set(window.ids[1:].tolist()) & set(ends)
        assert window.n_bytes[0] == 0
    assert len({tuple(w.ids.tolist()) for w in found}) == 5


@pytest.mark.parametrize("family", CAUSAL)
def test_the_bytes_of_windows_are_those_of_their_text_and_run_on_from_window_to_window(case, family):
    model, tokenizer = case(family)
    ascii_only(model, tokenizer)
    found = sample_windows(model, tokenizer, count=4, length=30, seed=0)
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]  # Llama's decoder drops a space at the beginning
    total = 0
    for window in found:
        text = tokenizer.decode([*anchor, *window.ids[1:].tolist()])
        assert text.isascii()
        assert int(window.n_bytes.sum()) == window.predicted_bytes == len(text) - 1
        assert window.ends.tolist() == (total + window.n_bytes.cumsum(0)).tolist()
        total = int(window.ends[-1])
    assert total == sum(int(w.n_bytes.sum()) for w in found)


@pytest.mark.parametrize("family", BYTE_LEVEL)
def test_a_piece_of_byte_level_tokens_has_as_many_bytes_as_characters(case, family):
    model, tokenizer = case(family)
    for window in sample_windows(model, tokenizer, count=3, length=60, seed=1):
        pieces = tokenizer.convert_ids_to_tokens(window.ids.tolist())
        assert window.n_bytes.tolist() == [0, *map(len, pieces[1:])]


@pytest.mark.parametrize("family", CAUSAL)
def test_windows_come_again_with_their_seed_whatever_the_config_of_the_model_says(case, family):
    model, tokenizer = case(family)

    def written(seed: int) -> list[list[int]]:
        return [w.ids.tolist() for w in sample_windows(model, tokenizer, count=3, length=20, seed=seed)]

    first = written(0)
    torch.manual_seed(31)
    assert written(0) == first
    assert written(1) != first
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=2, repetition_penalty=3.0, suppress_tokens=list(range(3, 400)), max_length=4,
        eos_token_id=end_of(family),
    )  # fmt: skip
    assert written(0) == first


def test_windows_are_drawn_from_the_distribution_of_the_model_without_its_end(case):
    """3,000 first tokens by chi-squared."""
    model, tokenizer = case("llama")
    found = sample_windows(model, tokenizer, count=3000, length=3, seed=2)
    counts = np.bincount([int(w.ids[1]) for w in found], minlength=512)
    logits = next_logits(model, (1,))
    logits[2] = -math.inf
    expected = 3000 * logits.softmax(0).numpy()
    assert likely(counts, expected)


def test_windows_begin_with_what_the_tokenizer_has(case):
    model, tokenizer = case("phi")
    assert begin_ids(tokenizer) == [0]
    tokenizer.bos_token = None
    assert begin_ids(tokenizer) == [1]  # the end token of the text before
    window = sample_windows(model, tokenizer, count=1, length=6, seed=0)[0]
    assert window.ids[0] == 1
    assert 1 not in window.ids[1:]
    tokenizer.eos_token = None
    with pytest.raises(InvalidArgument) as caught:
        sample_windows(model, tokenizer, count=1, length=6, seed=0)
    assert str(caught.value) == (
        "this tokenizer has no token that begins a text, so the model cannot write one by itself"
    )


def test_windows_begin_with_all_that_a_tokenizer_puts_before_a_text(case):
    model, tokenizer = case("llama")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <unk> $A </s>", special_tokens=[("<s>", 1), ("<unk>", 0), ("</s>", 2)]
    )
    window = sample_windows(model, tokenizer, count=1, length=9, seed=0)[0]
    assert begin_ids(tokenizer) == [1, 0] == window.ids[:2].tolist()
    assert (window.n_prefix, len(window.ids)) == (2, 9)
    assert window.n_bytes[:2].tolist() == [0, 0]
    assert bool((window.n_bytes[2:] > 0).all())


def test_windows_that_hold_less_than_two_tokens_are_refused(case):
    model, tokenizer = case("llama")
    assert len(sample_windows(model, tokenizer, count=1, length=3, seed=0)[0].ids) == 3
    with pytest.raises(InvalidArgument, match=r"^`length` must be 3 or more, got 2"):
        sample_windows(model, tokenizer, count=1, length=2, seed=0)


def test_windows_hold_no_ids_beyond_the_tokenizer(case):
    model, tokenizer = case("qwen2", tokenizer_size=400)
    assert model.config.vocab_size > len(tokenizer)
    windows = sample_windows(model, tokenizer, count=4, length=60, seed=0)
    assert max(int(w.ids.max()) for w in windows) < len(tokenizer)


def test_small_temperatures_of_the_config_of_the_model_stand_an_overflow(case):
    model, tokenizer = case("llama")
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.5, num_return_sequences=3)
    handle = model.lm_head.register_forward_hook(
        lambda module, args, out: out.index_fill(-1, torch.tensor([7]), math.inf)
    )
    try:
        [written] = generate(model, tokenizer, [prepare_prompt(tokenizer, "The sea")], Decoding("model", 4))
    finally:
        handle.remove()
    assert written.ids == (7, 7, 7, 7)


def test_a_config_of_the_model_that_cannot_be_followed_is_one_line(case):
    model, tokenizer = case("llama")
    model.generation_config = GenerationConfig(penalty_alpha=0.6, top_k=4)
    with pytest.raises(InvalidArgument, match="cannot be generated from as its generation config asks"):
        generate(model, tokenizer, [prepare_prompt(tokenizer, "The sea")], Decoding("model", 4))
