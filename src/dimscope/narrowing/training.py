"""Training of a narrow model towards the dense one: forward KL, block by block over positions, kept on disk as it goes.

What is trained is a list of leaf tensors and a way to get their gradients; a basis and the weights themselves both are.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.activations.forward import final_states, input_device
from dimscope.activations.output_head import logit_transform, position_blocks
from dimscope.storage import write_tensors
from dimscope.texts.windows import Window, grouped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 2560  # of a step
LONGEST_NORM = 1.0  # of a gradient
WARM_UP = 10  # steps
KEEPING = 20  # times as long as writing a state took passes before the next one is written: a twentieth of the time


@dataclass(frozen=True, slots=True)
class Point:
    """The held-out KL after so many steps, and the mean training KL since the point before."""

    step: int
    held_out: float
    training: float | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast: Adam, the rate rises over the first steps and falls along a cosine to nothing."""

    steps: int
    rate: float
    every: int  # steps between two looks at held-out text
    patience: int = 5  # looks without a new best after which it stops
    batch: int = 8  # windows of a step
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """The rate of step 0, 1, ..."""
        warm = min(1.0, (step + 1) / WARM_UP)
        return self.rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True, slots=True)
class Goal:
    """What is trained: leaves, a function that leaves gradients in them and returns the loss, and how good it is."""

    leaves: Sequence[Tensor]
    backward: Callable[[Int[Tensor, "b t"]], float]
    held_out: Callable[[], float]


def distance(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: Int[Tensor, "b t"],
    *,
    target: Float[Tensor, "b t d"] | None = None,
    low: torch.dtype | None = None,
) -> float:
    """KL(teacher || student) in nats, the mean over all positions; with gradients enabled they are left in the student.

    Logits stand in memory for some positions at once, whatever the vocabulary. `target` are the teacher's final states,
    where they are known; `low` is what the student computes in.
    """
    known = (final_states(teacher, ids) if target is None else target).flatten(0, 1)
    training = torch.is_grad_enabled()
    with _autocast(student, low):
        found = student.get_decoder()(input_ids=ids.to(input_device(student)), use_cache=False).last_hidden_state
    states = found.flatten(0, 1)
    leaf = states.detach().requires_grad_(training)
    heads = [(m.get_output_embeddings(), logit_transform(m)) for m in (teacher, student)]
    total = 0.0
    for rows in position_blocks(torch.arange(len(leaf)), heads[0][0].weight.shape[0]):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        with torch.no_grad():
            log_p = heads[0][1](heads[0][0](known[part]).float()).log_softmax(dim=1).to(leaf.device)
        with _autocast(student, low):
            raw = heads[1][0](leaf[part])
        kl = (log_p.exp() * (log_p - heads[1][1](raw.float()).log_softmax(dim=1))).sum() / len(leaf)
        total += float(kl.detach())
        if training:
            torch.autograd.backward(kl)
    if training:
        torch.autograd.backward(states, leaf.grad)
    return total


