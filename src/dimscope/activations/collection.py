"""What is kept of a pass over a text: sums of every site, one bounded sample of rows, sums over the predictions.

All of it adds up: collections of two parts of a text merge into the collection of both, and a collection from disk is
resumed as if nothing had happened.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dimscope.activations.forward import Consumer, run_batch
from dimscope.activations.predictions import Predictions
from dimscope.activations.reservoir import Reservoir
from dimscope.activations.site_sums import KINDS, SiteSums
from dimscope.activations.sites import Site
from dimscope.activations.state import is_current, load_state, save_state
from dimscope.errors import NonFiniteActivations
from dimscope.texts.windows import Window, require_rows
from dimscope.vectors.moments import Accumulator

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class Collection:
    """All that is kept of the windows so far.

    Attributes:
        sites: Sums by layer.
        reservoir: Sampled rows of all layers.
        predictions: Sums over the predictions.
        seen: Which tokens occurred at all.
        unique: Number of different tokens in each window.
        n_tokens: Tokens of all windows.
        n_batches: Batches of windows.
        complete: No windows are left.
    """

    sites: dict[int, SiteSums]
    reservoir: Reservoir
    predictions: Predictions
    seen: Bool[Tensor, " v"] = field(repr=False)
    unique: list[int] = field(default_factory=list, repr=False)
    n_tokens: int = 0
    n_batches: int = 0
    complete: bool = False

    @property
    def n_windows(self) -> int:
        """Return the number of windows."""
        return len(self.unique)

    def merge(self, other: "Collection") -> None:
        """Add what was collected from other windows of the same text."""
        for layer, sums in other.sites.items():
            self.sites[layer].merge(sums)
        self.reservoir.merge(other.reservoir)
        self.predictions.merge(other.predictions)
        self.unique += other.unique
        self.seen = self.seen | other.seen
        self.n_tokens += other.n_tokens
        self.n_batches += other.n_batches
        self.complete = self.complete and other.complete


def empty_collection(model: "PreTrainedModel", sites: Sequence[Site], reservoir: int, seed: int) -> Collection:
    """Return a collection of no windows.

    Args:
        model: The model.
        sites: Sites whose states are collected.
        reservoir: Rows of the sample, at most.
        seed: Of the sample.
    """
    output = model.get_output_embeddings()
    n_input, n_output = _n_rows(model.get_input_embeddings()), 0 if output is None else _n_rows(output)
    sums = {site.layer: SiteSums(site.name, site.dim) for site in sites}
    return Collection(sums, Reservoir(reservoir, seed), Predictions(n_output), torch.zeros(n_input, dtype=torch.bool))


def _n_rows(table: torch.nn.Module) -> int:
    return next(table.parameters()).shape[0]


def collect(
    model: "PreTrainedModel", windows: Sequence[Window], sites: Sequence[Site], into: Collection, *, logits: bool = True
) -> None:
    """Run windows through the model as one batch, and add what they show to a collection.

    Args:
        model: A causal language model.
        windows: Windows, padded on the right where they differ in length; nothing is collected at padding.
        sites: Where hidden states are read.
        into: The collection to add to.
        logits: Whether predictions are collected.

    Raises:
        NonFiniteActivations: Hidden states or logits are NaN or Inf; names the site.
        InvalidArgument: The model has no rows for some ids.
    """
    lengths = torch.tensor([len(w.ids) for w in windows])
    ids, ends = (pad_sequence([getattr(w, name) for w in windows], batch_first=True) for name in ("ids", "ends"))
    require_rows(int(ids.max()), len(into.seen))
    mask = torch.arange(ids.shape[1]) < lengths[:, None] if bool((lengths != ids.shape[1]).any()) else None
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    targets, flat_real = next_tokens(windows, ids).flatten(), real.flatten()

    def add_predictions(rows: Int[Tensor, " r"], block: Float[Tensor, "r v"]) -> None:
        numbers = torch.tensor([w.index for w in windows])[rows // ids.shape[1]]
        into.predictions.add(block, targets[rows].to(block.device), flat_real[rows].to(block.device), numbers)

    sampled = into.reservoir.candidates(ends, ids, [w.index for w in windows], mask)
    consume = _site_consumer(into, windows, mask, sampled)
    run_batch(model, ids, mask=mask, sites=sites, consume=consume, logits=add_predictions if logits else None)
    into.reservoir.prune()
    for window in windows if logits else ():
        into.predictions.add_bytes(window.index, window.predicted_bytes)
    into.unique += [w.unique_tokens for w in windows]
    into.seen[ids[real]] = True
    into.n_tokens += int(lengths.sum())
    into.n_batches += 1


def _site_consumer(
    into: Collection, windows: Sequence[Window], mask: Bool[Tensor, "b t"] | None, sampled: Int[Tensor, " c"]
) -> Consumer:
    """Return what adds the states of a site, and those at the sampled positions, to a collection."""

    def consume(site: Site, hidden: Float[Tensor, "b t d"]) -> None:
        try:
            into.sites[site.layer].add(hidden, mask)
        except NonFiniteActivations as e:
            first, last = windows[0].index, windows[-1].index
            span = f"windows {first} to {last}" if len(windows) > 1 else f"window {first}"
            raise NonFiniteActivations(
                f"NaN or Inf in the hidden states at layer {site.layer} ({site.name}), {span}: "
                "the weights are damaged, or `dtype` is too narrow; try `dtype` float32"
            ) from e
        into.reservoir.take(site.layer, hidden, sampled)

    return consume


def next_tokens(windows: Sequence[Window], ids: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Return the token that follows each position, -1 where none does: at the end, and before a token of the prefix."""
    targets = torch.full_like(ids, -1)
    targets[:, :-1] = ids[:, 1:]
    for row, window in zip(targets, windows, strict=True):
        row[: max(window.n_prefix - 1, 0)] = -1
        row[len(window.ids) - 1 :] = -1
    return targets


