"""The norm before the attention of the first block, which reads the stream as it enters the block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from causal_models import (
    CASES,
    LAYERS,
    OTHERS,
    SIZES,
    built,
    catch,
    hooks,
    some_ids,
)

from dimscope.activations.first_norm import first_norm
from dimscope.activations.sites import find_sites

FIRST_NORMS = {
    "gpt2": "transformer.h.0.ln_1", "gpt_neo": "transformer.h.0.ln_1", "gpt_neox": "gpt_neox.layers.0.input_layernorm",
    "opt": "model.decoder.layers.0.self_attn_layer_norm", "opt narrow": "model.decoder.layers.0.self_attn_layer_norm",
    "opt-350m": None, "opt without final norm": None,  # the norm is behind the attention
    "BloomForCausalLM": "transformer.h.0.input_layernorm",  # not that of the embeddings
    "GPTJForCausalLM": "transformer.h.0.ln_1", "MptForCausalLM": "transformer.blocks.0.norm_1",
    "FalconForCausalLM": "transformer.h.0.input_layernorm",
}  # fmt: skip


@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_the_first_norm_is_that_before_the_attention_of_the_first_block(model_of, case):
    model, before = model_of(case), hooks(model_of(case))
    name = FIRST_NORMS.get(case, "model.layers.0.input_layernorm")
    found = first_norm(model)
    assert found is (None if name is None else model.get_submodule(name))
    assert hooks(model) == before
    if found is not None:  # and it reads the stream as it enters the block, bit for bit
        read: list[torch.Tensor] = []
        found.register_forward_pre_hook(lambda module, args: read.append(args[0].clone()))
        assert torch.equal(catch(model, some_ids())[0], read[-1])


POST_NORM: dict[str, tuple[str, dict[str, Any]]] = {
    "Olmo2ForCausalLM": ("Olmo2Config", SIZES),  # norms of the queries and keys, and behind the attention
    "Exaone4ForCausalLM": ("Exaone4Config", {**SIZES, "sliding_window": None, "layer_types": ["full_attention"] * LAYERS}),
    "BartForCausalLM": ("BartConfig", {
        "vocab_size": 300, "d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
        "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", POST_NORM)
def test_a_block_that_reads_its_input_as_it_is_has_no_first_norm(case):
    config_class, arguments = POST_NORM[case]
    model = built(case, getattr(transformers, config_class)(**arguments))
    block = find_sites(model)[0].module
    assert any("norm" in type(m).__name__.lower() for m in block.modules())
    assert first_norm(model) is None


def test_the_first_norm_of_a_block_with_several_that_read_its_input_is_that_of_the_attention(model_of):
    """GPT-NeoX and the large Falcons read the stream twice, side by side."""
    model = model_of("gpt_neox")
    assert model.config.use_parallel_residual
    assert first_norm(model) is model.gpt_neox.layers[0].input_layernorm
    config = transformers.FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2)
    falcon = built("FalconForCausalLM", config)
    assert first_norm(falcon) is falcon.transformer.h[0].ln_attn


def test_the_hooks_of_the_first_norm_are_gone_after_an_exception(model_of):
    model = model_of("llama")

    def failing(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    model.model.layers[1].register_forward_pre_hook(failing)
    before = hooks(model)
    with pytest.raises(KeyboardInterrupt):
        first_norm(model)
    assert hooks(model) == before
