"""Families that nobody listed: their tables and budgets are found by asking transformers, not by names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import transformers

from dimscope.checkpoints.budget import parameter_budget
from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.vectors.embedding import open_table

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# config and model class, and what they want beyond SIZES
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "BloomForCausalLM": ("BloomConfig", {"n_head": 4, "n_layer": 2}),
    "CodeGenForCausalLM": (
        "CodeGenConfig",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    ),
    "CohereForCausalLM": ("CohereConfig", {}),
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
        | {"first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "num_key_value_heads": 4}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
    "FalconForCausalLM": ("FalconConfig", {}),
    "GPTBigCodeForCausalLM": ("GPTBigCodeConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "GPTJForCausalLM": ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}),
    "Gemma2ForCausalLM": ("Gemma2Config", {"head_dim": 8}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {"head_dim": 8}),
    "GraniteForCausalLM": ("GraniteConfig", {}),
    "MambaForCausalLM": ("MambaConfig", {"state_size": 4}),
    "MixtralForCausalLM": ("MixtralConfig", {"num_local_experts": 4}),
    "MptForCausalLM": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "Olmo2ForCausalLM": ("Olmo2Config", {}),
    "Phi3ForCausalLM": ("Phi3Config", {}),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 8}),
    "SmolLM3ForCausalLM": ("SmolLM3Config", {}),
    "StableLmForCausalLM": ("StableLmConfig", {}),
    "Starcoder2ForCausalLM": ("Starcoder2Config", {}),
    "XGLMForCausalLM": ("XGLMConfig", {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}),
    # encoders and encoder-decoders
    "DistilBertForMaskedLM": ("DistilBertConfig", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    "ModernBertForMaskedLM": ("ModernBertConfig", {}),
    "RobertaForMaskedLM": ("RobertaConfig", {}),
    "T5ForConditionalGeneration": ("T5Config", {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}),
}


@pytest.mark.parametrize("model_class", FAMILIES)
@pytest.mark.parametrize("tied", [None, False])
def test_tables_and_budget_are_those_of_stock_transformers(tmp_path, model_class, tied):
    folder = write(tmp_path, model_class, tied)
    model = getattr(transformers, model_class).from_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    inside, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for side, weight in (("input", inside), ("output", head)):
        np.testing.assert_array_equal(open_table(checkpoint, side).load()[1].numpy(), weight.detach().numpy())
    assert checkpoint.tied == (head is inside)
    budget = parameter_budget(checkpoint)
    assert budget["n_parameters"].sum() == sum(p.numel() for p in model.parameters())
    inner = budget.filter(budget["block"].is_not_null())
    assert set(inner["block"]) == {0, 1}


def write(folder: Path, model_class: str, tied: bool | None) -> Path:
    """Write a tiny random model of a class, with its own default for the tie unless told."""
    config_class, extra = FAMILIES[model_class]
    transformers.utils.logging.disable_progress_bar()
    config = getattr(transformers, config_class)(
        **{**SIZES, **extra, **({} if tied is None else {"tie_word_embeddings": tied})}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, model_class)(config).save_pretrained(folder)
    models.write_json(folder / "generation_config.json", {})
    return folder
