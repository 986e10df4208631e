"""All linear dimensions of one set of vectors as a mapping that prints as a small table, beside white noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from dimscope.errors import InvalidArgument
from dimscope.geometry.dimension import THRESHOLDS, Dimension, linear_dimensions
from dimscope.geometry.metrics import slug_of
from dimscope.geometry.nulls import white_noise_spectrum
from dimscope.geometry.spectrum import Spectrum, moments_of, spectrum_of
from dimscope.vectors.moments import Moments
from dimscope.vectors.table import VectorTable

if TYPE_CHECKING:
    import polars as pl

HEAD = ("measure", "value", "white noise", "share of d")


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Dimensions(Mapping[str, Dimension]):
    """The linear dimensions of N x d vectors by name, e.g. `["participation_ratio"].value`.

    Attributes:
        members: The dimensions by the slug of their measure.
        n_rows: N.
        dim: d.
        preprocess: "centred" or "uncentred".
    """

    members: dict[str, Dimension]
    n_rows: int
    dim: int
    preprocess: str

    def __getitem__(self, name: str) -> Dimension:
        """Return the dimension of this name. Raises KeyError that lists the names."""
        if name not in self.members:
            raise KeyError(f"no measure {name!r}; the measures are {', '.join(self.members)}")
        return self.members[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.members)

    def __len__(self) -> int:
        """Return the number of measures."""
        return len(self.members)

    @property
    def title(self) -> str:
        """One line about the vectors: N, d and the preprocessing."""
        return f"Dimensions of {self.n_rows:,} x {self.dim:,} vectors, {self.preprocess}"

    def __repr__(self) -> str:
        """Return a table with one line per measure: value, white noise of the same shape, share of d."""
        rows = [HEAD, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([self.title, *lines])

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        head = "".join(f"<th>{name}</th>" for name in HEAD)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self._cells())
        return (
            f"<table><caption>{escape(self.title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (name, _number(d.value, d.order), _number(d.null, d.order), _percent(d.value / self.dim))
            for name, d in self.members.items()
        ]

    def to_frame(self) -> pl.DataFrame:
        """Return a frame with one row per measure; what is undefined is null."""
        import polars as pl

        columns = ("metric", "preprocess", "spectrum", "order", "value", "null")
        frame = pl.DataFrame(
            [[getattr(d, name) for name in columns] for d in self.members.values()],
            schema=dict(zip(columns, (*[pl.String] * 3, *[pl.Float64] * 3), strict=True)),
            orient="row",
        )
        frame = frame.with_columns(share_of_dim=pl.col("value") / self.dim, n_rows=self.n_rows, dim=self.dim)
        return frame.with_columns(pl.col("value", "null", "share_of_dim").fill_nan(None))


def _number(value: float | None, order: float | None) -> str:
    """Return counts as integers, other numbers with one decimal."""
    if value is None or math.isnan(value):
        return "undefined"
    return f"{value:,.0f}" if order in (None, 0.0) else f"{value:,.1f}"


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.1%}"


def dimensions_of(
    source: Float[Tensor, "n d"] | VectorTable | Moments | Spectrum,
    *,
    centred: bool = True,
    thresholds: tuple[float, ...] = THRESHOLDS,
    tolerance: float | None = None,
) -> Dimensions:
    """Compute every linear dimension of vectors, beside its value for white noise of the same shape, in float64.

    Args:
        source: The vectors, as a tensor or a table (which is streamed: d x d numbers in memory), their moments or their
            spectrum.
        centred: Whether to subtract the mean first; a spectrum is centred already or not.
        thresholds: Shares of the variance for the variance counts, above 0 and at most 1.
        tolerance: Of the numerical rank, relative to the largest singular value; by default d eps(float32).

    Raises:
        InvalidArgument: for a threshold outside (0, 1], or rows too few to have a dimension (2 centred, 1 uncentred).

    >>> import torch
    >>> cross = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    >>> dimensions_of(cross)["participation_ratio"].value
    2.0
    """
    if not all(0 < t <= 1 for t in thresholds):
        raise InvalidArgument(f"`thresholds` must be shares above 0 and at most 1, got {thresholds}")
    if isinstance(source, VectorTable):
        source = moments_of(source)
    measured = source if isinstance(source, Spectrum) else spectrum_of(source, centred=centred)
    if measured.max_rank < 1:
        raise InvalidArgument(f"dimensions need at least {1 + measured.centred} rows, got {measured.n_rows}")
    # All measures are the same at any scale, so the noise may have a standard deviation of 1.
    noise = white_noise_spectrum(measured.n_rows, measured.dim, 1.0, centred=measured.centred)
    nulls = linear_dimensions(noise, thresholds, tolerance=tolerance)
    members = {
        slug_of(d.metric): replace(d, null=null.value)
        for d, null in zip(linear_dimensions(measured, thresholds, tolerance=tolerance), nulls, strict=True)
    }
    return Dimensions(members, measured.n_rows, measured.dim, measured.preprocess)
