"""A checkpoint cut to a narrower residual stream by one orthonormal map, from file to file, block by block.

With x the stream and P of d x k orthonormal, the narrow stream is P^T x: what reads it is multiplied by P from the right,
with the gain of its norm folded in before; what writes it by P^T from the left. All products are in float64, cast once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.errors import CorruptCheckpoint, UnsupportedCheckpoint
from dimscope.narrowing.layouts import Layout, check_width, layout_of, narrow_config
from dimscope.narrowing.writing import Planned, write_safetensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dimscope.checkpoints.checkpoint import Checkpoint
    from dimscope.checkpoints.tensors import TensorInfo

NUMBERS = 1 << 22  # of a tensor computed at once: 32 MiB in float64
BESIDE = ("tokenizer", "special_tokens_map", "vocab.", "merges.", "added_tokens", "chat_template", "generation_config")


@dataclass(frozen=True, slots=True)
class Account:
    """What is in the files: numbers and bytes of the dense and of the narrow checkpoint, as they are stored."""

    dense_parameters: int
    dense_bytes: int
    narrow_parameters: int
    narrow_bytes: int
    table_parameters: int  # of one embedding table of the narrow model, which it has twice
    untied: bool  # whether the dense model kept one table for both


@dataclass(frozen=True, slots=True)
class Cut:
    """A checkpoint on its way to a narrower one: where its tensors are, and how each is changed."""

    checkpoint: Checkpoint
    layout: Layout
    config: PretrainedConfig
    basis: Float[Tensor, "d k"]
    gains: Mapping[str, float]  # by norm; sqrt(d / k), which keeps all lengths where nothing is lost, unless told
    files: Mapping[str, TensorInfo]  # by parameter; the head of a tied model is its table
    dtype: torch.dtype | None = None  # to store all tensors in; None keeps each as it is

    @property
    def usual_gain(self) -> float:
        d, k = self.basis.shape
        return math.sqrt(d / k)

    def plan(self) -> list[Planned]:
        """The tensors of the narrow checkpoint in the order in which they are written."""
        from dimscope.checkpoints.tensors import DTYPES

        return [Planned(name, self._shape(name), self.dtype or DTYPES[info.dtype]) for name, info in self.files.items()]

    def _shape(self, name: str) -> tuple[int, ...]:
        shape, k = self.files[name].shape, self.basis.shape[1]
        part, _ = self.layout.part(name)
        if part in ("table", "head", "reader"):
            return (shape[0], k)
        return (k, *shape[1:]) if part in ("writer", "gain") else shape

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The rows of a tensor of the narrow checkpoint."""
        part, norm = self.layout.part(name)
        if part == "kept":
            yield from self._rows(name)
        elif part == "gain":
            gain = self.gains.get(name, self.usual_gain) - self.layout.gain_offset
            yield torch.full((self.basis.shape[1],), gain, dtype=torch.float64)
        elif part == "writer":
            yield from self._written(name)
        else:
            gain = torch.ones(len(self.basis), dtype=torch.float64) if norm is None else self._gain(norm)
            scale = self.usual_gain if part == "table" and self.layout.scaled_table else 1.0
            right = gain[:, None] * self.basis * scale
            for rows in self._rows(name):
                yield rows.double() @ right

    def _gain(self, norm: str) -> Float[Tensor, " d"]:
        return self._whole(norm).double() + self.layout.gain_offset

    def _rows(self, name: str) -> Iterator[Tensor]:
        info = self.files[name]
        step = max(1, NUMBERS // max(1, math.prod(info.shape[1:])))
        for start in range(0, info.shape[0], step):
            yield self.checkpoint.reader.read_rows(info.name, start, min(start + step, info.shape[0]))

    def _whole(self, name: str) -> Tensor:
        info = self.files[name]
        return self.checkpoint.reader.read_rows(info.name, 0, info.shape[0])

    def _written(self, name: str) -> Iterator[Tensor]:
        """P^T W in blocks of rows; W stays as it is stored, and is made wide a block of columns at a time."""
        stored = self._whole(name)
        if stored.ndim == 1:
            yield stored.double() @ self.basis
            return
        k, columns = self.basis.shape[1], stored.shape[1]
        result = torch.empty(k, columns, dtype=self.dtype or stored.dtype)
        step = max(1, NUMBERS // len(stored))
        for start in range(0, columns, step):
            block = slice(start, start + step)
            result[:, block] = self.basis.T @ stored[:, block].double()
        yield result


def plan_cut(
    checkpoint: Checkpoint,
    basis: Float[Tensor, "d k"],
    gains: Mapping[str, float] | None = None,
    dtype: torch.dtype | None = None,
) -> Cut:
    """Looks up which tensor is what; nothing is read but headers.

    Raises UnsupportedCheckpoint for a family that is not narrowed, InvalidArgument for a width that it cannot have,
    CorruptCheckpoint where a tensor is missing.
    """
    layout = layout_of(checkpoint)
    check_width(checkpoint, layout, basis.shape[1])
    skeleton = checkpoint.skeleton
    assert skeleton is not None, checkpoint.name  # layout_of refuses what has none
    files: dict[str, TensorInfo] = {}
    for parameter in skeleton.shapes:
        held = skeleton.file_name(parameter, checkpoint.tensors)
        if held is None:
            raise CorruptCheckpoint(f"{checkpoint.name}: the weights hold no {parameter}")
        files[parameter] = checkpoint.tensors[held]
    if layout.head not in files:
        files[layout.head] = files[layout.table]
    if odd := [name for name, info in files.items() if info.dtype not in ("F64", "F32", "F16", "BF16")]:
        raise UnsupportedCheckpoint(
            f"{checkpoint.name}: {odd[0]} is stored as {files[odd[0]].dtype}, which is not narrowed"
        )
    return Cut(checkpoint, layout, narrow_config(checkpoint, basis.shape[1]), basis.double(), gains or {}, files, dtype)


def write_cut(cut: Cut, folder: Path) -> Account:
    """Writes weights, config, tokenizer and generation config into a folder that is there, and counts what is in it."""
    plan = cut.plan()
    write_safetensors(folder, ((planned, cut.blocks(planned.name)) for planned in plan), plan)
    cut.config.save_pretrained(folder)
    source = cut.checkpoint.source
    for file in sorted(f for f in source.files if f.startswith(BESIDE)):
        (folder / file).write_bytes(source.fetch(file).read_bytes())
    dense = cut.checkpoint.tensors.values()
    return Account(
        dense_parameters=sum(t.n_elements for t in dense), dense_bytes=sum(t.n_bytes for t in dense),
        narrow_parameters=sum(math.prod(t.shape) for t in plan), narrow_bytes=sum(t.n_bytes for t in plan),
        table_parameters=math.prod(cut._shape(cut.layout.table)), untied=cut.checkpoint.tied,
    )  # fmt: skip
