"""The residual stream of a running model, caught by hooks and handed on batch by batch: nothing is kept here.

A site is a place in the stream: the input of the first block, the output of every block, and the output of the final
norm. The list `hidden_states` of transformers has no name for the output of the last block before the final norm.
"""

import inspect
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dimscope.activations.hooks import evaluating
from dimscope.errors import InvalidArgument, NonFiniteActivations, UnsupportedCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FINAL_NORM = "after final norm"
LOGITS = 64 << 20  # bytes of logits that stand in memory at once,
ROWS = 256  # and positions: more would not multiply faster, and leave the cache


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the residual stream. Layer 0 is the input of the first block, i the output of block i, L + 1 the final norm's."""

    layer: int
    name: str
    module: nn.Module
    takes_input: bool = False


def find_sites(model: "PreTrainedModel") -> list[Site]:
    """All sites of a causal language model, in the order of the stream.

    Raises UnsupportedCheckpoint where the model has no plain list of blocks.
    """
    decoder = model.get_decoder()
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if len(lists) != 1 or not n_layers:
        raise UnsupportedCheckpoint(
            f"{type(model).__name__}: its blocks are not one list, so layers cannot be told apart"
        )
    blocks = list(lists[0])
    norm = _final_norm(decoder)
    last = f"block {n_layers}" + (", before final norm" if norm is not None else "")
    sites = [Site(0, "embeddings", blocks[0], takes_input=True)]
    sites += [Site(i, f"block {i}" if i < n_layers else last, block) for i, block in enumerate(blocks, 1)]
    return sites if norm is None else [*sites, Site(n_layers + 1, FINAL_NORM, norm)]


def parse_layers(layers: str | None, last: int) -> set[int] | None:
    """The numbers that a list such as "0,4:8,norm" names: layers, ranges (the end left out), emb and norm. None for all.

    `last` is the number of the final norm. Raises InvalidArgument for what is no such list, and for numbers beyond it.
    """
    if layers is None:
        return None
    words, chosen = {"emb": 0, "norm": last}, set()
    for part in layers.split(","):
        match = re.fullmatch(r"(\d+)(?::(\d+))?", part.strip())
        if match is None and part.strip() not in words:
            raise InvalidArgument(f"`layers` must be a list such as 0,4:8,norm, got {part!r} in it")
        first = words[part.strip()] if match is None else int(match[1])
        end = int(match[2]) if match and match[2] else first + 1
        chosen |= set(range(first, min(end, max(first, last + 1) + 1)))  # one too many tells as much as a million
    if beyond := sorted(layer for layer in chosen if layer > last):
        raise InvalidArgument(f"there is no layer {beyond[0]}: this model has 0 (embeddings) to {last} ({FINAL_NORM})")
    if not chosen:
        raise InvalidArgument(f"`layers` {layers} selects no layer; the end of a range is excluded")
    return chosen


def select_sites(sites: Sequence[Site], layers: str | None) -> list[Site]:
    """The sites that a list of layers names, see `parse_layers`; all for None.

    Raises InvalidArgument for what is no such list, and for a layer that does not exist.
    """
    known = {site.layer: site for site in sites}
    n_blocks = max(layer for layer, site in known.items() if site.name != FINAL_NORM)
    chosen = parse_layers(layers, n_blocks + 1)
    if chosen is None:
        return list(sites)
    if missing := sorted(chosen - set(known)):  # a model without a final norm
        raise InvalidArgument(
            f"there is no layer {missing[0]}: this model has 0 (embeddings) to {max(known)} ({sites[-1].name})"
        )
    return [known[layer] for layer in sorted(chosen)]


def _final_norm(decoder: nn.Module) -> nn.Module | None:
    """The norm beside the blocks; a norm of the embeddings (BLOOM) is not it."""
    named = [(n.lower(), m) for n, m in decoder.named_children() if m is not None]
    norms = [m for n, m in named if ("norm" in n or n.startswith("ln")) and "embed" not in n]
    return norms[-1] if norms else None


