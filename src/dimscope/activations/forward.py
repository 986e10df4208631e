"""One forward pass: hidden states handed on as the pass reaches them, logits by blocks. Nothing is kept here."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dimscope.activations.hooks import Hook, evaluating, hooked
from dimscope.activations.output_head import OutputHead, output_head
from dimscope.activations.sites import Site, input_states, output_states
from dimscope.errors import NonFiniteActivations, UnsupportedCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Consumer = Callable[[Site, Float[Tensor, "b t d"]], None]
LogitRows = Callable[[Int[Tensor, " r"], Float[Tensor, "r v"]], None]


def watched(sites: Sequence[Site], consume: Consumer) -> AbstractContextManager[None]:
    """Hand the hidden states of each site to `consume` in every forward pass, as long as the context is open."""

    def hook(site: Site) -> Hook:
        if site.takes_input:
            return Hook(
                site.module, lambda m, args, kwargs: consume(site, input_states(args, kwargs).detach()), before=True
            )
        return Hook(site.module, lambda m, args, kwargs, result: consume(site, output_states(result)))

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
        model: A causal language model.
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
    device = input_device(model)
    options: dict[str, Any] = {"use_cache": False}
    if mask is not None:
        options["attention_mask"] = mask.to(device).long()
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    last: list[Tensor] = []
    catch = Hook(model.get_decoder(), lambda m, args, kwargs, result: last.append(output_states(result)))
    with evaluating(model), hooked([catch]), watched(sites, consume):
        result = model(input_ids=ids.to(device), **options)
    if logits is None:
        return
    head = output_head(model)
    _require_own_logits(model, head.logits(last[0][:, -1]), result.logits[:, -1])
    kept = torch.arange(ids.numel()) if mask is None else torch.nonzero(mask.cpu().flatten()).squeeze(1)
    _finite_logits(head, last[0].flatten(0, 1), kept, logits)


@torch.no_grad()
def final_states(model: "PreTrainedModel", ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
    """Return the states after the final norm, which the output table is applied to. No logit is computed."""
    with evaluating(model):
        return output_states(model.get_decoder()(input_ids=ids.to(input_device(model)), use_cache=False))


def input_device(model: "PreTrainedModel") -> torch.device:
    """Return the device for token ids; accelerate may have the weights elsewhere, or not in memory at all."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else next(embedding.parameters()).device


def _require_own_logits(model: "PreTrainedModel", computed: Float[Tensor, "b v"], own: Float[Tensor, "b v"]) -> None:
    """Refuse a model whose logits at the last position are not those that its output head computes."""
    own = own.to(computed.device)
    # bfloat16 rounds products of other shapes otherwise; a missing scale or bias is off by far more.
    if bool(torch.isfinite(own).all()) and not torch.allclose(
        computed, own.float(), rtol=2e-2, atol=2e-2 * float(own.abs().max())
    ):
        raise UnsupportedCheckpoint(
            f"{type(model).__name__}: its logits are not its output embedding applied to the last hidden state; pass `logits`=False"
        )


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
