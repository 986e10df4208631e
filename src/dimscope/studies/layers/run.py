"""Layer by layer: how many dimensions a model uses on a text, beside shuffled text, random weights, noise and other models.

The tables of a pass are on disk before the next pass begins; within a pass the sums are checkpointed. The tables of the
study are those of its passes, one below the other.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from safetensors import safe_open
from tqdm import tqdm

from dimscope.activations.collection import Collection, load_collection
from dimscope.activations.hidden_states import find_sites, select_sites
from dimscope.activations.passes import PassSettings, run_pass
from dimscope.activations.reservoir import Reservoir, load_reservoir, save_reservoir
from dimscope.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dimscope.checkpoints.model import load_model, random_twin
from dimscope.geometry.spectrum import Spectrum
from dimscope.storage import ResultFolder, alone
from dimscope.studies.estimate import estimate_passes
from dimscope.studies.layers import tables as measures
from dimscope.studies.layers.plan import Unit, plan_layers
from dimscope.studies.layers.settings import LayersSettings
from dimscope.studies.layers.similarity import Side, between_conditions, between_layers, between_models
from dimscope.studies.study import Monitor, RunOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TABLES = ("layers", "scree", "texts", "confidence", "predictions", "similarity", "curve")
STATE = ".dimscope-state"  # of a run that is not finished, in its folder


def sharing(directory: Path, settings: LayersSettings) -> AbstractContextManager[None]:
    """One shard at a time, where there are several: the last two may finish together."""
    return alone(directory / STATE) if settings.shard[1] > 1 else nullcontext()


def run_layers(checkpoint: Checkpoint, settings: LayersSettings, store: Any, monitor: Monitor) -> RunOutput:
    """Runs the study pass by pass.

    Finished passes are used again. With a shard, only its part of every pass is computed. The last shard to finish makes
    the tables; before that the output says which shards are missing, and there are no tables.
    Raises what opening texts and models, and running them, raises.
    """
    folder, others = store, [m if isinstance(m, Checkpoint) else open_checkpoint(m) for m in settings.compare]
    work = LayersWork(checkpoint, folder, settings, others)
    monitor.announce(work.estimate())
    if settings.shard[1] > 1 and (waiting := work.run_shard()):
        return RunOutput({}, {}, waiting=waiting)
    with sharing(folder.path, settings):
        for unit in work.plan.units:
            for name in work.wanted(unit):
                work.table(unit, name)
            work.forget(unit)
        done = {name: table for name in TABLES if (table := work.finish(name)) is not None}
    if settings.shard[1] == 1:  # other shards may still be reading theirs
        shutil.rmtree(work.state, ignore_errors=True)
    return RunOutput(done, work.facts(done["texts"], done["layers"]))


class LayersWork:
    """The passes of a study on their way into tables: one model and one collection at a time."""

    def __init__(
        self, checkpoint: Checkpoint, folder: ResultFolder, settings: LayersSettings, others: Sequence[Checkpoint]
    ) -> None:
        self.folder, self.settings = folder, settings
        self.state = folder.path / STATE
        self.plan = plan_layers([checkpoint, *others], settings)
        self._model: tuple[tuple[int, str], PreTrainedModel] | None = None
        self._collected: tuple[Unit, Collection] | None = None
        self._spectra: tuple[Unit, dict[int, Spectrum]] | None = None

    def estimate(self) -> str:
        """What is about to run, in one line for each model."""
        lines = []
        for m, (checkpoint, placement) in enumerate(zip(self.plan.checkpoints, self.plan.placements, strict=True)):
            tokens = [unit.reading.n_tokens for unit in self.plan.units if unit.model == m]
            known = None if None in tokens else sum(t for t in tokens if t is not None)
            cost = estimate_passes(checkpoint, placement, len(tokens), known, self.settings.reservoir)
            lines.append(f"{self.plan.titles[m]}: {cost}")
        return "\n".join(lines)

    # ---- running ---------------------------------------------------------------------------------------------------

    def _loaded(self, unit: Unit) -> "PreTrainedModel":
        """The model of a pass; the one before it is let go first, since two may not fit."""
        key = (unit.model, unit.weights)
        if self._model is None or self._model[0] != key:
            self._model = None
            checkpoint, placement = self.plan.checkpoints[unit.model], self.plan.placements[unit.model]
            remote = self.settings.trust_remote_code
            if unit.weights == "random":
                model = random_twin(checkpoint, placement, seed=self.settings.seed, trust_remote_code=remote)
            else:
                model = load_model(checkpoint, placement, trust_remote_code=remote)
            self._model = (key, model)
        return self._model[1]

    def _run(self, unit: Unit, state: Path) -> Collection:
        model, settings = self._loaded(unit), self.settings
        sites = select_sites(find_sites(model), settings.layers)
        how = PassSettings(
            unit.arguments["batch"], settings.reservoir, settings.seed, settings.logits, settings.checkpoint_every, settings.shard
        )  # fmt: skip
        draw = f" {unit.of.draw + 1}" if unit.of.draw else ""
        name = f"{unit.of.model}, {unit.of.text}, {unit.of.condition}{draw}"
        with tqdm(total=unit.reading.n_tokens, desc=name, unit="token", unit_scale=True, disable=None) as bar:
            return run_pass(
                model, sites, unit.windows(settings.seed), how, state,
                lambda windows: bar.update(sum(len(w.ids) for w in windows)),
            )  # fmt: skip

    def _state(self, unit: Unit, part: int) -> Path:
        return self.state / f"{unit.slug}.{part + 1}-of-{self.settings.shard[1]}.safetensors"

    def run_shard(self) -> list[str]:
        """Runs this shard's part of every pass; returns the shards that are missing, as "2/3"."""
        own, n = self.settings.shard
        for unit in self.plan.units:
            if not _is_complete(self._state(unit, own)):
                self._run(unit, self._state(unit, own))
        self._model = None
        parts = {part: [self._state(unit, part) for unit in self.plan.units] for part in range(n)}
        return [f"{part + 1}/{n}" for part, states in parts.items() if not all(map(_is_complete, states))]

    def collection(self, unit: Unit) -> Collection:
        """What a pass collects: run, gone on with, or put together from its shards. The last one is kept."""
        if self._collected is None or self._collected[0] is not unit:
            self._collected = None
            states = [self._state(unit, part) for part in range(self.settings.shard[1])]
            if all(map(_is_complete, states)):  # no model is needed for what is finished
                found, *rest = map(load_collection, states)
                for part in rest:
                    found.merge(part)
            else:
                found = self._run(unit, states[0])
            self._collected = (unit, found)
        return self._collected[1]

    def forget(self, unit: Unit) -> None:
        """Lets the sums of a pass go, whose tables are on disk."""
        self._collected = self._spectra = None
        if self.settings.shard[1] == 1:
            self._state(unit, 0).unlink(missing_ok=True)

    # ---- tables ----------------------------------------------------------------------------------------------------

    def wanted(self, unit: Unit) -> list[str]:
        """The tables of a pass; further draws of a shuffle have those with a spread only."""
        of, settings = unit.of, self.settings
        first = of.draw == 0
        names = {
            "layers": True, "texts": True, "scree": first, "confidence": settings.logits, "predictions": settings.logits,
            "similarity": first and of.condition != "shuffled across", "curve": settings.curve and first,
        }  # fmt: skip
        return [name for name in TABLES if names[name]]

    def table(self, unit: Unit, name: str) -> pl.DataFrame:
        """One table of one pass: read where it is finished, else computed."""
        return self.folder.table(f"passes/{unit.slug}.{name}", unit.arguments, lambda: self._compute(unit, name))

    def _compute(self, unit: Unit, name: str) -> pl.DataFrame:
        of, reading, found, thresholds = unit.of, unit.reading, self.collection(unit), self.settings.thresholds
        made: Mapping[str, Callable[[], pl.DataFrame]] = {
            "layers": lambda: measures.layers_frame(of, found, self._raw_spectra(unit), thresholds),
            "scree": lambda: measures.scree_frame(of, found, self._raw_spectra(unit)),
            "texts": lambda: measures.text_frame(of, found, reading.length, reading.bos),
            "confidence": lambda: measures.confidence_frame(of, found.predictions),
            "predictions": lambda: measures.predictions_frame(of, found.predictions),
            "similarity": lambda: self._similarity(unit),
            "curve": lambda: measures.curve_frame(of, found, thresholds),
        }
        return made[name]()

    def _raw_spectra(self, unit: Unit) -> dict[int, Spectrum]:
        if self._spectra is None or self._spectra[0] is not unit:
            self._spectra = (unit, measures.raw_spectra(self.collection(unit)))
        return self._spectra[1]

    def _similarity(self, unit: Unit) -> pl.DataFrame:
        real = self.plan.real(unit.of.text)
        sample = self.state / f"{real.slug}.sample.safetensors"
        if not sample.exists():  # the others are held against it; it outlives the sums of its pass
            save_reservoir(self.collection(real).reservoir, sample)
        studied = self._side(real, load_reservoir(sample))
        if unit is real:
            return between_layers(studied)
        own = self._side(unit, self.collection(unit).reservoir)
        return between_conditions(studied, own) if unit.model == 0 else between_models(studied, own)

    def _side(self, unit: Unit, reservoir: Reservoir) -> Side:
        names = self.table(unit, "layers").select("layer", "site").unique().sort("layer")
        return Side(unit.of, dict(names.iter_rows()), reservoir.sample())

    def finish(self, name: str) -> pl.DataFrame | None:
        """The table of the study: those of all passes, one below the other; None, and not on disk, where no pass has it."""
        units = [unit for unit in self.plan.units if name in self.wanted(unit)]
        if not units:
            self.folder.drop(name)
            return None
        given = {"passes": [unit.slug for unit in units], "thresholds": self.settings.thresholds}
        return self.folder.table(name, given, lambda: pl.concat(self.table(unit, name) for unit in units))

    def facts(self, texts: pl.DataFrame, layers: pl.DataFrame) -> dict[str, Any]:
        """What the page needs to know of the run, beside its tables."""
        settings, plan = self.settings, self.plan
        first = plan.units[0]
        known = layers.filter(pl.col("model") == plan.titles[0])["layer"].unique().sort().to_list()
        wanted = known[len(known) // 2] if settings.show_layer is None else settings.show_layer
        one = texts.filter((pl.col("text") == first.of.text) & (pl.col("condition") == "real"))["n_windows"][0] == 1
        return {
            "models": plan.titles,
            "texts": list(plan.texts),
            "thresholds": settings.thresholds,
            "shuffles": settings.shuffles,
            "window_length": first.reading.length,
            "bos": first.reading.bos,
            "chosen_layer": min(known, key=lambda layer: abs(layer - wanted)),
            "rank_tolerance": f"{'max(N, d)' if one else 'd'} x eps(float32)",
            **asdict(plan.placements[0]),
            **{key: getattr(settings, key) for key in ("preset", "windows", "reservoir", "seed", "layers")},
        }


def _is_complete(state: Path) -> bool:
    if not state.exists():
        return False
    with safe_open(state, "pt") as held:
        return bool(held.get_tensor("numbers")[-1])
