"""Sums over the hidden states of one site: moments by kind of row, unit rows, massive activations."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dimscope.errors import NonFiniteActivations
from dimscope.vectors.moments import Accumulator

MASSIVE = 100.0  # Sun et al. 2024 (arXiv 2402.17762): a massive activation is larger than this,
MASSIVE_RATIO = 1000.0  # and than this times the median of its window


class Kind(NamedTuple):
    """A kind of rows, which are summed apart so that each can be left out."""

    first: bool
    """The first row of its window: an attention sink in most models."""
    massive: bool
    """It has a massive activation."""


KINDS = tuple(Kind(first, massive) for first in (False, True) for massive in (False, True))


@dataclass(slots=True)
class SiteSums:
    """Sums over the rows (hidden states of one position) of one site.

    Attributes:
        name: The name of the site.
        dim: d, the width of a row.
        parts: Moments of the rows of each kind.
        unit_total: The sum of all rows, each divided by its length.
        unit_count: Rows that are not zero.
        n_massive: Massive activations (not rows).
        largest: The largest activation.
    """

    name: str
    dim: int
    parts: dict[Kind, Accumulator] = field(default_factory=dict, repr=False)
    unit_total: Float[Tensor, " d"] | None = field(default=None, repr=False)
    unit_count: int = 0
    n_massive: int = 0
    largest: float = 0.0

    @property
    def count(self) -> int:
        """Return the number of rows of all kinds."""
        return sum(part.count for part in self.parts.values())

    def part(self, kind: Kind) -> Accumulator:
        """Return the moments of the rows of a kind."""
        return self.parts.setdefault(kind, Accumulator(self.dim))

    def add(self, hidden: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | None) -> None:
        """Add the hidden states of a batch.

        Args:
            hidden: The states of b windows of t positions.
            mask: False at padding; None where there is none.

        Raises:
            NonFiniteActivations: A state is NaN or Inf.
        """
        hidden = hidden.float().cpu() if hidden.device.type == "mps" else hidden.float()  # no float64 there
        real = None if mask is None else mask.to(hidden.device)
        first = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        first[:, 0] = True
        massive = self._add_massive(hidden, real)
        rows, first, massive = (x.flatten(0, 1) if real is None else x[real] for x in (hidden, first, massive))
        self._add_units(rows)
        for kind in KINDS:
            chosen = (first == kind.first) & (massive == kind.massive)
            if bool(chosen.any()):
                self.part(kind).add(rows[chosen])

    def _add_units(self, rows: Float[Tensor, "n d"]) -> None:
        """Add every row divided by its length; rows of zeros add nothing."""
        exact = rows.double()
        norms = exact.norm(dim=1)
        if not bool(torch.isfinite(norms).all()):
            raise NonFiniteActivations("the hidden states hold NaN or Inf")
        total = torch.where(norms > 0, 1 / norms, 0.0) @ exact
        self.unit_total = total if self.unit_total is None else self.unit_total.to(exact.device) + total
        self.unit_count += int((norms > 0).sum())

    def _add_massive(self, hidden: Float[Tensor, "b t d"], real: Bool[Tensor, "b t"] | None) -> Bool[Tensor, "b t"]:
        """Count massive activations; return which positions have one."""
        sizes = hidden.abs()
        sizes = sizes if real is None else sizes.masked_fill(~real[:, :, None], 0)
        peaks = sizes.amax(dim=2)
        self.largest = max(self.largest, float(peaks.max()))
        massive = torch.zeros_like(peaks, dtype=torch.bool)
        for w in torch.nonzero((peaks > MASSIVE).any(dim=1)).squeeze(1).tolist():
            window = sizes[w] if real is None else sizes[w][real[w]]
            limit = massive_limit(window)
            if limit is not None:
                massive[w] = peaks[w] > limit
                self.n_massive += int((window > limit).sum())
        return massive

    def merge(self, other: "SiteSums") -> None:
        """Add the sums over another part of the text."""
        for kind, accumulator in other.parts.items():
            self.part(kind).merge(accumulator)
        if other.unit_total is not None:
            own = self.unit_total
            self.unit_total = other.unit_total if own is None else own + other.unit_total.to(own.device)
        self.unit_count += other.unit_count
        self.n_massive += other.n_massive
        self.largest = max(self.largest, other.largest)


def massive_limit(sizes: Float[Tensor, "t d"]) -> float | None:
    """Return the size above which an activation of a window is massive: 100, or 1,000 medians if that is more.

    None where it is plain that no activation is larger than 1,000 medians: that is so unless half of all sizes are below
    a thousandth of the largest one. Counting them is cheaper than the median, which few windows need.

    Args:
        sizes: The absolute activations of a window.
    """
    half = (sizes.numel() + 1) // 2  # the rank of the (lower) median
    if int((sizes * MASSIVE_RATIO < sizes.max()).sum()) < half:
        return None
    return max(MASSIVE, MASSIVE_RATIO * float(sizes.flatten().kthvalue(half).values))
