"""Which weights of a family read the residual stream, and which write it.

A layout is a table of patterns over the module names of transformers. A weight that no pattern names is not changed.
To add a family, add its layout to LAYOUTS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dimscope.errors import UnsupportedCheckpoint

if TYPE_CHECKING:
    from dimscope.checkpoints.checkpoint import Checkpoint

Part = Literal["table", "head", "reader", "reader bias", "writer", "gain", "shift", "zeros", "kept"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a family of pre-norm models reads and writes the residual stream, as patterns of module names.

    Attributes:
        readers: Modules with weights (out x d), and the norm before each; {0} is the number of the block.
        writers: Modules with weights (d x in), and biases (d), that add to the stream.
        norms: The norms inside blocks.
        table: The input table.
        head: The output table.
        final_norm: The norm before the output table.
        eps: The name of the norms' epsilon in the config.
        centred: Whether norms take out the mean and have a shift beside their gain (LayerNorm).
        gain_offset: A stored gain w multiplies by w + offset.
        scaled_table: Whether rows of the table are multiplied by sqrt(hidden_size) when they are looked up.
    """

    readers: Mapping[str, str]
    writers: tuple[str, ...]
    norms: tuple[str, ...]
    table: str = "model.embed_tokens"
    head: str = "lm_head|embed_out"  # as older versions of transformers call that of a GPT-NeoX
    final_norm: str = "model.norm"
    eps: str = "rms_norm_eps"
    centred: bool = False
    gain_offset: float = 0.0
    scaled_table: bool = False

    def part(self, name: str) -> Part:
        """Return what a parameter is."""
        module, _, kind = name.rpartition(".")
        if module == self.table:
            return "table"
        if self.norm_before(name) is not None:
            return "reader bias" if kind != "weight" else "head" if re.fullmatch(self.head, module) else "reader"
        if any(re.fullmatch(pattern, module) for pattern in self.writers):
            return "writer"
        if module == self.final_norm or any(re.fullmatch(pattern, module) for pattern in self.norms):
            return "gain" if kind == "weight" else "shift"
        return "kept"

    def norm_before(self, name: str) -> str | None:
        """Return the norm through which a parameter reads the stream, or None for one that does not read it."""
        module = name.rpartition(".")[0]
        if re.fullmatch(self.head, module):
            return self.final_norm
        for pattern, norm in self.readers.items():
            if match := re.fullmatch(pattern, module):
                return norm.format(*match.groups())
        return None


_BLOCK = r"model\.layers\.(\d+)\."
_LLAMA = Layout(
    readers={
        _BLOCK + r"self_attn\.[qkv]_proj": "model.layers.{0}.input_layernorm",
        _BLOCK + r"mlp\.(?:gate|up)_proj": "model.layers.{0}.post_attention_layernorm",
    },
    writers=(_BLOCK + r"self_attn\.o_proj", _BLOCK + r"mlp\.down_proj"),
    norms=(_BLOCK + r"(?:input|post_attention)_layernorm",),
)
_PHI = Layout(
    readers={_BLOCK + r"(?:self_attn\.[qkv]_proj|mlp\.fc1)": "model.layers.{0}.input_layernorm"},
    writers=(_BLOCK + r"self_attn\.dense", _BLOCK + r"mlp\.fc2"),
    norms=(_BLOCK + "input_layernorm",),
    final_norm="model.final_layernorm",
    eps="layer_norm_eps",
    centred=True,
)
_NEOX_BLOCK = r"gpt_neox\.layers\.(\d+)\."
_NEOX = Layout(
    readers={
        _NEOX_BLOCK + r"attention\.query_key_value": "gpt_neox.layers.{0}.input_layernorm",
        _NEOX_BLOCK + r"mlp\.dense_h_to_4h": "gpt_neox.layers.{0}.post_attention_layernorm",
    },
    writers=(_NEOX_BLOCK + r"attention\.dense", _NEOX_BLOCK + r"mlp\.dense_4h_to_h"),
    norms=(_NEOX_BLOCK + r"(?:input|post_attention)_layernorm",),
    table="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    eps="layer_norm_eps",
    centred=True,
)

LAYOUTS: dict[str, Layout] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "gemma": replace(_LLAMA, gain_offset=1.0, scaled_table=True),
    "phi": _PHI,
    "gpt_neox": _NEOX,
}

_POST_NORM = "norms after attention and MLP write into the stream, and no rotation goes through them"
_EXPERTS = "experts and their router are not narrowed"
_WHOLE_HEADS = "its width is heads times head size, so only whole heads could go"
REFUSED = {
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3", "glm4"), _POST_NORM),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _EXPERTS),
    **dict.fromkeys(("gpt2", "opt"), _WHOLE_HEADS),
}


def layout_of(checkpoint: Checkpoint) -> Layout:
    """Return the layout of a checkpoint's family.

    Raises:
        UnsupportedCheckpoint: The family, or this model of it, is not narrowed; the message has the reason.
    """
    from dimscope.checkpoints.model import require_causal

    config = require_causal(checkpoint)
    kind = config.model_type
    if method := checkpoint.quantisation:
        raise UnsupportedCheckpoint(
            f"{checkpoint.name}: its weights are quantised ({method}), and no rotation goes through their steps; "
            "narrow the checkpoint they were quantised from"
        )
    if config.get_text_config() is not config:
        raise UnsupportedCheckpoint(
            f"{checkpoint.name}: {kind} models are not narrowed: images or sounds write into the same stream"
        )
    if kind not in LAYOUTS:
        reason = REFUSED.get(kind, f"which of its weights touch the stream is known for {', '.join(LAYOUTS)} only")
        raise UnsupportedCheckpoint(f"{checkpoint.name}: {kind} models are not narrowed: {reason}")
    if kind == "gpt_neox" and not config.use_parallel_residual:
        raise UnsupportedCheckpoint(
            f"{checkpoint.name}: gpt_neox models are narrowed as Phi, whose attention and MLP read the same stream; here "
            "one comes after the other (use_parallel_residual is false)"
        )
    if kind == "phi" and config.qk_layernorm:
        raise UnsupportedCheckpoint(
            f"{checkpoint.name}: this Phi has norms on queries and keys, whose size transformers takes from the width"
        )
    if adapters := [name for name in checkpoint.tensors if ".lora_" in name]:  # of a model in memory
        raise UnsupportedCheckpoint(f"{checkpoint.name}: it holds adapters ({adapters[0]}); merge them first")
    return LAYOUTS[kind]


def head_size(config: Any) -> int:
    """Return the dimensions of an attention head; without an entry in the config, the width over the number of heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
