"""One pass of windows through a model: in batches, with its state on disk, and in shards for several processes."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from dimscope.activations.collection import Collection, collect, empty_collection, load_collection, save_collection
from dimscope.activations.hooks import evaluating
from dimscope.activations.sites import Site
from dimscope.checkpoints.model import is_out_of_memory, out_of_memory
from dimscope.texts.windows import Window, grouped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAVING_PART = 10  # saving may take one part in so many of the time between two states


@dataclass(frozen=True, slots=True)
class PassSettings:
    """How windows go through a model, and what is kept of them.

    Attributes:
        batch: Windows at once.
        reservoir: Rows of the sample, at most.
        seed: Of the sample.
        logits: Whether predictions are collected.
        checkpoint_every: Seconds between two states on disk, at least.
        shard: (i, n): every n-th batch, from the i-th on.
    """

    batch: int = 1
    reservoir: int = 2048
    seed: int = 0
    logits: bool = True
    checkpoint_every: float = 60.0
    shard: tuple[int, int] = (0, 1)


def run_pass(
    model: "PreTrainedModel",
    sites: Sequence[Site],
    windows: Iterable[Window],
    settings: PassSettings = PassSettings(),
    state: Path | None = None,
    progress: Callable[[Sequence[Window]], object] = lambda windows: None,
) -> Collection:
    """Collect what a model shows on windows; the model is left as it was.

    Args:
        model: A causal language model.
        sites: Where hidden states are read.
        windows: The windows of a text. Batches hold the same windows in all shards, so that these add up to one pass.
        settings: How they go through the model.
        state: A file from which the pass is resumed, and which is written now and then and at the end.
        progress: Called with the windows of each batch.

    Raises:
        NonFiniteActivations: Hidden states or logits are NaN or Inf.
        UnsupportedCheckpoint: The logits of the model cannot be computed from its hidden states.
        InvalidArgument: Memory runs out.
    """
    collection = load_collection(state) if state is not None else None
    collection = collection or empty_collection(model, sites, settings.reservoir, settings.seed)
    if collection.complete:
        return collection
    saver = _Saver(collection, state, settings.checkpoint_every)
    first, step = settings.shard
    with evaluating(model):  # once, not for every batch
        for number, group in enumerate(islice(grouped(windows, settings.batch), first, None, step)):
            if number >= collection.n_batches:  # the others are in the state
                _collect_batch(model, group, sites, collection, logits=settings.logits)
            progress(group)
            saver.save_if_due()
    collection.reservoir.prune(whole=True)
    collection.complete = True
    saver.save()
    return collection


def _collect_batch(
    model: "PreTrainedModel", group: Sequence[Window], sites: Sequence[Site], into: Collection, *, logits: bool
) -> None:
    try:
        collect(model, group, sites, into, logits=logits)
    except (RuntimeError, MemoryError) as e:
        if is_out_of_memory(e):
            raise out_of_memory(f"{len(group)} x {len(group[0].ids)} tokens at once") from e
        raise


@dataclass(slots=True)
class _Saver:
    """Saves a collection every so many seconds, and for a tenth of the time at most."""

    collection: Collection
    path: Path | None
    every: float
    last: float = field(default_factory=time.monotonic)
    cost: float = 0.0

    def save_if_due(self) -> None:
        """Save where enough time has passed since the last time."""
        if self.path is not None and time.monotonic() - self.last > max(self.every, SAVING_PART * self.cost):
            self.save()

    def save(self) -> None:
        """Save, and measure how long that takes."""
        if self.path is None:
            return
        began = time.monotonic()
        save_collection(self.collection, self.path)
        self.last = time.monotonic()
        self.cost = self.last - began
