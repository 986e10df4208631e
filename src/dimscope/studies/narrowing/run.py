"""Narrowing one model: to a smaller model in memory, or to a folder that is written whole or not at all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dimscope.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dimscope.checkpoints.model import load_model, place
from dimscope.errors import InvalidArgument
from dimscope.evaluation.metrics import BITS, KL, LOSS, TOP_1
from dimscope.evaluation.throughput import Spread, throughput
from dimscope.narrowing.assembly import Account, account_of, assemble, stored_model, write_narrowing
from dimscope.narrowing.bases import FROM_TABLE, LEARNED, check_basis, make_basis
from dimscope.narrowing.card import NarrowFacts, model_card
from dimscope.narrowing.projection import Narrowing, plan_narrowing
from dimscope.narrowing.target import Target, check_width, resolve_target
from dimscope.narrowing.training_state import Point
from dimscope.storage import alone, beside, check_folder, whole_folder, writing
from dimscope.studies.narrowing.candidates import heal_candidate, make_candidate, tie_cost
from dimscope.studies.narrowing.session import LENGTH, NarrowingSession, evaluate_model, open_session, table_summary
from dimscope.studies.narrowing.settings import NarrowSettings
from dimscope.studies.study import SILENT, Monitor
from dimscope.texts.window_sums import Interval
from dimscope.texts.windows import Window
from dimscope.units import readable_bytes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

DEFAULT = "normalised"  # basis
EVALUATED = {"loss": LOSS, "bits_per_byte": BITS, "kl": KL, "top_1": TOP_1}
TIMED = {"prefill": "prefill, tokens per second", "decode": "decode, tokens per second"}


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class NarrowResult:
    """A narrow model in memory.

    Attributes:
        model: An ordinary `PreTrainedModel` in the stored dtype of the dense one; `save_pretrained` writes it.
        account: Parameters and bytes of the dense and of the narrow model.
        measured: One row per number: `metric`, `dense`, `narrow`, and the 95% interval of the latter, `low` to `high`: over
            windows, or over rounds for a speed; null where there is none. None without `evaluate`.
        training: KL on held-out text while it was trained; None where nothing was trained.
        facts: How it was made.
    """

    model: PreTrainedModel
    account: Account
    measured: pl.DataFrame | None
    training: pl.DataFrame | None
    facts: NarrowFacts

    def __repr__(self) -> str:
        """Return the sizes, and what was measured, in a few lines."""
        measured = [f"  {row['metric']}: {row['dense']} -> {row['narrow']}" for row in _card_rows(self.measured)]
        return "\n".join([self._title(), *measured, *self.facts.warnings])

    def _repr_html_(self) -> str:
        """Return the account and what was measured as a table, for a notebook."""
        account = self.account
        rows = [
            ("parameters", f"{account.dense_parameters:,}", f"{account.narrow_parameters:,}"),
            ("bytes of weights", f"{account.dense_bytes:,}", f"{account.narrow_bytes:,}"),
            *((row["metric"], row["dense"], row["narrow"]) for row in _card_rows(self.measured)),
        ]
        cells = (f"<th>{name}</th><td>{dense}</td><td>{narrow}</td>" for name, dense, narrow in rows)
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        lines = "".join(f"<p>{escape(line)}</p>" for line in (self._title(), *self.facts.warnings))
        return f"{lines}<table><tr><th></th><th>dense</th><th>narrow</th></tr>{body}</table>"

    def _title(self) -> str:
        share = self.account.narrow_parameters / self.account.dense_parameters
        return (
            f"{type(self.model).__name__}, {self.facts.width} of {self.facts.dim} dimensions: "
            f"{self.account.narrow_parameters:,} parameters, {share:.0%} of the dense model's"
        )


@dataclass(frozen=True, slots=True)
class NarrowCheckpoint:
    """A narrow checkpoint in a folder.

    Attributes:
        folder: Where it is.
        account: Parameters and bytes of the dense and of the narrow model.
        tables: `measured` and `training`, where there are any; see `NarrowResult`.
        facts: How it was made.
    """

    folder: Path
    account: Account
    tables: Mapping[str, pl.DataFrame]
    facts: NarrowFacts


def narrow_in_memory(checkpoint: Checkpoint, settings: NarrowSettings, monitor: Monitor = SILENT) -> NarrowResult:
    """Cut the hidden size of a model, and return the narrow model. Nothing is written, and the model is not changed.

    Args:
        checkpoint: An opened checkpoint, or a model in memory.
        settings: With one width, and at most one basis.
        monitor: Who follows the run.

    Raises:
        InvalidArgument: A setting does not fit the model, or the text is too short.
        UnsupportedCheckpoint: The family is not narrowed.
    """
    began = time.monotonic()
    request = _request(checkpoint, settings, monitor)
    fitted = _fit(request, None)
    device = request.session.placement.device if request.session else place(checkpoint, device=settings.device).device
    model = stored_model(fitted.narrowing, fitted.trained, "cpu" if device == "map" else device)
    account, measured = account_of(fitted.narrowing), None
    if settings.evaluate:
        assert request.session is not None
        measured = _measure(request.session, _computed(request.session, model), account)
    facts = replace(fitted.facts, seconds=round(time.monotonic() - began, 1))
    return NarrowResult(model, account, measured, fitted.training, facts)


def narrow_to_folder(
    checkpoint: Checkpoint, out: Path, settings: NarrowSettings, command: str = "", monitor: Monitor = SILENT
) -> NarrowCheckpoint:
    """Write the narrow checkpoint to a folder that does not exist yet or is empty, with a model card.

    The state of training is kept in a hidden folder beside `out` until `out` is finished; the same call resumes it.

    Args:
        checkpoint: An opened checkpoint, or a model in memory.
        out: The folder.
        settings: With one width, and at most one basis.
        command: The command line, for the model card.
        monitor: Who follows the run.

    Raises:
        InvalidArgument: A setting does not fit the model, the text is too short, or the folder is not empty.
        UnsupportedCheckpoint: The family is not narrowed.
    """
    began = time.monotonic()
    out = out.resolve()
    _require_empty(out)
    request = _request(checkpoint, settings, monitor)
    folder = beside(out, "training") if request.trains else None
    lock: AbstractContextManager[None] = alone(folder) if folder is not None else nullcontext()
    with lock:
        fitted = _fit(request, folder)
        written = _write(request, replace(fitted, facts=replace(fitted.facts, command=command)), out, monitor)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    seconds = round(time.monotonic() - began, 1)
    return replace(written, facts=replace(written.facts, seconds=seconds))


def _write(request: _Request, fitted: _FittedModel, out: Path, monitor: Monitor) -> NarrowCheckpoint:
    """Write weights, config, tokenizer and model card, whole or not at all."""
    tables = {} if fitted.training is None else {"training": fitted.training}
    with whole_folder(out) as folder:
        monitor.announce(f"writing {readable_bytes(sum(t.n_bytes for t in fitted.narrowing.plan()))}")
        with writing(out):
            account = write_narrowing(fitted.narrowing, folder, fitted.trained)
        fitted.trained.clear()  # a model in float32
        if request.settings.evaluate:
            assert request.session is not None
            small = load_model(open_checkpoint(folder), request.session.placement)
            tables["measured"] = _measure(request.session, small, account)
        card = model_card(fitted.facts, account, _card_rows(tables.get("measured")))
        with writing(out):
            (folder / "README.md").write_text(card, encoding="utf-8")
    return NarrowCheckpoint(out, account, tables, fitted.facts)


def _require_empty(out: Path) -> None:
    check_folder(out)
    if out.exists() and any(out.iterdir()):
        raise InvalidArgument(f"{out}: is not empty, and a checkpoint is written whole; pass a new folder")


# ---- the request -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Request:
    """One narrow model that is going to be made; every setting fits the checkpoint.

    `session` is None where the embedding table alone gives the basis, and nothing is evaluated.
    """

    target: Target
    settings: NarrowSettings
    basis: str
    width: int
    session: NarrowingSession | None

    @property
    def trains(self) -> bool:
        """Whether a basis is learned or weights are healed."""
        return self.basis == LEARNED or self.settings.heal_steps > 0


def _request(checkpoint: Checkpoint, settings: NarrowSettings, monitor: Monitor) -> _Request:
    if len(settings.widths) != 1 or len(settings.bases) > 1:
        raise InvalidArgument("one narrow model has one of `widths` and one of `bases`")
    target = resolve_target(checkpoint, export=settings.export_as, tied=settings.tied)
    basis, width = (*settings.bases, DEFAULT)[0], settings.widths[0]
    check_width(target, width)
    check_basis(basis)
    trains = basis == LEARNED or settings.heal_steps > 0
    runs = trains or settings.evaluate or basis not in FROM_TABLE
    session = open_session(target, settings, monitor, trains=trains) if runs else None
    return _Request(target, settings, basis, width, session)


def _initial_facts(request: _Request, narrowing: Narrowing) -> NarrowFacts:
    """Return what is known before any training: the models, and the windows of each purpose."""
    target, session = request.target, request.session
    checkpoint = target.checkpoint
    facts = NarrowFacts(
        model=checkpoint.name, title=checkpoint.title, on_hub=checkpoint.revision is not None, dim=target.dim,
        width=request.width, basis=request.basis, family=narrowing.config.model_type, tied=target.tied,
        width_step=target.width_step, export=target.export, warnings=checkpoint.notes,
    )  # fmt: skip
    if session is None:
        return facts
    evaluated = _described(session, session.windows.evaluation) if request.settings.evaluate else None
    calibrated = _described(session, session.windows.calibration)
    return replace(
        facts, calibrated_on=calibrated, evaluated_on=evaluated, warnings=(*checkpoint.notes, *session.warnings)
    )


# ---- fitting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _FittedModel:
    """A narrow model before it is assembled: the weights that healing changed, and how they came about."""

    narrowing: Narrowing
    trained: dict[str, Tensor]
    training: pl.DataFrame | None
    facts: NarrowFacts


def _fit(request: _Request, folder: Path | None) -> _FittedModel:
    """Choose the basis, calibrate the gains, and train; `folder` is where the state of training is kept."""
    session = request.session
    if session is None:
        narrowing = _narrowing_of_table(request)
        return _FittedModel(narrowing, {}, None, _initial_facts(request, narrowing))
    candidate = make_candidate(session, request.basis, request.width, folder and folder / "basis")
    narrowing, learned = candidate.narrowing, candidate.points
    facts = _initial_facts(request, narrowing)
    if narrowing.tied:
        cost = tie_cost(session, candidate, request.basis)
        session.monitor.announce(f"one table for both sides costs {cost:+.4f} nats of KL")
        facts = replace(facts, tie_cost=cost)
    if not request.trains:
        return _FittedModel(narrowing, {}, None, facts)
    del candidate  # healing has a model of its own
    trained, learned_steps = _described(session, session.windows.training), learned[-1].step if learned else None
    facts = replace(facts, trained_on=trained, learned_steps=learned_steps)
    if not request.settings.heal_steps:
        return _FittedModel(narrowing, {}, _training_table({"basis": learned}), facts)
    healed = heal_candidate(session, narrowing, folder and folder / "healing")
    facts = replace(facts, healed=bool(healed.trained), heal_steps=healed.steps, lora=request.settings.lora)
    stages = {"basis": learned, "norms": healed.norms, "weights": healed.weights}
    return _FittedModel(narrowing, dict(healed.trained), _training_table(stages), facts)


def _narrowing_of_table(request: _Request) -> Narrowing:
    """Return the narrowing of a basis that the embedding table alone gives, with the usual gains."""
    target, table = request.target, table_summary(request.target.checkpoint)
    centred, seed = target.layout.centred, request.settings.seed
    return plan_narrowing(target, make_basis(request.basis, table, request.width, centred=centred, seed=seed))


def _training_table(stages: Mapping[str, Sequence[Point]]) -> pl.DataFrame:
    """Return the KL on held-out text, stage by stage."""
    rows = [(stage, p.step, p.held_out, p.training) for stage, points in stages.items() for p in points]
    schema = {"stage": pl.String, "step": pl.Int64, "held_out_kl": pl.Float64, "training_kl": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


# ---- measuring -------------------------------------------------------------------------------------------------------


def _computed(session: NarrowingSession, model: PreTrainedModel) -> PreTrainedModel:
    """Return a model in the dtype and on the device of the computation: itself where it is so already."""
    if str(model.dtype).removeprefix("torch.") == session.placement.dtype:
        return model
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return assemble(model.config, weights, session.placement)


def _measure(session: NarrowingSession, small: PreTrainedModel, account: Account) -> pl.DataFrame:
    """Return one row per number: of the dense and of the narrow model, on the same windows, timed in turns."""
    session.monitor.announce(f"evaluating on {len(session.windows.evaluation)} windows, and timing both models")
    dense, narrow = evaluate_model(session, session.dense()), evaluate_model(session, small)
    speed = throughput({"dense": session.dense(), "narrow": small}, read=min(LENGTH, session.length))
    rows = [
        ("parameters", account.dense_parameters, account.narrow_parameters, None, None),
        ("bytes", account.dense_bytes, account.narrow_bytes, None, None),
        *(_evaluated(title, getattr(dense, name), getattr(narrow, name)) for name, title in EVALUATED.items()),
        *(
            _timed(title, *(getattr(speed[side], name) for side in ("dense", "narrow")))
            for name, title in TIMED.items()
        ),
    ]
    schema = {
        "metric": pl.String, "dense": pl.Float64, "narrow": pl.Float64, "low": pl.Float64, "high": pl.Float64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row", strict=False)


_Row = tuple[str, float, float, float | None, float | None]


def _evaluated(title: str, dense: Interval, narrow: Interval) -> _Row:
    return title, dense.value, narrow.value, narrow.low, narrow.high


def _timed(title: str, dense: Spread, narrow: Spread) -> _Row:
    return title, dense.median, narrow.median, narrow.low, narrow.high


def _card_rows(measured: pl.DataFrame | None) -> list[dict[str, str]]:
    """Return the measured numbers as the model card prints them; the sizes are there already."""
    if measured is None:
        return []
    rows = [row for row in measured.iter_rows(named=True) if row["metric"] not in ("parameters", "bytes")]
    return [{"metric": r["metric"], "dense": f"{r['dense']:.4g}", "narrow": _with_interval(r)} for r in rows]


def _with_interval(row: Mapping[str, Any]) -> str:
    interval = "" if row["low"] is None else f" ({row['low']:.4g} to {row['high']:.4g})"
    return f"{row['narrow']:.4g}{interval}"


def _described(session: NarrowingSession, windows: Sequence[Window]) -> str:
    return f"{len(windows):,} windows of {session.length} tokens of {', '.join(session.texts)}"
