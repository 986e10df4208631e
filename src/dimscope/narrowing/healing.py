"""Healing: the weights of a narrow model trained towards the dense one, its norms first, then all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from dimscope.errors import MissingExtra
from dimscope.narrowing.training import (
    Goal,
    Point,
    Schedule,
    best_point,
    distance,
    looking,
    minimise,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dimscope.texts.windows import Window

NORM_RATE, RATE, LORA_RATE = 1e-2, 1e-3, 2e-3  # of Adam; that of the weights at a width of 256, and less above
WIDTH = 256
NORM_SHARE = 1 / 5  # of the steps are for the norms alone


def heal_rate(width: int, lora: int | None) -> float:
    """The rate at which weights of a model this wide are trained: falling as one over the width, as in muP.

    Source: Yang et al., Tensor Programs V, 2022 (arXiv 2203.03466), for the hidden matrices under Adam.
    """
    return LORA_RATE if lora is not None else RATE * min(1.0, WIDTH / width)


@dataclass(frozen=True, slots=True)
class Healed:
    """What came of it: the held-out KL on the way, of the norms alone and of all weights, and the weights where it helped."""

    norms: list[Point]
    weights: list[Point]
    model: PreTrainedModel  # as it was, where nothing is better
    trained: Mapping[str, Tensor]  # its parameters by name, none where nothing is better than it was

    @property
    def before(self) -> float:
        return self.norms[0].held_out

    @property
    def after(self) -> float:
        return best_point([*self.norms, *self.weights]).held_out

    @property
    def steps(self) -> int:
        """How many were run: fewer than asked for where nothing became better any more."""
        return sum(points[-1].step for points in (self.norms, self.weights) if points)


def heal(
    student: PreTrainedModel,
    dense: PreTrainedModel,
    training: Sequence[Window],
    held_out: Sequence[Window],
    schedule: Schedule,
    *,
    lora: int | None = None,
    low: torch.dtype | None = None,
    store: Path | None = None,
    recipe: str = "",
    announce: Callable[[Point], object] = lambda point: None,
) -> Healed:
    """Trains a narrow model, in float32, in place. What it ends with is the best of what was looked at on held-out text.

    `lora` trains low-rank changes of all linear maps in the place of the weights; `low` is a dtype to compute in.
    LoRA needs peft, see `require_peft`.
    """
    first = max(1, round(schedule.steps * NORM_SHARE))
    chosen = [p for name, p in student.named_parameters() if p.ndim == 1 and "norm" in name]
    look = looking(student, dense, held_out, schedule.batch)

    def trained(model: Any, leaves: Sequence[Tensor], steps: int, rate: float, stage: str) -> list[Point]:
        for p in model.parameters():
            p.requires_grad_(False)
        for leaf in leaves:
            leaf.requires_grad_(True)

        def backward(ids: Int[Tensor, "b t"]) -> float:
            return distance(student, dense, ids, low=low)

        goal = Goal(leaves, backward, look)
        own = replace(schedule, steps=steps, rate=rate, every=min(schedule.every, steps))
        told = f"{recipe} {stage} {schedule.steps} {lora} {low}"
        return minimise(goal, training, own, store=store and store / stage, recipe=told, announce=announce)

    norms = trained(student, chosen, first, NORM_RATE, "norms")
    adapted: Any = student if lora is None else _adapted(student, lora, schedule.seed)
    leaves = [p for p in adapted.parameters() if lora is None or p.requires_grad]
    rest, stage = schedule.steps - first, "weights" if lora is None else "lora"
    weights = trained(adapted, leaves, rest, schedule.rate, stage) if rest else []
    if lora is not None:
        adapted.merge_and_unload()
    for p in student.parameters():
        p.requires_grad_(False)
    # Where no look was better, both stages have put back what they began with.
    healed = Healed(norms, weights, student, dict(student.named_parameters()))
    return healed if healed.after < healed.before else replace(healed, trained={})


def require_peft() -> None:
    """Raises MissingExtra where peft is not there."""
    if find_spec("peft") is None:
        raise MissingExtra("peft", "lora")


def _adapted(student: PreTrainedModel, rank: int, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what peft asks of transformers has another name by now
        torch.default_generator.manual_seed(seed)
        return get_peft_model(student, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
