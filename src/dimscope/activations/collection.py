"""What is kept of a pass over a text: moments of every site, one bounded reservoir of rows, sums over the predictions.

All of it adds up: collections of two parts of a text merge into the collection of both, and a collection on disk is
gone on with as if nothing had happened.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dimscope.activations.forward import run_batch
from dimscope.activations.predictions import Predictions
from dimscope.activations.reservoir import Reservoir
from dimscope.activations.sites import Site
from dimscope.errors import NonFiniteActivations
from dimscope.storage import write_tensors
from dimscope.texts.windows import Window, require_rows
from dimscope.vectors.moments import Accumulator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASSIVE = 100.0  # Sun et al. 2024: a massive activation is larger than this,
MASSIVE_RATIO = 1000.0  # and than this times the median of its window
Kind = tuple[bool, bool]  # of rows: the first of their window, with a massive activation
KINDS: tuple[Kind, ...] = ((False, False), (False, True), (True, False), (True, True))


@dataclass(slots=True)
class SiteSums:
    """One site: its rows by kind, the sum of its unit rows, and its massive activations."""

    name: str
    dim: int
    parts: dict[Kind, Accumulator] = field(default_factory=dict)
    unit_total: Float[Tensor, " d"] | None = None
    unit_count: int = 0  # rows that are not zero
    n_massive: int = 0  # activations, not tokens
    largest: float = 0.0

    @property
    def count(self) -> int:
        """Rows in all."""
        return sum(part.count for part in self.parts.values())

    def add(self, hidden: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | None) -> None:
        """The hidden states of a batch; `mask` is False at padding. Raises NonFiniteActivations."""
        hidden = hidden.float().cpu() if hidden.device.type == "mps" else hidden.float()  # no float64 there
        first = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        first[:, 0] = True
        kept = None if mask is None else mask.to(hidden.device)
        massive = self._massive(hidden, kept)
        rows, first, massive = (x.flatten(0, 1) if kept is None else x[kept] for x in (hidden, first, massive))
        exact = rows.double()
        norms = exact.norm(dim=1)
        if not bool(torch.isfinite(norms).all()):
            raise NonFiniteActivations("the hidden states hold NaN or Inf")
        unit_total = torch.where(norms > 0, 1 / norms, 0.0) @ exact
        self.unit_total = unit_total if self.unit_total is None else self.unit_total.to(exact.device) + unit_total
        self.unit_count += int((norms > 0).sum())
        for kind in KINDS:
            chosen = (first == kind[0]) & (massive == kind[1])
            if bool(chosen.any()):
                self.part(kind).add(rows[chosen])

    def part(self, kind: Kind) -> Accumulator:
        """The rows of a kind."""
        return self.parts.setdefault(kind, Accumulator(self.dim))

    def _massive(self, hidden: Float[Tensor, "b t d"], kept: Bool[Tensor, "b t"] | None) -> Bool[Tensor, "b t"]:
        """Which tokens hold a massive activation; a median is taken only of windows that have one."""
        sizes = hidden.abs()
        sizes = sizes if kept is None else sizes.masked_fill(~kept[:, :, None], 0)
        peaks = sizes.amax(dim=2)
        self.largest = max(self.largest, float(peaks.max()))
        massive = torch.zeros_like(peaks, dtype=torch.bool)
        for w in torch.nonzero((peaks > MASSIVE).any(dim=1)).squeeze(1).tolist():
            real = sizes[w] if kept is None else sizes[w][kept[w]]
            half = (real.numel() + 1) // 2
            # The peak is more than 1,000 medians where half of all numbers lie below a thousandth of it: cheaper than a median.
            if int((real * MASSIVE_RATIO < peaks[w].max()).sum()) < half:
                continue
            limit = max(MASSIVE, MASSIVE_RATIO * float(real.flatten().kthvalue(half).values))
            massive[w] = peaks[w] > limit
            self.n_massive += int((real > limit).sum())
        return massive

    def merge(self, other: "SiteSums") -> None:
        """Takes in the rows of another part of the text."""
        for kind, accumulator in other.parts.items():
            self.part(kind).merge(accumulator)
        if other.unit_total is not None:
            own = self.unit_total
            self.unit_total = other.unit_total if own is None else own + other.unit_total.to(own.device)
        self.unit_count += other.unit_count
        self.n_massive += other.n_massive
        self.largest = max(self.largest, other.largest)


@dataclass(slots=True)
class Collection:
    """All that is kept of the windows seen so far."""

    sites: dict[int, SiteSums]  # by layer
    reservoir: Reservoir
    predictions: Predictions
    seen: Bool[Tensor, " v"]  # which tokens occurred at all
    unique: list[int] = field(default_factory=list)  # different tokens in each window
    n_tokens: int = 0
    n_batches: int = 0
    complete: bool = False  # no windows are left

    @property
    def n_windows(self) -> int:
        return len(self.unique)

    def merge(self, other: "Collection") -> None:
        """Takes in what was collected from other windows of the same text."""
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
    """Nothing collected yet, for a model and its sites, with a reservoir of so many rows."""
    dim = model.config.get_text_config().hidden_size
    n_input, n_output = (_n_rows(table) for table in (model.get_input_embeddings(), model.get_output_embeddings()))
    sums = {site.layer: SiteSums(site.name, dim) for site in sites}
    return Collection(sums, Reservoir(reservoir, seed), Predictions(n_output), torch.zeros(n_input, dtype=torch.bool))


def _n_rows(table: torch.nn.Module) -> int:
    return next(table.parameters()).shape[0]


def collect(
    model: "PreTrainedModel", windows: Sequence[Window], sites: Sequence[Site], into: Collection, *, logits: bool = True
) -> None:
    """Runs windows through the model as one batch, and adds what they show to the collection.

    Windows may differ in length: they are padded on the right, and nothing is collected at padding.
    Raises NonFiniteActivations, naming the site; InvalidArgument for ids that the model has no rows for.
    """
    lengths = torch.tensor([len(w.ids) for w in windows])
    ids, ends = (pad_sequence([getattr(w, name) for w in windows], batch_first=True) for name in ("ids", "ends"))
    require_rows(int(ids.max()), len(into.seen))
    mask = torch.arange(ids.shape[1]) < lengths[:, None] if bool((lengths != ids.shape[1]).any()) else None
    places = into.reservoir.candidates(ends, mask)

    def consume(site: Site, hidden: Tensor) -> None:
        try:
            into.sites[site.layer].add(hidden, mask)
        except NonFiniteActivations as e:
            span = (
                f"windows {windows[0].index} to {windows[-1].index}"
                if len(windows) > 1
                else f"window {windows[0].index}"
            )
            raise NonFiniteActivations(
                f"NaN or Inf in the hidden states at layer {site.layer} ({site.name}), {span}: "
                "the weights are damaged, or `dtype` is too narrow; try `dtype` float32"
            ) from e
        into.reservoir.take(site.layer, hidden, places)

    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    targets, flat_kept = next_tokens(windows, ids).flatten(), kept.flatten()

    def predicted(rows: Tensor, block: Tensor) -> None:
        into.predictions.add(block, targets[rows].to(block.device), flat_kept[rows].to(block.device))

    run_batch(model, ids, mask=mask, sites=sites, consume=consume, logits=predicted if logits else None)
    into.reservoir.prune()
    into.predictions.n_bytes += sum(w.predicted_bytes for w in windows) if logits else 0
    into.unique += [w.unique_tokens for w in windows]
    into.seen[ids[kept]] = True
    into.n_tokens += int(lengths.sum())
    into.n_batches += 1


def next_tokens(windows: Sequence[Window], ids: Tensor) -> Tensor:
    """The token that follows each position, -1 where none does: at the end, and where a token of the prefix follows."""
    targets = torch.full_like(ids, -1)
    targets[:, :-1] = ids[:, 1:]
    for row, window in zip(targets, windows, strict=True):
        row[: max(window.n_prefix - 1, 0)] = -1
        row[len(window.ids) - 1 :] = -1
    return targets


def save_collection(of: Collection, path: Path) -> None:
    """A collection as one safetensors file, whole or not at all."""
    write_tensors(path, dict(_tensors(of)))


def _tensors(of: Collection) -> Iterator[tuple[str, Tensor]]:
    for layer, sums in of.sites.items():
        yield f"site.{layer}.name", torch.tensor(list(sums.name.encode()), dtype=torch.uint8)
        yield f"site.{layer}.numbers", torch.tensor([sums.dim, sums.unit_count, sums.n_massive])
        yield f"site.{layer}.largest", torch.tensor(sums.largest, dtype=torch.float64)
        if sums.unit_total is not None:
            yield f"site.{layer}.unit_total", sums.unit_total.cpu()
        for kind, part in sums.parts.items():
            name = f"site.{layer}.part.{KINDS.index(kind)}"
            if part.upper is None or part.total is None:
                yield f"{name}.rows", torch.cat([rows.cpu() for rows in part.pieces])
            else:
                yield f"{name}.upper", part.upper.cpu()
                yield f"{name}.total", part.total.cpu()
                yield f"{name}.count", torch.tensor(part.count)
    yield from of.reservoir.tensors()
    yield from of.predictions.tensors()
    yield "unique", torch.tensor(of.unique, dtype=torch.int64)
    yield "seen", of.seen
    yield "numbers", torch.tensor([of.n_tokens, of.n_batches, of.complete])


def load_collection(path: Path) -> Collection:
    """What `save_collection` wrote, in the memory of the CPU; sums follow the rows that are added to them."""
    from safetensors.torch import load_file

    held = load_file(path)
    layers = sorted(int(name.split(".")[1]) for name in held if name.endswith(".numbers") and name.startswith("site."))
    n_tokens, n_batches, complete = held["numbers"].tolist()
    return Collection(
        {layer: _site(held, f"site.{layer}") for layer in layers},
        Reservoir.from_tensors(held),
        Predictions.from_tensors(held),
        held["seen"],
        held["unique"].tolist(),
        n_tokens,
        n_batches,
        bool(complete),
    )


def _site(held: Mapping[str, Tensor], name: str) -> SiteSums:
    dim, unit_count, n_massive = held[f"{name}.numbers"].tolist()
    site = bytes(held[f"{name}.name"].tolist()).decode()
    sums = SiteSums(
        site, dim, {}, held.get(f"{name}.unit_total"), unit_count, n_massive, float(held[f"{name}.largest"])
    )
    for number, kind in enumerate(KINDS):
        part = f"{name}.part.{number}"
        if f"{part}.upper" in held:
            total, upper = held[f"{part}.total"], held[f"{part}.upper"]
            sums.parts[kind] = Accumulator(dim, [], int(held[f"{part}.count"]), total, upper)
        elif f"{part}.rows" in held:
            rows = held[f"{part}.rows"]
            sums.parts[kind] = Accumulator(dim, [rows], len(rows))
    return sums
