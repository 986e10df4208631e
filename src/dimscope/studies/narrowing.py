"""Narrowing: a checkpoint cut to a smaller hidden size, weighed, judged beside the dense one, and written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dimscope.checkpoints.model import Placement, load_model, place
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.errors import InvalidArgument
from dimscope.evaluation.judging import Judgement, baseline, judge
from dimscope.evaluation.throughput import Throughput, throughput
from dimscope.interventions.perturbations import TableSummary, summarise
from dimscope.narrowing.bases import FROM_TEXT, check_basis, make_basis
from dimscope.narrowing.calibration import Calibration, calibrate, calibrated_gains
from dimscope.narrowing.card import model_card
from dimscope.narrowing.layouts import check_width, layout_of
from dimscope.narrowing.projection import Account, plan_cut, write_cut
from dimscope.representations.embedding import open_table
from dimscope.representations.hidden_states import run_batch
from dimscope.representations.windows import Window, middle_windows
from dimscope.results import check_folder
from dimscope.studies.damage_measures import BITS, KL, LOSS, TOP_1, TOP_5
from dimscope.studies.reading import named_texts, window_length, windows_at_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH, WINDOWS = 512, 16  # tokens of a window, and windows: every other one calibrates, the rest judge
EXACT = 1e-4  # share of the largest logit by which a rotation in float32 may change one


@dataclass(frozen=True, slots=True)
class NarrowSettings:
    """What is asked."""

    width: int
    basis: str = "normalised"
    texts: tuple[str, ...] = ("builtin:prose",)
    windows: int | None = None  # of the texts together; None is WINDOWS, or as many as there are
    length: int | None = None
    judged: bool = True  # judged and timed beside the dense model
    export: str | None = None  # the family that is written; None is the model's own
    tied: bool = False  # one table for both, as the dense model has
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


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


def verify_rotation(checkpoint: Checkpoint, settings: NarrowSettings) -> Verification:
    """Folds the norms and rotates at full width, which must change nothing, and says what it does change.

    Both models run in float32, whatever they are stored in: rounding to bfloat16 would hide a slip.
    Raises what planning the cut, loading and reading raise.
    """
    dim = checkpoint.input_table.shape[1]
    layout = layout_of(checkpoint)
    turned = make_basis("random", _summary(checkpoint), dim, centred=layout.centred, seed=settings.seed)
    cut = plan_cut(checkpoint, turned, dtype=torch.float32, export=settings.export)
    placement = Placement("float32", place(checkpoint, device=settings.device).device)
    [window] = _windows(checkpoint, settings, 1)
    with tempfile.TemporaryDirectory(prefix="dimscope-") as temporary:
        write_cut(cut, Path(temporary))
        dense = _logits(load_model(checkpoint, placement, trust_remote_code=settings.trust_remote_code), window)
        after = _logits(load_model(open_checkpoint(temporary), placement), window)
    return Verification(
        float((dense - after).abs().max()), float(dense.abs().max()),
        float((dense.argmax(dim=1) == after.argmax(dim=1)).double().mean()), len(dense),
    )  # fmt: skip


def _logits(model: PreTrainedModel, window: Window) -> Float[Tensor, "t v"]:
    found: list[Tensor] = []
    run_batch(model, window.ids[None], logits=lambda rows, block: found.append(block.cpu()))
    return torch.cat(found)


def narrow(
    checkpoint: Checkpoint,
    out: Path,
    settings: NarrowSettings,
    command: str,
    announce: Callable[[str], object] | None = None,
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Writes the narrow checkpoint to a folder that is not there yet, or empty; returns the facts and what was measured.

    Calibration and judging take every other window of the texts each. Raises InvalidArgument, and what opening,
    running and reading raise; then there is no folder.
    """
    began = time.monotonic()
    say = announce or (lambda line: None)
    layout = layout_of(checkpoint)
    check_width(checkpoint, layout, settings.width)
    check_basis(settings.basis)
    check_free(out)
    wanted = settings.judged or settings.basis in FROM_TEXT
    windows = _windows(checkpoint, settings, settings.windows) if wanted else []
    placement = place(checkpoint, dtype=settings.dtype, device=settings.device)
    batch = windows_at_once(placement, len(windows[0].ids)) if windows else 1
    dense = load_model(checkpoint, placement, trust_remote_code=settings.trust_remote_code) if wanted else None
    calibration = None
    if settings.basis in FROM_TEXT and dense is not None:
        say(f"calibrating on {len(windows[::2])} windows of {len(windows[0].ids)} tokens")
        calibration = calibrate(dense, layout, windows[::2], batch)
    basis, gains = _basis(checkpoint, settings, calibration)
    cut = plan_cut(checkpoint, basis, gains)
    with _whole_folder(out) as folder:
        say(f"writing {sum(t.n_bytes for t in cut.plan()) / 1e9:.2f} GB")
        account = write_cut(cut, folder)
        measured = pl.DataFrame()
        if dense is not None and settings.judged:
            say(f"judging on {len(windows[1::2])} windows, and timing both models")
            measured = _measured(dense, folder, placement, windows[1::2] or windows, batch, account)
        facts = _facts(checkpoint, settings, account, windows, command)
        (folder / "README.md").write_text(model_card(facts | {"measured": _told(measured)}), encoding="utf-8")
    return facts | {"seconds": round(time.monotonic() - began, 1)}, measured


