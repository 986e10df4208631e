"""The command that writes one vector for each sentence of a text."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import polars as pl

from dimscope.checkpoints import BUILTIN
from dimscope.cli.options import COMMON, Common, announce, text_sources
from dimscope.cli.terminal import Output, write
from dimscope.errors import InvalidArgument
from dimscope.studies.options import DType, Texts


def pool(
    model: str = BUILTIN,
    /,
    *,
    text: Texts = ("builtin:prose",),
    unit: Literal["sentence", "line"] = "sentence",
    count: int = 2000,
    pooling: Literal["mean", "cls", "last"] | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    common: Common = COMMON,
) -> None:
    """Compute one vector for each sentence of a text, and write them for the embedding study.

    The vectors are the last hidden states, pooled as the model's own sentence-transformers files say.

    Example: `dimscope pool sentence-transformers/all-MiniLM-L6-v2 --text prose.txt --out pooled`

    Parameters
    ----------
    text
        Texts to read: files, folders, URLs, builtin:prose.
    unit
        What becomes one vector: a sentence, or a line.
    count
        Sentences or lines of all texts, evenly spread.
    pooling
        States to pool: mean over all tokens, cls for the first, last for the last [default: as the model says, else mean].
    dtype
        Number format of the computation.
    device
        Device: auto, cpu, cuda, cuda:1, mps or map.
    """
    from dimscope.activations.pooling import pool_texts
    from dimscope.checkpoints.model import load_model, place
    from dimscope.checkpoints.pooling_config import PoolingConfig, read_pooling
    from dimscope.checkpoints.vocabulary import require_tokenizer
    from dimscope.studies.reading import context_of, named_texts
    from dimscope.texts.sentences import spread_units

    if common.out is None:
        raise InvalidArgument("`out` is needed: the vectors are written there")
    if count < 2:
        raise InvalidArgument(f"`count` must be 2 or more, got {count}")
    checkpoint = common.open(model)
    own = PoolingConfig() if pooling is not None else read_pooling(checkpoint.source)
    config = replace(own, pooling=pooling or own.pooling or "mean", max_length=own.max_length or context_of(checkpoint))
    tokenizer = require_tokenizer(checkpoint.source)
    texts = named_texts(text_sources(text))
    units = [u for t in texts.values() for u in spread_units(t, unit, -(-count // len(texts)))][:count]
    placement = place(checkpoint, dtype=dtype, device=device)
    announce(
        f"{checkpoint.title}: {len(units):,} {unit}s, {config.pooling} pooling, on {placement.device} ({placement.dtype})"
    )
    loaded = load_model(checkpoint, placement, trust_remote_code=common.trust_remote_code)
    rows = pool_texts(loaded, tokenizer, units, config, progress=True)
    frame = pl.DataFrame({"label": units, "vector": pl.Series(rows.numpy(), dtype=pl.Array(pl.Float32, rows.shape[1]))})
    path = common.out / "vectors.parquet"
    facts = {
        "model": checkpoint.name, "revision": checkpoint.revision, "texts": list(texts), "unit": unit,
        "pooling": config.pooling, "normalised": config.normalise, "max_length": config.max_length,
        "rows": len(units), "dim": rows.shape[1],
    }  # fmt: skip
    answer = (
        f"{len(units):,} {unit}s as vectors of {rows.shape[1]:,} dimensions; study them with: dimscope report {path}"
    )
    write(Output(facts, files_only={"vectors": frame}), common.out)
    common.print(Output(facts, answer=answer))
