"""Run the study of damage: point by point, each finished and stored before the next begins."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any

import polars as pl
from torch import Tensor
from tqdm import tqdm

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.model import is_out_of_memory, out_of_memory
from dimscope.evaluation.prompts import has_template
from dimscope.interventions.maps import LinearMap, RowMap
from dimscope.interventions.perturbations import make_map
from dimscope.storage import Store
from dimscope.studies.damage import operator_tables, points
from dimscope.studies.damage.claims import claims_frame
from dimscope.studies.damage.facts import DamageFacts
from dimscope.studies.damage.inputs import WINDOWS, DamageInputs, DamageSession, damage_inputs
from dimscope.studies.damage.losses import breaking_frame
from dimscope.studies.damage.plan import Point, Table
from dimscope.studies.damage.settings import DamageSettings
from dimscope.studies.damage.tables import with_agreement
from dimscope.studies.estimate import estimate_damage
from dimscope.studies.study import Monitor, RunOutput

OPERATOR_SHARE = 2 / 3  # of the dimensions: the random projection nearest to it is shown as a matrix
PROJECTIONS = ("project", "project-rescaled")  # whose operators are those of uniformly random subspaces
OPTIONAL = ("generations", "token_errors", "operator", "operator_block", "operator_histogram")


@dataclass(frozen=True, slots=True)
class GenerationProgress:
    """Continuations of the prompts while they grow.

    Attributes:
        change: The change.
        number: Its number, from 1.
        total: Number of points.
        seconds_left: Estimate for the rest of the study.
        prompts: The prompts.
        texts: Their continuations so far.
        undamaged: Those of the undamaged model; None at its own point.
    """

    change: str
    number: int
    total: int
    seconds_left: float | None
    prompts: Sequence[str]
    texts: Sequence[str]
    undamaged: Sequence[str] | None


def run_damage(checkpoint: Checkpoint, settings: DamageSettings, store: Store, monitor: Monitor) -> RunOutput:
    """Run the study; points that the store has are not computed again.

    Raises:
        InvalidArgument: The settings do not fit the model or the texts.
        DimscopeError: What opening and running the model raises.
    """
    inputs = damage_inputs(checkpoint, settings)
    monitor.announce("\n".join([*inputs.warnings, _estimate(inputs)]))
    session = DamageSession(inputs)
    try:
        _run_points(session, store, monitor)
        tables = _study_tables(session, store)
    except (RuntimeError, MemoryError) as e:
        if is_out_of_memory(e):
            raise out_of_memory(checkpoint.name) from e
        raise
    return RunOutput(
        {name: table for name, table in tables.items() if table.height}, asdict(_facts(inputs)), inputs.warnings
    )


def _estimate(inputs: DamageInputs) -> str:
    n_windows = sum(len(inputs.windows.get(name, ())) or inputs.settings.windows or WINDOWS for name in inputs.texts)
    n_written = sum(map(inputs.continues_prompts, inputs.points)) * inputs.decoding.max_new_tokens
    n_tokens = n_windows * inputs.length
    return estimate_damage(inputs.checkpoint, inputs.placement, len(inputs.points), n_tokens, n_written)


def _facts(inputs: DamageInputs) -> DamageFacts:
    settings = inputs.settings
    return DamageFacts(
        texts=tuple(inputs.texts), sides=settings.sides, n_changes=len(inputs.points) - 1, draws=settings.draws,
        seed=settings.seed, window_length=inputs.length, decoding=settings.decoding, new_tokens=settings.new_tokens,
        template=has_template(inputs.tokenizer), chat=any(prompt.chat for prompt in inputs.prompts),
        system=settings.system, dtype=inputs.placement.dtype, device=inputs.placement.device, preset=settings.preset,
    )  # fmt: skip


# ---- point by point --------------------------------------------------------------------------------------------------


def _run_points(session: DamageSession, store: Store, monitor: Monitor) -> None:
    """Run every point that is not finished."""
    inputs, began, total = session.inputs, time.monotonic(), len(session.inputs.points)
    silent = None if monitor.watch is None else True
    with tqdm(inputs.points, desc=inputs.checkpoint.title, unit="change", disable=silent) as bar:
        for number, point in enumerate(bar, 1):
            bar.set_postfix_str(point.label)
            left = None if number == 1 else (time.monotonic() - began) / (number - 1) * (total - number + 1)
            tables = PointTables(session, store, point)
            tables.damage()
            if inputs.continues_prompts(point):
                tables.generations(_listener(session, store, monitor, PointProgress(point, number, left)))
            if inputs.settings.token_errors:
                for name in point.tables:
                    tables.token_errors(name)
            monitor.stage(f"change {number} of {total} finished: {point.label}")


@dataclass(frozen=True, slots=True)
class PointProgress:
    """A point, its number, and the seconds left from there on."""

    point: Point
    number: int
    seconds_left: float | None


def _listener(
    session: DamageSession, store: Store, monitor: Monitor, progress: PointProgress
) -> Callable[[list[str]], object] | None:
    """Return what shows continuations while they grow, beside those of the undamaged model."""
    watch, inputs, point = monitor.watch, session.inputs, progress.point
    if watch is None:
        return None
    own = PointTables(session, store, inputs.points[0])
    undamaged = own.generations()["continuation"].to_list() if point.steps else None
    total, prompts = len(inputs.points), inputs.settings.prompts
    return lambda texts: watch(
        GenerationProgress(point.label, progress.number, total, progress.seconds_left, prompts, texts, undamaged)
    )


class PointTables:
    """The tables of one point: from the store where they are finished, else computed with maps that they share."""

    def __init__(self, session: DamageSession, store: Store, point: Point) -> None:
        self.session, self.store, self.point = session, store, point

    @cached_property
    def maps(self) -> Mapping[Table, RowMap]:
        """Return the map of each table."""
        return points.make_maps(self.session, self.point)

    def _stored(self, name: str, arguments: Mapping[str, Any], compute: Callable[[], pl.DataFrame]) -> pl.DataFrame:
        point = self.point
        identity = {"steps": point.steps, "side": point.side, "seed": point.seed}
        return self.store.table(f"points/{point.slug}.{name}", identity | dict(arguments), compute)

    def windows(self) -> pl.DataFrame:
        """Return the evaluations, window by window."""
        arguments = _text_arguments(self.session.inputs)
        return self._stored("windows", arguments, lambda: points.evaluate_point(self.session, self.point, self.maps))

    def damage(self) -> pl.DataFrame:
        """Return the errors and evaluations."""
        arguments, windows = _text_arguments(self.session.inputs), self.windows()
        return self._stored(
            "damage", arguments, lambda: points.measure_point(self.session, self.point, self.maps, windows)
        )

    def generations(self, listener: Callable[[list[str]], object] | None = None) -> pl.DataFrame:
        """Return the continuations of the prompts."""
        return self._stored(
            "generations", _prompt_arguments(self.session.inputs),
            lambda: points.continue_prompts(self.session, self.point, self.maps, listener),
        )  # fmt: skip

    def token_errors(self, name: Table) -> pl.DataFrame:
        """Return the error of every token of a table."""
        return self._stored(
            f"token_errors.{name}", {"table": name},
            lambda: points.measure_tokens(self.session, self.point, name, self.maps[name]),
        )  # fmt: skip


def _text_arguments(inputs: DamageInputs) -> dict[str, Any]:
    """Return what evaluations depend on beside the point; the seed stands for a text that the model generates."""
    settings, texts = inputs.settings, inputs.texts.items()
    return {
        "texts": {name: text.fingerprint if text else settings.seed for name, text in texts},
        "windows": [len(inputs.windows[name]) if name in inputs.windows else settings.windows for name, _ in texts],
        "length": inputs.length, "from_start": settings.from_start, "batch": inputs.batch,
        "seed_of_rows": settings.seed, "placement": asdict(inputs.placement),
    }  # fmt: skip


def _prompt_arguments(inputs: DamageInputs) -> dict[str, Any]:
    """Return what continuations depend on beside the point."""
    prompts = [asdict(prompt) for prompt in inputs.prompts]
    return {"prompts": prompts, "decoding": asdict(inputs.decoding), "placement": asdict(inputs.placement)}


# ---- tables of the study ---------------------------------------------------------------------------------------------


def _study_tables(session: DamageSession, store: Store) -> dict[str, pl.DataFrame]:
    """Return the tables of the study: those of its points, one below the other, and what follows from them."""
    inputs = session.inputs
    at = {point: PointTables(session, store, point) for point in inputs.points}

    def stored(
        name: str, listed: Sequence[Any], arguments: Mapping[str, Any], compute: Callable[[], pl.DataFrame]
    ) -> pl.DataFrame:
        return store.table(name, {"points": listed} | dict(arguments), compute)

    slugs, read = [point.slug for point in inputs.points], _text_arguments(inputs)
    damage = stored("damage", slugs, read, lambda: pl.concat(tables.damage() for tables in at.values()))
    windows = stored("windows", slugs, read, lambda: pl.concat(tables.windows() for tables in at.values()))
    tables = {
        "damage": damage,
        "windows": windows,
        "breaking": stored("breaking", slugs, read, lambda: breaking_frame(damage, windows)),
        **_operator_tables(session, store),
    }
    if continued := [point for point in inputs.points if inputs.continues_prompts(point)]:
        tables["generations"] = stored(
            "generations", [point.slug for point in continued], _prompt_arguments(inputs),
            lambda: with_agreement(pl.concat(at[point].generations() for point in continued)),
        )  # fmt: skip
    generations = tables.get("generations")
    answers = {"prompts": None if generations is None else _prompt_arguments(inputs)}
    tables["claims"] = stored("claims", slugs, read | answers, lambda: claims_frame(damage, windows, generations))
    if inputs.settings.token_errors:
        changed = [(point, name) for point in inputs.points for name in point.tables]
        tables["token_errors"] = stored(
            "token_errors", [[point.slug, name] for point, name in changed], {},
            lambda: pl.concat(at[point].token_errors(name) for point, name in changed),
        )  # fmt: skip
    for name in OPTIONAL:
        if name not in tables:
            store.drop(name)
    return tables


def _operator_tables(session: DamageSession, store: Store) -> dict[str, pl.DataFrame]:
    """Return the random projection nearest to two thirds of the dimensions, as a matrix."""
    dim = session.inputs.dim
    projected = [
        point for point in session.inputs.points if point.kind in PROJECTIONS and 0 < (point.n_kept or 0) < dim
    ]
    if not projected or dim < 2:
        return {}
    point = min(projected, key=lambda point: abs((point.n_kept or 0) - OPERATOR_SHARE * dim))
    k, seed = int(point.n_kept or 0), point.seed or 0

    @cache  # a QR of d x k, from which three tables are computed
    def projector() -> Tensor:
        change = make_map("project", next(iter(session.summaries.values())), k, seed)
        assert isinstance(change, LinearMap)
        return change.matrix

    frames: Mapping[str, Callable[[], pl.DataFrame]] = {
        "operator": lambda: operator_tables.operator_frame(projector(), k),
        "operator_block": lambda: operator_tables.operator_block_frame(projector()),
        "operator_histogram": lambda: operator_tables.operator_histogram_frame(projector()),
    }
    arguments = {"k": k, "d": dim, "seed": seed}
    return {name: store.table(name, arguments, compute) for name, compute in frames.items()}
