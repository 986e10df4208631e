"""How the studies that run a model read: names of texts and models, and how much of a text at once."""

from collections.abc import Sequence

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.model import Placement, require_causal
from dimscope.errors import InvalidArgument
from dimscope.texts.texts import Text, open_text

GENERATED = "generated"  # as a text: what the model writes itself
CPU_BATCH, GPU_BATCH = 2048, 16384  # tokens at once


def windows_at_once(placement: Placement, length: int) -> int:
    """How many windows of this many tokens suit the device."""
    return max(1, (CPU_BATCH if placement.device == "cpu" else GPU_BATCH) // length)


def distinct(names: Sequence[str], longer: Sequence[str]) -> list[str]:
    """The names, or the longer ones where two are the same; numbered where those are too."""
    chosen = list(names if len(set(names)) == len(names) else longer)
    return [
        name if chosen.index(name) == i else f"{name} ({chosen[:i].count(name) + 1})" for i, name in enumerate(chosen)
    ]


def named_texts(sources: Sequence[str]) -> dict[str, Text]:
    """The texts at the sources, by the name that is shown. Raises InvalidArgument for none, and what `open_text` raises."""
    if not sources:
        raise InvalidArgument("`texts` is empty; pass a file, or builtin:prose")
    texts = [open_text(source) for source in sources]
    return dict(zip(distinct([t.name for t in texts], sources), texts, strict=True))


def texts_or_written(sources: Sequence[str]) -> dict[str, Text | None]:
    """The texts at the sources by the name that is shown; None for what the model writes itself, `GENERATED`.

    Raises InvalidArgument for none, and what `open_text` raises.
    """
    if not sources:
        raise InvalidArgument(f"`texts` is empty; pass a file, builtin:prose or {GENERATED}")
    others = [source for source in sources if source != GENERATED]
    found: dict[str, Text | None] = {**named_texts(others)} if others else {}
    return found | ({GENERATED: None} if GENERATED in sources else {})


def context_of(checkpoint: Checkpoint) -> int | None:
    """How many tokens the model reads at once, where its config says so."""
    return getattr(require_causal(checkpoint).get_text_config(), "max_position_embeddings", None)


def window_length(checkpoint: Checkpoint, asked: int | None, longest: int) -> int:
    """Tokens of a window: as asked, else the context of the model, `longest` at most.

    Raises InvalidArgument where the model has no positions for as many as are asked for.
    """
    context = context_of(checkpoint)
    if asked is not None and context is not None and asked > context:
        raise InvalidArgument(f"`length` must be at most {context}, the context of {checkpoint.title}, got {asked}")
    return min(context or longest, longest) if asked is None else asked
