"""Logits by blocks are those of the model, and what cannot be computed is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from causal_models import (
    CASES,
    OTHERS,
    built,
    some_ids,
    stock,
)

from dimscope.activations import output_head as module
from dimscope.activations.forward import run_batch
from dimscope.activations.sites import find_sites
from dimscope.errors import NonFiniteActivations, UnsupportedCheckpoint


def logits_of(model: Any, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, list[int]]:
    """Return the logits of all positions put together from their blocks, and the sizes of these."""
    blocks: list[tuple[torch.Tensor, torch.Tensor]] = []
    run_batch(model, ids, logits=lambda rows, block: blocks.append((rows, block.clone())), **options)
    rows = torch.cat([rows for rows, _ in blocks])
    assert sorted(rows.tolist()) == list(range(ids.numel()))
    assert all(block.dtype == torch.float32 for _, block in blocks)
    found = torch.empty(ids.numel(), blocks[0][1].shape[1])
    found[rows] = torch.cat([block for _, block in blocks])
    return found.view(*ids.shape, -1), [len(block) for _, block in blocks]


def shares(case: str, dtype: torch.dtype) -> float:
    """Return by how much products over other shapes may differ, as a share of the largest logit: two units of the dtype."""
    return 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6


@pytest.mark.parametrize(
    ("case", "rows", "dtype"),
    [
        *((case, 5, torch.float32) for case in [*CASES, *OTHERS]), ("gpt2", 1, torch.float32), ("llama", None, torch.float32),
        *((case, 5, torch.bfloat16) for case in ("llama", "CohereForCausalLM", "Gemma2ForCausalLM")),
    ],
)  # fmt: skip
def test_logits_by_blocks_are_those_of_the_model(model_of, monkeypatch, case, rows, dtype):
    model, ids = model_of(case, dtype), some_ids()
    expected = stock(model, ids).logits.float()
    if rows is not None:
        monkeypatch.setattr(module, "BLOCK_BYTES", rows * 4 * expected.shape[-1])
    found, sizes = logits_of(model, ids)
    assert sizes == ([33] if rows is None else [rows] * (33 // rows) + [33 % rows] * (33 % rows > 0))
    limit = shares(case, dtype) * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)


@pytest.mark.parametrize("case", ["CohereForCausalLM", "GraniteForCausalLM", "Gemma2ForCausalLM"])
def test_the_scales_and_caps_of_these_cases_matter(model_of, case):
    model, ids = model_of(case), some_ids()
    expected = stock(model, ids)
    with torch.no_grad():
        bare = model.get_output_embeddings()(expected.hidden_states[-1])
    assert float((bare - expected.logits).abs().max()) > 0.1 * float(expected.logits.abs().max())


def test_a_block_of_a_vocabulary_larger_than_the_limit_is_one_row(model_of, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    assert logits_of(model_of("gpt2"), some_ids())[1] == [1] * 33


def test_logits_that_are_not_the_head_applied_to_the_last_hidden_state_are_refused():
    """BERT's head transforms the states before it applies the table."""
    config = transformers.BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        is_decoder=True,
    )
    model, blocks = built("BertLMHeadModel", config), []
    message = r"^BertLMHeadModel: its logits are not its output embedding applied .*; pass `logits`=False$"
    with pytest.raises(UnsupportedCheckpoint, match=message):
        run_batch(model, some_ids(), logits=lambda rows, block: blocks.append(rows))
    assert blocks == []
    run_batch(model, some_ids())  # as that says


def test_the_scale_is_that_of_the_model_whatever_its_config_says(model_of):
    model, ids = model_of("CohereForCausalLM"), some_ids()
    expected = stock(model, ids).logits.flatten(0, 1)
    model.config.logit_scale = 0.9  # the model itself goes on with the scale that it was built with
    blocks: dict[int, torch.Tensor] = {}
    run_batch(model, ids, logits=lambda rows, block: blocks.update(zip(rows.tolist(), block, strict=True)))
    torch.testing.assert_close(torch.stack([blocks[row] for row in range(len(expected))]), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [17, 299])
def test_logits_that_are_no_numbers_are_refused(model_of, value, row):
    model = model_of("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[row, 5] = value
    with pytest.raises(NonFiniteActivations, match=r"^NaN or Inf in the logits: .*try `dtype` float32$"):
        run_batch(model, some_ids(), logits=lambda rows, block: None)


@pytest.fixture
def overflowing() -> Iterator[Any]:
    """Return a model in float16 whose last block overflows where the token is 0, and nowhere else."""
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=1, n_head=4, n_positions=64, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = built("GPT2LMHeadModel", config).half()
    with torch.no_grad():
        model.transformer.wte.weight[0, 3] = 60_000
        model.transformer.h[0].mlp.c_proj.bias[3] = 10_000
    return model


def test_what_overflows_at_padding_alone_is_no_error(overflowing):
    ids, mask = some_ids(2, 8), torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
    caught: dict[int, torch.Tensor] = {}
    run_batch(
        overflowing, ids.where(mask, 0), mask=mask, sites=find_sites(overflowing),
        consume=lambda site, hidden: caught.update({site.layer: hidden.clone()}),
    )  # fmt: skip
    assert bool(torch.isfinite(caught[1][mask]).all())
    assert not bool(torch.isfinite(caught[1][~mask]).all())
    seen: dict[int, torch.Tensor] = {}
    run_batch(
        overflowing, ids.where(mask, 0), mask=mask,
        logits=lambda rows, block: seen.update(zip(rows.tolist(), block, strict=True)),
    )  # fmt: skip
    kept = [row for row, real in enumerate(mask.flatten().tolist()) if real]
    assert all(bool(torch.isfinite(seen[row]).all()) for row in kept)


def test_the_model_runs_without_its_cache_and_makes_logits_of_one_position_only(model_of):
    model, calls = model_of("llama"), []
    model.lm_head.register_forward_hook(lambda m, args, out: calls.append(tuple(out.shape)))
    model.model.register_forward_hook(lambda m, args, out: calls.append(out.past_key_values))
    run_batch(model, some_ids())  # the head does not run
    run_batch(model, some_ids(), logits=lambda rows, block: None)
    assert calls[:3] == [None, None, (3, 1, 512)]
