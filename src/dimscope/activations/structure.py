"""What a model is made of, read from one run on a few tokens: the modules that its residual stream passes through.

Structure is found by identity and not by name: a block is what takes the stream in and gives it out, the final norm is
the module whose output is the last hidden state. Nothing here knows a family.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dimscope.activations.hooks import Hook, evaluating, hooked
from dimscope.checkpoints.model import is_out_of_memory, out_of_memory
from dimscope.errors import UnsupportedCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE = (2, 3)  # sequences and tokens of the run: the two differ, so that axes cannot be mistaken for each other


@dataclass(slots=True, eq=False)
class Call:
    """One call of a module in a run: the module that called it, and the first tensors that it took in and gave out."""

    module: nn.Module
    parent: "Call | None"
    input: Tensor | None
    output: Tensor | None = field(default=None, repr=False)

    def ancestors(self) -> Iterator["Call"]:
        """Yield the calls that this one is part of, the innermost first."""
        call = self.parent
        while call is not None:
            yield call
            call = call.parent


def text_stack(model: "PreTrainedModel") -> nn.Module:
    """Return the module that turns token ids into the last hidden states.

    That is the decoder of a model that generates, also within a multimodal one, the encoder of an encoder-decoder, and
    otherwise the model without its head.
    """
    from transformers import PreTrainedModel

    if model.config.is_encoder_decoder:
        return model.get_encoder()
    stack: Any = model.get_decoder()
    if stack is None or isinstance(stack, nn.Linear | nn.Embedding):  # transformers goes by names
        stack = model.base_model
    while isinstance(stack, PreTrainedModel) and stack.get_output_embeddings() is not None:
        inner = stack.base_model if stack.base_model is not stack else _body(stack)
        if inner is None:
            break
        stack = inner
    return stack


def _body(model: "PreTrainedModel") -> nn.Module | None:
    """Return the part of a model with a head that holds the input table."""
    table = model.get_input_embeddings()
    return next((m for m in model.children() if m is not table and any(part is table for part in m.modules())), None)


def run_stack(stack: nn.Module, ids: Int[Tensor, "b t"], **options: Any) -> Any:
    """Run a text stack on token ids, without a cache."""
    return stack(input_ids=ids, **no_cache(stack), **options)


def no_cache(module: nn.Module) -> dict[str, bool]:
    """Return the argument that switches the cache of keys and values off, where a module takes one."""
    return {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}


@torch.no_grad()
def trace(stack: nn.Module, device: torch.device, vocab_size: int) -> list[Call]:
    """Run a text stack on a few tokens, and return the calls of its modules in the order in which they ended.

    Modules within the entries of a list are left out, unless they are entries of a list themselves: they could be no
    block, nor the final norm. The last call is that of the stack. The tensors are kept, so that equal addresses mean
    equal tensors.

    Raises:
        UnsupportedCheckpoint: transformers cannot run it on text alone.
    """
    calls: list[Call] = []
    running: list[Call] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(Call(module, running[-1] if running else None, first_states(args, kwargs)))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        call = running.pop()
        call.output = first_tensor(result)
        calls.append(call)

    n_tokens = PROBE[0] * PROBE[1]
    ids = (torch.arange(n_tokens, device=device) % vocab_size).view(PROBE)
    modules = list(_traced(stack))
    with evaluating(stack), hooked([Hook(m, enter, before=True) for m in modules] + [Hook(m, leave) for m in modules]):
        try:
            run_stack(stack, ids)
        except (RuntimeError, MemoryError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as e:
            if is_out_of_memory(e):
                raise out_of_memory(type(stack).__name__) from e
            reason = " ".join(str(e).split())[:160]
            raise UnsupportedCheckpoint(
                f"{type(stack).__name__}: transformers cannot run it on token ids alone ({reason})"
            ) from e
    return calls


def _traced(stack: nn.Module) -> Iterator[nn.Module]:
    entries = _entries(stack)
    below = {id(part) for m in stack.modules() if id(m) in entries for part in m.modules() if part is not m}
    return (m for m in stack.modules() if id(m) in entries or id(m) not in below)


def _entries(stack: nn.Module) -> dict[int, int]:
    """Return the list of modules that each entry of one is in, both by their identity."""
    return {id(child): id(m) for m in stack.modules() if isinstance(m, nn.ModuleList) for child in m.children()}


def first_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the hidden states among the arguments of a module: the first floating-point tensor of three axes or more."""
    named = [kwargs[name] for name in ("hidden_states",) if name in kwargs]
    for value in (*args, *named, *kwargs.values()):
        if torch.is_tensor(value) and value.is_floating_point() and value.ndim >= 3:
            return value
    return None


