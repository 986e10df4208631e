"""Maps of the rows of an embedding table, and the exact error of a linear one, from the moments of the table alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.vectors.moments import Moments

SMALL = 1e-6  # share of the energy below which a difference of energies is too inaccurate for an error


@runtime_checkable
class RowMap(Protocol):
    """A change of rows. It may depend on which token a row belongs to, and on nothing else."""

    def __call__(self, rows: Float[Tensor, "n d"], ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Return the changed rows, in the dtype of the rows, which stay as they are."""
        ...


@dataclass(frozen=True, slots=True)
class LinearMap:
    """w -> w L R + s with L of d x k and R of k x d, so that a map of rank k costs 2 d k a row, not d x d.

    All float64. R is None where L is d x d itself, s where nothing is added. `orthonormal` promises that the rows of R
    are orthonormal, which saves two thirds of the work for an exact error.
    """

    left: Float[Tensor, "d k"]
    right: Float[Tensor, "k d"] | None = None
    shift: Float[Tensor, " d"] | None = None
    orthonormal: bool = False

    def __call__(self, rows: Float[Tensor, "n d"], ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Return the mapped rows; products in float32 at least."""
        wide = rows if rows.dtype == torch.float64 else rows.float()
        changed = wide @ self.left.to(wide)
        changed = changed if self.right is None else changed @ self.right.to(wide)
        return (changed if self.shift is None else changed + self.shift.to(wide)).to(rows.dtype)

    def transposed(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return hidden states times M^T: h (W M)^T = (h M^T) W^T, so that no table is changed."""
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        wide = wide if self.right is None else wide @ self.right.T.to(wide)
        return (wide @ self.left.T.to(wide)).to(hidden.dtype)

    @property
    def matrix(self) -> Float[Tensor, "d d"]:
        """Return M = L R."""
        return self.left if self.right is None else self.left @ self.right


def identity(dim: int) -> Float[Tensor, "d d"]:
    """Return the identity matrix in float64."""
    return torch.eye(dim, dtype=torch.float64)


def projection(
    basis: Float[Tensor, "d k"], *, around: Float[Tensor, " d"] | None = None, factor: float | None = None
) -> LinearMap:
    """Return the orthogonal projection on the span of a basis.

    Args:
        basis: Orthonormal columns.
        around: A point that the projection keeps; None for the origin.
        factor: A number by which the projected rows are multiplied.
    """
    shift = None if around is None else around - (around @ basis) @ basis.T
    return LinearMap(basis if factor is None else basis * factor, basis.T, shift, orthonormal=True)


def exact_error(of: LinearMap, moments: Moments) -> float:
    """Return ||W - W'||_F of a table with these moments, in d x d work: no row is read.

    With D = I - M: tr(D^T G D) - 2 s . (D^T sum w) + N s . s, G = W^T W. Exact to about 1e-10 relative; with
    a shift, of rows whose mean is no longer than a hundred times their spread.
    """
    gram = moments.gram
    product = gram @ of.left  # G L, of d x k
    if of.right is None:
        squared = gram.trace() - 2 * product.trace() + (product * of.left).sum()
    else:
        widened = of.left if of.orthonormal else of.left @ (of.right @ of.right.T)
        squared = gram.trace() - 2 * (product * of.right.T).sum() + (product * widened).sum()
    if of.shift is not None:
        residual = moments.total - (moments.total @ of.left if of.right is None else moments.total @ of.left @ of.right)
        squared = squared - 2 * of.shift @ residual + moments.count * of.shift.square().sum()
    if float(squared) < SMALL * float(gram.trace()):  # a difference of nearly equal numbers: by D itself
        rest = torch.eye(len(gram), dtype=torch.float64) - of.matrix
        squared = ((gram @ rest) * rest).sum()
        if of.shift is not None:
            squared = squared - 2 * of.shift @ (rest.T @ moments.total) + moments.count * of.shift.square().sum()
    return math.sqrt(max(float(squared), 0.0))


def mapped_moments(of: LinearMap, moments: Moments) -> Moments:
    """Return the moments of the mapped rows, in d x d work: M^T G M, and what the shift adds to it."""
    matrix = of.matrix
    total, gram = moments.total @ matrix, matrix.T @ moments.gram @ matrix
    if of.shift is not None:
        cross = torch.outer(total, of.shift)
        gram = gram + cross + cross.T + moments.count * torch.outer(of.shift, of.shift)
        total = total + moments.count * of.shift
    return Moments(moments.count, total, gram)


@dataclass(frozen=True, slots=True)
class Chain:
    """Several maps, one after the other."""

    maps: tuple[RowMap, ...]

    def __call__(self, rows: Float[Tensor, "n d"], ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Return the rows after the last map."""
        for change in self.maps:
            rows = change(rows, ids)
        return rows


def compose(maps: Sequence[RowMap]) -> RowMap:
    """Return the maps one after the other as one map: a linear one, with its exact error, where all are linear."""
    linear = [change for change in maps if isinstance(change, LinearMap)]
    return reduce(_product, linear) if len(linear) == len(maps) > 0 else Chain(tuple(maps))


def _product(first: LinearMap, second: LinearMap) -> LinearMap:
    """Return w -> (w M1 + s1) M2 + s2, in the factors of the smaller rank."""
    shift = None
    if first.shift is not None or second.shift is not None:
        zero = torch.zeros(len(second.left), dtype=torch.float64)
        before, after = (zero if s is None else s for s in (first.shift, second.shift))
        shift = before @ second.matrix + after
    if first.right is not None and first.left.shape[1] <= second.left.shape[1]:
        return LinearMap(first.left, first.right @ second.matrix, shift)
    return LinearMap(first.matrix @ second.left, second.right, shift)


@dataclass(frozen=True, slots=True)
class GaussianNoise:
    """w -> w + sd * N(0, 1), the noise of a token being the same whenever and in whatever order it is looked up."""

    sd: float
    seed: int

    def __call__(self, rows: Float[Tensor, "n d"], ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Return the rows with noise; every different token takes a generator of its own, 10 microseconds each."""
        tokens, places = ids.cpu().unique(return_inverse=True)
        dim = rows.shape[1]
        noise = (
            torch.stack([_noise_of(int(token), dim, self.seed) for token in tokens])
            if len(tokens)
            else rows[:0].float().cpu()
        )
        return (rows.float() + self.sd * noise[places].to(rows.device)).to(rows.dtype)


def _noise_of(token: int, dim: int, seed: int) -> Float[Tensor, " d"]:
    # Tokens far apart in one stream of seeds, so that neighbouring seeds share no noise.
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + token * 0xBF58476D1CE4E5B9) % 2**63)
    return torch.randn(dim, generator=generator)


@dataclass(frozen=True, slots=True)
class RowQuantisation:
    """Every row on 2^(b - 1) - 1 steps to either side of zero, up to its largest entry (symmetric, round to nearest)."""

    bits: int

    def __call__(self, rows: Float[Tensor, "n d"], ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Return the nearest representable rows."""
        wide = rows.float()
        steps = 2 ** (self.bits - 1) - 1
        unit = wide.abs().amax(dim=1, keepdim=True) / steps
        return torch.where(unit > 0, (wide / unit).round() * unit, wide).to(rows.dtype)
