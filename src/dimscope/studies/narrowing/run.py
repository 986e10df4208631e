"""Narrowing one model: to a smaller model in memory, or to a folder that is written whole or not at all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dimscope.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dimscope.checkpoints.families import check_width, layout_of
from dimscope.checkpoints.model import load_model, place
from dimscope.errors import InvalidArgument
from dimscope.evaluation.metrics import BITS, KL, LOSS, TOP_1
from dimscope.evaluation.throughput import throughput
from dimscope.narrowing.bases import FROM_TABLE, LEARNED, check_basis, make_basis
from dimscope.narrowing.card import model_card
from dimscope.narrowing.conversion import check_export, keeps_tie
from dimscope.narrowing.projection import Account, Cut, account_of, assemble, plan_cut, stored_model, write_cut
from dimscope.narrowing.training import Point
from dimscope.storage import alone, beside, check_folder, whole_folder, writing
from dimscope.studies.narrowing.session import LENGTH, Bench, table_summary
from dimscope.studies.narrowing.settings import NarrowSettings
from dimscope.studies.study import SILENT, Monitor
from dimscope.texts.windows import Window
from dimscope.units import readable_bytes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

EVALUATED = {"loss": LOSS, "bits_per_byte": BITS, "kl": KL, "top_1": TOP_1}
TIMED = {"prefill": "prefill, tokens per second", "decode": "decode, tokens per second"}


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class NarrowResult:
    """A narrow model in memory.

    Attributes:
        model: An ordinary `PreTrainedModel` in the stored dtype of the dense one; `save_pretrained` writes it.
        account: Parameters and bytes of the dense and of the narrow model.
        measured: One row per number: `metric`, `dense`, `narrow`; None without `evaluate`.
        training: KL on held-out text while it was trained; None where nothing was trained.
        facts: How it was made.
    """

    model: PreTrainedModel
    account: Account
    measured: pl.DataFrame | None
    training: pl.DataFrame | None
    facts: Mapping[str, Any]

    def __repr__(self) -> str:
        """Return the sizes, and what was measured, in a few lines."""
        share = self.account.narrow_parameters / self.account.dense_parameters
        line = (
            f"{type(self.model).__name__}, {self.facts['width']} of {self.facts['dim']} dimensions: "
            f"{self.account.narrow_parameters:,} parameters, {share:.0%} of the dense model's"
        )
        return line if self.measured is None else f"{line}\n{self.measured}"


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
    facts: Mapping[str, Any]


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
    model = stored_model(fitted.cut, fitted.trained, "cpu" if device == "map" else device)
    facts = fitted.facts | {"family": fitted.cut.config.model_type}
    measured = None
    if settings.evaluate:
        assert request.session is not None
        facts["judged_on"] = _described(request.session, request.session.reading.judged)
        measured = _measure(request.session, _computed(request.session, model), account_of(fitted.cut))
    facts["seconds"] = round(time.monotonic() - began, 1)
    return NarrowResult(model, account_of(fitted.cut), measured, fitted.training, facts)


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
    state = beside(out, "training") if request.trains else None
    lock: AbstractContextManager[None] = alone(state) if state is not None else nullcontext()
    with lock:
        fitted = _fit(request, state)
        tables = {} if fitted.training is None else {"training": fitted.training}
        facts = fitted.facts | {"command": command, "family": fitted.cut.config.model_type}
        with whole_folder(out) as folder:
            monitor.announce(f"writing {readable_bytes(sum(t.n_bytes for t in fitted.cut.plan()))}")
            with writing(out):
                account = write_cut(fitted.cut, folder, fitted.trained)
            fitted.trained.clear()  # a model in float32
            if settings.evaluate:
                assert request.session is not None
                facts["judged_on"] = _described(request.session, request.session.reading.judged)
                small = load_model(open_checkpoint(folder), request.session.placement)
                tables["measured"] = _measure(request.session, small, account)
            card = model_card(facts, account, _card_rows(tables.get("measured")))
            with writing(out):
                (folder / "README.md").write_text(card, encoding="utf-8")
        if state is not None:
            shutil.rmtree(state, ignore_errors=True)
    return NarrowCheckpoint(out, account, tables, facts | {"seconds": round(time.monotonic() - began, 1)})


def _require_empty(out: Path) -> None:
    check_folder(out)
    if out.exists() and any(out.iterdir()):
        raise InvalidArgument(f"{out}: is not empty, and a checkpoint is written whole; pass a new folder")


# ---- the request -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Request:
    """One narrow model that is going to be made; every setting fits the checkpoint."""

    checkpoint: Checkpoint
    settings: NarrowSettings
    session: Bench | None
    """None where the embedding table alone gives the basis, and nothing is evaluated."""
    basis: str
    width: int
    tied: bool
    export: str | None

    @property
    def trains(self) -> bool:
        """Whether a basis is learned or weights are healed."""
        return self.basis == LEARNED or self.settings.heal_steps > 0


def _request(checkpoint: Checkpoint, settings: NarrowSettings, monitor: Monitor) -> _Request:
    if len(settings.widths) != 1 or len(settings.bases) > 1:
        raise InvalidArgument("one narrow model has one of `widths` and one of `bases`")
    basis, width = (*settings.bases, "normalised")[0], settings.widths[0]
    layout, export = layout_of(checkpoint), check_export(checkpoint, settings.export_as)
    check_width(checkpoint, layout, width, export)
    tied = keeps_tie(checkpoint, layout, settings.tied)
    check_basis(basis)
    trains = basis == LEARNED or settings.heal_steps > 0
    session = None
    if trains or settings.evaluate or basis not in FROM_TABLE:
        session = Bench(checkpoint, settings, trains=trains, announce=monitor.announce)
    return _Request(checkpoint, settings, session, basis, width, tied, export)


def _initial_facts(request: _Request) -> dict[str, Any]:
    checkpoint, settings = request.checkpoint, request.settings
    return {
        "model": checkpoint.name, "title": checkpoint.title, "dim": checkpoint.input_table.shape[1], "width": request.width,
        "basis": request.basis, "heal": settings.heal_steps, "lora": settings.lora, "on_hub": checkpoint.revision is not None,
        "tied": request.tied, "export": request.export,
    }  # fmt: skip


# ---- fitting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fitted:
    """A narrow model before it is assembled: the cut, the weights that healing changed, and how they came about."""

    cut: Cut
    trained: dict[str, Tensor]
    training: pl.DataFrame | None
    facts: dict[str, Any] = field(default_factory=dict)


def _fit(request: _Request, state: Path | None) -> _Fitted:
    """Choose the basis, calibrate the gains, and train what is to be trained; `state` is where training is kept."""
    facts = _initial_facts(request)
    session = request.session
    if session is None:
        layout = layout_of(request.checkpoint)
        table = table_summary(request.checkpoint)
        basis = make_basis(request.basis, table, request.width, centred=layout.centred, seed=request.settings.seed)
        cut = plan_cut(request.checkpoint, basis, export=request.settings.export_as, tied=request.tied)
        return _Fitted(cut, {}, None, facts)
    candidate = session.candidate(request.basis, request.width, store=state and state / "basis")
    facts["calibrated_on"] = _described(session, session.reading.calibration)
    if candidate.cut.tied:
        facts["tie_cost"] = session.tie_cost(candidate, request.basis)
        session.say(f"one table for both sides costs {facts['tie_cost']:+.4f} nats of KL")
    cut, learned = candidate.cut, candidate.learned
    if not request.trains:
        return _Fitted(cut, {}, None, facts)
    del candidate  # healing has a model of its own, and both would be in memory
    facts["trained_on"] = _described(session, session.reading.training)
    stages: dict[str, Sequence[Point]] = {"basis": learned}
    facts |= {"steps": learned[-1].step} if learned else {}
    trained: dict[str, Tensor] = {}
    facts["healed"] = False
    if request.settings.heal_steps:
        healed = session.heal(cut, store=state and state / "healing")
        trained, stages = dict(healed.trained), stages | {"norms": healed.norms, "weights": healed.weights}
        facts |= {"healed": bool(trained), "healing_steps": healed.steps}
    return _Fitted(cut, trained, _training_table(stages), facts)


def _training_table(stages: Mapping[str, Sequence[Point]]) -> pl.DataFrame:
    """Return the KL on held-out text, stage by stage."""
    rows = [(stage, p.step, p.held_out, p.training) for stage, points in stages.items() for p in points]
    schema = {"stage": pl.String, "step": pl.Int64, "held_out_kl": pl.Float64, "training_kl": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


# ---- measuring -------------------------------------------------------------------------------------------------------


def _computed(session: Bench, model: PreTrainedModel) -> PreTrainedModel:
    """Return a model in the dtype and on the device of the computation: itself where it is so already."""
    if str(model.dtype).removeprefix("torch.") == session.placement.dtype:
        return model
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return assemble(model.config, weights, session.placement)


def _measure(session: Bench, small: PreTrainedModel, account: Account) -> pl.DataFrame:
    """Return one row per number: of the dense and of the narrow model, on the same windows, timed in turns."""
    session.say(f"evaluating on {len(session.reading.judged)} windows, and timing both models")
    dense, narrow = session.judge(session.dense), session.judge(small)
    speed = throughput({"dense": session.dense, "narrow": small}, read=min(LENGTH, session.length))
    rows = [
        ("parameters", account.dense_parameters, account.narrow_parameters),
        ("bytes", account.dense_bytes, account.narrow_bytes),
        *((title, getattr(dense, name), getattr(narrow, name)) for name, title in EVALUATED.items()),
        *((title, getattr(speed["dense"], name), getattr(speed["narrow"], name)) for name, title in TIMED.items()),
    ]
    schema = {"metric": pl.String, "dense": pl.Float64, "narrow": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row", strict=False)


def _card_rows(measured: pl.DataFrame | None) -> list[dict[str, str]]:
    """Return the measured numbers as the model card prints them; the sizes are there already."""
    if measured is None:
        return []
    rows = [row for row in measured.iter_rows(named=True) if row["metric"] not in ("parameters", "bytes")]
    return [{"metric": r["metric"], "dense": f"{r['dense']:.4g}", "narrow": f"{r['narrow']:.4g}"} for r in rows]


def _described(session: Bench, windows: Sequence[Window]) -> str:
    return f"{len(windows):,} windows of {session.length} tokens of {', '.join(session.texts)}"
