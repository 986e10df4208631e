"""Training of a narrow model towards the dense one, by forward KL.

What is trained is a list of leaf tensors and a way to get their gradients: a basis, or the weights themselves.
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

from dimscope.activations.forward import final_states
from dimscope.activations.output_head import declared_head
from dimscope.activations.structure import run_stack, text_stack
from dimscope.checkpoints.model import input_device
from dimscope.narrowing.training_state import Point, TrainingState, copies, restore, write
from dimscope.texts.windows import Window, grouped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 2560  # of a step
LONGEST_NORM = 1.0  # of a gradient
WARM_UP = 10  # steps
WRITING_PAUSE = 20  # times as long as writing a state took, until the next is written: a twentieth of the time


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast Adam trains: the rate rises over the first steps, and falls along a cosine to 0.

    Attributes:
        steps: Number of steps.
        rate: The largest rate.
        every: Steps between two evaluations on held-out text.
        patience: Evaluations without a new best after which training stops.
        batch: Windows of a step.
        seed: Random seed of the order of the windows.
    """

    steps: int
    rate: float
    every: int
    patience: int = 5
    batch: int = 8
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Return the rate of step 0, 1, ..."""
        warm = min(1.0, (step + 1) / WARM_UP)
        return self.rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def evaluates_after(self, step: int) -> bool:
        """Whether held-out text is evaluated after step 0, 1, ..."""
        return (step + 1) % self.every == 0 or step + 1 == self.steps


@dataclass(frozen=True, slots=True)
class Objective:
    """What is trained.

    Attributes:
        leaves: The tensors to train.
        backward: Leaves the gradients of a batch of token ids in the leaves, and returns the loss.
        held_out: Returns the loss on held-out text.
    """

    leaves: Sequence[Tensor]
    backward: Callable[[Int[Tensor, "b t"]], float]
    held_out: Callable[[], float]


@dataclass(frozen=True, slots=True)
class TrainingWindows:
    """Windows to train on, and others on which the best state is chosen."""

    training: Sequence[Window]
    held_out: Sequence[Window]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training keeps its state, and who follows it.

    Attributes:
        folder: Where the state is written; None keeps none.
        recipe: What the training depends on beside its schedule; a state of another recipe is not resumed.
        announce: Called with every evaluation on held-out text.
    """

    folder: Path | None = None
    recipe: str = ""
    announce: Callable[[Point], object] = lambda point: None


UNRECORDED = Progress()

# ---- KL --------------------------------------------------------------------------------------------------------------


def kl_divergence(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: Int[Tensor, "b t"],
    *,
    target: Float[Tensor, "b t d"] | None = None,
    low: torch.dtype | None = None,
) -> float:
    """Compute KL(teacher || student) in nats, the mean over all positions.

    With gradients enabled, the gradients are added to those of the student's parameters. Logits of a block of positions
    are in memory at once, whatever the size of the vocabulary.

    Args:
        student: The model to compare.
        teacher: The model to compare with.
        ids: b sequences of t token ids.
        target: The teacher's final hidden states, where they are known.
        low: A dtype for the student to compute in.
    """
    target = final_states(teacher, ids) if target is None else target
    with _autocast(student, low):
        output = run_stack(text_stack(student), ids.to(input_device(student))).last_hidden_state
    states = output.flatten(0, 1)
    # The head runs block by block; its gradients are collected at the final states, from which one pass goes on.
    leaf = states.detach().requires_grad_(torch.is_grad_enabled())
    total = _head_kl(student, teacher, leaf, target.flatten(0, 1), low)
    if leaf.requires_grad:
        torch.autograd.backward(states, leaf.grad)
    return total


