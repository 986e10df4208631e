"""Narrowing: a checkpoint cut to a smaller hidden size, weighed, judged beside the dense one, and written whole or not at all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.activations.forward import run_batch
from dimscope.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dimscope.checkpoints.families import check_width, layout_of
from dimscope.checkpoints.model import Placement, load_model, place
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.errors import InvalidArgument
from dimscope.evaluation.metrics import BITS, KL, LOSS, TOP_1
from dimscope.evaluation.throughput import Throughput, throughput
from dimscope.narrowing.bases import FROM_TABLE, LEARNED, check_basis, make_basis
from dimscope.narrowing.card import model_card
from dimscope.narrowing.conversion import check_export, keeps_tie
from dimscope.narrowing.projection import Account, Cut, narrow_model, plan_cut, write_cut
from dimscope.narrowing.training import Point
from dimscope.storage import alone, beside, check_folder, whole_folder, writing
from dimscope.studies.narrowing.session import LENGTH, Bench, table_summary
from dimscope.studies.narrowing.settings import NarrowSettings
from dimscope.studies.reading import named_texts, window_length
from dimscope.texts.windows import Window, middle_windows
from dimscope.units import readable_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXACT = 1e-4  # share of the largest logit by which a rotation in float32 may change one
JUDGED = {"loss": LOSS, "bits_per_byte": BITS, "kl": KL, "top_1": TOP_1}
TIMED = {"prefill": "prefill, tokens per second", "decode": "decode, tokens per second"}


@dataclass(frozen=True, slots=True)
class Verification:
    """A model rotated at full width against itself, in float32: the largest difference of a logit, beside the largest logit."""

    difference: float
    largest: float
    same_first: float  # share of positions with the same first choice
    n_positions: int

    @property
    def holds(self) -> bool:
        return self.difference <= EXACT * self.largest


def basis_of(settings: NarrowSettings) -> str:
    """The basis of one narrow model."""
    return settings.bases[0] if settings.bases else "normalised"


def verify_rotation(checkpoint: Checkpoint, settings: NarrowSettings) -> Verification:
    """Folds the norms and rotates at full width, which must change nothing, and says what it does change.

    Both models run in float32, whatever they are stored in: rounding to bfloat16 would hide a slip.
    Raises what planning the cut, loading and reading raise.
    """
    dim = checkpoint.input_table.shape[1]
    layout = layout_of(checkpoint)
    tied = keeps_tie(checkpoint, layout, settings.tied)
    turn = make_basis("random", table_summary(checkpoint), dim, centred=layout.centred, seed=settings.seed)
    cut = plan_cut(checkpoint, turn, dtype=torch.float32, export=settings.export_as, tied=tied)
    placement = Placement("float32", place(checkpoint, device=settings.device).device)
    text = next(iter(named_texts(settings.texts).values()))
    length = window_length(checkpoint, settings.length, LENGTH)
    [window] = middle_windows(text, require_tokenizer(checkpoint.source), length=length, count=1)
    dense = _logits(load_model(checkpoint, placement, trust_remote_code=settings.trust_remote_code), window)
    turned = _logits(narrow_model(cut, placement), window)
    return Verification(
        float((dense - turned).abs().max()), float(dense.abs().max()),
        float((dense.argmax(dim=1) == turned.argmax(dim=1)).double().mean()), len(dense),
    )  # fmt: skip


def _logits(model: PreTrainedModel, window: Window) -> Float[Tensor, "t v"]:
    found: list[Tensor] = []
    run_batch(model, window.ids[None], logits=lambda rows, block: found.append(block.cpu()))
    return torch.cat(found)


def narrow(
    checkpoint: Checkpoint,
    out: Path,
    width: int,
    settings: NarrowSettings,
    command: str,
    announce: Callable[[str], object] | None = None,
) -> tuple[dict[str, Any], dict[str, pl.DataFrame]]:
    """Writes the narrow checkpoint to a folder that is not there yet, or empty; returns the facts, and tables by name.

    `measured` has the dense and the narrow model side by side, `training` the held-out KL on the way. What training has
    reached is kept in a hidden folder beside `out` until that is there, and the same call goes on from it.
    Raises InvalidArgument, and what opening, running and reading raise; then there is no folder.
    """
    began = time.monotonic()
    say = announce or (lambda line: None)
    layout, export = layout_of(checkpoint), check_export(checkpoint, settings.export_as)
    check_width(checkpoint, layout, width, export)
    tied = keeps_tie(checkpoint, layout, settings.tied)
    check_basis(basis_of(settings))
    out = out.resolve()
    check_free(out)
    trains = basis_of(settings) == LEARNED or settings.heal_steps > 0
    tables: dict[str, pl.DataFrame] = {}
    facts = _facts(checkpoint, width, settings, command) | {"tied": tied, "export": export}
    if trains or settings.evaluate or basis_of(settings) not in FROM_TABLE:
        bench = Bench(checkpoint, settings, trains=trains, announce=announce)
    else:
        bench = None
    store = beside(out, "training")
    with alone(store) if trains else nullcontext():
        if bench is not None:
            cut, trained, told, tables = _made(bench, width, store)
            facts |= told
        else:
            directions = make_basis(
                basis_of(settings), table_summary(checkpoint), width, centred=layout.centred, seed=settings.seed
            )
            cut, trained = plan_cut(checkpoint, directions, export=settings.export_as, tied=tied), {}
        with whole_folder(out) as folder:
            say(f"writing {readable_bytes(sum(t.n_bytes for t in cut.plan()))}")
            with writing(out):
                account = write_cut(cut, folder, trained)
            del trained  # a model in float32
            facts |= {"account": asdict(account), "family": cut.config.model_type}
            if bench is not None and settings.evaluate:
                say(f"judging on {len(bench.reading.judged)} windows, and timing both models")
                tables["measured"] = _measured(bench, folder, account)
                facts["judged_on"] = _on(bench, bench.reading.judged)
            measured = _told(tables["measured"]) if "measured" in tables else []
            with writing(out):
                (folder / "README.md").write_text(model_card(facts | {"measured": measured}), encoding="utf-8")
        if trains:
            shutil.rmtree(store, ignore_errors=True)
    return facts | {"seconds": round(time.monotonic() - began, 1)}, tables


def _made(
    bench: Bench, width: int, store: Path
) -> tuple[Cut, Mapping[str, Tensor], dict[str, Any], dict[str, pl.DataFrame]]:
    """What is to be written: the cut, the weights that were trained, what to tell of them, and the table of the training."""
    settings = bench.settings
    made = bench.candidate(basis_of(settings), width, store=store / "basis")
    told: dict[str, Any] = {"calibrated_on": _on(bench, bench.reading.calibration)}
    if made.cut.tied:
        told["tie_cost"] = bench.tie_cost(made, basis_of(settings))
        bench.say(f"keeping one table for both sides costs {told['tie_cost']:+.4f} nats of KL")
    cut, learned = made.cut, made.learned
    del made  # its model is one too many beside those of healing
    healed = bench.heal(cut, store=store / "healing") if settings.heal_steps else None
    if not bench.trains:
        return cut, {}, told, {}
    told |= {"trained_on": _on(bench, bench.reading.training), "healed": bool(healed and healed.trained)}
    told |= {"healing_steps": healed.steps} if healed else {}
    told |= {"steps": learned[-1].step} if learned else {}
    stages = {"basis": learned} | ({"norms": healed.norms, "weights": healed.weights} if healed else {})
    return cut, healed.trained if healed else {}, told, {"training": _training(stages)}


def _training(stages: Mapping[str, Sequence[Point]]) -> pl.DataFrame:
    """Held-out KL on the way, stage by stage."""
    rows = [(stage, p.step, p.held_out, p.training) for stage, points in stages.items() for p in points]
    schema = {"stage": pl.String, "step": pl.Int64, "held_out_kl": pl.Float64, "training_kl": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def check_free(out: Path) -> None:
    """Raises InvalidArgument where a folder is not empty, or cannot be written."""
    check_folder(out)
    if out.exists() and any(out.iterdir()):
        raise InvalidArgument(f"{out}: is not empty, and a checkpoint is written whole; give a new folder")


# ---- what is told of it ---------------------------------------------------------------------------------------------


def _measured(bench: Bench, folder: Path, account: Account) -> pl.DataFrame:
    """One row per number: of the dense model and of the narrow one as it is on disk, on the same windows, timed in turns."""
    small = load_model(open_checkpoint(folder), bench.placement)
    was, now = bench.judge(bench.dense), bench.judge(small)
    speed = throughput({"dense": bench.dense, "narrow": small}, read=min(LENGTH, bench.length))
    rows = [
        ("parameters", account.dense_parameters, account.narrow_parameters),
        ("bytes", account.dense_bytes, account.narrow_bytes),
        *((told, getattr(was, name), getattr(now, name)) for name, told in JUDGED.items()),
        *_timed(speed),
    ]
    return pl.DataFrame(
        rows, schema={"metric": pl.String, "dense": pl.Float64, "narrow": pl.Float64}, orient="row", strict=False
    )


def _timed(speed: Mapping[str, Throughput]) -> list[tuple[str, float, float]]:
    return [(told, getattr(speed["dense"], name), getattr(speed["narrow"], name)) for name, told in TIMED.items()]


def _told(measured: pl.DataFrame) -> list[dict[str, str]]:
    rows = [row for row in measured.iter_rows(named=True) if row["metric"] not in ("parameters", "bytes")]
    return [{"metric": r["metric"], "dense": f"{r['dense']:.4g}", "narrow": f"{r['narrow']:.4g}"} for r in rows]


def _on(bench: Bench, windows: Sequence[Window]) -> str:
    return f"{len(windows):,} windows of {bench.length} tokens of {', '.join(bench.texts)}"


def _facts(checkpoint: Checkpoint, width: int, settings: NarrowSettings, command: str) -> dict[str, Any]:
    return {
        "model": checkpoint.name, "title": checkpoint.title, "dim": checkpoint.input_table.shape[1], "width": width,
        "basis": basis_of(settings), "heal": settings.heal_steps, "lora": settings.lora, "command": command,
        "on_hub": checkpoint.revision is not None,
    }  # fmt: skip
