"""How far a training is: its evaluations, the best values, and both on disk, from where it is resumed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dimscope.storage import write_tensors

FILE = "training.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of Adam


@dataclass(frozen=True, slots=True)
class Point:
    """The loss on held-out text after `step` steps, and the mean training loss since the point before."""

    step: int
    held_out: float
    training: float | None = None


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The best values of the leaves, and all evaluations so far."""

    best: list[Tensor]
    points: list[Point]

    @property
    def stale(self) -> int:
        """Return how many evaluations ago the best was."""
        return len(self.points) - 1 - self.points.index(best_point(self.points))


def best_point(points: Sequence[Point]) -> Point:
    """Return the point with the smallest loss on held-out text: the first of equals, and never one that is not finite."""
    return min(points, key=lambda p: p.held_out if math.isfinite(p.held_out) else math.inf)


def copies(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of the present values."""
    return [leaf.detach().clone() for leaf in leaves]


def write(
    folder: Path, recipe: str, leaves: Sequence[Tensor], optimiser: torch.optim.Adam, state: TrainingState
) -> float:
    """Write the leaves, Adam's moments and the state, whole or not at all, and return the seconds that took.

    Raises:
        InvalidArgument: The folder cannot be written.
    """
    began = time.monotonic()
    tensors = {f"{i}.{name}": t for i, leaf in enumerate(leaves) for name, t in optimiser.state[leaf].items()}
    tensors |= {f"{i}.now": leaf.detach() for i, leaf in enumerate(leaves)}
    tensors |= {f"{i}.best": t for i, t in enumerate(state.best)}
    metadata = {"recipe": recipe, "points": json.dumps([asdict(p) for p in state.points])}
    write_tensors(folder / FILE, {name: t.contiguous() for name, t in tensors.items()}, metadata)
    return time.monotonic() - began


def restore(
    folder: Path | None, recipe: str, leaves: Sequence[Tensor], optimiser: torch.optim.Adam
) -> TrainingState | None:
    """Put the values of a written state back into the leaves and the optimiser, and return the state.

    Returns:
        None where there is no state of this recipe; nothing is changed then.
    """
    from safetensors import SafetensorError, safe_open

    if folder is None or not (folder / FILE).exists():
        return None
    try:
        with safe_open(folder / FILE, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("recipe") != recipe:
                return None
            points = [Point(**p) for p in json.loads(metadata["points"])]
            read = [{n: file.get_tensor(f"{i}.{n}") for n in ("now", "best", *MOMENTS)} for i in range(len(leaves))]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):  # of another version, or damaged: start again
        return None
    if any(t["now"].shape != leaf.shape for t, leaf in zip(read, leaves, strict=True)):
        return None
    with torch.no_grad():
        for leaf, tensors in zip(leaves, read, strict=True):
            leaf.copy_(tensors["now"])
            moments = {name: tensors[name].to(leaf.device) for name in MOMENTS[:2]}
            optimiser.state[leaf] = {**moments, "step": tensors["step"]}
    return TrainingState([t["best"].to(leaf.device) for t, leaf in zip(read, leaves, strict=True)], points)
