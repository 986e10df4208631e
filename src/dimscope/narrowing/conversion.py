"""Where every tensor of the narrower checkpoint comes from, and its config: the same family, or one that says the same.

A GPT-NeoX whose blocks read and write in parallel is, once its norms are folded, a Phi. A Qwen2 is a Llama with biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dimscope.checkpoints.families import Layout, Part, check_width, head_size
from dimscope.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dimscope.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a tensor of the narrower checkpoint comes from, and how it is changed."""

    part: Part
    source: str | None = None  # the parameter of the dense model; None: there is none, and it begins at zero
    norm: str | None = None  # the module through which a reader reads
    weight: str | None = None  # of a reader's bias: the weight beside it
    third: int | None = None  # of a fused query_key_value: 0, 1 or 2 of each head's thirds


Origins = dict[str, Origin]


@dataclass(frozen=True, slots=True)
class Export:
    """Another family that says the same: its config from that of the model, and its tensors."""

    config: Callable[[Any], PretrainedConfig]
    origins: Callable[[Layout, Mapping[str, Any], Any], Origins]


def same_family(layout: Layout, shapes: Mapping[str, Any], config: Any) -> Origins:
    """Every parameter from itself."""
    found: Origins = {}
    for name in shapes:
        part, norm = layout.part(name)
        weight = f"{name.rpartition('.')[0]}.weight" if part == "reader bias" else None
        found[name] = Origin(part, name, norm, weight)
    return found


# ---- a Qwen2 as a Llama ---------------------------------------------------------------------------------------------


def _llama_config(config: Any) -> PretrainedConfig:
    from transformers import LlamaConfig

    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout")  # fmt: skip
    copied = {name: deepcopy(getattr(config, name)) for name in kept}
    return LlamaConfig(**copied, attention_bias=True, architectures=["LlamaForCausalLM"])


def _llama_origins(layout: Layout, shapes: Mapping[str, Any], config: Any) -> Origins:
    found: Origins = {}
    for name, origin in same_family(layout, shapes, config).items():
        found[name] = origin
        if name.endswith(".o_proj.weight"):
            found[name.replace(".weight", ".bias")] = Origin("zeros")
    return found


# ---- a GPT-NeoX as a Phi --------------------------------------------------------------------------------------------


def _phi_config(config: Any) -> PretrainedConfig:
    from transformers import PhiConfig

    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
            "max_position_embeddings", "layer_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id",
            "pad_token_id", "attention_dropout", "rope_parameters")  # fmt: skip
    copied = {name: deepcopy(getattr(config, name)) for name in kept}
    return PhiConfig(**copied, architectures=["PhiForCausalLM"])


def _phi_origins(layout: Layout, shapes: Mapping[str, Any], config: Any) -> Origins:
    def held(name: str) -> str | None:
        return name if name in shapes else None

    def reader(module: str, third: int | None = None) -> dict[str, Origin]:
        weight, bias = f"{module}.weight", f"{module}.bias"
        part, norm = layout.part(weight)
        return {
            "weight": Origin(part, weight, norm, third=third),
            "bias": Origin("reader bias", held(bias), norm, weight, third),
        }

    def writer(module: str) -> dict[str, Origin]:
        bias = f"{module}.bias"
        return {
            "weight": Origin("writer", f"{module}.weight"),
            "bias": Origin("writer" if held(bias) else "zeros", held(bias)),
        }

    def norm(module: str) -> dict[str, Origin]:
        return {"weight": Origin("gain", f"{module}.weight"), "bias": Origin("shift", f"{module}.bias")}

    modules = {"model.embed_tokens": {"weight": Origin("table", f"{layout.table}.weight")}}
    for i in range(config.num_hidden_layers):
        own, block = f"gpt_neox.layers.{i}", f"model.layers.{i}"
        for third, letter in enumerate("qkv"):
            modules[f"{block}.self_attn.{letter}_proj"] = reader(f"{own}.attention.query_key_value", third)
        modules[f"{block}.self_attn.dense"] = writer(f"{own}.attention.dense")
        modules[f"{block}.mlp.fc1"] = reader(f"{own}.mlp.dense_h_to_4h")
        modules[f"{block}.mlp.fc2"] = writer(f"{own}.mlp.dense_4h_to_h")
        modules[f"{block}.input_layernorm"] = norm(f"{own}.input_layernorm")
    modules["model.final_layernorm"] = norm(layout.final_norm)
    modules["lm_head"] = reader("embed_out" if "embed_out.weight" in shapes else "lm_head")
    return {f"{module}.{kind}": origin for module, kinds in modules.items() for kind, origin in kinds.items()}


EXPORTS = {
    "qwen2": {"llama": Export(_llama_config, _llama_origins)},
    "gpt_neox": {"phi": Export(_phi_config, _phi_origins)},
}
"""By family, what else it can be written as. A GPT-NeoX has no width of its own choosing, and is written as the first."""


def check_export(checkpoint: Checkpoint, export: str | None) -> str | None:
    """The family that is written, None for the model's own.

    Raises InvalidArgument for one that does not say the same.
    """
    config = checkpoint.config
    assert config is not None, checkpoint.name
    kind = config.model_type
    known = EXPORTS.get(kind, {})
    if export is None and kind == "gpt_neox":
        return "phi"
    if export in (None, kind):
        return None
    if export not in known:
        others = f"as {', '.join(known)}" if known else f"as a {kind} only"
        raise InvalidArgument(f"`export_as` {export}: a {kind} model is written {others}")
    if export == "llama" and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise InvalidArgument(
            f"`export_as` llama: {checkpoint.title} has layers with sliding windows, and a Llama has none"
        )
    return export


def keeps_tie(checkpoint: Checkpoint, layout: Layout, tied: bool | None) -> bool:
    """Whether one table serves both sides of the narrow model: as asked, else as in the dense model where that can be.

    Raises InvalidArgument where it cannot be.
    """
    possible = checkpoint.tied and not layout.centred
    if tied and not possible:
        reason = "takes the mean out in its final norm, and its table does not" if checkpoint.tied else "has two tables"
        raise InvalidArgument(f"`tied`: {checkpoint.title} {reason}")
    return possible if tied is None else tied


def origins_of(
    checkpoint: Checkpoint, layout: Layout, width: int, *, export: str | None = None, tied: bool = False
) -> tuple[PretrainedConfig, Origins]:
    """The config of the narrower model and where its tensors come from: head size as before, the epsilon for the new width.

    Without `tied` a tied model gets a head of its own. Raises InvalidArgument for a width or family that it cannot have.
    """
    from dimscope.checkpoints.model import require_causal

    config: Any = deepcopy(require_causal(checkpoint))
    export = check_export(checkpoint, export)
    check_width(checkpoint, layout, width, export)
    skeleton = checkpoint.skeleton
    assert skeleton is not None, checkpoint.name
    other = None if export is None else EXPORTS[config.model_type][export]
    origins = (other.origins if other else same_family)(layout, skeleton.shapes, config)
    target: Any = other.config(config) if other else config
    head = "lm_head.weight"
    if keeps_tie(checkpoint, layout, tied):
        origins.pop(head, None)
    elif head not in origins:
        origins[head] = Origin("head", head, layout.final_norm)
    if getattr(target, "auto_map", None):
        target.auto_map = None  # its code is not copied, and not needed
    dim = config.hidden_size
    target.head_dim = head_size(config)
    target.hidden_size = width
    target.tie_word_embeddings = tied
    setattr(target, layout.eps, getattr(config, layout.eps) * dim / width)
    return target, origins
