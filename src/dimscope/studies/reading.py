"""What the studies that run a model read: texts by name, windows by length and number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.model import Placement, require_runnable
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.errors import InvalidArgument
from dimscope.texts.texts import Text, open_text
from dimscope.texts.windows import fitting_length, special_prefix

GENERATED = "generated"  # the name of the text that the model generates itself
CPU_BATCH, GPU_BATCH = 2048, 16384  # tokens at once


def windows_at_once(placement: Placement, length: int) -> int:
    """Return how many windows of this many tokens suit the device."""
    return max(1, (CPU_BATCH if placement.device == "cpu" else GPU_BATCH) // length)


def distinct(names: Sequence[str], longer: Sequence[str]) -> list[str]:
    """Return the names, or the longer ones where two are the same; numbered where those are too.

    >>> distinct(["a", "b"], ["x/a", "x/b"]), distinct(["a", "a"], ["x/a", "y/a"]), distinct(["a", "a"], ["a", "a"])
    (['a', 'b'], ['x/a', 'y/a'], ['a', 'a (2)'])
    """
    chosen = list(names if len(set(names)) == len(names) else longer)
    return [
        name if chosen.index(name) == i else f"{name} ({chosen[:i].count(name) + 1})" for i, name in enumerate(chosen)
    ]


def named_texts(sources: Sequence[str | Text], *, keep_line_ends: bool = False) -> dict[str, Text]:
    """Return texts by the name that is shown: those of sources, and those that are texts already.

    Args:
        sources: Files, folders, URLs and others that `open_text` takes; texts stay as they were opened.
        keep_line_ends: Do not read CRLF and CR as LF.

    Raises:
        InvalidArgument: There are none, or one cannot be read.
    """
    if not sources:
        raise InvalidArgument("`texts` is empty; pass a file, or builtin:prose")
    if other := [source for source in sources if not isinstance(source, str | Text)]:
        raise InvalidArgument(f"`texts` must be files, URLs, builtin:prose or texts, got {type(other[0]).__name__}")
    texts = [
        source if isinstance(source, Text) else open_text(source, keep_line_ends=keep_line_ends) for source in sources
    ]
    longer = [source if isinstance(source, str) else source.name for source in sources]
    return dict(zip(distinct([text.name for text in texts], longer), texts, strict=True))


def texts_or_generated(sources: Sequence[str | Text], *, keep_line_ends: bool = False) -> dict[str, Text | None]:
    """Return texts as `named_texts` does; None for the one that the model generates itself, `GENERATED`.

    Raises:
        InvalidArgument: There are none, or one cannot be read.
    """
    if not sources:
        raise InvalidArgument(f"`texts` is empty; pass a file, builtin:prose or {GENERATED}")
    others = [source for source in sources if source != GENERATED]
    texts: dict[str, Text | None] = {**named_texts(others, keep_line_ends=keep_line_ends)} if others else {}
    return texts | ({GENERATED: None} if GENERATED in sources else {})


def line_end_warnings(texts: Mapping[str, Text | None]) -> tuple[str, ...]:
    """Return a warning for every text with line ends that are read as LF; a long text is read in part for that."""
    changed = {name: text.changed_line_ends() for name, text in texts.items() if text is not None}
    return tuple(
        f"{name}: {ends} were read as LF; --keep-line-ends keeps them" for name, ends in changed.items() if ends
    )


def context_of(checkpoint: Checkpoint) -> int | None:
    """Return how many tokens the model reads at once; None where its config has no limit.

    Raises:
        UnsupportedCheckpoint: The checkpoint cannot be run.
    """
    positions = getattr(require_runnable(checkpoint).get_text_config(), "max_position_embeddings", None)
    skeleton = checkpoint.skeleton
    return positions if positions is None or skeleton is None else positions - skeleton.position_offset


def window_length(checkpoint: Checkpoint, length: int | None, longest: int) -> int:
    """Return the tokens of a window: `length`, else the context of the model, `longest` at most.

    Raises:
        InvalidArgument: `length` is larger than the context of the model.
        UnsupportedCheckpoint: The checkpoint cannot be run.
    """
    context = context_of(checkpoint)
    if length is None:
        return min(context or longest, longest)
    if context is not None and length > context:
        raise InvalidArgument(f"`length` must be at most {context}, the context of {checkpoint.title}, got {length}")
    return length


@dataclass(frozen=True, slots=True)
class FittedLength:
    """Tokens per window that every text can fill, and a warning for each text that made them fewer."""

    length: int
    warnings: tuple[str, ...] = ()


def fitted_length(
    checkpoint: Checkpoint, texts: Mapping[str, Text | None], length: int | None, longest: int, *, n_windows: int = 1
) -> FittedLength:
    """Return the tokens of a window as `window_length` does, or fewer where a text is too short for `n_windows` of them.

    Args:
        checkpoint: The model that reads the texts.
        texts: Texts by name; None for one that the model generates, which is as long as it needs to be.
        length: Tokens per window that the user chose.
        longest: Tokens per window where nothing was chosen, at most.
        n_windows: Windows that every text must fill.

    Raises:
        InvalidArgument: `length` exceeds the context of the model, or a text has fewer than 2 tokens.
        TokenizerMissing: The checkpoint has no tokenizer.
    """
    requested = window_length(checkpoint, length, longest)
    tokenizer = require_tokenizer(checkpoint.source)
    n_prefix = len(special_prefix(tokenizer))
    shortest, warnings = requested, []
    for name, text in texts.items():
        if text is None:
            continue
        available = fitting_length(text, tokenizer, n_windows * requested)
        own = requested if available == n_windows * requested else (available - n_prefix) // n_windows + n_prefix
        if own - n_prefix < 2:
            tokens = available - n_prefix
            raise InvalidArgument(f"{name} has {tokens} tokens; {n_windows} windows need at least {2 * n_windows}")
        if own < requested:
            warnings.append(
                f"{name} has {available - n_prefix:,} tokens: windows are {own:,} tokens long, not {requested:,}"
            )
            shortest = min(shortest, own)
    return FittedLength(shortest, tuple(warnings))