def _autocast(model: PreTrainedModel, low: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if low is None else torch.autocast(input_device(model).type, dtype=low)


def mean_distance(student: PreTrainedModel, teacher: PreTrainedModel, windows: Sequence[Window], batch: int) -> float:
    """KL over the positions of windows of one length."""
    return looking(student, teacher, windows, batch)()


def looking(
    student: PreTrainedModel, teacher: PreTrainedModel, windows: Sequence[Window], batch: int
) -> Callable[[], float]:
    """`mean_distance` of a student that changes, to be called again and again: the teacher reads the windows once."""
    ids = [torch.stack([w.ids for w in group]) for group in grouped(windows, batch)]
    targets = [final_states(teacher, group) for group in ids]

    @torch.no_grad()
    def look() -> float:
        pairs = zip(ids, targets, strict=True)
        return sum(len(group) * distance(student, teacher, group, target=t) for group, t in pairs) / len(windows)

    return look


def minimise(
    goal: Goal,
    windows: Sequence[Window],
    schedule: Schedule,
    *,
    store: Path | None = None,
    recipe: str = "",
    announce: Callable[[Point], object] = lambda point: None,
) -> list[Point]:
    """Trains the leaves in place, and leaves the best of what was looked at on held-out text in them; the way it began counts.

    With `store`, a folder, the state is written there at a look, unless that would take too much of the time, and a run with
    the same recipe goes on from it, to the same numbers. Raises InvalidArgument where it cannot be written.
    """
    optimiser = torch.optim.Adam(goal.leaves, lr=schedule.rate)
    best = [leaf.detach().clone() for leaf in goal.leaves]
    points, recipe = [], json.dumps([recipe, asdict(schedule)])
    if (held := _restored(store, recipe, goal.leaves, optimiser)) is not None:
        best, points = held
    else:
        points.append(Point(0, goal.held_out()))
        announce(points[0])
    order = _order(len(windows), schedule)
    losses: list[float] = []
    next_kept = 0.0
    for step in range(schedule.steps):
        chosen = next(order)
        if step < points[-1].step:
            continue
        if _stale(points) >= schedule.patience:
            break
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate_at(step)
        optimiser.zero_grad(set_to_none=True)
        losses.append(goal.backward(torch.stack([windows[i].ids for i in chosen])))
        torch.nn.utils.clip_grad_norm_(goal.leaves, LONGEST_NORM)
        optimiser.step()
        if (step + 1) % schedule.every == 0 or step + 1 == schedule.steps:
            points.append(Point(step + 1, goal.held_out(), sum(losses) / len(losses)))
            losses.clear()
            announce(points[-1])
            if _stale(points) == 0:
                best = [leaf.detach().clone() for leaf in goal.leaves]
            ended = step + 1 == schedule.steps or _stale(points) >= schedule.patience
            if store is not None and (ended or time.monotonic() >= next_kept):
                spent = _keep(store, recipe, goal.leaves, optimiser, best, points)
                next_kept = time.monotonic() + KEEPING * spent
    with torch.no_grad():
        for leaf, value in zip(goal.leaves, best, strict=True):
            leaf.copy_(value)
    return points


def best_point(points: Sequence[Point]) -> Point:
    """The one with the smallest held-out KL; the first of equals, and never one that is no number."""
    return min(points, key=lambda p: p.held_out if math.isfinite(p.held_out) else math.inf)


def _stale(points: Sequence[Point]) -> int:
    """How many looks ago the best was."""
    return len(points) - 1 - points.index(best_point(points))


def _order(n: int, schedule: Schedule) -> Iterator[list[int]]:
    """Which windows each step sees: all of them before any comes again, in an order of the seed alone."""
    generator = torch.Generator().manual_seed(schedule.seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < schedule.batch:
            waiting += torch.randperm(n, generator=generator).tolist()
        yield waiting[: schedule.batch]
        waiting = waiting[schedule.batch :]


# ---- on disk --------------------------------------------------------------------------------------------------------

STATE = "training.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of Adam


def _keep(
    store: Path,
    recipe: str,
    leaves: Sequence[Tensor],
    optimiser: torch.optim.Adam,
    best: list[Tensor],
    points: list[Point],
) -> float:
    """Writes the state, and says how long that took."""
    began = time.monotonic()
    held = {f"{i}.{name}": t for i, leaf in enumerate(leaves) for name, t in optimiser.state[leaf].items()}
    held |= {f"{i}.now": leaf.detach() for i, leaf in enumerate(leaves)} | {f"{i}.best": t for i, t in enumerate(best)}
    told = {"recipe": recipe, "points": json.dumps([asdict(p) for p in points])}
    write_tensors(store / STATE, {name: t.contiguous() for name, t in held.items()}, told)
    return time.monotonic() - began


def _restored(
    store: Path | None, recipe: str, leaves: Sequence[Tensor], optimiser: torch.optim.Adam
) -> tuple[list[Tensor], list[Point]] | None:
    """Puts a kept state of the same recipe back, and returns the best values and the points; None where there is none."""
    from safetensors import SafetensorError, safe_open

    if store is None or not (store / STATE).exists():
        return None
    try:
        with safe_open(store / STATE, "pt") as held:
            told = held.metadata() or {}
            if told.get("recipe") != recipe:
                return None
            points = [Point(**p) for p in json.loads(told["points"])]
            read = [{n: held.get_tensor(f"{i}.{n}") for n in ("now", "best", *MOMENTS)} for i in range(len(leaves))]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):  # of another version, or damaged: begin anew
        return None
    if any(t["now"].shape != leaf.shape for t, leaf in zip(read, leaves, strict=True)):
        return None
    with torch.no_grad():
        for leaf, tensors in zip(leaves, read, strict=True):
            leaf.copy_(tensors["now"])
            moments = {name: tensors[name].to(leaf.device) for name in MOMENTS[:2]}
            optimiser.state[leaf] = {**moments, "step": tensors["step"]}
    return [t["best"].to(leaf.device) for t, leaf in zip(read, leaves, strict=True)], points
