"""Short forms of learning, healing and training, for tests of what comes out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.model import Placement
from dimscope.narrowing import training as loop
from dimscope.narrowing.healing import Healed, Training, heal
from dimscope.narrowing.learning import learn_basis
from dimscope.narrowing.projection import Narrowing, plan_narrowing
from dimscope.narrowing.target import resolve_target
from dimscope.narrowing.training import Objective, Progress, Schedule, TrainingWindows
from dimscope.narrowing.training_state import Point
from dimscope.texts.windows import Window

CPU = Placement("float32", "cpu")


class Learned(NamedTuple):
    """What `learn_basis` returns, to be unpacked."""

    narrowing: Narrowing
    points: list[Point]


def ignore(point: Point) -> None:
    """Do nothing."""


def narrowing_of(
    checkpoint: Checkpoint,
    basis: torch.Tensor,
    gains: dict[str, torch.Tensor] | None = None,
    *,
    export: str | None = None,
    tied: bool | None = False,
    dtype: torch.dtype | None = None,
) -> Narrowing:
    """Plan a narrowing of a checkpoint, with two tables unless `tied` says otherwise."""
    return plan_narrowing(resolve_target(checkpoint, export=export, tied=tied), basis, gains, dtype=dtype)


def learn(
    dense: Any,
    narrowing: Narrowing,
    training: Sequence[Window],
    held_out: Sequence[Window],
    schedule: Schedule,
    *,
    store: Path | None = None,
    announce: Callable[[Point], object] = ignore,
) -> Learned:
    """Learn a basis on the CPU."""
    windows, progress = TrainingWindows(training, held_out), Progress(store, announce=announce)
    learned = learn_basis(dense, narrowing, windows, schedule, CPU, progress)
    return Learned(learned.narrowing, learned.points)


def healed_model(
    student: Any,
    dense: Any,
    training: Sequence[Window],
    held_out: Sequence[Window],
    schedule: Schedule,
    *,
    lora: int | None = None,
    low: torch.dtype | None = None,
    store: Path | None = None,
    announce: Callable[[Point], object] = ignore,
) -> Healed:
    """Heal a model."""
    windows, progress = TrainingWindows(training, held_out), Progress(store, announce=announce)
    return heal(student, dense, windows, Training(schedule, lora, low), progress)


def minimise(
    objective: Objective,
    windows: Sequence[Window],
    schedule: Schedule,
    *,
    store: Path | None = None,
    recipe: str = "",
    announce: Callable[[Point], object] = ignore,
) -> list[Point]:
    """Run the loop of a training."""
    return loop.minimise(objective, windows, schedule, Progress(store, recipe, announce))