def check_free(out: Path) -> None:
    """Raises InvalidArgument where a folder is not empty, or cannot be written."""
    check_folder(out)
    if out.exists() and any(out.iterdir()):
        raise InvalidArgument(f"{out}: is not empty, and a checkpoint is written whole; give a new folder")


@contextmanager
def _whole_folder(out: Path) -> Generator[Path]:
    """A folder beside `out` that takes its place once everything in it is on disk; what an interrupted run left there goes first."""
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            with path.open("rb+") as f:
                os.fsync(f.fileno())
        if out.exists():
            out.rmdir()  # empty: `check_free`
        partial.replace(out)
    except OSError as e:
        shutil.rmtree(partial, ignore_errors=True)
        raise InvalidArgument(f"{out} cannot be written: {e.strerror or e}") from e
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _summary(checkpoint: Checkpoint) -> TableSummary:
    return summarise(open_table(checkpoint, advice="a model with such a table is not narrowed"))


def _basis(
    checkpoint: Checkpoint, settings: NarrowSettings, calibration: Calibration | None
) -> tuple[Float[Tensor, "d k"], dict[str, float] | None]:
    """The basis, and the gains of the norms where a calibration pass tells them."""
    if calibration is None:
        return FROM_TABLE[settings.basis](_summary(checkpoint), settings.width, settings.seed), None
    basis = FROM_TEXT[settings.basis](calibration, settings.width)
    return basis, calibrated_gains(calibration, basis)


def _windows(checkpoint: Checkpoint, settings: NarrowSettings, count: int | None) -> list[Window]:
    tokenizer = require_tokenizer(checkpoint.source)
    length = window_length(checkpoint, settings.length, LENGTH)
    texts = named_texts(settings.texts).values()
    return [w for text in texts for w in middle_windows(text, tokenizer, length=length, count=count, most=WINDOWS)]


def _measured(
    dense: PreTrainedModel, folder: Path, placement: Placement, windows: Sequence[Window], batch: int, account: Account
) -> pl.DataFrame:
    """One row per number: of the dense model and of the narrow one, judged on the same windows and timed in turns."""
    base = baseline(dense, windows, batch)
    small = load_model(open_checkpoint(folder), placement)
    was, now = judge(dense, base), judge(small, base)
    speed = throughput({"dense": dense, "narrow": small}, read=min(512, len(windows[0].ids)))
    rows = [
        ("parameters", account.dense_parameters, account.narrow_parameters),
        ("bytes", account.dense_bytes, account.narrow_bytes),
        *_judged(was, now),
        *_timed(speed["dense"], speed["narrow"]),
    ]
    return pl.DataFrame(
        rows, schema={"metric": pl.String, "dense": pl.Float64, "narrow": pl.Float64}, orient="row", strict=False
    )


def _judged(was: Judgement, now: Judgement) -> list[tuple[str, float, float]]:
    names = {"loss": LOSS, "bits_per_byte": BITS, "kl": KL, "top_1": TOP_1, "top_5": TOP_5}
    return [(told, getattr(was, name), getattr(now, name)) for name, told in names.items()]


def _timed(was: Throughput, now: Throughput) -> list[tuple[str, float, float]]:
    return [
        ("prefill, tokens per second", was.prefill, now.prefill),
        ("decode, tokens per second", was.decode, now.decode),
    ]


def _told(measured: pl.DataFrame) -> list[dict[str, str]]:
    rows = [row for row in measured.iter_rows(named=True) if row["metric"] not in ("parameters", "bytes")]
    return [{"metric": r["metric"], "dense": f"{r['dense']:.4g}", "narrow": f"{r['narrow']:.4g}"} for r in rows]


def _facts(
    checkpoint: Checkpoint, settings: NarrowSettings, account: Account, windows: Sequence[Window], command: str
) -> dict[str, Any]:
    judged = windows[1::2] or windows
    text = ", ".join(settings.texts)
    on = f"{len(judged)} windows of {len(judged[0].ids)} tokens of {text}" if settings.judged and judged else None
    return {
        "model": checkpoint.name, "title": checkpoint.title, "dim": checkpoint.input_table.shape[1],
        "width": settings.width, "basis": settings.basis, "account": asdict(account), "command": command, "judged_on": on,
    }  # fmt: skip
