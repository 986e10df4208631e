"""Opening a folder, a GGUF file, a hub id or `builtin`: config, tensor index and tables, without the weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING

from dimscope.checkpoints import BUILTIN, gguf
from dimscope.checkpoints.config import CONFIG, quantisation, read_config, unknown_model_type
from dimscope.checkpoints.hub import cache_errors, find_on_hub
from dimscope.checkpoints.hub_environment import check_import_variables
from dimscope.checkpoints.quantised import dequantised
from dimscope.checkpoints.skeleton import Skeleton, build_skeleton
from dimscope.checkpoints.sources import LocalFolder, Source
from dimscope.checkpoints.static_table import find_static_table
from dimscope.checkpoints.tables import has_head_of_its_own, locate_tables, untie
from dimscope.checkpoints.tensors import TensorInfo, TensorReader
from dimscope.checkpoints.weights import (
    WeightFiles,
    adapter_note,
    choose_weights,
    hint_below,
    open_weights,
    refuse_adapter_alone,
    stale_note,
)
from dimscope.checkpoints.wrappers import unwrap
from dimscope.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedCheckpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True, repr=False)
class Checkpoint:
    """An opened model: what it is made of and how to read it. Nothing is ever written to it.

    Attributes:
        name: As the user wrote it.
        source: Where its files are.
        reader: Reads its tensors.
        config: Its config, corrected by what the files hold; None for a GGUF file or a static table.
        skeleton: The model without its weights; None where `config` is.
        input_table: The input table.
        output_table: The output table; None where the model has none, or where it is the input table.
        tied: Both are one.
        weights: The files of the weights; None for a model in memory.
        renamed: The tensors have other names here than in the files, which have wrappers' prefixes.
        notes: What the user should know of the files.

    >>> open_checkpoint("builtin")
    Checkpoint('builtin', LlamaForCausalLM, 4,224 x 256, tied)
    """

    name: str
    source: Source
    reader: TensorReader
    config: "PretrainedConfig | None"
    skeleton: Skeleton | None
    input_table: TensorInfo
    output_table: TensorInfo | None
    tied: bool
    weights: WeightFiles | None = None
    renamed: bool = False
    notes: tuple[str, ...] = field(default=(), repr=False)

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
    def shares_table(self) -> bool | None:
        """Return whether one table is input and output; None where the model has no output table."""
        return None if not self.tied and self.output_table is None else self.tied

    @property
    def quantisation(self) -> str | None:
        """Return the method by which the weights are quantised, or None."""
        return None if self.config is None else quantisation(self.config)

    @property
    def architecture(self) -> str:
        """Return the model class that the config names, or the model type."""
        if self.config is None:
            return "GGUF" if isinstance(self.reader, gguf.GgufReader) else "static table"
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
        UnsupportedCheckpoint: transformers does not know the architecture, or has no model for the config.
        UnsafeCheckpoint: Weights or architecture are code, and the option that accepts it is off.
        MissingExtra: The file is GGUF, and the package gguf is not installed.
    """
    check_import_variables()
    source, gguf_file = _find_source(str(name), revision)
    with cache_errors(source):
        return _open(source, gguf_file, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


def _open(source: Source, gguf_file: str | None, *, allow_pickle: bool, trust_remote_code: bool) -> Checkpoint:
    if gguf_file is not None:
        return _open_gguf(source, WeightFiles("gguf", tuple(gguf.gguf_files(source, gguf_file))))
    refuse_adapter_alone(source)
    config = read_config(source, trust_remote_code=trust_remote_code)
    if config is None and not any(f.endswith((".gguf", ".safetensors")) for f in source.files):
        raise _no_model(source)
    explicit = getattr(config, "transformers_weights", None)
    weights = choose_weights(source, explicit, allow_pickle=allow_pickle)
    if weights.kind == "gguf":  # GGUF repositories often carry a config too
        return _open_gguf(source, weights)
    if config is None:
        return _open_static(source, weights)
    return _open_model(source, weights, config, trust_remote_code=trust_remote_code)


def _open_model(
    source: Source, weights: WeightFiles, config: "PretrainedConfig", *, trust_remote_code: bool
) -> Checkpoint:
    skeleton = build_skeleton(config, source.name, trust_remote_code=trust_remote_code)
    stored = open_weights(source, weights)
    if lora := next((name for name in stored.tensors if ".lora_" in name), None):
        raise UnsupportedCheckpoint(
            f"{source.name}: its adapters are not merged into the weights ({lora}); merge them first"
        )
    unwrapped = unwrap(stored, skeleton)
    reader, notes = unwrapped.reader, [*stale_note(source, weights), *adapter_note(source, weights)]
    if unwrapped.removed:
        notes.append(f"{source.name}: {', '.join(unwrapped.removed)} was taken off the names of its tensors")
    if has_head_of_its_own(reader, skeleton):
        notes.append(
            f"{source.name}: config.json ties the output table to the input table, but the weights hold another output "
            f"table, {skeleton.head_name}; both are used, as stock transformers does"
        )
        untie(config)
        skeleton = build_skeleton(config, source.name, trust_remote_code=trust_remote_code)
    tables = locate_tables(source, reader, skeleton)
    if quantisation(config):
        stored_tables = (tables.input, *([tables.output] if tables.output else []))
        reader = dequantised(reader, [info.name for info in stored_tables], config)
    if unfilled := [] if quantisation(config) else skeleton.unfilled(reader.tensors):
        notes.append(
            f"{source.name}: the weights fill {len(skeleton.shapes) - len(unfilled):,} of the {len(skeleton.shapes):,} "
            f"parameters of the model; {len(unfilled):,} are unfilled, such as {unfilled[0]}"
        )
    return Checkpoint(
        source.name, source, reader, config, skeleton, tables.input, tables.output, tables.tied,
        weights, bool(unwrapped.removed), tuple(notes),
    )  # fmt: skip


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


def _no_model(source: Source) -> CheckpointNotFound | UnsupportedCheckpoint:
    """Return the error about a folder without a config that transformers knows."""
    if CONFIG in source.files:
        return unknown_model_type(source)
    return CheckpointNotFound(f"{source.name}: no config.json there, so it is not a model{hint_below(source)}")


def _open_static(source: Source, weights: WeightFiles) -> Checkpoint:
    """Open a folder without a model of transformers as one table of static embeddings."""
    static = find_static_table(open_weights(source, weights), source.name)
    if static is None:
        raise _no_model(source)
    return Checkpoint(
        source.name, source, static.reader, None, None, static.info, None, False, weights, notes=static.notes
    )


def _open_gguf(source: Source, weights: WeightFiles) -> Checkpoint:
    reader = open_weights(source, weights)
    if gguf.INPUT_TABLE not in reader.tensors:
        raise CorruptCheckpoint(f"{source.name}: the file holds no {gguf.INPUT_TABLE}, the token-embedding table")
    table, output = reader.tensors[gguf.INPUT_TABLE], reader.tensors.get(gguf.OUTPUT_TABLE)
    return Checkpoint(source.name, source, reader, None, None, table, output, output is None, weights)