def _head_kl(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    states: Float[Tensor, "n d"],
    target: Float[Tensor, "n e"],
    low: torch.dtype | None,
) -> float:
    """Compute the KL from final hidden states, and leave the gradients in the output head and in `states`."""
    own, other, total = declared_head(student), declared_head(teacher), 0.0
    for rows in other.blocks(torch.arange(len(states))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        with torch.no_grad():
            log_p = other.logits(target[part]).log_softmax(dim=1).to(states.device)
        with _autocast(student, low):
            raw = own.module(states[part])
        kl = (log_p.exp() * (log_p - own.transform(raw).log_softmax(dim=1))).sum() / len(states)
        total += float(kl.detach())
        if states.requires_grad:
            torch.autograd.backward(kl)
    return total


def _autocast(model: PreTrainedModel, low: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if low is None else torch.autocast(input_device(model).type, dtype=low)


def mean_kl(student: PreTrainedModel, teacher: PreTrainedModel, windows: Sequence[Window], batch: int) -> float:
    """Compute the mean KL over the positions of windows of one length, `batch` windows at once."""
    return held_out_evaluator(student, teacher, windows, batch)()


def held_out_evaluator(
    student: PreTrainedModel, teacher: PreTrainedModel, windows: Sequence[Window], batch: int
) -> Callable[[], float]:
    """Return a function that computes `mean_kl` of a student that changes; the teacher reads the windows once."""
    ids = [torch.stack([w.ids for w in group]) for group in grouped(windows, batch)]
    targets = [final_states(teacher, group) for group in ids]

    @torch.no_grad()
    def evaluate() -> float:
        pairs = zip(ids, targets, strict=True)
        return sum(len(group) * kl_divergence(student, teacher, group, target=t) for group, t in pairs) / len(windows)

    return evaluate


# ---- the loop --------------------------------------------------------------------------------------------------------


def minimise(
    objective: Objective, windows: Sequence[Window], schedule: Schedule, progress: Progress = UNRECORDED
) -> list[Point]:
    """Train the leaves in place, and leave in them the values with the lowest loss on held-out text.

    The values before the first step count too. Where `progress` has a folder, the state is written there after an
    evaluation, unless that would take too much of the time, and a run with the same recipe resumes it, to the same numbers.

    Raises:
        InvalidArgument: The state cannot be written.
    """
    optimiser = torch.optim.Adam(objective.leaves, lr=schedule.rate)
    recipe = json.dumps([progress.recipe, asdict(schedule)])
    state = restore(progress.folder, recipe, objective.leaves, optimiser)
    if state is None:
        state = TrainingState(copies(objective.leaves), [Point(0, objective.held_out())])
        progress.announce(state.points[0])
    order, losses, next_write = _order(len(windows), schedule), list[float](), 0.0
    for step in range(schedule.steps):
        chosen = next(order)
        if step < state.points[-1].step:
            continue
        if state.stale >= schedule.patience:
            break
        ids = torch.stack([windows[i].ids for i in chosen])
        losses.append(_train_step(objective, optimiser, schedule.rate_at(step), ids))
        if not schedule.evaluates_after(step):
            continue
        state.points.append(Point(step + 1, objective.held_out(), sum(losses) / len(losses)))
        losses.clear()
        progress.announce(state.points[-1])
        if state.stale == 0:
            state.best[:] = copies(objective.leaves)
        ended = step + 1 == schedule.steps or state.stale >= schedule.patience
        if progress.folder is not None and (ended or time.monotonic() >= next_write):
            seconds = write(progress.folder, recipe, objective.leaves, optimiser, state)
            next_write = time.monotonic() + WRITING_PAUSE * seconds
    _put_back(objective.leaves, state.best)
    return state.points


@torch.no_grad()
def _put_back(leaves: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for leaf, value in zip(leaves, values, strict=True):
        leaf.copy_(value)


def _train_step(objective: Objective, optimiser: torch.optim.Adam, rate: float, ids: Int[Tensor, "b t"]) -> float:
    """Take one step of Adam, and return the loss before it."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    loss = objective.backward(ids)
    torch.nn.utils.clip_grad_norm_(objective.leaves, LONGEST_NORM)
    optimiser.step()
    return loss


def _order(n: int, schedule: Schedule) -> Iterator[list[int]]:
    """Yield the windows of each step: all of them before any is repeated, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(schedule.seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < schedule.batch:
            waiting += torch.randperm(n, generator=generator).tolist()
        yield waiting[: schedule.batch]
        waiting = waiting[schedule.batch :]
