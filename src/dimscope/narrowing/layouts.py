"""Which weights of a family read the residual stream, which write it, and what its config must say when it is narrower.

A layout is a table of patterns over the parameter names of transformers. Everything that no pattern names stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dimscope.errors import InvalidArgument, UnsupportedCheckpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dimscope.checkpoints.checkpoint import Checkpoint

Part = Literal["table", "head", "reader", "writer", "gain", "kept"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a family of pre-norm RMSNorm models touches the stream.

    `readers` are patterns of weights (out x d) and the norm through which they read, with the block's number as {0};
    `writers` of weights (d x in) and biases (d) that add to the stream; `gains` of the norms on the stream.
    """

    readers: Mapping[str, str]
    writers: tuple[str, ...]
    gains: tuple[str, ...]
    table: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm.weight"
    gain_offset: float = 0.0  # a stored gain w acts as w + offset
    scaled_table: bool = False  # the looked-up row is multiplied by sqrt(hidden_size)
    multiple_of: str | None = None  # an entry of the config that divides every width

    def part(self, name: str) -> tuple[Part, str | None]:
        """What a parameter is, and the norm of a reader."""
        if name == self.table:
            return "table", None
        if name == self.head:
            return "head", self.final_norm
        for pattern, norm in self.readers.items():
            if match := re.fullmatch(pattern, name):
                return "reader", norm.format(*match.groups())
        if any(re.fullmatch(pattern, name) for pattern in self.writers):
            return "writer", None
        if name == self.final_norm or any(re.fullmatch(pattern, name) for pattern in self.gains):
            return "gain", None
        return "kept", None


_BLOCK = r"model\.layers\.(\d+)\."
_LLAMA = Layout(
    readers={
        _BLOCK + r"self_attn\.[qkv]_proj\.weight": "model.layers.{0}.input_layernorm.weight",
        _BLOCK + r"mlp\.(?:gate|up)_proj\.weight": "model.layers.{0}.post_attention_layernorm.weight",
    },
    writers=(_BLOCK + r"self_attn\.o_proj\.(?:weight|bias)", _BLOCK + r"mlp\.down_proj\.(?:weight|bias)"),
    gains=(_BLOCK + r"(?:input|post_attention)_layernorm\.weight",),
)


LAYOUTS: dict[str, Layout] = {
    "llama": replace(_LLAMA, multiple_of="num_attention_heads"),  # its config is refused otherwise
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "gemma": replace(_LLAMA, gain_offset=1.0, scaled_table=True),
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

    kind = require_causal(checkpoint).model_type
    if kind not in LAYOUTS:
        reason = REFUSED.get(kind, f"which of its weights touch the stream is known for {', '.join(LAYOUTS)} only")
        raise UnsupportedCheckpoint(f"{checkpoint.name}: {kind} models are not narrowed: {reason}")
    if adapters := [name for name in checkpoint.tensors if ".lora_" in name]:
        raise UnsupportedCheckpoint(f"{checkpoint.name}: it holds adapters ({adapters[0]}); merge them first")
    return LAYOUTS[kind]


def check_width(checkpoint: Checkpoint, layout: Layout, width: int) -> None:
    """Raises InvalidArgument for a width above the model's, below 1, or that its architecture does not allow."""
    dim = checkpoint.input_table.shape[1]
    if not 1 <= width <= dim:
        raise InvalidArgument(f"--width goes from 1 to {dim}, the width of {checkpoint.title}, not {width}")
    if layout.multiple_of is None or checkpoint.config is None:
        return
    step = int(getattr(checkpoint.config, layout.multiple_of))
    if width % step:
        low, high = width // step * step, -(-width // step) * step
        nearest = f"{high}" if not low else f"{low} or {high}"
        raise InvalidArgument(
            f"--width {width}: the width of a {checkpoint.config.model_type} model is a multiple of its {step} attention "
            f"heads; the nearest are {nearest}"
        )


def narrow_config(checkpoint: Checkpoint, width: int) -> PretrainedConfig:
    """The config of the narrower model: head size as it was, no tie, and the epsilon of the norms for the new width."""
    from copy import deepcopy

    from dimscope.checkpoints.model import require_causal

    config: Any = deepcopy(require_causal(checkpoint))
    dim = config.hidden_size
    config.head_dim = getattr(config, "head_dim", None) or dim // config.num_attention_heads
    config.hidden_size = width
    config.tie_word_embeddings = False
    config.rms_norm_eps = config.rms_norm_eps * dim / width
    return config
