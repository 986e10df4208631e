"""From final hidden states to logits, with what some families do to logits after the output table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dimscope.errors import UnsupportedCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_BYTES = 64 << 20  # of float32 logits that are in memory at once,
BLOCK_ROWS = 256  # and positions: more would not multiply faster, and leave the cache


@dataclass(frozen=True, slots=True, eq=False)
class OutputHead:
    """The output table of a model and what follows it: logits = cap(scale * (W h + b)).

    Cohere and Granite scale logits, Gemma 2 caps them smoothly: cap(z) = c tanh(z / c).

    Attributes:
        module: The output table as a module that maps d hidden units to V logits.
        scale: Factor of all logits; 1 in most families.
        cap: c, or None for no cap.
    """

    module: nn.Module
    scale: float = 1.0
    cap: float | None = None

    @property
    def weight(self) -> Float[Tensor, "v d"]:
        """Return the output table."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Float[Tensor, " v"] | None:
        """Return what is added to all raw logits, if anything."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def frozen(self) -> "OutputHead":
        """Return a head over the present table, whatever is hooked to the model or replaced in it later. No copy.

        Raises:
            UnsupportedCheckpoint: The table is not in memory, because accelerate offloaded it.
        """
        if self.weight.is_meta:
            raise UnsupportedCheckpoint(
                "the output table is offloaded from memory; take `device` cpu or `dtype` bfloat16"
            )
        vocab_size, dim = self.weight.shape
        module = nn.Linear(dim, vocab_size, bias=False, device="meta")
        module.weight, module.bias = (x if x is None else _parameter(x) for x in (self.weight, self.bias))  # ty: ignore
        return OutputHead(module, self.scale, self.cap)

    def transform(self, raw: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
        """Return float32 logits from raw ones, W h + b: scaled and capped."""
        logits = raw.float() if self.scale == 1 else raw.float() * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def logits(self, states: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """Return the float32 logits of final hidden states."""
        weight = self.weight
        # accelerate keeps offloaded weights on the meta device, and moves the states itself.
        return self.transform(self.module(states if weight.is_meta else states.to(weight.device)))

    def blocks(self, positions: Int[Tensor, " n"]) -> Sequence[Int[Tensor, " r"]]:
        """Return the positions in blocks whose float32 logits fit in memory at once."""
        return position_blocks(positions, self.weight.shape[0])

    def logits_by_blocks(
        self,
        states: Float[Tensor, "n d"],
        positions: Int[Tensor, " m"],
        consume: Callable[[Int[Tensor, " r"], Float[Tensor, "r v"]], object],
    ) -> None:
        """Call `consume` with blocks of positions (rows of `states`) and their logits."""
        for rows in self.blocks(positions):
            consume(rows, self.logits(states[rows.to(states.device)]))


def output_head(model: "PreTrainedModel") -> OutputHead:
    """Return the output head of a model; what is hooked to its output table acts on the logits.

    Raises:
        UnsupportedCheckpoint: The model has no output table.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise UnsupportedCheckpoint(f"{type(model).__name__} has no output table")
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return OutputHead(module, scale, getattr(config, "final_logit_softcapping", None) or None)


def position_blocks(positions: Int[Tensor, " n"], vocab_size: int) -> Sequence[Int[Tensor, " r"]]:
    """Return the positions in blocks whose float32 logits fit in memory at once."""
    return positions.split(min(BLOCK_ROWS, max(1, BLOCK_BYTES // (4 * vocab_size))))


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
