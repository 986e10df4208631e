"""GGUF files, through the `gguf` extra: tensors listed by their GGUF names, rows dequantised as they are read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dimscope.checkpoints.sources import Source
from dimscope.checkpoints.tensors import TensorInfo
from dimscope.errors import CorruptCheckpoint, MissingExtra

# Names that the GGUF format fixes for every architecture.
INPUT_TABLE = "token_embd.weight"
OUTPUT_TABLE = "output.weight"


@dataclass(frozen=True, slots=True)
class GgufReader:
    """Tensors of one GGUF file. Shapes are in torch's order (GGUF lists them reversed)."""

    tensors: Mapping[str, TensorInfo] = field(repr=False)
    _packed: Mapping[str, Any] = field(repr=False)  # name -> gguf.ReaderTensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of a matrix, dequantised."""
        from gguf.quants import dequantize

        tensor = self._packed[name]
        return torch.from_numpy(dequantize(tensor.data[start:stop], tensor.tensor_type)).clone()

    def prefetch(self, name: str) -> None:
        """Do nothing: the file is memory-mapped."""


def open_gguf(source: Source, file: str) -> GgufReader:
    """Open one GGUF file.

    Raises:
        MissingExtra: The package gguf is not installed.
        CorruptCheckpoint: The file is damaged, or not GGUF.
    """
    try:
        from gguf import GGUFReader
    except ImportError as e:
        raise MissingExtra("gguf", "gguf") from e
    path = source.fetch(file)
    try:
        packed = {t.name: t for t in GGUFReader(path).tensors}
    except (ValueError, IndexError, KeyError, OSError) as e:
        raise CorruptCheckpoint(f"{source.name}: {file} is not a GGUF file, or is damaged ({e})") from e
    infos = {
        n: TensorInfo(n, tuple(int(s) for s in reversed(t.shape)), t.tensor_type.name, int(t.n_bytes), file)
        for n, t in packed.items()
    }
    return GgufReader(infos, packed)
