"""A checkpoint written tensor by tensor, block by block: never more than a block of it is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dimscope.checkpoints.tensors import NAMES

SHARD = 5_000_000_000  # bytes of a file at most, as transformers writes them
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that is going to be written: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(folder: Path, tensors: Iterable[tuple[Planned, Iterator[Tensor]]], plan: list[Planned]) -> None:
    """Writes tensors as safetensors into a folder, sharded as transformers does, with an index where there are several.

    `tensors` gives each of `plan`, in its order, with its rows block by block. Raises ValueError for blocks that are not
    what was planned.
    """
    shards = _sharded(plan)
    names = [_file_name(n, len(shards)) for n in range(len(shards))]
    given = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, given)
    if len(shards) > 1:
        weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": sum(t.n_bytes for t in plan)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _sharded(plan: list[Planned]) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    for tensor in plan:
        if shards[-1] and sum(t.n_bytes for t in shards[-1]) + tensor.n_bytes > SHARD:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def _file_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def _write_shard(path: Path, shard: list[Planned], given: Iterator[tuple[Planned, Iterator[Tensor]]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.n_bytes],
        }  # fmt: skip
        offset += tensor.n_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format wants its data aligned
    with path.open("wb") as f:
        f.write(len(encoded).to_bytes(8, "little"))
        f.write(encoded)
        for wanted in shard:
            planned, blocks = next(given)
            if planned != wanted:
                raise ValueError(f"{planned.name} is given where {wanted.name} is to be written")
            written = 0
            for block in blocks:
                data = block.to(wanted.dtype).contiguous().view(torch.uint8).numpy()
                f.write(data)
                written += data.nbytes
            if written != wanted.n_bytes:
                raise ValueError(f"{wanted.name} has {written} bytes where {wanted.n_bytes} were planned")
