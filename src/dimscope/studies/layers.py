"""Layer by layer: how many dimensions a model uses on a text, beside shuffled text, random weights, noise and other models.

A pass is one model on one text under one condition. Its tables are on disk before the next pass begins; within a pass
the sums are checkpointed. The tables of the study are those of its passes, one below the other.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import polars as pl
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.model import Placement, load_model, place, random_twin, require_causal
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.errors import InvalidArgument
from dimscope.geometry.dimension import THRESHOLDS
from dimscope.representations.collection import Collection, load_collection
from dimscope.representations.hidden_states import FINAL_NORM, find_sites, select_sites
from dimscope.representations.passes import PassSettings, run_pass
from dimscope.representations.reservoir import Reservoir
from dimscope.representations.texts import Text, open_text
from dimscope.representations.windows import (
    Window,
    middle_windows,
    shuffle_across,
    shuffle_within,
    special_prefix,
    stream_windows,
)
from dimscope.results import ResultFolder, whole_file
from dimscope.studies import layer_measures as measures
from dimscope.studies.estimate import estimate_passes
from dimscope.studies.layer_similarity import Side, between_conditions, between_layers, between_models
from dimscope.studies.provenance import checkpoint_facts, fingerprint

LENGTH = 1024  # tokens of a window where the model's context is longer and none is asked for
ACROSS = 1024  # windows of a stream whose tokens are shuffled together
CPU_BATCH, GPU_BATCH = 2048, 16384  # tokens at once
TABLES = ("layers", "scree", "texts", "confidence", "predictions", "similarity", "curve")


@dataclass(frozen=True, slots=True)
class LayersSettings:
    """What is asked of the study."""

    texts: tuple[str, ...] = ("builtin:prose", "builtin:html")
    windows: int | Literal["all"] | None = None  # of each text, spread evenly; None is 8, or as many as every text has
    length: int | None = None  # tokens of a window; None is the context of the model, LENGTH at most
    shuffles: int = 5  # draws of the shuffle within each window
    across: int = 1  # draws of the shuffle across all windows
    twin: bool = True  # the same architecture with random weights
    logits: bool = True
    curve: bool = False  # every dimension over growing numbers of tokens
    thresholds: tuple[float, ...] = THRESHOLDS
    layers: str | None = None  # such as "0,4:8,norm"
    chosen_layer: int | None = None  # to show where there is room for one; None is the middle
    reservoir: int = 2048
    batch: int | None = None  # windows at once; None is what fits the device
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False
    preset: str | None = None
    checkpoint_every: float = 60.0  # seconds
    shard: tuple[int, int] = (0, 1)  # (i, n): only every n-th batch, from the i-th on


def notebook_settings() -> LayersSettings:
    """The setting of the notebook that the study grew from: one window from the middle, one shuffle, 95%, layer 10."""
    return LayersSettings(
        windows=1, shuffles=1, across=0, twin=False, thresholds=(0.95,), chosen_layer=10, preset="notebook"
    )


@dataclass(frozen=True, slots=True)
class Reading:
    """A text as the windows that one model is given."""

    text: str
    length: int
    windows: Callable[[], Iterable[Window]]
    bos: str | None
    n_windows: int | None  # where that is known beforehand

    @property
    def n_tokens(self) -> int | None:
        return None if self.n_windows is None else self.n_windows * self.length


@dataclass(frozen=True, slots=True)
class Unit:
    """One pass: what it is, which windows it reads, and all that its result depends on."""

    of: measures.Pass
    reading: Reading
    main: bool  # of the studied model, not of one beside it
    arguments: Mapping[str, Any]

    @property
    def slug(self) -> str:
        collected = {key: value for key, value in self.arguments.items() if key != "thresholds"}
        digest = hashlib.sha256(json.dumps(collected, sort_keys=True).encode()).hexdigest()[:16]
        return f"{self.of.condition.replace(' ', '-')}-{self.of.draw}-{digest}"

    def windows(self, seed: int) -> Iterator[Window]:
        given = self.reading.windows()
        if self.of.condition == "shuffled":
            return (shuffle_within(w, seed, self.of.draw) for w in given)
        if self.of.condition == "shuffled across":
            return (w for group in _grouped(given, ACROSS) for w in shuffle_across(group, seed, self.of.draw))
        return iter(given)


def study_layers(
    checkpoint: Checkpoint,
    folder: ResultFolder,
    settings: LayersSettings,
    others: Sequence[Checkpoint] = (),
    announce: Callable[[str], object] = lambda line: None,
) -> tuple[dict[str, Any], dict[str, pl.DataFrame]]:
    """Runs the study into a folder, pass by pass; returns the facts for report.json and the tables by name.

    Finished passes are used again. `others` are models to compare, on real text. `announce` is told what is about to run.
    With a shard, only its part of every pass is computed; the last shard to finish makes the tables, and the facts say
    under "waiting" which others are missing. Raises what opening texts and models, and running them, raises.
    """
    began = time.monotonic()
    work = LayersWork(checkpoint, folder, settings, others)
    announce(work.estimate())
    waiting = work.run_shards() if settings.shard[1] > 1 else []
    facts = checkpoint_facts(checkpoint) | {"waiting": waiting, "seconds": round(time.monotonic() - began, 1)}
    if waiting:
        return facts, {}
    for units in work.units.values():
        for unit in units:
            for name in work.wanted(unit):
                work.table(unit, name)
        work.release()
    done = {name: table for name in TABLES if (table := work.finish(name)) is not None}
    if settings.shard[1] == 1:  # other shards may still be reading theirs
        shutil.rmtree(work.state, ignore_errors=True)
    study = work.facts(done["texts"], done["layers"])
    facts |= {"study": {"layers": study}, "warnings": [], "seconds": round(time.monotonic() - began, 1)}
    return facts, done


def summary_frame(layers: pl.DataFrame) -> pl.DataFrame:
    """One row per model, text and layer from the table `layers`, narrow enough for a terminal; raw and centred numbers.

    The count of components for 95% of the variance (or for the largest share that was asked for) on real text, shuffled
    (mean and sd over the draws) and with random weights, and white noise's; rank, corrected participation ratio and TwoNN.
    """
    rows = layers.filter((pl.col("preprocess") == "raw") & pl.col("centred") & pl.col("scale").is_null())
    counts = [m for m in rows["metric"].unique(maintain_order=True) if m.startswith("variance count")]
    told = "variance count 95%" if "variance count 95%" in counts else counts[-1]
    percent = told.rpartition(" ")[2]
    place = ["model", "text", "layer", "site"]
    real = rows.filter(pl.col("condition") == "real")

    def column(metric: str, name: str, value: str = "value") -> pl.DataFrame:
        return real.filter(pl.col("metric") == metric).select(*place, pl.col(value).alias(name))

    found = column(told, "N", "n_tokens").join(column(told, percent), on=place, maintain_order="left")
    beside = []
    for condition in ("shuffled", "random weights"):
        draws = rows.filter((pl.col("metric") == told) & (pl.col("condition") == condition))
        spread = [pl.col("value").std().alias("sd")] if condition == "shuffled" else []
        beside.append(draws.group_by(place).agg(pl.col("value").mean().alias(condition.split()[0]), *spread))
    beside += [
        column(told, "noise", "null"),
        column("numerical rank", "rank"),
        column("participation ratio, corrected", "ratio"),
        column("TwoNN, maximum likelihood", "TwoNN"),
    ]
    for frame in beside:
        found = found.join(frame, on=place, how="left", maintain_order="left")
    short = pl.col("site").replace({"embeddings": "emb", FINAL_NORM: "norm"}).str.replace(",.*", "")
    return found.with_columns(short).drop(c for c in found.columns if found[c].is_null().all())


class LayersWork:
    """The passes of a study, and what they share: models loaded when they are needed, samples of the real passes."""

    def __init__(
        self, checkpoint: Checkpoint, folder: ResultFolder, settings: LayersSettings, others: Sequence[Checkpoint]
    ) -> None:
        self.folder, self.settings = folder, settings
        self.state = folder.path / "state"
        self.checkpoints = [checkpoint, *others]
        self.titles = _distinct([c.title for c in self.checkpoints], [c.name for c in self.checkpoints])
        self.placements = [place(c, dtype=settings.dtype, device=settings.device) for c in self.checkpoints]
        self.texts = _named_texts(settings.texts)
        self.units: dict[tuple[int, str], list[Unit]] = {}  # (number of the model, weights) -> its passes
        read = {
            number: [self._reading(number, name, settings.windows) for name in self.texts] for number in range(len(self.titles))
        }  # fmt: skip
        if settings.windows is None:  # as many of each text as of the shortest: dimensions grow with the tokens
            least = min(r.n_windows or 0 for readings in read.values() for r in readings)
            read = {
                n: [r if r.n_windows == least else self._reading(n, r.text, least) for r in rs]
                for n, rs in read.items()
            }
        for number, title in enumerate(self.titles):
            readings = read[number]
            self.units[number, "trained"] = [u for r in readings for u in self._passes(number, title, r)]
            if number == 0 and settings.twin:
                self.units[number, "random"] = [self._unit(number, title, r, "random weights") for r in readings]
        self._model: tuple[tuple[int, str], Any] | None = None
        self._collected: tuple[str, Collection] | None = None

    # ---- what there is to run --------------------------------------------------------------------------------------

    def _reading(self, number: int, name: str, windows: int | Literal["all"] | None) -> Reading:
        checkpoint, text = self.checkpoints[number], self.texts[name]
        tokenizer = require_tokenizer(checkpoint.source)
        length = _window_length(checkpoint, self.settings.length)
        bos = " ".join(tokenizer.convert_ids_to_tokens(special_prefix(tokenizer))) or None
        if windows == "all":
            # The first window now: a text that is too short is said before a model is loaded.
            next(iter(stream_windows(text, tokenizer, length=length)))
            return Reading(name, length, lambda: stream_windows(text, tokenizer, length=length), bos, None)
        listed = middle_windows(text, tokenizer, length=length, count=windows)
        return Reading(name, length, lambda: listed, bos, len(listed))

    def _passes(self, number: int, title: str, reading: Reading) -> Iterator[Unit]:
        yield self._unit(number, title, reading, "real")
        if number > 0:
            return
        for draw in range(self.settings.shuffles):
            yield self._unit(number, title, reading, "shuffled", draw)
        for draw in range(0 if reading.n_windows == 1 else self.settings.across):
            yield self._unit(number, title, reading, "shuffled across", draw)

    def _unit(self, number: int, title: str, reading: Reading, condition: str, draw: int = 0) -> Unit:
        settings, placement = self.settings, self.placements[number]
        arguments = {
            "model": fingerprint(self.checkpoints[number]), "title": title, "text": self.texts[reading.text].fingerprint,
            "text_name": reading.text, "condition": condition, "draw": draw, "windows": reading.n_windows,
            "length": reading.length, "batch": self._batch(reading, placement), "placement": asdict(placement),
            **{key: getattr(settings, key) for key in ("layers", "logits", "thresholds", "reservoir", "seed")},
        }  # fmt: skip
        return Unit(measures.Pass(title, reading.text, condition, draw), reading, number == 0, arguments)

    def _batch(self, reading: Reading, placement: Placement) -> int:
        tokens = CPU_BATCH if placement.device == "cpu" else GPU_BATCH
        return self.settings.batch or max(1, tokens // reading.length)

    def estimate(self) -> str:
        """What is about to run, in one line."""
        units = [unit for units in self.units.values() for unit in units]
        tokens = [unit.reading.n_tokens for unit in units]
        known = None if None in tokens else sum(t for t in tokens if t is not None)
        return estimate_passes(self.checkpoints[0], self.placements[0], len(units), known, self.settings.reservoir)

    # ---- running ---------------------------------------------------------------------------------------------------

    def _loaded(self, key: tuple[int, str]) -> Any:
        """The model of these passes; the one before it is let go first, since two may not fit."""
        if self._model is None or self._model[0] != key:
            self._model = None
            number, weights = key
            checkpoint, placement = self.checkpoints[number], self.placements[number]
            remote = self.settings.trust_remote_code
            if weights == "random":
                model = random_twin(checkpoint, placement, seed=self.settings.seed, trust_remote_code=remote)
            else:
                model = load_model(checkpoint, placement, trust_remote_code=remote)
            self._model = (key, model)
        return self._model[1]

    def release(self) -> None:
        """Lets the model and the last collection go."""
        self._model = self._collected = None

    def _run(self, unit: Unit, state: Path) -> Collection:
        key = next(key for key, units in self.units.items() if unit in units)
        model, settings = self._loaded(key), self.settings
        sites = select_sites(find_sites(model), settings.layers)
        plan = PassSettings(
            unit.arguments["batch"], settings.reservoir, settings.seed, settings.logits, settings.checkpoint_every, settings.shard
        )  # fmt: skip
        draw = f" {unit.of.draw + 1}" if unit.of.draw else ""
        name = f"{unit.of.model}, {unit.of.text}, {unit.of.condition}{draw}"
        with tqdm(total=unit.reading.n_tokens, desc=name, unit="token", unit_scale=True, disable=None) as bar:
            return run_pass(
                model, sites, unit.windows(settings.seed), plan, state,
                lambda windows: bar.update(sum(len(w.ids) for w in windows)),
            )  # fmt: skip

    def _state(self, unit: Unit, shard: tuple[int, int]) -> Path:
        return self.state / f"{unit.slug}.{shard[0] + 1}-of-{shard[1]}.safetensors"

    def run_shards(self) -> list[str]:
        """Runs this shard's part of every pass; returns the shards that are missing, as "2/3"."""
        shard = self.settings.shard
        for units in self.units.values():
            for unit in units:
                self._run(unit, self._state(unit, shard))
            self.release()
        units = [unit for units in self.units.values() for unit in units]
        others = [(i, shard[1]) for i in range(shard[1]) if i != shard[0]]
        ready = [all(_is_complete(self._state(unit, other)) for unit in units) for other in others]
        return [f"{i + 1}/{n}" for (i, n), there in zip(others, ready, strict=True) if not there]

    def collection(self, unit: Unit) -> Collection:
        """What a pass collects: run, gone on with, or put together from its shards. The last one is kept."""
        if self._collected is None or self._collected[0] != unit.slug:
            self._collected = None
            n = self.settings.shard[1]
            states = [self._state(unit, (i, n)) for i in range(n)]
            if n > 1 or _is_complete(states[0]):  # no model is needed for what is finished
                found, *rest = map(load_collection, states)
                for part in rest:
                    found.merge(part)
            else:
                found = self._run(unit, states[0])
            self._collected = (unit.slug, found)
        return self._collected[1]

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
        of, reading = unit.of, unit.reading

        @cache
        def spectra() -> Any:
            return measures.raw_spectra(self.collection(unit))

        def compute() -> pl.DataFrame:
            found = self.collection(unit)
            made: Mapping[str, Callable[[], pl.DataFrame]] = {
                "layers": lambda: measures.layers_frame(of, found, spectra(), self.settings.thresholds),
                "scree": lambda: measures.scree_frame(of, found, spectra()),
                "texts": lambda: measures.text_frame(of, found, reading.length, reading.bos),
                "confidence": lambda: measures.confidence_frame(of, found.predictions),
                "predictions": lambda: measures.predictions_frame(of, found.predictions),
                "similarity": lambda: self._similarity(unit),
                "curve": lambda: measures.curve_frame(of, found, self.settings.thresholds),
            }
            return made[name]()

        return self.folder.table(f"passes/{unit.slug}.{name}", unit.arguments, compute)

    def _similarity(self, unit: Unit) -> pl.DataFrame:
        real = next(u for u in self.units[0, "trained"] if u.of.text == unit.of.text)
        sample = self.state / f"{real.slug}.sample.safetensors"
        if not sample.exists():  # the others are held against it; it outlives the sums of its pass
            save_reservoir(self.collection(real).reservoir, sample)
        studied = self._side(real, load_reservoir(sample))
        if unit is real:
            return between_layers(studied)
        own = self._side(unit, self.collection(unit).reservoir)
        return between_conditions(studied, own) if unit.main else between_models(studied, own)

    def _side(self, unit: Unit, reservoir: Reservoir) -> Side:
        names = self.table(unit, "layers").select("layer", "site").unique().sort("layer")
        return Side(unit.of, dict(names.iter_rows()), reservoir.sample())

    def finish(self, name: str) -> pl.DataFrame | None:
        """The table of the study: those of all passes, one below the other; None, and not on disk, where no pass has it."""
        units = [unit for units in self.units.values() for unit in units if name in self.wanted(unit)]
        if not units:
            self.folder.drop(name)
            return None
        given = {"passes": [unit.slug for unit in units], "thresholds": self.settings.thresholds}
        return self.folder.table(name, given, lambda: pl.concat(self.table(unit, name) for unit in units))

    def facts(self, texts: pl.DataFrame, layers: pl.DataFrame) -> dict[str, Any]:
        """What the page needs to know of the run, beside its tables."""
        settings, first = self.settings, self.units[0, "trained"][0]
        known = layers.filter(pl.col("model") == self.titles[0])["layer"].unique().sort().to_list()
        wanted = known[len(known) // 2] if settings.chosen_layer is None else settings.chosen_layer
        one = texts.filter((pl.col("text") == first.of.text) & (pl.col("condition") == "real"))["n_windows"][0] == 1
        return {
            "models": self.titles,
            "texts": list(self.texts),
            "thresholds": settings.thresholds,
            "shuffles": settings.shuffles,
            "window_length": first.reading.length,
            "bos": first.reading.bos,
            "chosen_layer": min(known, key=lambda layer: abs(layer - wanted)),
            "rank_tolerance": f"{'max(N, d)' if one else 'd'} x eps(float32)",
            **asdict(self.placements[0]),
            **{key: getattr(settings, key) for key in ("preset", "windows", "reservoir", "seed", "layers")},
        }


def save_reservoir(of: Reservoir, path: Path) -> None:
    """A reservoir as a safetensors file, whole or not at all."""
    with whole_file(path) as temporary:
        save_file(dict(of.tensors()), temporary)


def load_reservoir(path: Path) -> Reservoir:
    """What `save_reservoir` wrote."""
    return Reservoir.from_tensors(load_file(path))


def _is_complete(state: Path) -> bool:
    if not state.exists():
        return False
    with safe_open(state, "pt") as held:
        return bool(held.get_tensor("numbers")[-1])


def _grouped(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    iterator = iter(windows)
    while group := list(islice(iterator, size)):
        yield group


def _distinct(names: Sequence[str], longer: Sequence[str]) -> list[str]:
    """The names, or the longer ones where two are the same; numbered where those are too."""
    chosen = list(names if len(set(names)) == len(names) else longer)
    return [
        name if chosen.index(name) == i else f"{name} ({chosen[:i].count(name) + 1})" for i, name in enumerate(chosen)
    ]


def _named_texts(sources: Sequence[str]) -> dict[str, Text]:
    if not sources:
        raise InvalidArgument("give a text: --text FILE, or builtin:prose")
    texts = [open_text(source) for source in sources]
    return dict(zip(_distinct([t.name for t in texts], sources), texts, strict=True))


def _window_length(checkpoint: Checkpoint, asked: int | None) -> int:
    """Tokens of a window. Raises InvalidArgument where the model has no positions for as many as are asked for."""
    config = require_causal(checkpoint).get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if asked is not None and context is not None and asked > context:
        raise InvalidArgument(f"--length {asked}: {checkpoint.title} reads at most {context} tokens at once")
    return asked or min(context or LENGTH, LENGTH)
