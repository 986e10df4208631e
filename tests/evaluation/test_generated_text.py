"""Windows that a model generates: begun as texts are, without an end, with the bytes of their text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from generating import (
    FEW,
    added_to_logits,
    end_of,
    likely,
    next_logits,
)
from tokenizers import processors
from transformers import GenerationConfig

from dimscope.errors import InvalidArgument
from dimscope.evaluation.generated_text import begin_ids, sample_windows


def ascii_only(model: Any, tokenizer: Any) -> Any:
    """Let a model write printable ASCII and spaces alone, whatever it would like to."""
    pieces = [tokenizer.convert_ids_to_tokens(i) for i in range(512)]
    plain = [p.replace("Ġ", "").replace("▁", "") for p in pieces]
    kept = [all("!" <= c <= "~" for c in p) and not p.startswith("<") for p in plain]
    return added_to_logits(model, torch.where(torch.tensor(kept), 0.0, -1e4))


@pytest.mark.parametrize("length", [9, 40])
@pytest.mark.parametrize("family", FEW)
def test_windows_have_their_length_their_beginning_and_no_end_inside(speaker, family, length):
    """Also where the model would end at once, by any of its end tokens."""
    model, tokenizer = speaker(family)
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


@pytest.mark.parametrize("family", FEW)
def test_the_bytes_of_windows_are_those_of_their_text_and_run_on_from_window_to_window(speaker, family):
    model, tokenizer = speaker(family)
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


@pytest.mark.parametrize("family", ["gpt2"])
def test_a_piece_of_byte_level_tokens_has_as_many_bytes_as_characters(speaker, family):
    model, tokenizer = speaker(family)
    for window in sample_windows(model, tokenizer, count=3, length=60, seed=1):
        pieces = tokenizer.convert_ids_to_tokens(window.ids.tolist())
        assert window.n_bytes.tolist() == [0, *map(len, pieces[1:])]


@pytest.mark.parametrize("family", FEW)
def test_windows_come_again_with_their_seed_whatever_the_config_of_the_model_says(speaker, family):
    model, tokenizer = speaker(family)

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


def test_windows_are_drawn_from_the_distribution_of_the_model_without_its_end(speaker):
    """2,000 first tokens by chi-squared."""
    model, tokenizer = speaker("llama")
    found = sample_windows(model, tokenizer, count=2000, length=3, seed=2)
    counts = np.bincount([int(w.ids[1]) for w in found], minlength=512)
    logits = next_logits(model, (1,))
    logits[2] = -math.inf
    expected = 2000 * logits.softmax(0).numpy()
    assert likely(counts, expected)


def test_windows_begin_with_what_the_tokenizer_has(speaker):
    model, tokenizer = speaker("phi")
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


def test_windows_begin_with_all_that_a_tokenizer_puts_before_a_text(speaker):
    model, tokenizer = speaker("llama")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <unk> $A </s>", special_tokens=[("<s>", 1), ("<unk>", 0), ("</s>", 2)]
    )
    window = sample_windows(model, tokenizer, count=1, length=9, seed=0)[0]
    assert begin_ids(tokenizer) == [1, 0] == window.ids[:2].tolist()
    assert (window.n_prefix, len(window.ids)) == (2, 9)
    assert window.n_bytes[:2].tolist() == [0, 0]
    assert bool((window.n_bytes[2:] > 0).all())


def test_windows_that_hold_less_than_two_tokens_are_refused(speaker):
    model, tokenizer = speaker("llama")
    assert len(sample_windows(model, tokenizer, count=1, length=3, seed=0)[0].ids) == 3
    with pytest.raises(InvalidArgument, match=r"^`length` must be 3 or more, got 2"):
        sample_windows(model, tokenizer, count=1, length=2, seed=0)


def test_windows_hold_no_ids_beyond_the_tokenizer(speaker):
    model, tokenizer = speaker("qwen2", tokenizer_size=400)
    assert model.config.vocab_size > len(tokenizer)
    windows = sample_windows(model, tokenizer, count=4, length=60, seed=0)
    assert max(int(w.ids.max()) for w in windows) < len(tokenizer)
