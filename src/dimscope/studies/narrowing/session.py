"""What all candidates of a narrowing share: texts dealt out, the dense model with its baseline, and one calibration pass."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.families import layout_of
from dimscope.checkpoints.model import Placement, load_model, place
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.errors import InvalidArgument
from dimscope.evaluation.evaluate import Baseline, Evaluation, baseline, evaluate
from dimscope.evaluation.generated_text import sample_windows
from dimscope.interventions.maps import RowQuantisation
from dimscope.interventions.table_summary import TableSummary, summarise_table
from dimscope.narrowing.bases import FROM_TABLE, LEARNED, make_basis
from dimscope.narrowing.calibration import Calibration, calibrate, calibrated_gains
from dimscope.narrowing.conversion import keeps_tie
from dimscope.narrowing.healing import Healed, heal, heal_rate, require_peft
from dimscope.narrowing.layer_dropping import least_blocks, without_blocks
from dimscope.narrowing.learning import RATE, learn_basis
from dimscope.narrowing.projection import Cut, fitted_model, narrow_model, plan_cut
from dimscope.narrowing.training import TOKENS, Point, Schedule, mean_distance
from dimscope.studies.narrowing.settings import NarrowSettings
from dimscope.studies.provenance import fingerprint
from dimscope.studies.reading import texts_or_generated, window_length, windows_at_once
from dimscope.texts.windows import Window, middle_windows
from dimscope.units import readable_duration
from dimscope.vectors.embedding import open_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 512  # tokens of a window
MOST = 4096  # windows of each text, where something is trained
WRITTEN, TOGETHER = 512, 64  # windows that a model writes itself at most, and at once
EVERY = 20  # steps between two looks at held-out text


@dataclass(frozen=True, slots=True)
class Reading:
    """Windows of the texts by what they are for. Nothing that is judged or held out is trained or calibrated on."""

    calibration: list[Window]
    judged: list[Window]
    held_out: list[Window]  # empty where nothing is trained
    training: list[Window]


def deal(windows: Sequence[Window], each: int, trains: bool, names: Sequence[str]) -> Reading:
    """Windows dealt out evenly over the texts, `each` of a kind or as many as there are; training takes the rest too.

    Raises InvalidArgument where there is not one of each kind.
    """
    kinds = 3 if trains else 2
    each = min(each, len(windows) // kinds)
    if not each:
        wanted = (
            "one to calibrate on, one to hold out and one to judge on"
            if trains
            else "one to calibrate on, one to judge on"
        )
        raise InvalidArgument(
            f"{', '.join(names)}: {len(windows)} windows of {len(windows[0].ids)} tokens are too few ({wanted}): give a "
            "longer text or a smaller `length`"
        )
    picked = [(2 * i + 1) * len(windows) // (2 * kinds * each) for i in range(kinds * each)]
    judged, held_out = (picked[n::kinds] if n < kinds else [] for n in (1, 2))
    apart = {*judged, *held_out}
    return Reading(
        [windows[i] for i in picked[0::kinds]], [windows[i] for i in judged], [windows[i] for i in held_out],
        [w for i, w in enumerate(windows) if i not in apart],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Candidate:
    """A narrow model that might be written."""

    cut: Cut
    model: PreTrainedModel
    learned: list[Point]  # held-out KL while its basis was learned


class Bench:
    """One dense model and one text on which candidates are made and judged; each part is there once it is needed."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: NarrowSettings,
        *,
        trains: bool,
        announce: Callable[[str], object] | None = None,
    ) -> None:
        self.checkpoint, self.settings, self.trains = checkpoint, settings, trains
        self.layout = layout_of(checkpoint)
        self.tied = keeps_tie(checkpoint, self.layout, settings.tied)
        if settings.lora is not None:
            require_peft()
        self.say = announce or (lambda line: None)
        self.placement = place(checkpoint, dtype=settings.dtype, device=settings.device)
        if self.placement.device == "map":
            raise InvalidArgument(
                "`device` map: a model is calibrated and evaluated on one device; take cpu or cuda, or use the table alone: "
                "`bases` embedding without `evaluate`"
            )
        self.texts = texts_or_generated(settings.texts)
        self.reading = self._read()
        self.length = len(self.reading.judged[0].ids)
        self.batch = windows_at_once(self.placement, self.length)

    def _read(self) -> Reading:
        settings, tokenizer = self.settings, require_tokenizer(self.checkpoint.source)
        length = window_length(self.checkpoint, settings.length, LENGTH)
        most = MOST if self.trains else -(-2 * settings.windows // len(self.texts))
        windows: list[Window] = []
        for text in self.texts.values():
            if text is None:
                windows += self._written(length, min(most, WRITTEN))
            else:
                windows += middle_windows(text, tokenizer, length=length, count=None, most=most)
        return deal(windows, settings.windows, self.trains, list(self.texts))

    def _written(self, length: int, count: int) -> list[Window]:
        """Windows that the model writes itself, some at once: each holds keys and values of its own."""
        tokenizer, seed = require_tokenizer(self.checkpoint.source), self.settings.seed
        self.say(f"writing {count} windows of {length} tokens")
        parts = [
            sample_windows(
                self.dense, tokenizer, count=min(TOGETHER, count - start), length=length, seed=(seed * MOST + start) % 2**63
            )
            for start in range(0, count, TOGETHER)
        ]  # fmt: skip
        return [window for part in parts for window in part]

    @cached_property
    def dense(self) -> PreTrainedModel:
        return load_model(self.checkpoint, self.placement, trust_remote_code=self.settings.trust_remote_code)

    @cached_property
    def calibration(self) -> Calibration:
        windows = self.reading.calibration
        self.say(f"calibrating on {len(windows)} windows of {self.length} tokens")
        return calibrate(self.dense, self.layout, windows, self.batch)

    @cached_property
    def table(self) -> TableSummary:
        return table_summary(self.checkpoint)

    @cached_property
    def baseline(self) -> Baseline:
        return baseline(self.dense, self.reading.judged, self.batch)

    def judge(self, model: PreTrainedModel) -> Evaluation:
        """A model beside the dense one, on the windows that nothing was fitted to."""
        return evaluate(model, self.baseline, changed=model is not self.dense)

    def schedule(self, steps: int, rate: float) -> Schedule:
        """Steps of as many tokens whatever the length of a window."""
        return Schedule(steps, rate, min(EVERY, steps), batch=max(1, TOKENS // self.length), seed=self.settings.seed)

    def start(self, basis: str, width: int, *, tied: bool | None = None) -> Candidate:
        """The narrow model of a basis and width, gains calibrated, the final one fitted as a temperature; nothing is trained.

        Raises InvalidArgument for a width that the family cannot have.
        """
        known = self.table if basis in FROM_TABLE else self.calibration
        directions = make_basis(basis, known, width, centred=self.layout.centred, seed=self.settings.seed)
        cut = plan_cut(
            self.checkpoint, directions, calibrated_gains(self.calibration, directions), export=self.settings.export_as,
            tied=self.tied if tied is None else tied,
        )  # fmt: skip
        return Candidate(*fitted_model(cut, self.dense, self.reading.calibration, self.placement, self.batch), [])

    def candidate(self, basis: str, width: int, *, store: Path | None = None) -> Candidate:
        """The narrow model of a basis and width, learned where that is asked; `store` is where learning is kept."""
        begun = self.start(basis, width)
        if basis != LEARNED:
            return begun
        start, schedule = begun.cut, self.schedule(self.settings.learn_steps, RATE)
        del begun  # learning has a model of its own
        cut, points = learn_basis(
            self.dense, start, self.reading.training, self.reading.held_out, schedule, self.placement, store=store,
            recipe=self._training_recipe(start), announce=self._teller(f"learning a basis of {width}", schedule),
        )  # fmt: skip
        return Candidate(cut, narrow_model(cut, self.placement), points)

    def heal(self, cut: Cut, *, store: Path | None = None) -> Healed:
        """A cut trained in float32, computed with in the dtype of the run."""
        settings, width = self.settings, cut.basis.shape[1]
        schedule = self.schedule(settings.heal_steps, heal_rate(width, settings.lora))
        # The gradients of a small KL are too small for float16, not for bfloat16.
        low = None if self.placement.dtype == "float32" else torch.bfloat16
        return heal(
            narrow_model(cut, Placement("float32", self.placement.device)), self.dense, self.reading.training,
            self.reading.held_out, schedule, lora=settings.lora, low=low, store=store,
            recipe=self._training_recipe(cut), announce=self._teller("healing", schedule),
        )  # fmt: skip

    def tie_cost(self, made: Candidate, basis: str) -> float:
        """How much more KL one table for both sides costs than two, on the text of the calibration; before any training."""
        width = made.cut.basis.shape[1]
        kept = self.start(basis, width, tied=True) if made.learned else made
        one = self._calibration_kl(kept.model)
        return one - self._calibration_kl(self.start(basis, width, tied=False).model)

    def _calibration_kl(self, model: PreTrainedModel) -> float:
        return mean_distance(model, self.dense, self.reading.calibration, self.batch)

    def _teller(self, what: str, schedule: Schedule) -> Callable[[Point], object]:
        """Says what begins, and then how far it is and how long it may still take."""
        self.say(f"{what}: {schedule.steps} steps of {schedule.batch * self.length} tokens")
        first: list[tuple[int, float]] = []

        def tell(point: Point) -> None:
            now = time.monotonic()
            first.append((point.step, now))
            done = point.step - first[0][0]
            left = (now - first[0][1]) / done * (schedule.steps - point.step) if done else None
            rest = "" if left is None else f", at most {readable_duration(left)} left"
            self.say(f"step {point.step}: held-out KL {point.held_out:.4f}{rest}")

        return tell

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """What every candidate depends on: the model, the text and how it is dealt out, and where it runs."""
        settings = self.settings
        return {
            "model": fingerprint(self.checkpoint), "texts": {name: t and t.fingerprint for name, t in self.texts.items()},
            "windows": [settings.windows, self.length, self.trains], "seed": settings.seed, "tied": self.tied,
            "export": settings.export_as, **asdict(self.placement),
        }  # fmt: skip

    def _training_recipe(self, cut: Cut) -> str:
        """What training depends on, beside its schedule: all of that, and where it begins."""
        digest = hashlib.sha256(cut.basis.contiguous().numpy().tobytes())
        for name in sorted(cut.gains):
            digest.update(cut.gains[name].contiguous().numpy().tobytes())
        return json.dumps([self.recipe, digest.hexdigest()], sort_keys=True)

    def without(self, n: int) -> PreTrainedModel:
        """The dense model without the `n` consecutive blocks that change the stream the least, as seen while calibrating."""
        return without_blocks(self.dense, least_blocks(self.calibration, n), self.placement)

    @torch.no_grad()
    def quantised(self, bits: int) -> PreTrainedModel:
        """The dense model with every row of its matrices rounded to so many bits, and computed with as before."""
        model, change = deepcopy(self.dense), RowQuantisation(bits)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                for rows in parameter.split(4096):
                    rows.copy_(change(rows, torch.arange(len(rows))))
        return model


def table_summary(checkpoint: Checkpoint) -> TableSummary:
    """The moments of the input table. Raises CorruptCheckpoint for one with NaN or Inf."""
    return summarise_table(open_table(checkpoint, advice="a model with such a table is not narrowed"))
