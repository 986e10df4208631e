"""Which weights of a family read the residual stream, and which write it.

A layout is a table of patterns over the module names of transformers. Everything that no pattern names stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dimscope.errors import InvalidArgument, UnsupportedCheckpoint

if TYPE_CHECKING:
    from dimscope.checkpoints.checkpoint import Checkpoint

Part = Literal["table", "head", "reader", "reader bias", "writer", "gain", "shift", "zeros", "kept"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a family of pre-norm models touches the stream; patterns of modules, with the block's number as {0}.

    `readers` have weights (out x d), and the norm through which they read; `writers` weights (d x in) and biases (d) that
    add to the stream. With `centred` norms (LayerNorm) a norm has a shift beside its gain, and the mean is taken out.
    """

    readers: Mapping[str, str]
    writers: tuple[str, ...]
    norms: tuple[str, ...]
    table: str = "model.embed_tokens"
    head: str = "lm_head|embed_out"  # as older versions of transformers call that of a GPT-NeoX
    final_norm: str = "model.norm"
    eps: str = "rms_norm_eps"  # the entry of the config
    centred: bool = False
    gain_offset: float = 0.0  # a stored gain w acts as w + offset
    scaled_table: bool = False  # the looked-up row is multiplied by sqrt(hidden_size)

    def part(self, name: str) -> tuple[Part, str | None]:
        """What a parameter is, and the norm through which it reads."""
        module, _, kind = name.rpartition(".")
        if module == self.table:
            return "table", None
        if norm := self._read_through(module):
            part: Part = "head" if re.fullmatch(self.head, module) else "reader"
            return (part, norm) if kind == "weight" else ("reader bias", norm)
        if any(re.fullmatch(pattern, module) for pattern in self.writers):
            return "writer", None
        if module == self.final_norm or any(re.fullmatch(pattern, module) for pattern in self.norms):
            return ("gain" if kind == "weight" else "shift"), None
        return "kept", None

    def _read_through(self, module: str) -> str | None:
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
    """The layout of a checkpoint's family. Raises UnsupportedCheckpoint, with the reason, where it is not narrowed."""
    from dimscope.checkpoints.model import require_causal

    config = require_causal(checkpoint)
    kind = config.model_type
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
    beside = ["adapter_config.json"] if "adapter_config.json" in checkpoint.source.files else []
    if adapters := [*beside, *(name for name in checkpoint.tensors if ".lora_" in name)]:
        raise UnsupportedCheckpoint(f"{checkpoint.name}: it holds adapters ({adapters[0]}); merge them first")
    return LAYOUTS[kind]


def check_width(checkpoint: Checkpoint, layout: Layout, width: int, export: str | None = None) -> None:
    """Raises InvalidArgument for a width above the model's, too small, or that the architecture does not allow."""
    dim = checkpoint.input_table.shape[1]
    least = 2 if layout.centred else 1  # a LayerNorm takes one dimension for the mean
    if not least <= width <= dim:
        raise InvalidArgument(f"`widths` must be from {least} to {dim}, the width of {checkpoint.title}, got {width}")
    if not (step := width_step(checkpoint, export)) or not width % step:
        return
    low, high = width // step * step, -(-width // step) * step
    nearest = f"{high}" if not low else f"{low} or {high}"
    raise InvalidArgument(
        f"`widths` {width}: the width of a llama model is a multiple of its {step} attention heads; the nearest are {nearest}"
    )


def width_step(checkpoint: Checkpoint, export: str | None = None) -> int | None:
    """What every width is a multiple of, where the config of the family is refused otherwise."""
    config = checkpoint.config
    assert config is not None, checkpoint.name
    return int(config.num_attention_heads) if "llama" in (export, config.model_type) else None


def head_size(config: Any) -> int:
    """Numbers of a head; where the config does not say so, the width is that of all heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
