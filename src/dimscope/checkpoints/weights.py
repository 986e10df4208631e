"""The weights of a checkpoint, in whatever format its files are."""

import pickle
import zipfile

import torch
from torch import Tensor

from dimscope.checkpoints.gguf import open_gguf
from dimscope.checkpoints.sources import Source
from dimscope.checkpoints.tensors import (
    SafetensorsReader,
    StateDictReader,
    TensorReader,
    open_safetensors,
    open_sharded,
    read_state_dict,
)
from dimscope.errors import CheckpointNotFound, CorruptCheckpoint, UnsafeCheckpoint


def open_pickle(source: Source, files: list[str]) -> StateDictReader:
    """Open weights in torch's pickle format, memory-mapped where the file allows it, loaded with `weights_only`.

    Raises:
        CorruptCheckpoint: A file cannot be read, or is not a state dict.
    """
    state: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for file in files:
        path = source.fetch(file)
        try:
            zipped = zipfile.is_zipfile(path)  # what torch 1.6 and later write; the older format cannot be mapped
            part = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as e:
            raise CorruptCheckpoint(f"{source.name}: {file} cannot be read ({str(e).splitlines()[0]})") from e
        if not isinstance(part, dict):
            raise CorruptCheckpoint(f"{source.name}: {file} holds a {type(part).__name__}, not a state dict")
        part = {name: tensor for name, tensor in part.items() if isinstance(tensor, Tensor)}
        state |= part
        origin |= dict.fromkeys(part, file)
    return read_state_dict(state, origin)


def open_weights(source: Source, *, allow_pickle: bool) -> TensorReader:
    """Return the reader for the format of the files: GGUF, safetensors, or pickle where that is allowed.

    Raises:
        CheckpointNotFound: There are no weights, or several GGUF files.
        CorruptCheckpoint: Files are missing or damaged.
        UnsafeCheckpoint: There are only pickle weights, and `allow_pickle` is off.
        MissingExtra: The file is GGUF, and the package gguf is not installed.
    """
    files = source.files
    gguf = sorted(f for f in files if f.endswith(".gguf"))
    if "model.safetensors.index.json" in files:
        return open_sharded(source, "model.safetensors.index.json")
    if "model.safetensors" in files:
        return open_safetensors(source, ["model.safetensors"])
    if loose := sorted(f for f in files if f.endswith(".safetensors") and not f.startswith("adapter")):
        return _open_loose(source, loose)
    if len(gguf) == 1:
        return open_gguf(source, gguf[0])
    if gguf:
        raise CheckpointNotFound(f"{source.name}: {len(gguf)} GGUF files here; name one of them ({gguf[0]})")
    pickles = sorted(f for f in files if f.startswith("pytorch_model") and f.endswith(".bin"))
    if pickles and allow_pickle:
        return open_pickle(source, pickles)
    if pickles:
        raise UnsafeCheckpoint(
            f"{source.name}: only pickle weights ({pickles[0]}), which can run code when loaded; "
            "convert them to safetensors, or pass `allow_pickle` if you trust them"
        )
    raise CheckpointNotFound(f"{source.name}: no weights found (no *.safetensors, no *.gguf)")


def _open_loose(source: Source, files: list[str]) -> SafetensorsReader:
    """Open files without an index: one safetensors file under another name, or shards whose index is missing."""
    if len(files) > 1:
        raise CorruptCheckpoint(
            f"{source.name}: {len(files)} safetensors files but no model.safetensors.index.json; download the model again"
        )
    return open_safetensors(source, files)
