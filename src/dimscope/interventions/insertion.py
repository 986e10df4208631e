"""A perturbation put into a running model, and taken out again without a trace."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dimscope.errors import InvalidArgument
from dimscope.interventions.maps import LinearMap, RowMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Side = Literal["input", "output", "both"]
BLOCK = 8192  # rows changed at once where a table is materialised


@contextmanager
def perturbed(
    model: PreTrainedModel, change: RowMap, side: Side = "input", *, materialise: bool = False
) -> Generator[None]:
    """While open, the model reads (`input`), predicts with (`output`), or does both with a changed table.

    No weight is touched: rows are changed as they are looked up, T x d work a pass, and the output table is changed by
    changing what it is multiplied with, which a linear map allows. Other maps of the output side, and `materialise`,
    put a changed copy of the table in its place, V x d work and memory once. A tied model stays tied only with
    "both"; with one side the other keeps the table as it is. The model is as before afterwards, bit for bit, also after
    an exception.

    A shift of the output table is not put in where rows are not materialised: it adds the same to all logits.
    Raises InvalidArgument for an output table where the model has none.
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


@contextmanager
def _hooked(register: Callable[[], Any]) -> Generator[None]:
    handle = register()
    try:
        yield
    finally:
        handle.remove()


def _table(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter), type(weight)
    return weight


def _looked_up(module: nn.Module, change: RowMap) -> AbstractContextManager[None]:
    def changed(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
        ids = args[0]
        rows = change(_table(module)[ids.flatten()], ids.flatten()).view(*ids.shape, -1)
        # Gemma's embedding multiplies what it looks up by a number of its own.
        return (rows * getattr(module, "embed_scale", 1.0)).to(result.dtype)

    return _hooked(lambda: module.register_forward_hook(changed))


def _multiplied(module: nn.Module, change: LinearMap) -> AbstractContextManager[None]:
    def changed(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (change.transposed(hidden.reshape(-1, hidden.shape[-1])).view_as(hidden), *args[1:])

    return _hooked(lambda: module.register_forward_pre_hook(changed))


@contextmanager
def _replaced(module: nn.Module, change: RowMap) -> Generator[None]:
    original = _table(module)
    with torch.no_grad():
        ids = torch.arange(len(original), device=original.device)
        parts = [change(original[block], block) for block in ids.split(BLOCK)]
    module.weight = nn.Parameter(torch.cat(parts), requires_grad=original.requires_grad)
    try:
        yield
    finally:
        module.weight = original
