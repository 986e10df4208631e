"""Opening a folder, a GGUF file, a hub id or `builtin`: config, tensor index and tables, without the weights."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING

from dimscope.checkpoints import BUILTIN, gguf
from dimscope.checkpoints.hub import cache_errors, find_on_hub
from dimscope.checkpoints.hub_environment import check_import_variables
from dimscope.checkpoints.skeleton import Skeleton, build_skeleton
from dimscope.checkpoints.sources import LocalFolder, Source
from dimscope.checkpoints.tensors import TensorInfo, TensorReader
from dimscope.checkpoints.weights import open_weights
from dimscope.errors import CheckpointNotFound, CorruptCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True, repr=False)
class Checkpoint:
    """An opened model: what it is made of and how to read it. Nothing is ever written to it.

    `config` and `skeleton` are None for a GGUF file, which describes its tables itself.

    >>> open_checkpoint("builtin")
    Checkpoint('builtin', LlamaForCausalLM, 4,224 x 256, tied)
    """

    name: str
    source: Source
    reader: TensorReader
    config: "PretrainedConfig | None"
    skeleton: Skeleton | None
    input_table: TensorInfo
    output_table: TensorInfo | None  # None where the model has none, or where it is the input table
    tied: bool

    def __repr__(self) -> str:
        """Return the model in one line: its tensors are thousands."""
        n_rows, dim = self.input_table.shape
        tied = "tied" if self.tied else "untied"
        return f"Checkpoint({self.name!r}, {self.architecture}, {n_rows:,} x {dim:,}, {tied})"

    @property
    def revision(self) -> str | None:
        """Return the commit on the hub, if it is from there."""
        return self.source.revision

    @property
    def title(self) -> str:
        """Return the short name."""
        return title_of(self.name)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return what the files declare, by name."""
        return self.reader.tensors

    @property
    def architecture(self) -> str:
        """Return the model class that the config names, or the model type."""
        if self.config is None:
            return "GGUF"
        return (self.config.architectures or [self.config.model_type])[0]


def title_of(name: str) -> str:
    """Return the short name of a model: a hub id whole, of a path its last part.

    >>> title_of("Qwen/Qwen2.5-0.5B"), title_of("./runs/tiny/")
    ('Qwen/Qwen2.5-0.5B', 'tiny')
    """
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return name.rstrip("/").rpartition("/")[2] if is_path else name


