"""Layer by layer: how many dimensions a model uses on a text, compared with shuffled text, random weights and noise.

The tables of a pass are finished before the next pass begins; within a pass the sums are saved at intervals. The tables
of the study are those of its passes, one below the other.
"""

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict

import polars as pl

from dimscope.activations.collection import is_complete
from dimscope.activations.reservoir import Reservoir
from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.loaded import as_checkpoint
from dimscope.errors import InvalidArgument
from dimscope.storage import STATE, Store, alone
from dimscope.studies.estimate import estimate_passes
from dimscope.studies.layers import tables
from dimscope.studies.layers.facts import LayersFacts
from dimscope.studies.layers.passes import PassRunner
from dimscope.studies.layers.plan import LayersPlan, PlannedPass, plan_layers
from dimscope.studies.layers.settings import LayersSettings
from dimscope.studies.layers.similarity import Side, between_conditions, between_layers, between_models
from dimscope.studies.study import Monitor, RunOutput

TABLES = ("layers", "scree", "type_spectra", "texts", "confidence", "predictions", "similarity", "curve")


def run_layers(checkpoint: Checkpoint, settings: LayersSettings, store: Store, monitor: Monitor) -> RunOutput:
    """Run the study pass by pass; finished passes are reused.

    With a shard, only its part of every pass is computed. The last shard to finish makes the tables; before that the
    output says which shards are missing, and there are no tables.

    Raises:
        DimscopeError: What opening texts and models, and running them, raises.
    """
    if settings.shard[1] > 1 and store.folder is None:
        raise InvalidArgument("`shard` needs `out`: the parts meet in that folder")
    others = [as_checkpoint(model) for model in settings.compare]
    plan = plan_layers([checkpoint, *others], settings)
    monitor.announce("\n".join([*plan.warnings, _estimate(plan)]))
    runner = PassRunner(plan, None if store.folder is None else store.folder / STATE)
    if settings.shard[1] > 1 and (waiting := _run_shard(runner)):
        return RunOutput({}, {}, waiting=waiting)
    with _one_shard_at_a_time(runner):
        for number, planned in enumerate(plan.passes, 1):
            for name in _pass_tables(planned, plan.settings):
                _pass_table(runner, store, planned, name)
            runner.forget(planned)
            monitor.stage(f"pass {number} of {len(plan.passes)} finished: {planned.title}")
        finished = {name: table for name in TABLES if (table := _study_table(runner, store, name)) is not None}
    if settings.shard[1] == 1 and runner.state is not None:  # other shards may still be reading theirs
        shutil.rmtree(runner.state, ignore_errors=True)
    return RunOutput(finished, asdict(_facts(plan, finished)), plan.warnings)


def _estimate(plan: LayersPlan) -> str:
    """Return the estimate of the run, one line per model."""
    lines = []
    for model, (checkpoint, placement) in enumerate(zip(plan.checkpoints, plan.placements, strict=True)):
        tokens = [planned.source.n_tokens for planned in plan.passes if planned.model == model]
        total = None if None in tokens else sum(n for n in tokens if n is not None)
        cost = estimate_passes(checkpoint, placement, len(tokens), total, plan.settings.reservoir)
        lines.append(f"{plan.titles[model]}: {cost}")
    return "\n".join(lines)


def _run_shard(runner: PassRunner) -> list[str]:
    """Run this shard's part of every pass; return the shards that are missing, as "2/3"."""
    own, n_shards = runner.plan.settings.shard

    def complete(planned: PlannedPass, part: int) -> bool:
        path = runner.state_file(planned, part)
        return path is not None and is_complete(path)

    for planned in runner.plan.passes:
        if not complete(planned, own):
            runner.run(planned, own)
    runner.unload_model()
    missing = [part for part in range(n_shards) if not all(complete(planned, part) for planned in runner.plan.passes)]
    return [f"{part + 1}/{n_shards}" for part in missing]


def _one_shard_at_a_time(runner: PassRunner) -> AbstractContextManager[None]:
    """Lock the folder where there are several shards, because the last two may finish together."""
    return nullcontext() if runner.state is None or runner.plan.settings.shard[1] == 1 else alone(runner.state)


# ---- tables --------------------------------------------------------------------------------------------------------