@torch.no_grad()
def first_norm(model: "PreTrainedModel") -> nn.Module | None:
    """The norm through which the first block reads its input; None where it reads it as it is (post-norm families)."""
    block = find_sites(model)[0].module
    entered: list[Tensor] = []
    found: list[nn.Module] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    def met(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and torch.is_tensor(args[0]) and args[0] is entered[-1]:
            found.append(module)

    norms = [m for m in block.modules() if "norm" in type(m).__name__.lower()]
    handles = [
        block.register_forward_pre_hook(begin, with_kwargs=True),
        *(m.register_forward_pre_hook(met) for m in norms),
    ]
    try:
        with evaluating(model):
            ids = torch.zeros(1, 2, dtype=torch.int64, device=input_device(model))
            model.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


Consumer = Callable[[Site, Float[Tensor, "b t d"]], None]


@contextmanager
def watched(sites: Sequence[Site], consume: Consumer) -> Generator[None]:
    """While open, every forward pass hands the hidden states of each site to `consume`; the hooks are gone afterwards."""

    def before(site: Site) -> Callable[..., None]:
        return lambda module, args, kwargs: consume(site, (args[0] if args else kwargs["hidden_states"]).detach())

    def after(site: Site) -> Callable[..., None]:
        return lambda module, args, result: consume(site, _tensor(result))

    handles = []
    try:
        for site in sites:
            if site.takes_input:
                handles.append(site.module.register_forward_pre_hook(before(site), with_kwargs=True))
            else:
                handles.append(site.module.register_forward_hook(after(site)))
        yield
    finally:
        for handle in handles:
            handle.remove()


LogitRows = Callable[[Int[Tensor, " r"], Float[Tensor, "r v"]], None]


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
    """One forward pass. `consume` gets the hidden states of each site as the pass reaches it; `logits` gets blocks of
    positions (indices into the flattened b x t) with their float32 logits, so that b x t x V never stands in memory.

    `mask` is False at padding. Raises NonFiniteActivations where logits are NaN or Inf, UnsupportedCheckpoint where the
    model's own logits are not its output embedding applied to its last hidden state.
    """
    device = input_device(model)
    last: list[Tensor] = []
    options: dict[str, Any] = {"use_cache": False}
    if mask is not None:
        options["attention_mask"] = mask.to(device).long()
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    handle = model.get_decoder().register_forward_hook(lambda module, args, result: last.append(_tensor(result)))
    try:
        with evaluating(model), watched(sites, consume):
            result = model(input_ids=ids.to(device), **options)
    finally:
        handle.remove()
    if logits is not None:
        _logits_by_blocks(model, last[0], result.logits[:, -1], mask, logits)


@torch.no_grad()
def final_states(model: "PreTrainedModel", ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
    """What the output table is multiplied with: the states after the final norm, without a logit being computed."""
    with evaluating(model):
        return _tensor(model.get_decoder()(input_ids=ids.to(input_device(model)), use_cache=False))


def position_blocks(positions: Int[Tensor, " n"], vocab_size: int) -> Sequence[Int[Tensor, " r"]]:
    """The positions in blocks whose float32 logits may stand in memory at once."""
    return positions.split(min(ROWS, max(1, LOGITS // (4 * vocab_size))))


def input_device(model: "PreTrainedModel") -> torch.device:
    """Where the model wants its token ids; accelerate may have its weights elsewhere, or not in memory at all."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    placed = getattr(hook, "execution_device", None)
    return torch.device(placed) if placed is not None else next(embedding.parameters()).device


def _tensor(result: Any) -> Tensor:
    """The hidden states of what a module returns: alone, or first of a tuple or a ModelOutput."""
    return (result if torch.is_tensor(result) else result[0]).detach()


def _logits_by_blocks(
    model: "PreTrainedModel",
    last: Float[Tensor, "b t d"],
    own: Float[Tensor, "b v"],
    mask: Bool[Tensor, "b t"] | None,
    consume: LogitRows,
) -> None:
    b, t, d = last.shape
    transform = logit_transform(model)
    head = model.get_output_embeddings()
    flat = last.reshape(b * t, d)
    ours = transform(head(last[:, -1]).float())
    own = own.to(ours.device)
    # bfloat16 rounds products of other shapes otherwise; a forgotten scale or bias is off by far more.
    if bool(torch.isfinite(own).all()) and not torch.allclose(
        ours, own.float(), rtol=2e-2, atol=2e-2 * float(own.abs().max())
    ):
        raise UnsupportedCheckpoint(
            f"{type(model).__name__}: its logits are not its output embedding applied to the last hidden state; pass `logits`=False"
        )
    kept = torch.arange(b * t) if mask is None else torch.nonzero(mask.cpu().flatten()).squeeze(1)
    for rows in position_blocks(kept, own.shape[-1]):
        block = transform(head(flat[rows.to(flat.device)]).float())
        if not bool(torch.isfinite(block.sum())):
            raise NonFiniteActivations(
                "NaN or Inf in the logits: the weights are damaged, or `dtype` is too narrow; try `dtype` float32"
            )
        consume(rows, block)


def logit_transform(model: "PreTrainedModel") -> Callable[[Tensor], Tensor]:
    """What some families do to logits after the output embedding: Cohere and Granite scale, Gemma 2 caps them smoothly."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        return lambda logits: torch.tanh(logits * scale / cap) * cap
    return (lambda logits: logits) if scale == 1 else (lambda logits: logits * scale)
