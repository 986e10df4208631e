"""The config of a checkpoint: read through transformers, which runs no code of the repository unless that is allowed."""

import json
from typing import TYPE_CHECKING, Any

from dimscope.checkpoints.sources import Source
from dimscope.errors import CorruptCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG = "config.json"


def read_config(source: Source, *, trust_remote_code: bool) -> "PretrainedConfig | None":
    """Return the config of a checkpoint; None where there is none, or one that describes no model of transformers.

    Raises:
        CorruptCheckpoint: The config is damaged, or contradicts itself.
        UnsafeCheckpoint: The architecture is code in the repository, and `trust_remote_code` is off.
    """
    if CONFIG not in source.files:
        return None
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = _read_json(source)
    model_type = raw.get("model_type")
    builtin = model_type in CONFIG_MAPPING  # transformers has the code
    if not builtin and "auto_map" not in raw:
        return None
    if not builtin and not trust_remote_code:
        raise UnsafeCheckpoint(
            f"{source.name}: its architecture {model_type!r} is code in the repository, which would run on this machine; "
            "pass `trust_remote_code` if you trust it"
        )
    location = source.fetch(CONFIG).parent if builtin else source.folder([CONFIG])
    try:
        return AutoConfig.from_pretrained(str(location), trust_remote_code=trust_remote_code and not builtin)
    except (ValueError, TypeError, KeyError, OSError) as e:
        raise CorruptCheckpoint(
            f"{source.name}: config.json does not describe a model ({str(e).splitlines()[0]})"
        ) from e
    except Exception as e:  # huggingface_hub's validation errors share no base that is public in all its versions
        if "Validation" not in type(e).__name__:
            raise
        reason = " ".join(str(e).split())
        raise CorruptCheckpoint(f"{source.name}: config.json contradicts itself ({reason})") from e


def unknown_model_type(source: Source) -> UnsupportedCheckpoint:
    """Return the error about a config that transformers cannot read."""
    return UnsupportedCheckpoint(
        f"{source.name}: transformers does not know the model type {_read_json(source).get('model_type')!r}"
    )


def _read_json(source: Source) -> dict[str, Any]:
    try:
        raw = json.loads(source.fetch(CONFIG).read_text(encoding="utf-8"))
        raw.get("model_type")
    except (ValueError, AttributeError) as e:
        raise CorruptCheckpoint(f"{source.name}: config.json is not valid JSON ({e})") from e
    return raw


def quantisation(config: "PretrainedConfig") -> str | None:
    """Return the method by which a config declares its weights quantised, or None."""
    if getattr(config, "quantization", None):
        return "MLX"
    declared = getattr(config, "quantization_config", None)
    if not declared:
        return None
    return (
        str(declared.get("quant_method", "unknown method")) if isinstance(declared, dict) else type(declared).__name__
    )