def first_tensor(result: Any) -> Tensor | None:
    """Return the first of what a module returns: alone, or in a tuple or ModelOutput."""
    if not torch.is_tensor(result):
        try:
            result = result[0]
        except (TypeError, KeyError, IndexError):
            return None
    return result if torch.is_tensor(result) else None


def input_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states among the arguments of a block or norm."""
    states = first_states(args, kwargs)
    assert states is not None
    return states


def output_states(result: Any) -> Tensor:
    """Return the hidden states among what a module returns: alone, or first of a tuple or a ModelOutput."""
    states = first_tensor(result)
    assert states is not None
    return states.detach()


def block_calls(calls: list[Call]) -> list[Call]:
    """Return the calls of the blocks in their order: entries of a list of modules that take the stream in and give it out.

    Raises:
        UnsupportedCheckpoint: There are none, or they are parts of blocks that take turns.
    """
    stack = calls[-1].module
    container = _entries(stack)
    entries = [call for call in calls if id(call.module) in container]
    stream = {id(call) for call in entries if _is_stream(call)}
    blocks = _chained([c for c in entries if id(c) in stream and not any(id(a) in stream for a in c.ancestors())])
    name = type(stack).__name__
    if not blocks:
        shapes = [tuple(c.output.shape) for c in entries if c.output is not None and c.output.ndim >= 3]
        reason = f": states of shape {shapes[0]} come out for {PROBE[0]} x {PROBE[1]} tokens" if shapes else ""
        raise UnsupportedCheckpoint(f"{name}: it has no list of blocks that the stream passes through{reason}")
    order = [container[id(c.module)] for c in blocks]
    changes = sum(one != other for one, other in pairwise(order))
    if changes >= len(set(order)):
        raise UnsupportedCheckpoint(
            f"{name}: its blocks are no modules but parts that take turns, so layers cannot be separated"
        )
    return blocks


def _chained(entries: list[Call]) -> list[Call]:
    """Return the calls of which one takes in what another gives out; all where none does."""
    linked: set[int] = set()
    for one, other in pairwise(entries):
        if same(one.output, other.input):
            linked |= {id(one), id(other)}
    return [c for c in entries if id(c) in linked] if linked else entries


def _is_stream(call: Call) -> bool:
    """Whether a module takes in and gives out states of every position: batch x positions x width, or copies of that."""
    before, after = call.input, call.output
    if before is None or after is None or before.shape != after.shape:
        return False
    return before.shape[:-1] == PROBE or (before.ndim == 4 and before.shape[1:-1] == PROBE)


def final_norm_call(calls: list[Call], blocks: list[Call]) -> Call | None:
    """Return the call of the norm after the blocks whose output is the last hidden state, or what that is projected from."""
    inside = {id(b) for b in blocks}
    around = {id(a) for b in blocks for a in b.ancestors()}
    outside = [c for c in calls if id(c) not in inside | around and not any(id(a) in inside for a in c.ancestors())]
    state = calls[-1].output
    while state is not None and not same(state, blocks[-1].output):
        producer = next((c for c in reversed(outside) if same(c.output, state) and not same(c.input, state)), None)
        if producer is None or producer.input is None:
            return None
        if producer.input.shape == state.shape and all(p.ndim < 2 for p in producer.module.parameters()):
            return producer
        state = producer.input
    return None


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same numbers in memory."""
    return one is not None and other is not None and one.shape == other.shape and one.data_ptr() == other.data_ptr()
