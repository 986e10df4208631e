"""What a checkpoint is narrowed to: its family, the family that is written, the tie. Resolved once, then handed on."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dimscope.checkpoints.families import Layout, head_size, layout_of
from dimscope.checkpoints.model import require_causal
from dimscope.errors import InvalidArgument
from dimscope.narrowing.conversion import EXPORTS, Origin, Origins, same_family

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dimscope.checkpoints.checkpoint import Checkpoint

HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Target:
    """A checkpoint, and what it is narrowed to, whatever the width.

    Attributes:
        checkpoint: The dense checkpoint.
        config: The config of the dense model.
        layout: Which of its weights read and write the residual stream.
        export: The family that is written; None for the model's own.
        tied: Whether one table of the narrow model serves as input and as output table.
        width_step: Every width is a multiple of it.
    """

    checkpoint: Checkpoint
    config: PretrainedConfig
    layout: Layout
    export: str | None
    tied: bool
    width_step: int

    @property
    def dim(self) -> int:
        """Return the width of the dense model."""
        return self.checkpoint.input_table.shape[1]


def resolve_target(checkpoint: Checkpoint, *, export: str | None = None, tied: bool | None = None) -> Target:
    """Find out how a checkpoint is narrowed.

    Args:
        checkpoint: The dense checkpoint.
        export: The family to write; None for the model's own, or Phi for a GPT-NeoX.
        tied: Keep one table for both sides, or write two; None does what the dense model does, where that is possible.

    Raises:
        UnsupportedCheckpoint: The family is not narrowed.
        InvalidArgument: `export` is not equivalent to the family, or the tie is not possible.
    """
    layout, config = layout_of(checkpoint), require_causal(checkpoint)
    export = _checked_export(checkpoint, config, export)
    heads = int(config.num_attention_heads)
    step = heads if "llama" in (export, config.model_type) else 1
    return Target(checkpoint, config, layout, export, _checked_tie(checkpoint, layout, tied), step)


def check_width(target: Target, width: int) -> None:
    """Check that a model can be narrowed to a width.

    Raises:
        InvalidArgument: The width is above the model's, too small, or not possible in the architecture.
    """
    least = 2 if target.layout.centred else 1  # a LayerNorm takes one dimension for the mean
    if not least <= width <= target.dim:
        raise InvalidArgument(
            f"`widths` must be from {least} to {target.dim}, the width of {target.checkpoint.title}, got {width}"
        )
    step = target.width_step
    if width % step:
        low, high = width // step * step, -(-width // step) * step
        nearest = f"{low} or {high}" if low else f"{high}"
        raise InvalidArgument(
            f"`widths` {width}: the width of a llama model is a multiple of its {step} attention heads; the nearest are {nearest}"
        )


def narrow_config(target: Target, width: int) -> PretrainedConfig:
    """Return the config of the narrow model: head size as before, the epsilon of the norms for the new width."""
    config: Any = deepcopy(target.config)
    if target.export is not None:
        config = EXPORTS[config.model_type][target.export].config(config)
    if getattr(config, "auto_map", None):
        config.auto_map = None  # its code is not copied, and not needed
    eps = target.layout.eps
    config.head_dim = head_size(target.config)
    config.hidden_size = width
    config.tie_word_embeddings = target.tied
    setattr(config, eps, getattr(target.config, eps) * target.dim / width)
    return config


def origins_of(target: Target) -> Origins:
    """Return where every tensor of the narrow checkpoint comes from. A tie that is not kept gives a second table."""
    skeleton = target.checkpoint.skeleton
    assert skeleton is not None, target.checkpoint.name  # layout_of refuses what has none
    export = None if target.export is None else EXPORTS[target.config.model_type][target.export]
    origins = (export.origins if export else same_family)(target.layout, skeleton.shapes, target.config)
    if target.tied:
        origins.pop(HEAD, None)
    elif HEAD not in origins:
        origins[HEAD] = Origin("head", HEAD, target.layout.final_norm)
    return origins


def _checked_export(checkpoint: Checkpoint, config: Any, export: str | None) -> str | None:
    kind = config.model_type
    if export is None and kind == "gpt_neox":
        return "phi"
    if export in (None, kind):
        return None
    equivalent = EXPORTS.get(kind, {})
    if export not in equivalent:
        others = f"as {', '.join(equivalent)}" if equivalent else f"as a {kind} only"
        raise InvalidArgument(f"`export_as` {export}: a {kind} model is written {others}")
    if export == "llama" and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise InvalidArgument(
            f"`export_as` llama: {checkpoint.title} has layers with sliding windows, and a Llama has none"
        )
    return export


def _checked_tie(checkpoint: Checkpoint, layout: Layout, tied: bool | None) -> bool:
    possible = checkpoint.tied and not layout.centred
    if tied and not possible:
        reason = "takes the mean out in its final norm, and its table does not" if checkpoint.tied else "has two tables"
        raise InvalidArgument(f"`tied`: {checkpoint.title} {reason}")
    return possible if tied is None else tied
