"""Where every tensor of the narrow checkpoint comes from: in the same family, or in an equivalent one.

A GPT-NeoX whose blocks read and write in parallel is, once its norms are folded, a Phi. A Qwen2 is a Llama with biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dimscope.checkpoints.families import Layout, Part

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a tensor of the narrow checkpoint comes from, and how it is changed.

    Attributes:
        part: What it is.
        source: The parameter of the dense model; None for one that is 0 there.
        norm: The norm through which a reader reads.
        weight: The weight beside a reader's bias.
        third: 0, 1 or 2: queries, keys or values of a fused projection.
    """

    part: Part
    source: str | None = None
    norm: str | None = None
    weight: str | None = None
    third: int | None = None


Origins = dict[str, Origin]


@dataclass(frozen=True, slots=True)
class Export:
    """An equivalent family: its config from that of the model, and its tensors."""

    config: Callable[[Any], PretrainedConfig]
    origins: Callable[[Layout, Mapping[str, Any], Any], Origins]


def same_family(layout: Layout, shapes: Mapping[str, Any], config: Any) -> Origins:
    """Return the origins where every parameter comes from itself."""
    origins: Origins = {}
    for name in shapes:
        part = layout.part(name)
        weight = f"{name.rpartition('.')[0]}.weight" if part == "reader bias" else None
        origins[name] = Origin(part, name, layout.norm_before(name), weight)
    return origins


# ---- a Qwen2 as a Llama ---------------------------------------------------------------------------------------------


def _llama_config(config: Any) -> PretrainedConfig:
    from transformers import LlamaConfig

    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout")  # fmt: skip
    copied = {name: deepcopy(getattr(config, name)) for name in kept}
    return LlamaConfig(**copied, attention_bias=True, architectures=["LlamaForCausalLM"])


def _llama_origins(layout: Layout, shapes: Mapping[str, Any], config: Any) -> Origins:
    origins: Origins = {}
    for name, origin in same_family(layout, shapes, config).items():
        origins[name] = origin
        if name.endswith(".o_proj.weight"):
            origins[name.replace(".weight", ".bias")] = Origin("zeros")
    return origins


# ---- a GPT-NeoX as a Phi --------------------------------------------------------------------------------------------


def _phi_config(config: Any) -> PretrainedConfig:
    from transformers import PhiConfig

    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
            "max_position_embeddings", "layer_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id",
            "pad_token_id", "attention_dropout", "rope_parameters")  # fmt: skip
    copied = {name: deepcopy(getattr(config, name)) for name in kept}
    return PhiConfig(**copied, architectures=["PhiForCausalLM"])


def _phi_origins(layout: Layout, shapes: Mapping[str, Any], config: Any) -> Origins:
    modules = {"model.embed_tokens": {"weight": Origin("table", f"{layout.table}.weight")}}
    for i in range(config.num_hidden_layers):
        own, block = f"gpt_neox.layers.{i}", f"model.layers.{i}"
        for third, letter in enumerate("qkv"):
            fused = f"{own}.attention.query_key_value"
            modules[f"{block}.self_attn.{letter}_proj"] = _reader(layout, shapes, fused, third)
        modules[f"{block}.self_attn.dense"] = _writer(shapes, f"{own}.attention.dense")
        modules[f"{block}.mlp.fc1"] = _reader(layout, shapes, f"{own}.mlp.dense_h_to_4h")
        modules[f"{block}.mlp.fc2"] = _writer(shapes, f"{own}.mlp.dense_4h_to_h")
        modules[f"{block}.input_layernorm"] = _norm(f"{own}.input_layernorm")
    modules["model.final_layernorm"] = _norm(layout.final_norm)
    modules["lm_head"] = _reader(layout, shapes, "embed_out" if "embed_out.weight" in shapes else "lm_head")
    return {f"{module}.{kind}": origin for module, kinds in modules.items() for kind, origin in kinds.items()}


def _reader(layout: Layout, shapes: Mapping[str, Any], module: str, third: int | None = None) -> dict[str, Origin]:
    """Return the origins of the weight and the bias of a module that reads the stream."""
    weight, bias = f"{module}.weight", f"{module}.bias"
    norm = layout.norm_before(weight)
    return {
        "weight": Origin(layout.part(weight), weight, norm, third=third),
        "bias": Origin("reader bias", bias if bias in shapes else None, norm, weight, third),
    }


def _writer(shapes: Mapping[str, Any], module: str) -> dict[str, Origin]:
    """Return the origins of the weight and the bias of a module that writes to the stream."""
    bias = f"{module}.bias"
    return {
        "weight": Origin("writer", f"{module}.weight"),
        "bias": Origin("writer", bias) if bias in shapes else Origin("zeros"),
    }


def _norm(module: str) -> dict[str, Origin]:
    return {"weight": Origin("gain", f"{module}.weight"), "bias": Origin("shift", f"{module}.bias")}


EXPORTS = {
    "qwen2": {"llama": Export(_llama_config, _llama_origins)},
    "gpt_neox": {"phi": Export(_phi_config, _phi_origins)},
}
"""By family, the equivalent families it can be written as. A GPT-NeoX is always written as a Phi: its own config ties
the head size to the width."""
