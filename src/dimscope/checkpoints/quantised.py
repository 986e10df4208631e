"""Quantised tables whose dequantisation is documented: fp8 with scales by block, row or tensor, and bitsandbytes 8-bit.

fp8: a weight is the stored number times the scale of its block (DeepSeek-V3, arXiv 2412.19437, section 3.3).
bitsandbytes 8-bit: a weight is the stored integer times the largest magnitude of its row, divided by 127 (Dettmers et
al. 2022, arXiv 2208.07339, section 2.1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dimscope.checkpoints.tensors import TensorInfo, TensorReader, read_tensor

INT8_RANGE = 127
FLOAT8 = ("F8_E4M3", "F8_E5M2")
FLOATS = ("F64", "F32", "F16", "BF16")
BLOCK = (128, 128)  # where the config does not say otherwise


@dataclass(frozen=True, slots=True)
class Dequantised:
    """A reader that turns packed tables into float32 as it reads them.

    Attributes:
        reader: The reader of the files.
        scales: The tensor of scales of each packed table.
        block: Rows and columns of a block with one scale.
    """

    reader: TensorReader
    scales: Mapping[str, str] = field(repr=False)
    block: tuple[int, int]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return what the files declare, by name."""
        return self.reader.tensors

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of a matrix, float32 where it is packed."""
        rows = self.reader.read_rows(name, start, stop)
        if name not in self.scales:
            return rows
        scales = read_tensor(self.reader, self.scales[name]).float()
        if self.reader.tensors[name].dtype == "I8":
            return rows.float() * (scales.flatten()[start : start + len(rows), None] / INT8_RANGE)
        return rows.float() * self._expanded(scales, self.tensors[name].shape, start, start + len(rows))

    def _expanded(self, scales: Tensor, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Return the scale of every number of rows `start` to `stop`."""
        if scales.numel() == 1:
            return scales.reshape(1, 1)
        if scales.numel() == shape[0]:
            return scales.reshape(-1, 1)[start:stop]
        n_rows, n_columns = self.block
        return scales[torch.arange(start, stop) // n_rows].repeat_interleave(n_columns, dim=1)[:, : shape[1]]

    def prefetch(self, name: str) -> None:
        """Prepare for reading the whole tensor."""
        self.reader.prefetch(name)


def dequantised(reader: TensorReader, tables: Sequence[str], config: Any) -> TensorReader:
    """Return a reader that dequantises those of the tables whose format is known; the same reader where there is none.

    Args:
        reader: The reader of the files.
        tables: Names of tables, as the files have them.
        config: The config, whose `quantization_config` has the size of a block.
    """
    declared = getattr(config, "quantization_config", None) or {}
    rows, columns = (declared.get("weight_block_size") if isinstance(declared, dict) else None) or BLOCK
    scales = {name: beside for name in tables if (beside := _scales_of(reader.tensors, name, (rows, columns)))}
    return Dequantised(reader, scales, (rows, columns)) if scales else reader


def reads_floats(reader: TensorReader, info: TensorInfo) -> bool:
    """Return whether a reader gives the rows of a table as floating-point numbers."""
    return info.dtype in FLOATS or (isinstance(reader, Dequantised) and info.name in reader.scales)


def _scales_of(tensors: Mapping[str, TensorInfo], name: str, block: tuple[int, int]) -> str | None:
    """Return the tensor with the scales of a packed table; None for a table that is not packed, or in another way."""
    info, module = tensors.get(name), name.removesuffix("weight")
    if info is None or len(info.shape) != 2:
        return None
    n_rows, dim = info.shape
    whole, by_row = ((), (1,), (1, 1)), ((n_rows,), (n_rows, 1))
    if info.dtype == "I8":
        names, shapes = [f"{module}SCB"], by_row
    elif info.dtype in FLOAT8:
        names = [f"{name}_scale_inv", f"{name}_scale"]
        shapes = (*whole, *by_row, (-(-n_rows // block[0]), -(-dim // block[1])))
    else:
        return None
    return next((n for n in names if n in tensors and tensors[n].shape in shapes), None)
