"""What a study of hidden layers is asked, and the passes that it takes: one model on one text under one condition each."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from dimscope.activations.hidden_states import parse_layers
from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.model import Placement, place, require_causal
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.studies.layers.settings import LayersSettings
from dimscope.studies.layers.tables import Pass
from dimscope.studies.provenance import fingerprint
from dimscope.studies.reading import distinct, named_texts, window_length, windows_at_once
from dimscope.texts.texts import Text
from dimscope.texts.windows import (
    Window,
    grouped,
    middle_windows,
    shuffle_across,
    shuffle_within,
    special_prefix,
    stream_windows,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH = 1024  # tokens of a window where the model's context is longer and none is asked for
NOTEBOOK_LENGTH = 2048  # the same for the notebook, whose models read 1,024 and 2,048
ACROSS = 1024  # windows of a stream whose tokens are shuffled together


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

    of: Pass
    model: int  # the number of the model; 0 is the one studied
    weights: Literal["trained", "random"]
    reading: Reading
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
            return (w for group in grouped(given, ACROSS) for w in shuffle_across(group, seed, self.of.draw))
        return iter(given)


@dataclass(frozen=True, slots=True)
class Plan:
    """The models of a study, where they run, its texts, and its passes in the order in which they run."""

    checkpoints: tuple[Checkpoint, ...]
    titles: tuple[str, ...]
    placements: tuple[Placement, ...]
    texts: Mapping[str, Text]  # by the name that is shown
    units: tuple[Unit, ...]

    def real(self, text: str) -> Unit:
        """The pass of the studied model over the real text, against which others are held."""
        return next(u for u in self.units if (u.model, u.of.text, u.of.condition) == (0, text, "real"))


def plan_layers(checkpoints: Sequence[Checkpoint], settings: LayersSettings) -> Plan:
    """Opens the texts, cuts them into windows, and lists the passes; no model is loaded.

    Raises InvalidArgument for texts and windows that do not fit, TokenizerMissing, UnsupportedCheckpoint.
    """
    for checkpoint in checkpoints:  # now, not after the passes of the models before it
        parse_layers(settings.layers, require_causal(checkpoint).get_text_config().num_hidden_layers + 1)
    titles = distinct([c.title for c in checkpoints], [c.name for c in checkpoints])
    placements = [place(c, dtype=settings.dtype, device=settings.device) for c in checkpoints]
    texts = named_texts(settings.texts)
    longest = LENGTH if settings.preset is None else NOTEBOOK_LENGTH
    readers = [Reader(window_length(c, settings.length, longest), require_tokenizer(c.source)) for c in checkpoints]
    read = {(m, name): _reading(reader, name, text, settings.windows)
            for m, reader in enumerate(readers) for name, text in texts.items()}  # fmt: skip
    if settings.windows is None:  # as many of each text as of the shortest: dimensions grow with the tokens
        least = min(reading.n_windows or 0 for reading in read.values())
        read = {(m, name): r if r.n_windows == least else _reading(readers[m], name, texts[name], least)
                for (m, name), r in read.items()}  # fmt: skip
    units, marks = [], [fingerprint(c) for c in checkpoints]
    # Model by model, so that each is loaded once; random weights are a model of their own.
    for m, weights, conditions in _runs(len(checkpoints), settings):
        for name, text in texts.items():
            for condition, draw in conditions:
                reading = read[m, name]
                if condition == "shuffled across" and reading.n_windows == 1:
                    continue
                arguments = {
                    "model": marks[m], "title": titles[m], "text": text.fingerprint, "text_name": name,
                    "condition": condition, "draw": draw, "windows": reading.n_windows, "length": reading.length,
                    "batch": settings.batch or windows_at_once(placements[m], reading.length),
                    "placement": asdict(placements[m]),
                    **{key: getattr(settings, key) for key in ("layers", "logits", "thresholds", "reservoir", "seed")},
                }  # fmt: skip
                units.append(Unit(Pass(titles[m], name, condition, draw), m, weights, reading, arguments))
    return Plan(tuple(checkpoints), tuple(titles), tuple(placements), texts, tuple(units))


Conditions = list[tuple[str, int]]


def _runs(n_models: int, settings: LayersSettings) -> Iterator[tuple[int, Literal["trained", "random"], Conditions]]:
    """Which conditions each model runs under: all for the studied one, real text for those beside it."""
    shuffles = [("shuffled", draw) for draw in range(settings.shuffles)]
    shuffles += [("shuffled across", draw) for draw in range(settings.shuffles_across)]
    yield 0, "trained", [("real", 0), *shuffles]
    if settings.random_weights:
        yield 0, "random", [("random weights", 0)]
    for other in range(1, n_models):
        yield other, "trained", [("real", 0)]


@dataclass(frozen=True, slots=True)
class Reader:
    """How a model reads: how many tokens at once, and its tokenizer."""

    length: int
    tokenizer: "PreTrainedTokenizerBase"


def _reading(reader: Reader, name: str, text: Text, windows: int | Literal["all"] | None) -> Reading:
    tokenizer, length = reader.tokenizer, reader.length
    bos = " ".join(tokenizer.convert_ids_to_tokens(special_prefix(tokenizer))) or None
    if windows == "all":
        # The first window now: a text that is too short is said before a model is loaded.
        next(iter(stream_windows(text, tokenizer, length=length)))
        return Reading(name, length, lambda: stream_windows(text, tokenizer, length=length), bos, None)
    listed = middle_windows(text, tokenizer, length=length, count=windows)
    return Reading(name, length, lambda: listed, bos, len(listed))
