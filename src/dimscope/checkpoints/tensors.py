"""The tensors of a checkpoint: which there are, and their rows, read lazily from safetensors files or from memory."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dimscope.checkpoints.sources import Source
from dimscope.errors import CorruptCheckpoint

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_GUESS = 100_000  # bytes; nearly every safetensors header fits, so that one request fetches it
HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as its file declares it.

    Attributes:
        name: Its name in the file.
        shape: Rows first.
        dtype: As safetensors (or GGUF) spells it, such as "BF16".
        n_bytes: Its size.
        file: The file, empty for a tensor in memory.
        begin: Its first byte in the file (0 where the format has no byte range).
        end: The byte after its last.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int
    file: str
    begin: int = 0
    end: int = 0

    @property
    def n_elements(self) -> int:
        """Return how many numbers it has."""
        return math.prod(self.shape)


@runtime_checkable
class TensorReader(Protocol):
    """One format of weight files. Opening it reads headers; `read_rows` reads the rows it returns."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return what the files declare, by name."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of a matrix, in the dtype it is stored in (dequantised where it is packed)."""
        ...

    def prefetch(self, name: str) -> None:
        """Prepare for reading the whole tensor, perhaps several times."""
        ...


def read_tensor(reader: TensorReader, name: str) -> Tensor:
    """Return a whole tensor; one without dimensions is a single number."""
    shape = reader.tensors[name].shape
    return reader.read_rows(name, 0, shape[0] if shape else 1).reshape(shape)


def parse_header(source: Source, file: str) -> dict[str, TensorInfo]:
    """Return the tensors that one safetensors file declares, checked against the length of the file.

    Raises:
        CorruptCheckpoint: The header is damaged, or declares more than is in the file.
    """
    head = source.read(file, 0, HEADER_GUESS).numpy().tobytes()
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or not 2 <= length <= HEADER_LIMIT:
        raise CorruptCheckpoint(f"{source.name}: {file} is not a safetensors file, or is damaged (no valid header)")
    if len(head) < 8 + length:
        head = source.read(file, 0, 8 + length).numpy().tobytes()
    try:
        entries = json.loads(head[8 : 8 + length])
        tensors = {n: _declared(n, e, file, 8 + length) for n, e in entries.items() if n != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CorruptCheckpoint(f"{source.name}: the header of {file} is damaged ({e})") from e
    needed = max((t.end for t in tensors.values()), default=0)
    if (size := source.size(file)) < needed:
        raise CorruptCheckpoint(
            f"{source.name}: {file} is truncated: its header declares {needed:,} bytes, the file has {size:,}; download it again"
        )
    return tensors


def _declared(name: str, entry: dict, file: str, data_start: int) -> TensorInfo:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"])
    if not all(isinstance(number, int) for number in (*shape, begin, end)):
        raise ValueError(f"{name} lies at {begin}..{end} with shape {shape}, which are not all whole numbers")
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError(f"{name} lies at {begin}..{end} with shape {shape}")
    if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{name} has shape {shape} and dtype {entry['dtype']}, but {end - begin} bytes")
    return TensorInfo(name, shape, entry["dtype"], end - begin, file, data_start + begin, data_start + end)


@dataclass(frozen=True, slots=True)
class SafetensorsReader:
    """Single or sharded safetensors: headers when opened, rows by byte range.

    The header is read by hand because the `safetensors` package needs the whole file on this machine: byte ranges read
    one table of a model on the hub, and rows of it block by block.
    """

    source: Source
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of a matrix.

        Raises:
            CorruptCheckpoint: The file is truncated.
        """
        info = self.tensors[name]
        n_rows = info.shape[0] if info.shape else 1
        width = info.n_bytes // max(1, n_rows)
        stop = min(stop, n_rows)
        data = self.source.read(info.file, info.begin + start * width, info.begin + stop * width)
        if data.numel() != (stop - start) * width:
            raise CorruptCheckpoint(f"{self.source.name}: {info.file} ends in the middle of {name}; download it again")
        return data.view(DTYPES[info.dtype]).view(stop - start, *info.shape[1:])

    def prefetch(self, name: str) -> None:
        """Download the tensor into the cache, where it is on the hub."""
        info = self.tensors[name]
        self.source.keep(info.file, info.begin, info.end)


@dataclass(frozen=True, slots=True)
class StateDictReader:
    """Tensors that are in memory already, or memory-mapped by torch."""

    state: Mapping[str, Tensor] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return a copy of rows `start` to `stop` of a matrix, in the memory of the CPU."""
        return self.state[name][start:stop].detach().to("cpu", copy=True)

    def prefetch(self, name: str) -> None:
        """Do nothing: the tensor is in memory."""


def read_state_dict(state: Mapping[str, Tensor], files: Mapping[str, str]) -> StateDictReader:
    """Return the reader of tensors in memory; `files` holds the file that each comes from, if any."""
    infos = {
        name: TensorInfo(name, tuple(t.shape), NAMES.get(t.dtype, str(t.dtype)), t.nbytes, files.get(name, ""))
        for name, t in state.items()
    }
    return StateDictReader(state, infos)


def open_safetensors(source: Source, files: Sequence[str]) -> SafetensorsReader:
    """Open safetensors files.

    Raises:
        CorruptCheckpoint: A file is damaged.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors |= parse_header(source, file)
    return SafetensorsReader(source, tensors)


def read_weight_map(source: Source, index: str) -> dict[str, str]:
    """Return the file of each tensor, as an index has them.

    Raises:
        CorruptCheckpoint: The index is damaged.
    """
    try:
        weight_map: dict[str, str] = json.loads(source.fetch(index).read_text(encoding="utf-8"))["weight_map"]
        if other := [name for name, shard in weight_map.items() if not isinstance(shard, str)]:
            raise ValueError(f"the file of {other[0]} is not a name")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CorruptCheckpoint(f"{source.name}: {index} is damaged ({e})") from e
    return weight_map


def open_sharded(source: Source, index: str, shards: Sequence[str], weight_map: Mapping[str, str]) -> SafetensorsReader:
    """Open the shards that an index names; `weight_map` is what it says.

    Raises:
        CorruptCheckpoint: A file is damaged, or a tensor is not in the shard that the index names.
    """
    reader = open_safetensors(source, shards)
    for name, shard in weight_map.items():
        if name not in reader.tensors or reader.tensors[name].file != shard:
            raise CorruptCheckpoint(f"{source.name}: {index} says that {name} is in {shard}, but it is not")
    return reader
