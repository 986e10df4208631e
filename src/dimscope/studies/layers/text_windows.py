"""The windows of a study of hidden layers: cut for the studied model, and over the same bytes for the others."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.errors import InvalidArgument
from dimscope.studies.layers.settings import LayersSettings
from dimscope.studies.reading import context_of, fitted_length
from dimscope.texts.alignment import aligned_windows
from dimscope.texts.encoding import special_prefix
from dimscope.texts.texts import Text
from dimscope.texts.windows import Window, middle_windows, stream_windows

LONGEST = 1024  # tokens of a window where the model's context is longer and no length is set
NOTEBOOK_LONGEST = 2048  # the same for the notebook, whose models have a context of 1,024 and 2,048
SAMPLED = 64  # windows of a streamed text from which their length in the tokens of another model is estimated

Windows = int | Literal["all"] | None


@dataclass(frozen=True, slots=True)
class TextWindows:
    """A text as the windows that one model reads.

    Attributes:
        text: Name of the text.
        length: Tokens of the longest window; all windows of the studied model are as long.
        windows: Returns the windows.
        bos: The special tokens before each window.
        n_windows: Number of windows; None for a text that is streamed.
        n_tokens: Tokens of all windows; None for a text that is streamed.
    """

    text: str
    length: int
    windows: Callable[[], Iterable[Window]]
    bos: str | None
    n_windows: int | None
    n_tokens: int | None


@dataclass(frozen=True, slots=True)
class StudyWindows:
    """All windows of a study.

    Attributes:
        sources: Windows by the index of the model and the name of the text.
        length: Tokens of a window of the first model.
        warnings: What made windows shorter than requested.
    """

    sources: Mapping[tuple[int, str], TextWindows]
    length: int
    warnings: tuple[str, ...] = ()


def cut_texts(checkpoints: Sequence[Checkpoint], texts: Mapping[str, Text], settings: LayersSettings) -> StudyWindows:
    """Cut every text into windows for the first model, and into windows over the same bytes for each of the others.

    Windows become shorter until each fits the context of the model that reads it. Of a streamed text only the first
    windows are tried; what exceeds the context in a later one is left out.

    Raises:
        InvalidArgument: Texts or windows do not fit.
        TokenizerMissing: A model has no tokenizer.
        UnsupportedCheckpoint: A model is not a causal language model.
    """
    studied, *others = checkpoints
    longest = LONGEST if settings.preset is None else NOTEBOOK_LONGEST
    fitted = fitted_length(studied, texts, settings.length, longest)
    length, reason = fitted.length, ""
    while True:
        own = _studied_windows(studied, texts, settings.windows, length)
        sources = {(0, name): source for name, source in own.items()}
        for model, other in enumerate(others, 1):
            sources |= {(model, name): _aligned(other, texts[name], source) for name, source in own.items()}
        excess, title = _largest_excess(checkpoints, sources)
        if excess <= 1:
            break
        length = int(length / excess)
        reason = f"windows are {length:,} tokens long, not {fitted.length:,}: longer ones exceed the context of {title}"
    return StudyWindows(sources, length, (*fitted.warnings, *([reason] if reason else [])))


def _largest_excess(
    checkpoints: Sequence[Checkpoint], sources: Mapping[tuple[int, str], TextWindows]
) -> tuple[float, str]:
    """Return how many times its context the longest window has, over all models, and the title of that model."""
    excess = (
        (source.length / context, checkpoints[model].title)
        for (model, _), source in sources.items()
        if (context := context_of(checkpoints[model])) is not None
    )
    return max(excess, default=(0.0, ""))


def _studied_windows(
    checkpoint: Checkpoint, texts: Mapping[str, Text], windows: Windows, length: int
) -> dict[str, TextWindows]:
    """Return the windows of the first model by the name of the text: as many of each text as of the shortest by default."""
    sources = {name: _cut(checkpoint, name, text, windows, length) for name, text in texts.items()}
    if windows is not None:
        return sources
    fewest = min(source.n_windows or 0 for source in sources.values())  # dimensions grow with the tokens
    return {
        name: source if source.n_windows == fewest else _cut(checkpoint, name, texts[name], fewest, length)
        for name, source in sources.items()
    }


def _cut(checkpoint: Checkpoint, name: str, text: Text, windows: Windows, length: int) -> TextWindows:
    tokenizer, bos = require_tokenizer(checkpoint.source), _bos(checkpoint)
    if windows == "all":
        # Reads the first window, so that a text that is too short is refused before a model is loaded.
        next(iter(stream_windows(text, tokenizer, length=length)))
        return TextWindows(name, length, lambda: stream_windows(text, tokenizer, length=length), bos, None, None)
    cut = middle_windows(text, tokenizer, length=length, count=windows)
    return TextWindows(name, length, lambda: cut, bos, len(cut), len(cut) * length)


def _aligned(checkpoint: Checkpoint, text: Text, studied: TextWindows) -> TextWindows:
    """Return the windows of another model over the bytes of those of the studied one."""
    tokenizer, bos = require_tokenizer(checkpoint.source), _bos(checkpoint)
    streamed = studied.n_windows is None
    like = islice(studied.windows(), SAMPLED if streamed else None)
    windows = list(aligned_windows(text, tokenizer, like))
    if not windows:
        raise InvalidArgument(
            f"{studied.text}: no window of it has a whole token of {checkpoint.title}; pass a larger `length`"
        )
    length, name = max(len(window.ids) for window in windows), studied.text
    if not streamed:
        return TextWindows(name, length, lambda: windows, bos, len(windows), sum(len(w.ids) for w in windows))
    context = context_of(checkpoint)
    return TextWindows(
        name, length, lambda: aligned_windows(text, tokenizer, studied.windows(), longest=context), bos, None, None
    )


def _bos(checkpoint: Checkpoint) -> str | None:
    tokenizer = require_tokenizer(checkpoint.source)
    return " ".join(tokenizer.convert_ids_to_tokens(special_prefix(tokenizer))) or None
