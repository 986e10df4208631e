"""The command that writes one vector for each sentence of a text."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from cyclopts import Parameter

from dimscope.checkpoints import BUILTIN
from dimscope.cli.options import COMMON, Common, announce, text_sources
from dimscope.cli.terminal import Output, write
from dimscope.errors import InvalidArgument
from dimscope.studies.pooled import PoolSettings, pool_vectors

SETTINGS = PoolSettings()


def pool(
    model: str = BUILTIN,
    /,
    *,
    settings: Annotated[PoolSettings, Parameter(name="*")] = SETTINGS,
    common: Common = COMMON,
) -> None:
    """Compute one vector for each sentence of a text, and write them for the embedding study.

    The vectors are the last hidden states, pooled as the model's own sentence-transformers files say.

    Example: `dimscope pool sentence-transformers/all-MiniLM-L6-v2 --text prose.txt --out pooled`
    """
    if common.out is None:
        raise InvalidArgument("`out` is needed: the vectors are written there")
    settings = replace(settings, texts=text_sources(settings.texts))
    pooled = pool_vectors(common.open(model), settings, trust_remote_code=common.trust_remote_code, announce=announce)
    path, facts = common.out / "vectors.parquet", pooled.facts
    answer = (
        f"{facts['rows']:,} {facts['unit']}s as vectors of {facts['dim']:,} dimensions; "
        f"study them with: dimscope report {path}"
    )
    write(Output(facts, files_only={"vectors": pooled.frame}), common.out)
    common.print(Output(facts, answer=answer))
