"""Narrow models of a session, and the models they are compared with."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dimscope.checkpoints.model import Placement
from dimscope.interventions.maps import RowQuantisation
from dimscope.narrowing.assembly import Candidate, fit_temperature, narrow_model
from dimscope.narrowing.bases import FROM_TABLE, LEARNED, make_basis
from dimscope.narrowing.calibration import calibrated_gains
from dimscope.narrowing.healing import Healed, Training, heal, heal_rate
from dimscope.narrowing.layer_dropping import least_blocks, without_blocks
from dimscope.narrowing.learning import RATE, LearnedBasis, learn_basis
from dimscope.narrowing.projection import Narrowing, plan_narrowing
from dimscope.narrowing.training import TOKENS, Progress, Schedule, TrainingWindows, mean_kl
from dimscope.narrowing.training_state import Point
from dimscope.studies.narrowing.session import NarrowingSession, session_recipe
from dimscope.units import readable_duration

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EVERY = 20  # steps between two evaluations on held-out text


def initial_candidate(session: NarrowingSession, basis: str, width: int, *, tied: bool | None = None) -> Candidate:
    """Return the narrow model of a basis and width before any training: gains calibrated, the last fitted as a temperature.

    Args:
        session: The dense model and its texts.
        basis: Name of the basis; a learned one starts as `normalised`.
        width: The hidden size.
        tied: Overrides the tie of the session.

    Raises:
        InvalidArgument: The family cannot have the width.
    """
    target = session.target if tied is None else replace(session.target, tied=tied)
    source = session.table() if basis in FROM_TABLE else session.calibration()
    directions = make_basis(basis, source, width, centred=target.layout.centred, seed=session.settings.seed)
    narrowing = plan_narrowing(target, directions, calibrated_gains(session.calibration(), directions))
    return fit_temperature(narrowing, session.dense(), session.windows.calibration, session.placement, session.batch)


def learn(session: NarrowingSession, start: Narrowing, folder: Path | None = None) -> LearnedBasis:
    """Train the basis of a narrowing; `folder` is where the state is kept."""
    schedule = _schedule(session, session.settings.learn_steps, RATE)
    progress = _progress(session, start, f"learning a basis of {start.width}", schedule, folder)
    return learn_basis(session.dense(), start, _training_windows(session), schedule, session.placement, progress)


def make_candidate(session: NarrowingSession, basis: str, width: int, folder: Path | None = None) -> LearnedCandidate:
    """Return the narrow model of a basis and width; a learned basis is trained, and keeps its state in `folder`."""
    initial = initial_candidate(session, basis, width)
    if basis != LEARNED:
        return LearnedCandidate(initial.narrowing, initial.model)
    start = initial.narrowing
    del initial  # learning has a model of its own
    learned = learn(session, start, folder)
    return LearnedCandidate(learned.narrowing, narrow_model(learned.narrowing, session.placement), learned.points)


@dataclass(frozen=True, slots=True)
class LearnedCandidate:
    """A narrow model, what it was made from, and the evaluations while its basis was learned."""

    narrowing: Narrowing
    model: PreTrainedModel
    points: Sequence[Point] = ()


def heal_candidate(session: NarrowingSession, narrowing: Narrowing, folder: Path | None = None) -> Healed:
    """Train all weights of a narrow model in float32, computing in the dtype of the session."""
    settings = session.settings
    schedule = _schedule(session, settings.heal_steps, heal_rate(narrowing.width, settings.lora))
    # The gradients of a small KL are too small for float16, not for bfloat16.
    low = None if session.placement.dtype == "float32" else torch.bfloat16
    student = narrow_model(narrowing, Placement("float32", session.placement.device))
    progress = _progress(session, narrowing, "healing", schedule, folder)
    training = Training(schedule, settings.lora, low)
    return heal(student, session.dense(), _training_windows(session), training, progress)


def tie_cost(session: NarrowingSession, candidate: LearnedCandidate, basis: str) -> float:
    """Return how much more KL one table costs than two, on the calibration windows, before any training; in nats."""
    width = candidate.narrowing.width
    tied = initial_candidate(session, basis, width, tied=True).model if candidate.points else candidate.model
    return _calibration_kl(session, tied) - _calibration_kl(
        session, initial_candidate(session, basis, width, tied=False).model
    )


def _calibration_kl(session: NarrowingSession, model: PreTrainedModel) -> float:
    return mean_kl(model, session.dense(), session.windows.calibration, session.batch)


# ---- training --------------------------------------------------------------------------------------------------------


def _schedule(session: NarrowingSession, steps: int, rate: float) -> Schedule:
    """Return a schedule whose steps have as many tokens whatever the length of a window."""
    return Schedule(steps, rate, min(EVERY, steps), batch=max(1, TOKENS // session.length), seed=session.settings.seed)


def _training_windows(session: NarrowingSession) -> TrainingWindows:
    return TrainingWindows(session.windows.training, session.windows.held_out)


def _progress(
    session: NarrowingSession, narrowing: Narrowing, title: str, schedule: Schedule, folder: Path | None
) -> Progress:
    """Announce a training, and return where it is kept and who follows it."""
    session.monitor.announce(f"{title}: {schedule.steps} steps of {schedule.batch * session.length} tokens")
    digest = hashlib.sha256(narrowing.basis.contiguous().numpy().tobytes())
    for name in sorted(narrowing.gains):
        digest.update(narrowing.gains[name].contiguous().numpy().tobytes())
    recipe = json.dumps([session_recipe(session), digest.hexdigest()], sort_keys=True)
    return Progress(folder, recipe, _step_announcer(session, schedule))


def _step_announcer(session: NarrowingSession, schedule: Schedule) -> Callable[[Point], object]:
    """Return a function that announces how far a training is, and how long it takes at most."""
    first: list[tuple[int, float]] = []

    def announce(point: Point) -> None:
        now = time.monotonic()
        first.append((point.step, now))
        done = point.step - first[0][0]
        left = (now - first[0][1]) / done * (schedule.steps - point.step) if done else None
        rest = "" if left is None else f", at most {readable_duration(left)} left"
        session.monitor.announce(f"step {point.step}: KL {point.held_out:.4f} on held-out text{rest}")

    return announce


# ---- what narrow models are compared with ----------------------------------------------------------------------------


def shallower_model(session: NarrowingSession, n: int) -> PreTrainedModel:
    """Return the dense model without the `n` consecutive blocks that change the stream the least."""
    return without_blocks(session.dense(), least_blocks(session.calibration(), n), session.placement)


@torch.no_grad()
def quantised_model(session: NarrowingSession, bits: int) -> PreTrainedModel:
    """Return the dense model with every row of its matrices rounded to `bits` bits, computed in the same dtype."""
    model, change = deepcopy(session.dense()), RowQuantisation(bits)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            for rows in parameter.split(4096):
                rows.copy_(change(rows, torch.arange(len(rows))))
    return model
