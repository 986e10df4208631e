"""Writing a checkpoint tensor by tensor, block by block, so that only one block is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dimscope.checkpoints.tensors import NAMES
from dimscope.errors import NonFiniteWeights

SHARD = 5_000_000_000  # bytes of a file at most, as transformers writes them
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor that is going to be written: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Return its size in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    folder: Path, tensors: Iterable[tuple[PlannedTensor, Iterator[Tensor]]], plan: list[PlannedTensor]
) -> None:
    """Write tensors as safetensors into a folder, in shards as transformers does, with an index where there are several.

    Args:
        folder: An existing folder.
        tensors: Each tensor of `plan`, in its order, with an iterator over blocks of its rows.
        plan: What is going to be written.

    Raises:
        ValueError: The blocks are not what was planned.
        NonFiniteWeights: A tensor holds NaN or Inf in the dtype in which it is stored.
    """
    shards = _sharded(plan)
    names = [_file_name(n, len(shards)) for n in range(len(shards))]
    pending = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, pending)
    if len(shards) > 1:
        weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": sum(t.n_bytes for t in plan)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _sharded(plan: list[PlannedTensor]) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    for tensor in plan:
        if shards[-1] and sum(t.n_bytes for t in shards[-1]) + tensor.n_bytes > SHARD:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def _file_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def _write_shard(
    path: Path, shard: list[PlannedTensor], pending: Iterator[tuple[PlannedTensor, Iterator[Tensor]]]
) -> None:
    header = _header(shard)
    with path.open("wb") as f:
        f.write(len(header).to_bytes(8, "little"))
        f.write(header)
        for expected in shard:
            planned, blocks = next(pending)
            if planned != expected:
                raise ValueError(f"{planned.name} is written where {expected.name} was planned")
            n_bytes = 0
            for block in blocks:
                stored = block.to(expected.dtype).contiguous()
                _require_finite(stored, expected)
                data = stored.view(torch.uint8).numpy()
                f.write(data)
                n_bytes += data.nbytes
            if n_bytes != expected.n_bytes:
                raise ValueError(f"{expected.name} has {n_bytes} bytes where {expected.n_bytes} were planned")


def _require_finite(block: Tensor, tensor: PlannedTensor) -> None:
    if bool(torch.isfinite(block.sum(dtype=torch.float64))):
        return
    n_bad = int((~torch.isfinite(block)).sum())
    raise NonFiniteWeights(
        f"{n_bad:,} numbers of {tensor.name} are NaN or Inf in {str(tensor.dtype).removeprefix('torch.')}; nothing was written"
    )


def _header(shard: list[PlannedTensor]) -> bytes:
    """Return the header of a safetensors file, padded because the format aligns its data to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + tensor.n_bytes
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    return encoded + b" " * (-len(encoded) % 8)
