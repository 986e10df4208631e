"""Prompts have the ids of transformers; what a tokenizer or a context cannot take is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
from generating import (
    TEXTS,
)
from tokenizers import processors
from transformers import AutoTokenizer

from dimscope.errors import InvalidArgument
from dimscope.evaluation.prompts import Prompt, check_context, has_template, prepare_prompt

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


def test_a_prompt_that_leaves_no_room_is_refused_with_all_numbers():
    short, long = Prompt("short", (1,) * 5, False), Prompt("a long one", (1,) * 57, False)
    check_context([short, long], 7, 64)
    check_context([short, long], 10**6, None)
    check_context([], 64, 1)
    with pytest.raises(InvalidArgument) as caught:
        check_context([short, long], 8, 64)
    assert str(caught.value) == (
        "the prompt 'a long one' has 57 tokens, and 8 new ones make 65: the model reads at most 64; "
        "shorten it, or take a smaller `new_tokens`"
    )


@pytest.mark.parametrize("length", [40, 41, 4000])
def test_a_long_prompt_is_shown_by_its_beginning(length):
    text = ("word\n" * length)[:length]
    with pytest.raises(InvalidArgument) as caught:
        check_context([Prompt(text, (1,) * 60, False)], 9, 64)
    shown = text if length == 40 else text[:37] + "..."
    assert f"the prompt {shown!r} has 60 tokens" in str(caught.value)
    assert "\n" not in str(caught.value)


# what templates of multimodal models look like, which expect a list of parts
TEXT_PARTS = "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
PARTS = "{% for m in messages %}<{{ m.role }}>" + TEXT_PARTS + "{% endfor %}<assistant>"
SYSTEM_AS_STRING = PARTS.replace(
    TEXT_PARTS, "{% if m.role == 'system' %}{{ m.content }}{% else %}" + TEXT_PARTS + "{% endif %}"
)


@pytest.mark.parametrize("template", [PARTS, SYSTEM_AS_STRING])
@pytest.mark.parametrize("text", ["How deep is it?", "user", " assistant\n"])
def test_a_template_that_reads_parts_gets_parts(chatty, template, text):
    chatty.chat_template = template
    for system in (None, SYSTEM):
        found = prepare_prompt(chatty, text, "chat", system)
        written = f"<system>{SYSTEM}" * (system is not None) + f"<user>{text}<assistant>"
        assert found.ids == tuple(chatty(written, add_special_tokens=False)["input_ids"])


def test_a_template_without_the_prompt_is_refused(chatty):
    chatty.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.text }}{% endfor %}"
    for text in ("How deep is it?", "user"):
        with pytest.raises(InvalidArgument, match=r"^this model's chat template leaves the prompt out, [^\n]+$"):
            prepare_prompt(chatty, text)
