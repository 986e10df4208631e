"""The rows of a plan: candidates made, evaluated and timed, one after the other. Each is stored before the next begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dimscope.checkpoints.tensors import DTYPES
from dimscope.evaluation.evaluate import evaluation_of
from dimscope.evaluation.throughput import speed_ratio, throughput
from dimscope.evaluation.yardstick import probability_within
from dimscope.narrowing.bases import LEARNED
from dimscope.storage import Store
from dimscope.studies.narrowing.advice import DENSE, DROP, HEALED, NARROW, ROUND, SCHEMA, SPEEDS
from dimscope.studies.narrowing.candidates import heal_candidate, make_candidate, quantised_model, shallower_model
from dimscope.studies.narrowing.session import LENGTH, NarrowingSession, evaluate_model, session_recipe
from dimscope.texts.window_sums import Interval

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel

BITS = 8
EVALUATED = ("loss", "loss_rise", "kl", "top_1")


@dataclass(frozen=True, slots=True)
class PlanRun:
    """A session, and where its rows are stored."""

    session: NarrowingSession
    store: Store

    @property
    def training_folder(self) -> Path | None:
        """Return where states of training are kept until the plan is finished; None in memory."""
        return None if self.store.folder is None else self.store.folder / "training"

    def folder_of(self, basis: str, width: int) -> Path | None:
        """Return where the training of one candidate is kept."""
        return self.training_folder and self.training_folder / f"{basis}-{width}"


@dataclass(frozen=True, slots=True)
class _Row:
    """One row that is going to be computed.

    Attributes:
        name: The name of its table.
        identity: The columns that say what it is.
        make: Makes the model.
        timed: Whether its speed is measured.
        bits: Bits of rounded weights.
        recipe: What it depends on, beside `identity` and what all rows depend on.
    """

    name: str
    identity: Mapping[str, Any]
    make: Callable[[], PreTrainedModel]
    timed: bool = True
    recipe: Mapping[str, Any] | None = None
    bits: int | None = None


def candidate_recipe(session: NarrowingSession, basis: str, width: int, *, healed: bool = False) -> dict[str, Any]:
    """Return what a narrow model depends on."""
    settings = session.settings
    learned = {"learn": settings.learn_steps} if basis == LEARNED else {}
    healing = {"heal": settings.heal_steps, "lora": settings.lora} if healed and settings.heal_steps else {}
    return {"basis": basis, "width": width, "recipe": session_recipe(session), **learned, **healing}


def dense_row(run: PlanRun) -> pl.DataFrame:
    """Return the row of the dense model."""
    identity = {"method": DENSE, "tied": run.session.target.checkpoint.tied}
    return _stored_row(run, _Row("dense", identity, run.session.dense))


def narrow_rows(run: PlanRun, width: int, bases: Sequence[str]) -> list[pl.DataFrame]:
    """Return one row per basis; the speed of the first is that of all, because the basis does not change it."""
    session, rows = run.session, list[pl.DataFrame]()
    for basis in bases:
        identity = {"method": NARROW, "basis": basis, "width": width, "tied": session.target.tied}
        recipe = candidate_recipe(session, basis, width)

        def make(basis: str = basis) -> PreTrainedModel:
            return make_candidate(session, basis, width, run.folder_of(basis, width)).model

        row = _stored_row(run, _Row(f"{basis}-{width}", identity, make, not rows, recipe))
        rows.append(row.with_columns(rows[0].select(SPEEDS)) if rows else row)
    return rows


def healed_row(run: PlanRun, shown: Mapping[str, Any]) -> pl.DataFrame:
    """Return the row of a candidate after healing, which does not change its speed."""
    basis, width = shown["basis"], shown["width"]
    identity = {"method": HEALED, "basis": basis, "width": width, "tied": run.session.target.tied}
    recipe = candidate_recipe(run.session, basis, width, healed=True)
    row = _Row(f"{basis}-{width}-healed", identity, lambda: final_model(run, basis, width), False, recipe)
    return _stored_row(run, row).with_columns(pl.lit(shown[name]).alias(name) for name in SPEEDS)


def shallower_rows(run: PlanRun) -> list[pl.DataFrame]:
    """Return the rows of the dense model without some of its layers, in a few steps up to half of them."""
    n_layers = int(run.session.target.config.num_hidden_layers)
    numbers = {n for n in (1, 2, 3, *(round(n_layers / part) for part in (6, 4, 3, 2))) if 0 < n <= n_layers / 2}
    tied = run.session.target.checkpoint.tied
    return [
        _stored_row(
            run,
            _Row(
                f"without-{n}",
                {"method": DROP, "layers": n_layers - n, "tied": tied},
                lambda n=n: shallower_model(run.session, n),
            ),
        )
        for n in sorted(numbers)
    ]


def rounded_row(run: PlanRun) -> pl.DataFrame:
    """Return the row of the dense model with rounded weights. Its speed depends on the engine, and is not measured."""
    identity = {"method": ROUND, "bits": BITS, "tied": run.session.target.checkpoint.tied}
    make = partial(quantised_model, run.session, BITS)
    return _stored_row(run, _Row(f"bits-{BITS}", identity, make, timed=False, bits=BITS))


def final_model(run: PlanRun, basis: str, width: int) -> PreTrainedModel:
    """Return the narrow model that is shown, healed where that is requested; a second call resumes training at its end."""
    candidate, folder = make_candidate(run.session, basis, width, run.folder_of(basis, width)), run.training_folder
    if not run.session.settings.heal_steps:
        return candidate.model
    narrowing = candidate.narrowing
    del candidate  # healing has a model of its own
    return heal_candidate(run.session, narrowing, folder and folder / "healing").model


def _stored_row(run: PlanRun, row: _Row) -> pl.DataFrame:
    """Return a row: read from the store where it has one of the same recipe, else computed."""
    arguments = {
        "recipe": session_recipe(run.session), "timed": row.timed, **row.identity, **(row.recipe or {})
    }  # fmt: skip
    return run.store.table(f"candidates/{row.name}", arguments, lambda: _compute_row(run.session, row))


def _compute_row(session: NarrowingSession, row: _Row) -> pl.DataFrame:
    model = row.make()
    evaluation = evaluate_model(session, model)
    speeds = _speeds(session, row.name, model) if row.timed else {}
    parameters = sum(p.numel() for p in model.parameters())
    intervals = {name: getattr(evaluation, name) for name in EVALUATED}
    session.monitor.announce(f"{row.name}: {parameters / 1e6:.1f}M parameters, KL {evaluation.kl.value:.4f}")
    columns = {
        **row.identity,
        "parameters": parameters,
        "bytes": _stored_bytes(session, model, row.bits),
        **{name: intervals[name].value for name in EVALUATED},
        "loss_high": intervals["loss"].high,
        **{f"{name}_stderr": intervals[name].stderr for name in EVALUATED},
        **(_halves(evaluation.sums, session.windows.evaluation_texts) if len(evaluation.sums) > 1 else {}),
        **speeds,
        "n_tokens": evaluation.n_positions,
    }
    return pl.DataFrame([columns], schema=SCHEMA)


def _speeds(session: NarrowingSession, name: str, model: PreTrainedModel) -> dict[str, float]:
    """Time a model beside the dense one in the same minute: machines get busy and idle again."""
    both = throughput({"dense": session.dense(), name: model}, read=min(LENGTH, session.length))
    own = both[name]
    ratio = speed_ratio(own, both["dense"])
    ratios = (ratio.prefill, ratio.decode)
    values = (
        own.prefill.median, own.decode.median, *(r.median for r in ratios), *(r.low for r in ratios), *(r.high for r in ratios)
    )  # fmt: skip
    return dict(zip(SPEEDS, values, strict=True))


def _halves(sums: Float[Tensor, "g 7"], texts: Sequence[str]) -> dict[str, Any]:
    """Return the KL on every other window, to choose by, and on those between, to judge the choice.

    Each text is judged alone; the columns have the one on which the upper end of the interval is highest, so that a KL is
    within a mark there only if it is so on every text.

    Args:
        sums: The sums of each window, or of each group of neighbouring windows.
        texts: The text of each window.
    """
    choice, judged = evaluation_of(sums[0::2]).kl, _judged_by_text(sums, texts)
    name, worst = max(judged.items(), key=lambda of_text: _upper(of_text[1]))
    columns = {
        "choice_kl": choice.value,
        "choice_kl_high": choice.high,
        "judged_text": name if len(judged) > 1 else None,
    }
    if worst is None:
        return columns
    return columns | {
        "judged_kl": worst.value, "judged_kl_low": worst.low, "judged_kl_high": worst.high,
        "judged_within": probability_within(worst),
    }  # fmt: skip


def _judged_by_text(sums: Float[Tensor, "g 7"], texts: Sequence[str]) -> dict[str, Interval | None]:
    """Return the KL of each text on the windows that judge it; None where it has none."""
    span = 1  # windows of a group: a power of two
    while -(-len(texts) // span) > len(sums):
        span *= 2
    of_groups = [set(texts[i : i + span]) for i in range(0, len(texts), span)]  # a group may end in the next text
    judging = {
        name: [i for i, names in enumerate(of_groups) if i % 2 and names == {name}] for name in dict.fromkeys(texts)
    }
    return {name: evaluation_of(sums[rows]).kl if rows else None for name, rows in judging.items()}


def _upper(kl: Interval | None) -> float:
    """Return the upper end of an interval, infinite where there is none: such a KL is not known to be within a mark."""
    return math.inf if kl is None or kl.high is None or not math.isfinite(kl.high) else kl.high


def _stored_bytes(session: NarrowingSession, model: PreTrainedModel, bits: int | None) -> int:
    """Return the bytes of the weights in the stored dtype; rounded matrices have a scale per row."""
    size = DTYPES[session.target.checkpoint.input_table.dtype].itemsize
    if bits is None:
        return size * sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = sum(p.numel() for p in model.parameters() if p.ndim != 2)
    return sum(p.numel() * bits // 8 + len(p) * size for p in matrices) + size * others
