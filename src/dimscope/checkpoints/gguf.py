"""GGUF files, through the `gguf` extra: tensors listed by their GGUF names, rows dequantised as they are read."""

import mmap
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dimscope.checkpoints.sources import Source
from dimscope.checkpoints.tensors import TensorInfo
from dimscope.errors import CheckpointNotFound, CorruptCheckpoint, MissingExtra, UnsupportedCheckpoint

# Names that the GGUF format fixes for every architecture.
INPUT_TABLE = "token_embd.weight"
OUTPUT_TABLE = "output.weight"
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # what llama.cpp calls the parts of a split model


@dataclass(frozen=True, slots=True)
class GgufReader:
    """Tensors of one GGUF model. Shapes are in torch's order (GGUF lists them reversed)."""

    tensors: Mapping[str, TensorInfo] = field(repr=False)
    _packed: Mapping[str, Any] = field(repr=False)  # name -> gguf.ReaderTensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of a matrix, dequantised.

        Raises:
            UnsupportedCheckpoint: The package gguf does not know this quantisation.
        """
        from gguf.quants import dequantize

        tensor = self._packed[name]
        rows = tensor.data[start:stop]
        if rows.dtype != np.float64:
            try:
                rows = dequantize(rows, tensor.tensor_type)
            except NotImplementedError as e:
                kind = tensor.tensor_type.name
                raise UnsupportedCheckpoint(f"{name} is stored as {kind}, which the package gguf does not read") from e
        # A copy: rows that need no dequantisation are the mapped file, which torch must not write to.
        return torch.from_numpy(np.array(rows))

    def prefetch(self, name: str) -> None:
        """Do nothing: the file is memory-mapped."""


def gguf_files(source: Source, file: str | None = None) -> list[str]:
    """Return the GGUF files of a model: all parts of a split one, else the only file; none where there is no GGUF file.

    Args:
        source: The files.
        file: One of them, by which the model is named.

    Raises:
        CheckpointNotFound: There are several models, or a part is missing.
    """
    files = sorted(f for f in source.files if f.endswith(".gguf"))
    models: dict[str, list[str]] = {}
    for f in files:
        match = PART.fullmatch(f)
        models.setdefault(f"{match[1]}-of-{match[3]}" if match else f, []).append(f)
    if file is not None:
        models = {name: parts for name, parts in models.items() if file in parts}
    if len(models) > 1:
        raise CheckpointNotFound(f"{source.name}: {len(models)} GGUF files here; name one of them ({files[0]})")
    parts = next(iter(models.values()), [])
    if parts and (match := PART.fullmatch(parts[0])):
        expected = [f"{match[1]}-{n:05d}-of-{match[3]}.gguf" for n in range(1, int(match[3]) + 1)]
        if missing := [part for part in expected if part not in parts]:
            raise CheckpointNotFound(
                f"{source.name}: {len(missing)} of {len(expected)} parts of this GGUF model are missing ({missing[0]}); "
                "download them into the same folder"
            )
    return parts


def open_gguf(source: Source, files: Sequence[str]) -> GgufReader:
    """Open the GGUF files of one model.

    Raises:
        MissingExtra: The package gguf is not installed.
        CheckpointNotFound: The files are parts of a split model, and others are missing.
        CorruptCheckpoint: A file is damaged, or not GGUF.
    """
    packed, infos = {}, {}
    for file in files:
        reader = read_gguf(source.name, source.fetch(file))
        count = reader.fields.get("split.count")
        if count is not None and (n_parts := int(count.parts[count.data[0]][0])) > len(files):
            raise CheckpointNotFound(
                f"{source.name}: {file} is one of {n_parts} parts of a split GGUF model; put all parts into one folder, "
                f"with names that end in -00001-of-{n_parts:05d}.gguf and so on"
            )
        for tensor in reader.tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            packed[tensor.name] = tensor
            infos[tensor.name] = TensorInfo(tensor.name, shape, tensor.tensor_type.name, int(tensor.n_bytes), file)
    return GgufReader(infos, packed)


def read_gguf(name: str, path: Path) -> Any:
    """Return the reader of the package gguf for one file of the model `name`.

    Raises:
        MissingExtra: The package gguf is not installed.
        CorruptCheckpoint: The file is damaged, or not GGUF.
    """
    try:
        from gguf import GGUFReader
    except ImportError as e:
        raise MissingExtra("gguf", "gguf") from e
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as e:
        raise CorruptCheckpoint(f"{name}: {path.name} is not a GGUF file, or is damaged ({e})") from e


# ---- metadata ------------------------------------------------------------------------------------------------------

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_metadata(path: Path, keys: Collection[str]) -> dict[str, Any]:
    """Return the values of some keys of a GGUF file; none for a file of another byte order.

    The reader of the package gguf makes several objects of every string, which takes seconds for a vocabulary.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        version, _, n_keys = struct.unpack_from("<IQQ", data, 4)
        if version > 0xFFFF:  # the other byte order
            return {}
        position, values = 24, {}
        for _ in range(n_keys):
            key, position = _value(data, position, _STRING)
            (kind,) = struct.unpack_from("<I", data, position)
            value, position = _value(data, position + 4, kind)
            if key in keys:
                values[key] = value
        return values


def _value(data: mmap.mmap, position: int, kind: int) -> tuple[Any, int]:
    """Return the value at a position, and the position after it."""
    if kind == _STRING:
        (length,) = struct.unpack_from("<Q", data, position)
        stop = position + 8 + length
        return data[position + 8 : stop].decode("utf-8", "replace"), stop
    if kind != _ARRAY:
        value = struct.unpack_from(f"<{_NUMBERS[kind]}", data, position)
        return value[0], position + struct.calcsize(f"<{_NUMBERS[kind]}")
    kind, length = struct.unpack_from("<IQ", data, position)
    position += 12
    if kind in _NUMBERS:
        layout = f"<{length}{_NUMBERS[kind]}"
        return struct.unpack_from(layout, data, position), position + struct.calcsize(layout)
    values = []
    for _ in range(length):
        value, position = _value(data, position, kind)
        values.append(value)
    return tuple(values), position
