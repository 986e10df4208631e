"""A perturbation put into a running model, and taken out again without a trace."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dimscope.activations.hooks import Hook, hooked
from dimscope.errors import InvalidArgument
from dimscope.interventions.maps import LinearMap, RowMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Side = Literal["input", "output", "both"]
BLOCK_ROWS = 8192  # rows of a materialised table changed at once


@contextmanager
def perturbed(
    model: PreTrainedModel, change: RowMap, side: Side = "input", *, materialise: bool = False
) -> Generator[None]:
    """Perturb the embedding tables of a model as long as the context is open.

    No weight is touched. Rows are changed as they are looked up, T x d work a pass. The output table is changed by
    changing what it is multiplied with, which a linear map allows. A shift of the output table adds the same number to
    all logits, and is left out there. Other maps of the output table, and `materialise`, put a changed copy of the table
    in its place: V x d work and memory, once. Afterwards the model is as before, bit for bit, also after an exception.

    Args:
        model: The model to perturb.
        change: The map of rows.
        side: The table that the model reads with ("input"), predicts with ("output"), or "both". A tied model stays
            tied only with "both"; with one side the other keeps the table as it is.
        materialise: Change the whole table once instead of rows on the fly.

    Raises:
        InvalidArgument: The model has no output table to change.
    """
    reader, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None and side != "input":
        raise InvalidArgument(f"{type(model).__name__} has no output table to change")
    with ExitStack() as stack:
        if side in ("input", "both"):
            stack.enter_context(_replaced(reader, change) if materialise else _looked_up(reader, change))
        if side in ("output", "both") and head is not None:
            on_the_fly = not materialise and isinstance(change, LinearMap)
            stack.enter_context(_multiplied(head, change) if on_the_fly else _replaced(head, change))
        yield


def _table(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter), type(weight)
    return weight


def _looked_up(module: nn.Module, change: RowMap) -> AbstractContextManager[None]:
    """Change rows as the input table looks them up."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], result: Tensor) -> Tensor:
        ids = args[0]
        rows = change(_table(module)[ids.flatten()], ids.flatten()).view(*ids.shape, -1)
        # Gemma's embedding multiplies what it looks up by a number of its own.
        return (rows * getattr(module, "embed_scale", 1.0)).to(result.dtype)

    return hooked([Hook(module, hook)])


def _multiplied(module: nn.Module, change: LinearMap) -> AbstractContextManager[None]:
    """Change the hidden states that the output table is multiplied with."""

    def hook(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        hidden = args[0]
        return (change.transposed(hidden.reshape(-1, hidden.shape[-1])).view_as(hidden), *args[1:]), kwargs

    return hooked([Hook(module, hook, before=True)])


@contextmanager
def _replaced(module: nn.Module, change: RowMap) -> Generator[None]:
    """Put a changed copy of the table in its place."""
    original = _table(module)
    with torch.no_grad():
        ids = torch.arange(len(original), device=original.device)
        parts = [change(original[block], block) for block in ids.split(BLOCK_ROWS)]
    module.weight = nn.Parameter(torch.cat(parts), requires_grad=original.requires_grad)
    try:
        yield
    finally:
        module.weight = original
