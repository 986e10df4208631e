"""One pass of windows through a model: batched, checkpointed on disk, and split over processes where that is asked."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dimscope.activations.collection import Collection, collect, empty_collection, load_collection, save_collection
from dimscope.activations.hooks import evaluating
from dimscope.activations.sites import Site
from dimscope.checkpoints.model import is_out_of_memory, out_of_memory
from dimscope.texts.windows import Window, grouped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAVING = 10  # a checkpoint may take one part in so many of the time between two


@dataclass(frozen=True, slots=True)
class PassSettings:
    """How windows go through a model, and what is kept of them."""

    batch: int = 1  # windows at once
    reservoir: int = 2048  # rows
    seed: int = 0  # of the reservoir
    logits: bool = True
    checkpoint_every: float = 60.0  # seconds
    shard: tuple[int, int] = (0, 1)  # (i, n): every n-th batch, from the i-th on


def run_pass(
    model: "PreTrainedModel",
    sites: Sequence[Site],
    windows: Iterable[Window],
    settings: PassSettings = PassSettings(),
    state: Path | None = None,
    progress: Callable[[Sequence[Window]], object] = lambda windows: None,
) -> Collection:
    """What a model shows on windows; the model is left as it was.

    With a `state` file the pass goes on where it stopped, and a finished one is only read. Batches hold the same windows
    whatever the shards, so that all shards together, or an interrupted pass, give the sums of one pass to rounding.
    Raises NonFiniteActivations, UnsupportedCheckpoint, InvalidArgument where memory runs out.
    """
    done = load_collection(state) if state is not None and state.exists() else None
    done = done or empty_collection(model, sites, settings.reservoir, settings.seed)
    if done.complete:
        return done
    saved, cost = time.monotonic(), 0.0
    first, step = settings.shard
    with evaluating(model):  # once, not for every batch
        for number, group in enumerate(grouped(windows, settings.batch)):
            if number % step != first:
                continue
            if number // step >= done.n_batches:
                try:
                    collect(model, group, sites, done, logits=settings.logits)
                except (RuntimeError, MemoryError) as e:
                    if is_out_of_memory(e):
                        raise out_of_memory(f"{len(group)} x {len(group[0].ids)} tokens at once") from e
                    raise
            progress(group)
            if state is not None and time.monotonic() - saved > max(settings.checkpoint_every, SAVING * cost):
                began = time.monotonic()
                save_collection(done, state)
                saved = time.monotonic()
                cost = saved - began
    done.reservoir.prune(whole=True)
    done.complete = True
    if state is not None:
        save_collection(done, state)
    return done