def _pass_tables(planned: PlannedPass, settings: LayersSettings) -> list[str]:
    """Return the names of the tables of a pass; further draws of a shuffle have only those that a spread is computed from."""
    first = planned.identity.draw == 0
    has_table = {
        "layers": True, "texts": True, "scree": first, "confidence": settings.logits, "predictions": settings.logits,
        "type_spectra": planned.identity.condition == "real",
        "similarity": first and planned.identity.condition != "shuffled across", "curve": settings.curve and first,
    }  # fmt: skip
    return [name for name in TABLES if has_table[name]]


def _pass_table(runner: PassRunner, store: Store, planned: PlannedPass, name: str) -> pl.DataFrame:
    """Return one table of one pass: read it where it is finished, else compute it."""
    identity, thresholds = planned.identity, runner.plan.settings.thresholds

    def compute() -> pl.DataFrame:
        collection = runner.collection(planned)
        frames: Mapping[str, Callable[[], pl.DataFrame]] = {
            "layers": lambda: tables.layers_frame(identity, collection, runner.spectra(planned), thresholds),
            "scree": lambda: tables.scree_frame(identity, collection, runner.spectra(planned)),
            "type_spectra": lambda: tables.type_spectra_frame(identity, collection, runner.spectra(planned)),
            "texts": lambda: tables.text_frame(identity, collection, planned.source.bos),
            "confidence": lambda: tables.confidence_frame(identity, collection.predictions),
            "predictions": lambda: tables.predictions_frame(identity, collection.predictions),
            "similarity": lambda: _similarity(runner, store, planned),
            "curve": lambda: tables.curve_frame(identity, collection, thresholds),
        }
        return frames[name]()

    return store.table(f"passes/{planned.slug}.{name}", planned.arguments, compute)


def _similarity(runner: PassRunner, store: Store, planned: PlannedPass) -> pl.DataFrame:
    """Compare a pass with the pass of the studied model over the real text; compare the layers of the latter."""
    real = runner.plan.real(planned.identity.text)
    studied = _side(runner, store, real, runner.real_sample(planned.identity.text))
    if planned is real:
        return between_layers(studied)
    own = _side(runner, store, planned, runner.collection(planned).reservoir)
    return between_conditions(studied, own) if planned.model == 0 else between_models(studied, own)


def _side(runner: PassRunner, store: Store, planned: PlannedPass, reservoir: Reservoir) -> Side:
    rows = _pass_table(runner, store, planned, "layers").select("layer", "site").unique().sort("layer")
    return Side(planned.identity, dict(rows.iter_rows()), reservoir.sample())


def _study_table(runner: PassRunner, store: Store, name: str) -> pl.DataFrame | None:
    """Return a table of the study: those of all passes, one below the other; None where no pass has it."""
    settings = runner.plan.settings
    passes = [planned for planned in runner.plan.passes if name in _pass_tables(planned, settings)]
    if not passes:
        store.drop(name)
        return None
    arguments = {"passes": [planned.slug for planned in passes], "thresholds": settings.thresholds}
    return store.table(
        name, arguments, lambda: pl.concat(_pass_table(runner, store, planned, name) for planned in passes)
    )


def _facts(plan: LayersPlan, finished: Mapping[str, pl.DataFrame]) -> LayersFacts:
    """Return what the page must know of the run beside its tables."""
    settings, source = plan.settings, plan.passes[0].source
    layers = finished["layers"].filter(pl.col("model") == plan.titles[0])["layer"].unique().sort().to_list()
    shown = layers[len(layers) // 2] if settings.show_layer is None else settings.show_layer
    real = finished["texts"].filter((pl.col("text") == source.text) & (pl.col("condition") == "real"))
    factor = "max(N, d)" if real["n_windows"][0] == 1 else "d"
    return LayersFacts(
        models=plan.titles, texts=tuple(plan.texts), thresholds=settings.thresholds, shuffles=settings.shuffles,
        window_length=source.length, bos=source.bos, show_layer=min(layers, key=lambda layer: abs(layer - shown)),
        rank_tolerance=f"{factor} x eps(float32)", dtype=plan.placements[0].dtype, device=plan.placements[0].device,
        preset=settings.preset, windows=settings.windows, reservoir=settings.reservoir, seed=settings.seed,
        layers=settings.layers,
    )  # fmt: skip
