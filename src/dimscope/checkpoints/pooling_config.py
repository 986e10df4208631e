"""How a folder of sentence-transformers makes one vector of a text: which states are pooled, and what follows."""

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dimscope.checkpoints.sources import Source
from dimscope.errors import CorruptCheckpoint, DimscopeError, UnsupportedCheckpoint

Pooling = Literal["mean", "cls", "last"]
MODULES = "modules.json"  # as sentence-transformers writes it
MODES = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}  # as sentence-transformers calls them


@dataclass(frozen=True, slots=True)
class PoolingConfig:
    """What a checkpoint says of pooling.

    Attributes:
        pooling: Which states: their mean over all tokens, that of the first, or that of the last; None where it says nothing.
        normalise: Every vector is divided by its length afterwards.
        max_length: Tokens of a text that are read, at most; None where it says nothing.
    """

    pooling: Pooling | None = None
    normalise: bool = False
    max_length: int | None = None


def read_pooling(source: Source) -> PoolingConfig:
    """Return what the folder of a checkpoint says of pooling; nothing where it is not one of sentence-transformers.

    Raises:
        UnsupportedCheckpoint: It pools in another way, or has a layer of weights behind the pooling.
        CorruptCheckpoint: A file is damaged.
    """
    if MODULES not in source.files:
        return PoolingConfig()
    parts = {str(part["type"]).rpartition(".")[2]: part.get("path", "") for part in _read(source, MODULES)}
    if other := sorted(set(parts) - {"Transformer", "Pooling", "Normalize"}):
        raise UnsupportedCheckpoint(
            f"{source.name}: its {MODULES} has a {other[0]} module, which is not supported; choose the pooling yourself to leave it out"
        )
    pooling = None
    if "Pooling" in parts:
        own = _read(source, f"{parts['Pooling']}/config.json")
        keys = [
            key.removeprefix("pooling_mode_") for key, on in own.items() if on is True and key.startswith("pooling_")
        ]
        chosen = [str(own["pooling_mode"])] if "pooling_mode" in own else keys
        modes = [MODES.get(mode, mode) for mode in chosen]
        if len(modes) != 1 or modes[0] not in get_args(Pooling):
            raise UnsupportedCheckpoint(
                f"{source.name}: it pools by {', '.join(modes) or 'nothing'}; pooling is one of {', '.join(get_args(Pooling))}"
            )
        pooling = modes[0]
    length = None
    if "sentence_bert_config.json" in source.files:
        length = _read(source, "sentence_bert_config.json").get("max_seq_length")
    return PoolingConfig(pooling, "Normalize" in parts, length)


def _read(source: Source, file: str) -> Any:
    try:
        return json.loads(source.fetch(file).read_text(encoding="utf-8"))
    except DimscopeError:
        raise
    except (ValueError, OSError) as e:
        raise CorruptCheckpoint(f"{source.name}: {file} is not valid JSON ({e})") from e
