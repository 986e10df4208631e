"""A `transformers` model in memory as a checkpoint. Its weights are read where they are, and never changed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dimscope.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dimscope.checkpoints.skeleton import skeleton_of
from dimscope.checkpoints.tables import locate_tables
from dimscope.checkpoints.tensors import read_state_dict
from dimscope.errors import InvalidArgument, UnsupportedCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """The source of a checkpoint in memory: it has a model and perhaps a tokenizer, and no files."""

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None" = None
    revision: str | None = None
    files: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        """Return the model in one line."""
        tokenizer = "no tokenizer" if self.tokenizer is None else type(self.tokenizer).__name__
        return f"LoadedModel({self.name!r}, {type(self.model).__name__}, {tokenizer})"

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the token-embedding table."""
        return self._table.dtype

    @property
    def device(self) -> str:
        """Return the device of the token-embedding table, or "map" for a model spread over several devices."""
        spread = {str(device) for device in (getattr(self.model, "hf_device_map", None) or {}).values()}
        return "map" if len(spread) > 1 else str(self._table.device)

    @property
    def _table(self) -> Tensor:
        return next(self.model.get_input_embeddings().parameters())

    def fetch(self, file: str) -> Path:
        """Refuse: there are no files."""
        raise self._no_files(file)

    def folder(self, files: Iterable[str]) -> Path:
        """Refuse: there are no files."""
        raise self._no_files(next(iter(files), "of its own"))

    def size(self, file: str) -> int:
        """Refuse: there are no files."""
        raise self._no_files(file)

    def read(self, file: str, begin: int, end: int) -> Tensor:
        """Refuse: there are no files."""
        raise self._no_files(file)

    def keep(self, file: str, begin: int, end: int) -> None:
        """Do nothing: the weights are in memory."""

    def _no_files(self, file: str) -> UnsupportedCheckpoint:
        return UnsupportedCheckpoint(f"{self.name}: a model in memory has no file {file}; save it and open the folder")


def checkpoint_of(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None" = None, name: str | None = None
) -> Checkpoint:
    """Return a model in memory as an opened checkpoint. No weight is copied.

    Args:
        model: A `transformers` model with its weights in memory.
        tokenizer: Its tokenizer, needed wherever texts are read or tokens are named.
        name: The name in tables and messages; by default where the model came from, else its class.

    Raises:
        UnsupportedCheckpoint: The model is offloaded, or has no token-embedding table.
    """
    name = name or model.name_or_path or type(model).__name__
    parameters = dict(model.named_parameters())
    if offloaded := next((n for n, p in parameters.items() if p.is_meta), None):
        raise UnsupportedCheckpoint(f"{name}: {offloaded} is not in memory (offloaded, or on the meta device)")
    skeleton = skeleton_of(model, name, targets=lambda name: (name,))
    source, reader = LoadedModel(name, model, tokenizer), read_state_dict(parameters, {})
    tables = locate_tables(source, reader, skeleton)
    return Checkpoint(name, source, reader, model.config, skeleton, tables.input, tables.output, tables.tied)


def as_checkpoint(source: Any, tokenizer: "PreTrainedTokenizerBase | None" = None, **options: Any) -> Checkpoint:
    """Return the checkpoint that a user means: by name or path, already opened, or loaded as a model.

    Args:
        source: The name or path that `open_checkpoint` takes, a Checkpoint, or a `PreTrainedModel`.
        tokenizer: The tokenizer of a `PreTrainedModel`; checkpoints have their own.
        options: Options of `open_checkpoint`.

    Raises:
        InvalidArgument: `source` is something else, or an argument does not go with it.
        CheckpointError: What `open_checkpoint` and `checkpoint_of` raise.
    """
    from transformers import PreTrainedModel

    if isinstance(source, PreTrainedModel):
        _refuse_options(options, "a model in memory")
        return checkpoint_of(source, tokenizer)
    if not isinstance(source, str | Path | Checkpoint):
        raise InvalidArgument(
            "a model is a name, a path, an opened checkpoint or a transformers PreTrainedModel, "
            f"not {type(source).__name__}"
        )
    if tokenizer is not None:
        raise InvalidArgument("`tokenizer` goes with a loaded transformers model; a checkpoint has its own tokenizer")
    if isinstance(source, Checkpoint):
        _refuse_options(options, "an opened checkpoint")
        return source
    return open_checkpoint(source, **options)


def _refuse_options(options: dict[str, Any], what: str) -> None:
    if unused := next((name for name, value in options.items() if value), None):
        raise InvalidArgument(f"`{unused}` is for opening a checkpoint by name or path, and does nothing for {what}")


def weight_bytes(model: "PreTrainedModel") -> Iterator[memoryview]:
    """Yield the bytes of every parameter and buffer that a state dict holds, in the order of their names."""
    for _, tensor in sorted(model.state_dict().items()):
        yield memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
