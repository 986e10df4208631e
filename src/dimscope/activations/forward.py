"""One forward pass: hidden states handed on as the pass reaches them, logits by blocks. Nothing is kept here."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dimscope.activations.hooks import Hook, evaluating, hooked
from dimscope.activations.output_head import OutputHead, states_and_head
from dimscope.activations.sites import Site
from dimscope.activations.structure import input_states, output_states, run_stack, text_stack
from dimscope.checkpoints.model import input_device
from dimscope.errors import NonFiniteActivations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Consumer = Callable[[Site, Float[Tensor, "b t d"]], None]
LogitRows = Callable[[Int[Tensor, " r"], Float[Tensor, "r v"]], None]


def watched(sites: Sequence[Site], consume: Consumer) -> AbstractContextManager[None]:
    """Hand the hidden states of each site to `consume` in every forward pass, as long as the context is open."""

    def hook(site: Site) -> Hook:
        calls = count()

        def hand_on(states: Tensor) -> None:
            if next(calls) % site.n_calls == site.call:
                consume(site, site.select(states))

        if site.takes_input:
            return Hook(site.module, lambda m, args, kwargs: hand_on(input_states(args, kwargs)), before=True)
        return Hook(site.module, lambda m, args, kwargs, result: hand_on(output_states(result)))

    return hooked(hook(site) for site in sites)


@torch.no_grad()  # not inference_mode: what is collected must stay usable outside
def run_batch(
    model: "PreTrainedModel",
    ids: Int[Tensor, "b t"],
    *,
    mask: Bool[Tensor, "b t"] | None = None,
    sites: Sequence[Site] = (),
    consume: Consumer = lambda site, hidden: None,
    logits: LogitRows | None = None,
) -> None:
    """Run one forward pass in evaluation mode.

    Args:
        model: A model; one that predicts the next token where `logits` is passed.
        ids: b sequences of t token ids.
        mask: False at padding, which is on the right.
        sites: Where hidden states are read.
        consume: Called with each site and its hidden states, in the order of the stream.
        logits: Called with blocks of positions (indices into the flattened b x t) and their float32 logits, so that
            b x t x V numbers are never in memory.

    Raises:
        NonFiniteActivations: Logits are NaN or Inf.
        UnsupportedCheckpoint: The model's own logits are not its output table applied to its last hidden state.
    """
    device, stack = input_device(model), text_stack(model)
    options: dict[str, Any] = {} if mask is None else {"attention_mask": mask.to(device).long()}
    with evaluating(model), watched(sites, consume):
        if logits is None:
            run_stack(stack, ids.to(device), **options)
            return
        states, head = states_and_head(model, stack, ids.to(device), **options)
    kept = torch.arange(ids.numel()) if mask is None else torch.nonzero(mask.cpu().flatten()).squeeze(1)
    _finite_logits(head, states.flatten(0, 1), kept, logits)


@torch.no_grad()
def final_states(model: "PreTrainedModel", ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
    """Return the states after the final norm, which the output table is applied to. No logit is computed."""
    with evaluating(model):
        return output_states(run_stack(text_stack(model), ids.to(input_device(model))))


def _finite_logits(
    head: OutputHead, states: Float[Tensor, "n d"], positions: Int[Tensor, " m"], consume: LogitRows
) -> None:
    def checked(rows: Int[Tensor, " r"], block: Float[Tensor, "r v"]) -> None:
        if not bool(torch.isfinite(block.sum())):
            raise NonFiniteActivations(
                "NaN or Inf in the logits: the weights are damaged, or `dtype` is too narrow; try `dtype` float32"
            )
        consume(rows, block)

    head.logits_by_blocks(states, positions, checked)
