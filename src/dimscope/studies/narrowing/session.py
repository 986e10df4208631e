"""What all candidates of a narrowing share: the dense model with its baseline, the windows, and one calibration pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from dimscope.checkpoints.model import Placement, load_model, place
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.errors import InvalidArgument
from dimscope.evaluation.evaluate import Baseline, Evaluation, baseline, evaluate, require_finite_evaluation
from dimscope.evaluation.generated_text import sample_windows
from dimscope.interventions.table_summary import TableSummary, summarise_table
from dimscope.narrowing.calibration import Calibration, calibrate
from dimscope.narrowing.healing import require_peft
from dimscope.narrowing.target import Target
from dimscope.studies.narrowing.settings import NarrowSettings
from dimscope.studies.narrowing.windows import SplitWindows, split_windows
from dimscope.studies.provenance import fingerprint
from dimscope.studies.reading import (
    FittedLength,
    fitted_length,
    line_end_warnings,
    texts_or_generated,
    windows_at_once,
)
from dimscope.studies.study import Monitor
from dimscope.texts.windows import Window, middle_windows
from dimscope.vectors.embedding import open_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dimscope.checkpoints.checkpoint import Checkpoint
    from dimscope.texts.texts import Text

LENGTH = 512  # tokens of a window
MOST = 4096  # windows of each text, where something is trained
GENERATED_WINDOWS, AT_ONCE = 512, 64  # windows that a model generates itself at most, and at once


@dataclass(frozen=True, slots=True, eq=False)
class NarrowingSession:
    """One dense model and its texts, on which narrow models are made and evaluated.

    Attributes:
        target: The dense checkpoint, and what it is narrowed to.
        settings: What the user chose.
        monitor: Who follows the run.
        placement: Dtype and device of the computation.
        trains: Whether something is trained, so that windows are held out for it.
        texts: Texts by name; None for the one that the model generates.
        windows: Their windows by purpose.
        dense: Returns the dense model, loaded on the first call.
        calibration: Returns the calibration, computed on the first call.
        table: Returns the moments of the input table, computed on the first call.
        baseline: Returns the predictions of the dense model on the evaluation windows, computed on the first call.
        warnings: What the user should know of the texts, such as windows that a short one shrank.
    """

    target: Target
    settings: NarrowSettings
    monitor: Monitor
    placement: Placement
    trains: bool
    texts: Mapping[str, Text | None]
    windows: SplitWindows
    dense: Callable[[], PreTrainedModel]
    calibration: Callable[[], Calibration]
    table: Callable[[], TableSummary]
    baseline: Callable[[], Baseline]
    warnings: Sequence[str] = ()

    @property
    def length(self) -> int:
        """Return the tokens of a window."""
        return len(self.windows.evaluation[0].ids)

    @property
    def batch(self) -> int:
        """Return the windows that suit the device at once."""
        return windows_at_once(self.placement, self.length)


def open_session(target: Target, settings: NarrowSettings, monitor: Monitor, *, trains: bool) -> NarrowingSession:
    """Read the texts, and prepare what all candidates share. No model is loaded, unless it generates a text.

    Args:
        target: The dense checkpoint, and what it is narrowed to.
        settings: What the user chose.
        monitor: Who follows the run.
        trains: Whether something is trained.

    Raises:
        InvalidArgument: A text is missing or too short, or the model would be spread over several devices.
        MissingExtra: `lora` needs peft, which is not installed.
    """
    if settings.lora is not None:
        require_peft()
    checkpoint = target.checkpoint
    placement = place(checkpoint, dtype=settings.dtype, device=settings.device)
    if placement.device == "map":
        raise InvalidArgument(
            "`device` map: a model is calibrated and evaluated on one device; take cpu or cuda, or use the table alone: "
            "`bases` embedding without `evaluate`"
        )
    texts = texts_or_generated(settings.texts, keep_line_ends=settings.keep_line_ends)
    dense = cache(lambda: load_model(checkpoint, placement, trust_remote_code=settings.trust_remote_code))
    source = _WindowSource(checkpoint, settings, monitor, texts, trains, dense)
    fitted = _fitted_length(source)
    windows = split_windows(_read_windows(source, fitted.length), settings.windows, trains)
    batch = windows_at_once(placement, len(windows.evaluation[0].ids))

    def calibration() -> Calibration:
        length = len(windows.calibration[0].ids)
        monitor.announce(f"calibrating on {len(windows.calibration)} windows of {length} tokens")
        return calibrate(dense(), target.layout, windows.calibration, batch)

    return NarrowingSession(
        target, settings, monitor, placement, trains, texts, windows, dense, cache(calibration),
        cache(lambda: table_summary(checkpoint)), cache(lambda: baseline(dense(), windows.evaluation, batch)), fitted.warnings,
    )  # fmt: skip


def evaluate_model(session: NarrowingSession, model: PreTrainedModel) -> Evaluation:
    """Compare a model with the dense one, on windows that nothing was fitted to.

    Raises:
        NonFiniteActivations: The model computes NaN or Inf.
    """
    evaluation = evaluate(model, session.baseline(), changed=model is not session.dense())
    require_finite_evaluation(evaluation, session.placement.dtype)
    return evaluation


def session_recipe(session: NarrowingSession) -> dict[str, Any]:
    """Return what every candidate depends on: the model, the texts, the purposes of their windows, and the placement."""
    settings = session.settings
    return {
        "model": fingerprint(session.target.checkpoint),
        "texts": {name: text and text.fingerprint for name, text in session.texts.items()},
        "windows": [settings.windows, session.length, session.trains], "seed": settings.seed, "tied": session.target.tied,
        "export": settings.export_as, **asdict(session.placement),
    }  # fmt: skip


def table_summary(checkpoint: Checkpoint) -> TableSummary:
    """Compute the moments of the input table.

    Raises:
        CorruptCheckpoint: The table holds NaN or Inf.
    """
    return summarise_table(open_table(checkpoint, advice="a model with such a table is not narrowed"))


# ---- windows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _WindowSource:
    """What the windows are read from."""

    checkpoint: Checkpoint
    settings: NarrowSettings
    monitor: Monitor
    texts: Mapping[str, Text | None]
    trains: bool
    dense: Callable[[], PreTrainedModel]


def _fitted_length(source: _WindowSource) -> FittedLength:
    """Return the tokens of a window that fit every text, and announce what the user should know of the texts."""
    # One window to calibrate on, one to evaluate on, and one to hold out where something is trained.
    n_windows = 2 + source.trains
    fitted = fitted_length(source.checkpoint, source.texts, source.settings.length, LENGTH, n_windows=n_windows)
    warnings = (*line_end_warnings(source.texts), *fitted.warnings)
    for line in warnings:
        source.monitor.announce(line)
    return replace(fitted, warnings=warnings)


def _read_windows(source: _WindowSource, length: int) -> dict[str, list[Window]]:
    """Return the windows of each text by its name."""
    tokenizer = require_tokenizer(source.checkpoint.source)
    most = MOST if source.trains else -(-2 * source.settings.windows // len(source.texts))
    return {
        name: _generate_windows(source, length, min(most, GENERATED_WINDOWS))
        if text is None
        else middle_windows(text, tokenizer, length=length, count=None, most=most)
        for name, text in source.texts.items()
    }


def _generate_windows(source: _WindowSource, length: int, count: int) -> list[Window]:
    """Return windows that the model generates, some at once: each has keys and values of its own in memory."""
    tokenizer, seed = require_tokenizer(source.checkpoint.source), source.settings.seed
    source.monitor.announce(f"generating {count} windows of {length} tokens")
    windows: list[Window] = []
    for start in range(0, count, AT_ONCE):
        own_seed = (seed * MOST + start) % 2**63
        windows += sample_windows(
            source.dense(), tokenizer, count=min(AT_ONCE, count - start), length=length, seed=own_seed
        )
    return windows
