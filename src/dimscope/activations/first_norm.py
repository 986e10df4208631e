"""The norm through which the first block reads the embeddings."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dimscope.activations.hooks import Hook, evaluating, hooked
from dimscope.activations.sites import find_sites
from dimscope.activations.structure import input_states, run_stack, text_stack
from dimscope.checkpoints.model import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def first_norm(model: "PreTrainedModel") -> nn.Module | None:
    """Return the norm through which the first block reads its input; None where it reads it as it is (post-norm families).

    The model runs once on two tokens: the norm is the first one whose input is the very tensor that enters the block.

    Raises:
        UnsupportedCheckpoint: The model has no plain list of blocks.
    """
    block = find_sites(model)[0].module
    entered: list[Tensor] = []
    readers: list[nn.Module] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(input_states(args, kwargs))

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args and args[0] is entered[-1]:
            readers.append(module)

    norms = [m for m in block.modules() if "norm" in type(m).__name__.lower()]
    ids = torch.zeros(1, 2, dtype=torch.int64, device=input_device(model))
    with evaluating(model), hooked([Hook(block, enter, before=True), *(Hook(m, read, before=True) for m in norms)]):
        run_stack(text_stack(model), ids)
    return readers[0] if readers else None
