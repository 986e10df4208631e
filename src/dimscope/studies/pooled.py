"""One vector for each sentence of some texts: a source for the embedding study, which takes any N x d vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from dimscope.errors import InvalidArgument
from dimscope.studies.options import DType, Texts, require_not_empty, require_types

if TYPE_CHECKING:
    from dimscope.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Options of pooling."""

    texts: Texts = ("builtin:prose",)
    "Texts: files, folders, FILE.parquet:COLUMN, FILE.jsonl:FIELD, URLs, - or builtin:prose."
    unit: Literal["sentence", "line"] = "sentence"
    "What becomes one vector."
    count: int = 2000
    "Sentences or lines of all texts, evenly spread, at most."
    pooling: Literal["mean", "cls", "last"] | None = None
    "States to pool: mean over all tokens, cls for the first, last for the last [default: as the model says, else mean]."
    dtype: DType = "auto"
    "Number format of the computation [default: float32 on a CPU where it fits, else as stored]."
    device: str = "auto"
    "Device: auto, cpu, cuda, cuda:1, mps or map."

    def __post_init__(self) -> None:
        """Raise InvalidArgument for a setting that fits no model."""
        require_types(self, opened=("texts",))
        require_not_empty(self, "texts", "files, URLs or builtin:prose")
        if self.count < 2:
            raise InvalidArgument(f"`count` must be 2 or more, got {self.count}")


@dataclass(frozen=True, slots=True)
class PooledVectors:
    """Pooled vectors, and what they are.

    Attributes:
        frame: A row per sentence: `label` is the sentence, `vector` its d numbers (float32).
        facts: The model, the texts and how the states were pooled, for JSON.
    """

    frame: pl.DataFrame
    facts: dict[str, Any]


def pool_vectors(
    checkpoint: Checkpoint,
    settings: PoolSettings,
    *,
    trust_remote_code: bool = False,
    announce: Callable[[str], object] = lambda line: None,
) -> PooledVectors:
    """Return one vector for each sentence or line of the texts.

    Raises:
        DimscopeError: What opening texts and models, and running them, raises.
    """
    from dimscope.activations.pooling import pool_texts
    from dimscope.checkpoints.model import load_model, place
    from dimscope.checkpoints.pooling_config import PoolingConfig, read_pooling
    from dimscope.checkpoints.vocabulary import require_tokenizer
    from dimscope.studies.reading import context_of, named_texts
    from dimscope.texts.sentences import spread_units

    own = read_pooling(checkpoint.source) if settings.pooling is None else PoolingConfig(settings.pooling)
    config = replace(own, pooling=own.pooling or "mean", max_length=own.max_length or context_of(checkpoint))
    tokenizer = require_tokenizer(checkpoint.source)
    texts = named_texts(settings.texts)
    each = -(-settings.count // len(texts))
    units = [unit for text in texts.values() for unit in spread_units(text, settings.unit, each)][: settings.count]
    placement = place(checkpoint, dtype=settings.dtype, device=settings.device)
    announce(
        f"{checkpoint.title}: {len(units):,} {settings.unit}s, pooling {config.pooling}, on {placement.device} ({placement.dtype})"
    )
    model = load_model(checkpoint, placement, trust_remote_code=trust_remote_code)
    rows = pool_texts(model, tokenizer, units, config, progress=True)
    vectors = pl.Series(rows.numpy(), dtype=pl.Array(pl.Float32, rows.shape[1]))
    facts: dict[str, Any] = {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "texts": list(texts),
        "unit": settings.unit,
    }
    facts |= asdict(config) | {"rows": len(units), "dim": rows.shape[1]}
    return PooledVectors(pl.DataFrame({"label": units, "vector": vectors}), facts)
