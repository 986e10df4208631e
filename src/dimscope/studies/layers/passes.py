"""Runs the passes of a study of hidden layers: one model and one collection in memory at a time."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dimscope.activations.collection import Collection, is_complete, load_collection
from dimscope.activations.layer_selection import select_sites
from dimscope.activations.passes import PassSettings, run_pass
from dimscope.activations.reservoir import Reservoir, load_reservoir, save_reservoir
from dimscope.activations.sites import Site, find_sites
from dimscope.checkpoints.model import load_model, randomly_initialised
from dimscope.studies.layers.plan import LayersPlan, PlannedPass
from dimscope.studies.layers.tables import LayerSpectra, layer_spectra

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class Latest:
    """Keeps the last value that was computed, and frees it before the next: two may not fit into memory."""

    key: Hashable = None
    value: Any = None

    def get(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return the value of this key, computed unless it is the last one."""
        if self.key != key:
            self.clear()
            self.value = compute()
            self.key = key
        return self.value

    def clear(self) -> None:
        """Free the value."""
        self.key = self.value = None


@dataclass(frozen=True, slots=True)
class PassRunner:
    """A plan, the folder for states of unfinished passes (None keeps them in memory), and what is loaded."""

    plan: LayersPlan
    state: Path | None
    _model: Latest = field(default_factory=Latest)
    _collection: Latest = field(default_factory=Latest)
    _spectra: Latest = field(default_factory=Latest)
    _samples: dict[str, Reservoir] = field(default_factory=dict)

    def model(self, planned: PlannedPass) -> "tuple[PreTrainedModel, list[Site]]":
        """Return the model of a pass, and the sites at which it is read; finding them runs it once."""

        def load() -> "tuple[PreTrainedModel, list[Site]]":
            model = self._load(planned)
            return model, select_sites(find_sites(model), self.plan.settings.layers)

        return self._model.get((planned.model, planned.weights), load)

    def _load(self, planned: PlannedPass) -> "PreTrainedModel":
        settings = self.plan.settings
        checkpoint, placement = self.plan.checkpoints[planned.model], self.plan.placements[planned.model]
        if planned.weights == "random":
            return randomly_initialised(
                checkpoint, placement, seed=settings.seed, trust_remote_code=settings.trust_remote_code
            )
        return load_model(checkpoint, placement, trust_remote_code=settings.trust_remote_code)

    def collection(self, planned: PlannedPass) -> Collection:
        """Return the collection of a pass: run it, resume it, or merge its shards."""
        return self._collection.get(planned.slug, lambda: self._collect(planned))

    def _collect(self, planned: PlannedPass) -> Collection:
        n_shards = self.plan.settings.shard[1]
        states = [path for part in range(n_shards) if (path := self.state_file(planned, part)) is not None]
        if not states or not all(map(is_complete, states)):
            return self.run(planned, self.plan.settings.shard[0])
        # A finished pass needs no model.
        merged, *rest = (part for part in map(load_collection, states) if part is not None)
        for part in rest:
            merged.merge(part)
        return merged

    def run(self, planned: PlannedPass, part: int) -> Collection:
        """Run one shard of a pass, or resume it."""
        (model, sites), settings = self.model(planned), self.plan.settings
        options = PassSettings(
            planned.batch, settings.reservoir, settings.seed, settings.logits, settings.checkpoint_every, settings.shard
        )  # fmt: skip
        with tqdm(
            total=planned.source.n_tokens, desc=planned.title, unit="token", unit_scale=True, disable=None
        ) as bar:
            return run_pass(
                model, sites, planned.windows(settings.seed), options, self.state_file(planned, part),
                lambda windows: bar.update(sum(len(window.ids) for window in windows)),
            )  # fmt: skip

    def spectra(self, planned: PlannedPass) -> dict[int, LayerSpectra]:
        """Return the spectra of every layer of a pass."""
        thresholds, first = self.plan.settings.thresholds, planned.identity.draw == 0
        return self._spectra.get(planned.slug, lambda: layer_spectra(self.collection(planned), thresholds, first=first))

    def real_sample(self, text: str) -> Reservoir:
        """Return the sampled states on real text, which are kept after their pass: the others are compared with them."""
        planned = self.plan.real(text)
        if text not in self._samples:
            path = None if self.state is None else self.state / f"{planned.slug}.sample.safetensors"
            if path is not None and (reservoir := load_reservoir(path)) is not None:
                return reservoir
            reservoir = self.collection(planned).reservoir
            if path is None:
                self._samples[text] = reservoir
            else:
                save_reservoir(reservoir, path)
            return reservoir
        return self._samples[text]

    def state_file(self, planned: PlannedPass, part: int) -> Path | None:
        """Return the file in which one shard of a pass is saved."""
        n_shards = self.plan.settings.shard[1]
        return None if self.state is None else self.state / f"{planned.slug}.{part + 1}-of-{n_shards}.safetensors"

    def unload_model(self) -> None:
        """Free the memory of the model."""
        self._model.clear()

    def forget(self, planned: PlannedPass) -> None:
        """Drop the sums of a pass whose tables are finished."""
        self._collection.clear()
        self._spectra.clear()
        if self.plan.settings.shard[1] == 1 and (path := self.state_file(planned, 0)) is not None:
            path.unlink(missing_ok=True)