def save_collection(collection: Collection, path: Path) -> None:
    """Write a collection as one file, whole or not at all."""
    save_state(path, dict(_tensors(collection)))


def _tensors(collection: Collection) -> Iterator[tuple[str, Tensor]]:
    for layer, sums in collection.sites.items():
        yield f"site.{layer}.name", torch.tensor(list(sums.name.encode()), dtype=torch.uint8)
        yield f"site.{layer}.numbers", torch.tensor([sums.dim, sums.unit_count, sums.n_massive])
        yield f"site.{layer}.largest", torch.tensor(sums.largest, dtype=torch.float64)
        if sums.unit_total is not None:
            yield f"site.{layer}.unit_total", sums.unit_total.cpu()
        for kind, part in sums.parts.items():
            yield from _part_tensors(f"site.{layer}.part.{KINDS.index(kind)}", part)
    yield from collection.reservoir.tensors()
    yield from collection.predictions.tensors()
    yield "unique", torch.tensor(collection.unique, dtype=torch.int64)
    yield "seen", collection.seen
    yield "numbers", torch.tensor([collection.n_tokens, collection.n_batches, collection.complete])


def _part_tensors(name: str, part: Accumulator) -> Iterator[tuple[str, Tensor]]:
    if part.upper is None or part.total is None:
        yield f"{name}.rows", torch.cat([rows.cpu() for rows in part.pieces])
    else:
        yield f"{name}.upper", part.upper.cpu()
        yield f"{name}.total", part.total.cpu()
        yield f"{name}.count", torch.tensor(part.count)


def is_complete(path: Path) -> bool:
    """Whether a file has the collection of all windows, by the present definition."""
    from safetensors import safe_open

    if not is_current(path):
        return False
    with safe_open(path, "pt") as tensors:
        return bool(tensors.get_tensor("numbers")[-1])


def load_collection(path: Path) -> Collection | None:
    """Return what `save_collection` wrote, in the memory of the CPU; None where that is nothing, or of another definition."""
    tensors = load_state(path)
    if tensors is None:
        return None
    layers = sorted(int(name.split(".")[1]) for name in tensors if re.fullmatch(r"site\.\d+\.numbers", name))
    n_tokens, n_batches, complete = tensors["numbers"].tolist()
    return Collection(
        {layer: _site(tensors, f"site.{layer}") for layer in layers},
        Reservoir.from_tensors(tensors),
        Predictions.from_tensors(tensors),
        tensors["seen"],
        tensors["unique"].tolist(),
        n_tokens,
        n_batches,
        bool(complete),
    )


def _site(tensors: Mapping[str, Tensor], name: str) -> SiteSums:
    dim, unit_count, n_massive = tensors[f"{name}.numbers"].tolist()
    sums = SiteSums(
        bytes(tensors[f"{name}.name"].tolist()).decode(),
        dim,
        unit_total=tensors.get(f"{name}.unit_total"),
        unit_count=unit_count,
        n_massive=n_massive,
        largest=float(tensors[f"{name}.largest"]),
    )
    for number, kind in enumerate(KINDS):
        part = f"{name}.part.{number}"
        if f"{part}.upper" in tensors:
            total, upper = tensors[f"{part}.total"], tensors[f"{part}.upper"]
            sums.parts[kind] = Accumulator(dim, [], int(tensors[f"{part}.count"]), total, upper)
        elif f"{part}.rows" in tensors:
            rows = tensors[f"{part}.rows"]
            sums.parts[kind] = Accumulator(dim, [rows], len(rows))
    return sums
