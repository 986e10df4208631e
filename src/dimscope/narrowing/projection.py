"""A checkpoint projected to a narrower residual stream by one orthonormal map, tensor by tensor, block by block.

With x the stream and P of d x k orthonormal, the narrow stream is P^T x. Weights that read the stream are multiplied by P
from the right, with the gain of their norm folded in before; weights that write it by P^T from the left. All products are
in float64, rounded once. Behind centred norms (LayerNorm) P has rank k - 1: it maps the complement of the ones of R^d to
the complement of the ones of R^k, so that the mean that the norm takes out is zero already (see `bases.orthonormal`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.checkpoints.families import Layout
from dimscope.checkpoints.tensors import DTYPES
from dimscope.checkpoints.writer import PlannedTensor
from dimscope.errors import CorruptCheckpoint, UnsupportedCheckpoint
from dimscope.narrowing.bases import diagonalising_basis
from dimscope.narrowing.conversion import Origin, Origins
from dimscope.narrowing.target import HEAD, Target, check_width, narrow_config, origins_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dimscope.checkpoints.tensors import TensorInfo

NUMBERS = 1 << 22  # of a tensor computed at once: 32 MiB in float64

Gains = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Narrowing:
    """A dense checkpoint, a basis and gains: what every tensor of the narrow checkpoint is computed from.

    Attributes:
        target: The dense checkpoint, and what it is narrowed to.
        config: The config of the narrow model.
        basis: P, float64.
        origins: Where every tensor of the narrow checkpoint comes from.
        files: The stored tensors by parameter of the dense model.
        gains: By norm a number, or one for each dimension; `usual_gain` for a norm without an entry.
        dtype: To store all tensors in; None keeps the dtype of each.
    """

    target: Target
    config: PretrainedConfig
    basis: Float[Tensor, "d k"]
    origins: Origins
    files: Mapping[str, TensorInfo]
    gains: Gains = field(default_factory=dict)
    dtype: torch.dtype | None = None

    @property
    def layout(self) -> Layout:
        """Return which weights of the dense model read and write the stream."""
        return self.target.layout

    @property
    def width(self) -> int:
        """Return k."""
        return self.basis.shape[1]

    @property
    def usual_gain(self) -> float:
        """Return sqrt(d / k): a norm makes its output sqrt(k) long, where it was sqrt(d) long."""
        d, k = self.basis.shape
        return math.sqrt(d / k)

    @property
    def tied(self) -> bool:
        """Whether one table serves as input and as output table."""
        return bool(self.config.tie_word_embeddings)

    def plan(self) -> list[PlannedTensor]:
        """Return the tensors of the narrow checkpoint in the order in which they are written."""
        fallback = self.files[f"{self.layout.table}.weight"]
        return [
            PlannedTensor(
                name, self.shape_of(o), self.dtype or DTYPES[(self.files[o.source] if o.source else fallback).dtype]
            )
            for name, o in self.origins.items()
        ]

    def shape_of(self, origin: Origin) -> tuple[int, ...]:
        """Return the shape of a tensor of the narrow checkpoint."""
        k = self.width
        stored = origin.source or origin.weight
        if stored is None:
            return (k,)
        shape = self.files[stored].shape
        if origin.part == "kept":
            return shape
        n_rows = shape[0] if origin.third is None else shape[0] // 3
        if origin.part == "reader bias":
            return (n_rows,)
        if origin.part in ("table", "head", "reader"):
            return (n_rows, k)
        return (k, *shape[1:])

    def right(
        self, origin: Origin, gain: Float[Tensor, " d"] | None, basis: Float[Tensor, "d k"]
    ) -> Float[Tensor, "d k"]:
        """Return what the rows of a table or reader are multiplied by, for this basis or one that is learned."""
        if origin.part == "table" and self.layout.scaled_table:
            return basis * self.usual_gain
        return basis if gain is None else gain.to(basis)[:, None] * basis

    def gain_before(self, origin: Origin) -> Float[Tensor, " d"] | None:
        """Return the gain of the norm through which a tensor reads, which is folded into it."""
        return None if origin.norm is None else self.whole(f"{origin.norm}.weight").double() + self.layout.gain_offset

    def gain_after(self, origin: Origin) -> Tensor:
        """Return the gain of a norm of the narrow model, as it is stored."""
        assert origin.source is not None
        gain = self.gains.get(origin.source, torch.tensor(self.usual_gain, dtype=torch.float64))
        return (gain.double() - self.layout.gain_offset).expand(self.width)

    def bias(self, origin: Origin) -> Float[Tensor, " n"]:
        """Return a reader's bias: W b is added, with b the shift of its norm."""
        assert origin.weight is not None
        assert origin.norm is not None
        own = None if origin.source is None else self.whole(origin.source, origin.third).double()
        shift = f"{origin.norm}.bias"
        if shift not in self.files:
            assert own is not None, origin
            return own
        shifted = self.whole(shift).double()
        moved = torch.cat([rows.double() @ shifted for rows in self.rows(origin.weight, origin.third)])
        return moved if own is None else own + moved

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the rows of a tensor of the narrow checkpoint, block by block, in float64 or as they are stored."""
        origin = self.origins[name]
        if origin.part in ("zeros", "shift"):
            yield torch.zeros(self.width)
        elif origin.part == "gain":
            yield self.gain_after(origin)
        elif origin.part == "reader bias":
            yield self.bias(origin)
        else:
            assert origin.source is not None
            if origin.part == "kept":
                yield from self.rows(origin.source)
            elif origin.part == "writer":
                yield from self._written(origin.source)
            else:
                right = self.right(origin, self.gain_before(origin), self.basis)
                for rows in self.rows(origin.source, origin.third):
                    yield rows.double() @ right

    def rows(self, name: str, third: int | None = None) -> Iterator[Tensor]:
        """Yield a tensor of the dense checkpoint block by block; a third of a fused one at once."""
        info = self.files[name]
        if third is not None:
            yield self.whole(name, third)
            return
        step = max(1, NUMBERS // max(1, math.prod(info.shape[1:])))
        for start in range(0, info.shape[0], step):
            yield self.target.checkpoint.reader.read_rows(info.name, start, min(start + step, info.shape[0]))

    def whole(self, name: str, third: int | None = None) -> Tensor:
        """Return a tensor of the dense checkpoint, or a third of it, as it is stored."""
        info = self.files[name]
        return self.third_of(self.target.checkpoint.reader.read_rows(info.name, 0, info.shape[0]), third)

    def third_of(self, fused: Tensor, third: int | None) -> Tensor:
        """Return queries, keys or values of a fused projection, whose rows are ordered by head, then by these three."""
        if third is None:
            return fused
        return fused.unflatten(0, (self.config.num_attention_heads, 3, -1))[:, third].flatten(0, 1)

    def _written(self, name: str) -> Iterator[Tensor]:
        """Yield P^T W. W stays as it is stored, and a block of its columns at a time is float64."""
        stored = self.whole(name)
        if stored.ndim == 1:
            yield stored.double() @ self.basis
            return
        k, columns = self.width, stored.shape[1]
        result = torch.empty(k, columns, dtype=self.dtype or stored.dtype)
        step = max(1, NUMBERS // len(stored))
        for start in range(0, columns, step):
            block = slice(start, start + step)
            result[:, block] = self.basis.T @ stored[:, block].double()
        yield result


def plan_narrowing(
    target: Target, basis: Float[Tensor, "d k"], gains: Gains | None = None, *, dtype: torch.dtype | None = None
) -> Narrowing:
    """Find out which stored tensor each tensor of the narrow checkpoint comes from. No weights are read but a final gain.

    Where `target` keeps a tie, the basis is rotated so that the tie costs least (`diagonalising_basis`), and the final norm
    gets a gain for each dimension, times its entry in `gains`.

    Args:
        target: The dense checkpoint, and what it is narrowed to.
        basis: P.
        gains: By norm of the dense model.
        dtype: To store all tensors in; None keeps the dtype of each.

    Raises:
        InvalidArgument: The family cannot have the width.
        UnsupportedCheckpoint: A tensor is not stored in floating point.
        CorruptCheckpoint: A tensor is missing.
    """
    check_width(target, basis.shape[1])
    config, origins = narrow_config(target, basis.shape[1]), origins_of(target)
    narrowing = Narrowing(target, config, basis.double(), origins, _stored_tensors(target), gains or {}, dtype)
    return _tied(narrowing) if target.tied else narrowing


def _stored_tensors(target: Target) -> dict[str, TensorInfo]:
    """Return the stored tensor of each parameter of the dense model."""
    checkpoint = target.checkpoint
    skeleton = checkpoint.skeleton
    assert skeleton is not None, checkpoint.name
    files: dict[str, TensorInfo] = {}
    names = {parameter: name for name, parameter in skeleton.parameters_of(checkpoint.tensors).items()}
    for parameter in skeleton.shapes:
        name = names.get(parameter) or skeleton.file_name(parameter, checkpoint.tensors)
        if name is None:
            raise CorruptCheckpoint(f"{checkpoint.name}: the weights hold no {parameter}")
        files[parameter] = checkpoint.tensors[name]
    files.setdefault(HEAD, files[f"{target.layout.table}.weight"])  # of a tied model, which has one for both
    if odd := [info for info in files.values() if info.dtype not in ("F64", "F32", "F16", "BF16")]:
        raise UnsupportedCheckpoint(
            f"{checkpoint.name}: {odd[0].name} is stored as {odd[0].dtype}, which is not narrowed"
        )
    return files


def _tied(narrowing: Narrowing) -> Narrowing:
    final = f"{narrowing.layout.final_norm}.weight"
    gain = narrowing.gain_before(Origin("head", final, narrowing.layout.final_norm))
    assert gain is not None
    rotated = diagonalising_basis(narrowing.basis, gain)
    usual = torch.tensor(narrowing.usual_gain, dtype=torch.float64)
    scale = narrowing.usual_gain if narrowing.layout.scaled_table else 1.0  # of the table, which `right` multiplies by
    own = rotated.gain * narrowing.gains.get(final, usual) / scale
    return replace(narrowing, basis=rotated.basis, gains={**narrowing.gains, final: own})
