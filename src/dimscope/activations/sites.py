"""Sites: where the residual stream of a model can be read.

They are the input of the first block, the output of every block, and the output of the final norm. The list
`hidden_states` of transformers has no entry for the output of the last block before the final norm.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dimscope.activations.structure import (
    PROBE,
    Call,
    block_calls,
    final_norm_call,
    text_stack,
    trace,
)
from dimscope.checkpoints.model import input_device
from dimscope.errors import UnsupportedCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FINAL_NORM = "after final norm"


@dataclass(frozen=True, slots=True)
class Site:
    """A point of the residual stream.

    Attributes:
        layer: 0 for the input of the first block, i for the output of block i, L + 1 for the output of the final norm.
        name: Its name in tables.
        module: The module that takes the hidden states in or gives them out.
        takes_input: The states are the input of the module, not its output.
        dim: The width of the states.
        call: Which call of the module in a forward pass, from 0: some models share one block among all layers.
        n_calls: The calls of the module in a forward pass.
        copy: Which of several copies of the stream is read; None where there is one.
    """

    layer: int
    name: str
    module: nn.Module = field(repr=False)
    takes_input: bool = False
    dim: int = 0
    call: int = 0
    n_calls: int = 1
    copy: int | None = None

    def select(self, states: Tensor | None) -> Tensor:
        """Return the copy of the stream that is read."""
        assert states is not None, self.name
        return (states if self.copy is None else states[self.copy]).detach()


def find_sites(model: "PreTrainedModel") -> list[Site]:
    """Return all sites of a model, in the order of the stream. The model runs once on a few tokens.

    Raises:
        UnsupportedCheckpoint: The stream does not pass through a list of blocks.
    """
    stack = text_stack(model)
    calls = trace(stack, input_device(model), next(model.get_input_embeddings().parameters()).shape[0])
    blocks = block_calls(calls)
    norm = final_norm_call(calls, blocks)
    _require_width(model, blocks if norm is None else [*blocks, norm])
    n_layers, copy = len(blocks), _copy_of(model, blocks)
    last = f"block {n_layers}" + (", before final norm" if norm is not None else "")
    names = ["embeddings", *(f"block {i}" for i in range(1, n_layers)), last]
    located = [(blocks[0], True, copy), *((block, False, copy) for block in blocks)]
    if norm is not None:
        names.append(FINAL_NORM)
        located.append((norm, False, None))
    return [
        _site(layer, name, call, calls, takes_input, copy)
        for layer, (name, (call, takes_input, copy)) in enumerate(zip(names, located, strict=True))
    ]


def _site(layer: int, name: str, call: Call, calls: list[Call], takes_input: bool, copy: int | None) -> Site:
    own = [c for c in calls if c.module is call.module]
    assert call.output is not None, name
    return Site(layer, name, call.module, takes_input, call.output.shape[-1], own.index(call), len(own), copy)


def _require_width(model: "PreTrainedModel", calls: list[Call]) -> None:
    """Refuse a stream that is several side by side, as hyper-connections and reversible layers have it.

    Raises:
        UnsupportedCheckpoint: Its width is not the hidden size.
    """
    hidden_size = getattr(model.config.get_text_config(), "hidden_size", None)
    widths = {call.output.shape[-1] for call in calls if call.output is not None} - {hidden_size}
    if widths and hidden_size is not None:
        raise UnsupportedCheckpoint(
            f"{type(model).__name__}: its stream has {widths.pop():,} numbers per position and its hidden size is "
            f"{hidden_size:,}, so several streams run side by side"
        )


def _copy_of(model: "PreTrainedModel", blocks: list[Call]) -> int | None:
    """Return which copy of the stream is read where the blocks take several (Gemma 3n).

    Raises:
        UnsupportedCheckpoint: The config does not say which of the copies is the stream.
    """
    states = blocks[0].output
    assert states is not None
    if states.ndim == len(PROBE) + 1:
        return None
    copy = getattr(model.config.get_text_config(), "altup_active_idx", None)
    if copy is None:
        raise UnsupportedCheckpoint(
            f"{type(model).__name__}: its blocks take {states.shape[0]} copies of the stream, and none is the stream itself"
        )
    return copy
