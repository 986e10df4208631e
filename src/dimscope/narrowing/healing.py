"""Healing: the weights of a narrow model are trained towards the dense one, its norms first, then all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from dimscope.errors import MissingExtra
from dimscope.narrowing.training import (
    UNRECORDED,
    Objective,
    Progress,
    Schedule,
    TrainingWindows,
    held_out_evaluator,
    kl_divergence,
    minimise,
)
from dimscope.narrowing.training_state import Point, best_point

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dimscope.texts.windows import Window

NORM_RATE, RATE, LORA_RATE = 1e-2, 1e-3, 2e-3  # of Adam; that of the weights at a width of 256, and less above
WIDTH = 256
NORM_SHARE = 1 / 5  # of the steps train the norms alone


@dataclass(frozen=True, slots=True)
class Training:
    """How a narrow model is healed.

    Attributes:
        schedule: How long and how fast.
        lora: Rank of low-rank updates of all linear maps; None trains the weights themselves.
        low: A dtype to compute in; the weights are float32.
    """

    schedule: Schedule
    lora: int | None = None
    low: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Healed:
    """The result of healing.

    Attributes:
        norms: Evaluations while the norms were trained.
        weights: Evaluations while all weights were trained.
        model: The healed model; unchanged where nothing became better.
        trained: Its parameters by name; empty where nothing became better.
    """

    norms: list[Point]
    weights: list[Point]
    model: PreTrainedModel
    trained: Mapping[str, Tensor]

    @property
    def before(self) -> float:
        """Return the KL on held-out text before healing."""
        return self.norms[0].held_out

    @property
    def after(self) -> float:
        """Return the lowest KL on held-out text."""
        return best_point([*self.norms, *self.weights]).held_out

    @property
    def steps(self) -> int:
        """Return the steps that were run: fewer than requested where nothing became better any more."""
        return sum(points[-1].step for points in (self.norms, self.weights) if points)


def heal_rate(width: int, lora: int | None) -> float:
    """Return the rate at which weights of a model this wide are trained: falling as one over the width, as in muP.

    Source: Yang et al., Tensor Programs V, 2022 (arXiv 2203.03466), for the hidden matrices under Adam.
    """
    return LORA_RATE if lora is not None else RATE * min(1.0, WIDTH / width)


def heal(
    student: PreTrainedModel,
    dense: PreTrainedModel,
    windows: TrainingWindows,
    training: Training,
    progress: Progress = UNRECORDED,
) -> Healed:
    """Train a narrow model in place; it ends with the weights that were best on held-out text.

    Args:
        student: The narrow model, in float32.
        dense: The dense model, which is not changed.
        windows: To train on, and to choose the best on.
        training: How to train.
        progress: Where the state is kept, and who follows.

    Raises:
        ImportError: `training.lora` is set, and peft is not installed; see `require_peft`.
    """
    schedule, lora = training.schedule, training.lora
    held_out = held_out_evaluator(student, dense, windows.held_out, schedule.batch)
    stages = _Stages(student, dense, windows.training, held_out, training, progress)
    norm_steps = max(1, round(schedule.steps * NORM_SHARE))
    norms = [p for name, p in student.named_parameters() if p.ndim == 1 and "norm" in name]
    norm_points = _train_stage(stages, student, norms, replace(schedule, steps=norm_steps, rate=NORM_RATE), "norms")
    adapted: Any = student if lora is None else _adapted(student, lora, schedule.seed)
    leaves = [p for p in adapted.parameters() if lora is None or p.requires_grad]
    rest, name = schedule.steps - norm_steps, "weights" if lora is None else "lora"
    points = _train_stage(stages, adapted, leaves, replace(schedule, steps=rest), name) if rest else []
    if lora is not None:
        adapted.merge_and_unload()
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    # Where no evaluation was better, both stages have put back the values they began with.
    healed = Healed(norm_points, points, student, dict(student.named_parameters()))
    return healed if healed.after < healed.before else replace(healed, trained={})


@dataclass(frozen=True, slots=True)
class _Stages:
    """What both stages share."""

    student: PreTrainedModel
    dense: PreTrainedModel
    windows: Sequence[Window]
    held_out: Callable[[], float]
    training: Training
    progress: Progress


def _train_stage(stages: _Stages, model: Any, leaves: Sequence[Tensor], schedule: Schedule, name: str) -> list[Point]:
    """Train some parameters of a model, which is the student or the student with low-rank updates."""
    student, dense, training, progress = stages.student, stages.dense, stages.training, stages.progress
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for leaf in leaves:
        leaf.requires_grad_(True)

    def backward(ids: Int[Tensor, "b t"]) -> float:
        return kl_divergence(student, dense, ids, low=training.low)

    own = replace(
        progress,
        folder=progress.folder and progress.folder / name,
        recipe=f"{progress.recipe} {name} {training.schedule.steps} {training.lora} {training.low}",
    )
    schedule = replace(schedule, every=min(schedule.every, schedule.steps))
    return minimise(Objective(leaves, backward, stages.held_out), stages.windows, schedule, own)


def require_peft() -> None:
    """Check that low-rank updates can be trained.

    Raises:
        MissingExtra: peft is not installed.
    """
    if find_spec("peft") is None:
        raise MissingExtra("peft", "lora")


def _adapted(student: PreTrainedModel, rank: int, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is deprecated
        torch.default_generator.manual_seed(seed)
        return get_peft_model(student, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