def open_checkpoint(
    name: str | Path = BUILTIN,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Open a model: its config and the headers of its weight files. No weights are read, or downloaded from the hub.

    >>> open_checkpoint("builtin").tied
    True

    Args:
        name: A folder, a GGUF file, a hub id (owner/name), or "builtin".
        revision: A branch, tag or commit on the hub.
        allow_pickle: Read pickle weights where there are no others; they can run code.
        trust_remote_code: Run code of the repository.

    Raises:
        CheckpointNotFound: There is no such model, or no access to it.
        NetworkError: The hub cannot be reached.
        CorruptCheckpoint: The files are damaged.
        UnsupportedCheckpoint: The weights are quantised, or transformers does not know the architecture.
        UnsafeCheckpoint: Weights or architecture are code, and the option that accepts it is off.
        MissingExtra: The file is GGUF, and the package gguf is not installed.
    """
    check_import_variables()
    source, gguf_file = _find_source(str(name), revision)
    with cache_errors(source):
        return _open(source, gguf_file, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


def _open(source: Source, gguf_file: str | None, *, allow_pickle: bool, trust_remote_code: bool) -> Checkpoint:
    if gguf_file is not None:
        return _located_gguf(source, gguf.open_gguf(source, gguf_file))
    has_config = "config.json" in source.files
    if not has_config and not any(f.endswith(".gguf") for f in source.files):
        raise CheckpointNotFound(f"{source.name}: no config.json there, so it is not a model")
    config = _read_config(source, trust_remote_code) if has_config else None
    if config is not None:
        refuse_quantised(config, source.name)
    reader = open_weights(source, allow_pickle=allow_pickle)
    if config is None or isinstance(reader, gguf.GgufReader):  # GGUF repositories often carry a config too
        return _located_gguf(source, reader)
    skeleton = build_skeleton(config, source.name, trust_remote_code=trust_remote_code)
    return locate_tables(source, reader, config, skeleton)


def _find_source(name: str, revision: str | None) -> tuple[Source, str | None]:
    """Return the source, and the file in it where the name is that of a GGUF file."""
    if name == BUILTIN:
        return LocalFolder(Path(str(package_files("dimscope.builtin") / "model")), BUILTIN), None
    path = Path(name).expanduser()
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as e:  # a name longer than file systems allow, or with a NUL
        raise CheckpointNotFound(f"{name[:80]}: no such folder, and no hub id either") from e
    if is_folder:
        return LocalFolder(path, name), None
    if is_file:
        if path.suffix == ".gguf":
            return LocalFolder(path.parent, name), path.name
        raise CheckpointNotFound(f"{name}: this is a file; pass the folder of the model, or a .gguf file")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "/", "~")):
        raise CheckpointNotFound(f"{name}: no such folder")
    return find_on_hub(name, revision), None


def _read_config(source: Source, trust_remote_code: bool) -> "PretrainedConfig":
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = source.fetch("config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        model_type = raw.get("model_type")
    except (ValueError, AttributeError) as e:
        raise CorruptCheckpoint(f"{source.name}: config.json is not valid JSON ({e})") from e
    builtin = model_type in CONFIG_MAPPING  # transformers has the code
    if not builtin and "auto_map" in raw and not trust_remote_code:
        raise UnsafeCheckpoint(
            f"{source.name}: its architecture {model_type!r} is code in the repository, which would run on this machine; "
            "pass `trust_remote_code` if you trust it"
        )
    if not builtin and "auto_map" not in raw:
        raise UnsupportedCheckpoint(f"{source.name}: transformers does not know the model type {model_type!r}")
    location = path.parent if builtin else source.folder(["config.json"])
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


def refuse_quantised(config: "PretrainedConfig", name: str) -> None:
    """Refuse a config that declares quantised weights.

    Raises:
        UnsupportedCheckpoint: The config declares a quantisation.
    """
    # MLX writes its own key; everybody else the one of transformers.
    quantised = getattr(config, "quantization_config", None) or getattr(config, "quantization", None)
    if quantised:
        method = (
            quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else type(quantised).__name__
        )
        raise UnsupportedCheckpoint(
            f"{name}: its weights are quantised ({method}); use the checkpoint they were quantised from"
        )


def locate_tables(source: Source, reader: TensorReader, config: "PretrainedConfig", skeleton: Skeleton) -> Checkpoint:
    """Find the embedding tables among the tensors of a checkpoint, and check their shapes and dtypes.

    Raises:
        CorruptCheckpoint: A table is missing, or has another shape than the config says.
        UnsupportedCheckpoint: A table is quantised.
    """
    names = set(reader.tensors)
    input_file = skeleton.file_name(skeleton.input_name, names)
    if input_file is None and skeleton.tied:
        # A tied table may have been saved under the name of the head alone.
        input_file = next((n for n in names if n.endswith("lm_head.weight")), None)
    if input_file is None:
        raise CorruptCheckpoint(f"{source.name}: the weights hold no {skeleton.input_name}, the token-embedding table")
    input_table = _checked(reader.tensors[input_file], skeleton.shapes[skeleton.input_name], source.name)
    output_table = None
    if skeleton.output_name is not None and not skeleton.tied:
        output_file = skeleton.file_name(skeleton.output_name, names)
        if output_file is None and skeleton.causal:
            raise CorruptCheckpoint(
                f"{source.name}: the config says that input and output tables differ, but the weights hold no {skeleton.output_name}"
            )
        if output_file is not None:
            output_table = _checked(reader.tensors[output_file], skeleton.shapes[skeleton.output_name], source.name)
    return Checkpoint(source.name, source, reader, config, skeleton, input_table, output_table, skeleton.tied)


def _located_gguf(source: Source, reader: TensorReader) -> Checkpoint:
    if gguf.INPUT_TABLE not in reader.tensors:
        raise CorruptCheckpoint(f"{source.name}: the file holds no {gguf.INPUT_TABLE}, the token-embedding table")
    output = reader.tensors.get(gguf.OUTPUT_TABLE)
    return Checkpoint(source.name, source, reader, None, None, reader.tensors[gguf.INPUT_TABLE], output, output is None)


def _checked(info: TensorInfo, expected: tuple[int, ...], name: str) -> TensorInfo:
    if info.shape != expected:
        raise CorruptCheckpoint(
            f"{name}: {info.name} has shape {' x '.join(map(str, info.shape))}, but config.json says {' x '.join(map(str, expected))}"
        )
    if info.dtype not in ("F64", "F32", "F16", "BF16"):
        raise UnsupportedCheckpoint(
            f"{name}: {info.name} is stored as {info.dtype}; quantised tables cannot be studied"
        )
    return info
