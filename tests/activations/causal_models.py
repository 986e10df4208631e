"""Small causal language models of many families, and the hidden states of stock transformers."""

from __future__ import annotations

from typing import Any

import models
import torch
import transformers

from dimscope.activations.forward import run_batch
from dimscope.activations.sites import Site, find_sites

LAYERS = 2
NO_NORM = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}  # as OPT-350m

# case: family, arguments of build_checkpoint
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family, spec in models.FAMILIES.items() if spec.output is not None},
    "opt narrow": ("opt", {"word_embed_proj_dim": 16}),
    "opt-350m": ("opt", NO_NORM),
    "opt without final norm": ("opt", {"do_layer_norm_before": False}),
}

BLOCKS = {
    "gpt2": "transformer.h",
    "gpt_neo": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}
NORMS = {
    "gpt2": "transformer.ln_f", "gpt_neo": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm", "phi": "model.final_layernorm",
}  # fmt: skip

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip

# Families whose logits are more than a product, or whose decoder is laid out in another way; with a scale that matters.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "CohereForCausalLM": ("CohereConfig", {"logit_scale": 0.3}),
    "GraniteForCausalLM": ("GraniteConfig", {"logits_scaling": 7.0, "embedding_multiplier": 3.0}),
    "Gemma2ForCausalLM": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 0.2}),
    "BloomForCausalLM": ("BloomConfig", {"n_head": 4, "n_layer": LAYERS}),  # a norm of the embeddings
    "GPTJForCausalLM": ("GPTJConfig", {"n_head": 4, "n_layer": LAYERS, "rotary_dim": 4}),  # a head with a bias
    "MptForCausalLM": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": LAYERS}),
    "FalconForCausalLM": ("FalconConfig", {}),
    "MixtralForCausalLM": ("MixtralConfig", {"num_local_experts": 4}),
}


def family_of(case: str) -> str:
    return CASES[case][0]


def built(model_class: str, config: Any) -> Any:
    """Return a model with random weights, biases of the head too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config).eval()
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            torch.nn.init.normal_(bias)
    return model


def some_ids(b: int = 3, t: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (b, t), generator=torch.Generator().manual_seed(seed))


def catch(model: Any, ids: torch.Tensor, **options: Any) -> dict[int, torch.Tensor]:
    """Return the hidden states of all sites by layer, each handed on once."""
    caught: dict[int, torch.Tensor] = {}

    def consume(site: Site, hidden: torch.Tensor) -> None:
        assert site.layer not in caught
        caught[site.layer] = hidden.clone()

    run_batch(model, ids, sites=find_sites(model), consume=consume, **options)
    return caught


def stock(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return model(ids, output_hidden_states=True, use_cache=False, **options)


def hooks(model: Any) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, name)) for m in model.modules() for name in names)
