"""The passes of a study of hidden layers: one model on one text under one condition each. No model is loaded here."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dimscope.activations.layer_selection import parse_layers
from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.model import Placement, place, predicts, require_runnable
from dimscope.studies.layers.rows import Pass
from dimscope.studies.layers.settings import LayersSettings
from dimscope.studies.layers.text_windows import TextWindows, cut_texts
from dimscope.studies.provenance import fingerprint
from dimscope.studies.reading import distinct, line_end_warnings, named_texts, windows_at_once
from dimscope.texts.texts import Text
from dimscope.texts.windows import Window, grouped, shuffle_across, shuffle_within

ACROSS = 1024  # windows of a stream whose tokens are shuffled together

Weights = Literal["trained", "random"]


@dataclass(frozen=True, slots=True)
class PlannedPass:
    """One pass: what it is, which windows it reads, and all that its result depends on."""

    identity: Pass
    model: int  # the index of the model; 0 is the one studied
    weights: Weights
    source: TextWindows
    batch: int
    arguments: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Return the title of the pass: "builtin, builtin prose, shuffled 2"."""
        identity = self.identity
        number = f" {identity.draw + 1}" if identity.draw else ""
        return f"{identity.model}, {identity.text}, {identity.condition}{number}"

    @property
    def slug(self) -> str:
        """Return a file name unique to the pass. It omits the thresholds, on which what is collected does not depend."""
        collected = {key: value for key, value in self.arguments.items() if key != "thresholds"}
        digest = hashlib.sha256(json.dumps(collected, sort_keys=True).encode()).hexdigest()[:16]
        return f"{self.identity.condition.replace(' ', '-')}-{self.identity.draw}-{digest}"

    def windows(self, seed: int) -> Iterator[Window]:
        """Yield the windows, shuffled where the condition says so."""
        source, draw = self.source.windows(), self.identity.draw
        if self.identity.condition == "shuffled":
            return (shuffle_within(window, seed, draw) for window in source)
        if self.identity.condition == "shuffled across":
            return (window for group in grouped(source, ACROSS) for window in shuffle_across(group, seed, draw))
        return iter(source)


@dataclass(frozen=True, slots=True)
class LayersPlan:
    """The models of a study, their placement, its texts, and its passes in the order in which they run."""

    settings: LayersSettings
    checkpoints: tuple[Checkpoint, ...]
    titles: tuple[str, ...]
    placements: tuple[Placement, ...]
    texts: Mapping[str, Text]  # by the name that is shown
    passes: tuple[PlannedPass, ...]
    warnings: tuple[str, ...] = ()

    def real(self, text: str) -> PlannedPass:
        """Return the pass of the studied model over the real text, with which the others are compared."""
        key = (0, text, "real")
        return next(p for p in self.passes if (p.model, p.identity.text, p.identity.condition) == key)


def plan_layers(checkpoints: Sequence[Checkpoint], settings: LayersSettings) -> LayersPlan:
    """Open the texts, cut them into windows, and list the passes.

    Raises:
        InvalidArgument: Texts or windows do not fit.
        TokenizerMissing: A model has no tokenizer.
        UnsupportedCheckpoint: A model cannot be run.
    """
    for checkpoint in checkpoints:  # before the passes of the other models
        parse_layers(settings.layers, require_runnable(checkpoint).get_text_config().num_hidden_layers + 1)
    titles = distinct([c.title for c in checkpoints], [c.name for c in checkpoints])
    unable = [title for c, title in zip(checkpoints, titles, strict=True) if not predicts(c)]
    if unable and settings.logits:
        settings = replace(settings, logits=False)
    placements = [place(c, dtype=settings.dtype, device=settings.device) for c in checkpoints]
    texts = named_texts(settings.texts, keep_line_ends=settings.keep_line_ends)
    cut = cut_texts(checkpoints, texts, settings)
    warnings = (*line_end_warnings(texts), *cut.warnings, *_few_tokens(checkpoints, titles, cut.sources))
    warnings += tuple(f"{title} does not predict the next token: the study is without predictions" for title in unable)
    pairs = [t for c, t in zip(checkpoints, titles, strict=True) if require_runnable(c).is_encoder_decoder]
    warnings += tuple(f"{title} is an encoder-decoder: its layers are those of the encoder" for title in pairs)
    passes: list[PlannedPass] = []
    marks = [fingerprint(checkpoint) for checkpoint in checkpoints]
    # Model by model, so that each is loaded once; random weights are a model of their own.
    for model, weights, conditions in _runs(len(checkpoints), settings):
        placement = placements[model]
        mark = {"model": marks[model]} | ({"aligned_with": [marks[0], cut.length]} if model else {})
        for name, text in texts.items():
            source = cut.sources[model, name]
            batch = settings.batch or windows_at_once(placement, source.length)
            common = _arguments(settings, text, source, placement) | mark | {"batch": batch}
            for condition, draw in conditions:
                if condition == "shuffled across" and source.n_windows == 1:
                    continue
                seed = None if condition == "real" else settings.seed + draw
                identity = Pass(titles[model], name, condition, draw, seed)
                arguments = common | {"title": titles[model], "condition": condition, "draw": draw}
                passes.append(PlannedPass(identity, model, weights, source, batch, arguments))
    return LayersPlan(settings, tuple(checkpoints), tuple(titles), tuple(placements), texts, tuple(passes), warnings)


def _arguments(settings: LayersSettings, text: Text, source: TextWindows, placement: Placement) -> dict[str, Any]:
    """Return what the passes over a text have in common: all that changes their numbers."""
    return {
        "text": text.fingerprint, "text_name": source.text, "windows": source.n_windows, "length": source.length,
        "placement": asdict(placement),
        **{key: getattr(settings, key) for key in ("layers", "logits", "thresholds", "reservoir", "seed")},
    }  # fmt: skip


def _few_tokens(
    checkpoints: Sequence[Checkpoint], titles: Sequence[str], sources: Mapping[tuple[int, str], TextWindows]
) -> Iterator[str]:
    """Yield a warning for every model and text with fewer tokens than a measure needs to reach all dimensions."""
    for (model, text), source in sources.items():
        dim = require_runnable(checkpoints[model]).get_text_config().hidden_size
        if source.n_tokens is not None and source.n_tokens <= dim:
            yield (
                f"{text}: N = {source.n_tokens:,} tokens for the {dim:,} dimensions of {titles[model]}: "
                f"no count of dimensions can exceed N - 1 = {source.n_tokens - 1:,}"
            )


Conditions = list[tuple[str, int]]


def _runs(n_models: int, settings: LayersSettings) -> Iterator[tuple[int, Weights, Conditions]]:
    """Yield which conditions each model runs under: all for the studied one, real text for those compared with it."""
    shuffles = [("shuffled", draw) for draw in range(settings.shuffles)]
    shuffles += [("shuffled across", draw) for draw in range(settings.shuffles_across)]
    yield 0, "trained", [("real", 0), *shuffles]
    if settings.random_weights:
        yield 0, "random", [("random weights", 0)]
    for other in range(1, n_models):
        yield other, "trained", [("real", 0)]
