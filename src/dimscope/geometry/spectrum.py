"""The singular spectrum of N x d rows, from their moments, and the principal components that go with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.vectors.moments import Moments, moments, upper_gram
from dimscope.vectors.table import VectorTable

SMALL = 10**11  # N x d x d up to which float64 products cost next to nothing
CONDITION = 30.0  # largest singular value over the smallest, up to which float32 products keep 7 digits


@dataclass(frozen=True, slots=True, repr=False)
class Spectrum:
    """Singular values in falling order, float64, of `n_rows` x `dim` numbers, centred or not."""

    singular_values: Float[Tensor, " m"]
    n_rows: int
    dim: int
    centred: bool

    def __repr__(self) -> str:
        """Return one line: shape, preprocessing, number and range of the singular values."""
        values = self.singular_values
        ends = f", from {float(values[0]):.6g} to {float(values[-1]):.6g}" if len(values) else ""
        return f"Spectrum({self.n_rows:,} x {self.dim:,}, {self.preprocess}: {len(values):,} singular values{ends})"

    @property
    def preprocess(self) -> str:
        """Either "centred" or "uncentred"."""
        return "centred" if self.centred else "uncentred"

    @property
    def max_rank(self) -> int:
        """min(N - 1, d) of centred rows, else min(N, d)."""
        return min(self.n_rows - self.centred, self.dim)

    @property
    def explained_variance_ratio(self) -> Float[Tensor, " m"]:
        """p_i = sigma_i^2 / sum sigma^2; all zero for a table of zeros."""
        energy = self.singular_values.square()
        return energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)


def spectrum(of: Moments, *, centred: bool) -> Spectrum:
    """Compute all min(N, d) singular values from the d x d moments (one `eigvalsh`, float64)."""
    return spectrum_of(of, centred=centred)


def spectrum_of(
    source: Float[Tensor, "n d"] | Moments, *, centred: bool = True, standardised: bool = False
) -> Spectrum:
    """Compute all singular values of rows, from the smaller of their two Gram matrices, or of moments (float64).

    `standardised` divides every column by its standard deviation (z-scores); columns that are constant become zero.
    """
    if isinstance(source, Moments):
        scatter = source.scatter(centred=centred)
        n, d = source.count, len(scatter)
        scales = (
            _inverse(scatter.diagonal().clamp_min(0).sqrt(), source.gram.diagonal().sqrt()) if standardised else None
        )
        side = scatter if scales is None else scatter * scales * scales[:, None]
    else:
        rows = source.double()
        n, d = rows.shape
        sizes = rows.norm(dim=0) if standardised else None
        rows = rows - rows.mean(dim=0) if centred else rows
        if sizes is not None:
            rows = rows * _inverse(rows.norm(dim=0), sizes)
        side = upper_gram(rows.T if n < d else rows)
    if standardised:
        side = side * max(n - centred, 1)
    eigenvalues = torch.linalg.eigvalsh(side, UPLO="U").clamp_min(0).flip(0)[: min(n - centred, d)]
    return Spectrum(eigenvalues.sqrt(), n, d, centred)


@dataclass(frozen=True, slots=True, repr=False)
class Decomposition:
    """The centred spectrum of rows, and the principal components (orthonormal columns) that belong to it."""

    spectrum: Spectrum
    axes: Float[Tensor, "d m"]


def decompose(source: Float[Tensor, "n d"] | Moments) -> Decomposition:
    """Compute the singular values of centred rows, or of moments, and the directions that they belong to (float64)."""
    if isinstance(source, Moments):
        values, axes = torch.linalg.eigh(source.scatter(centred=True))
        n, d = source.count, len(values)
    else:
        rows = source.double()
        n, d = rows.shape
        _, sigma, axes = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
        values, axes = sigma.square().flip(0), axes.T.flip(1)
    m = min(n - 1, d)
    return Decomposition(Spectrum(values.clamp_min(0).flip(0)[:m].sqrt(), n, d, True), axes.flip(1)[:, :m])


def _inverse(spread: Float[Tensor, " d"], size: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Return 1 / spread, 0 where the spread is only the rounding of numbers of this size."""
    return torch.where(spread > 1e-7 * size, 1 / spread, 0.0)


def table_moments(blocks: Callable[[], Iterable[Float[Tensor, "_ d"]]], n_rows: int, dim: int) -> Moments:
    """Compute moments whose singular values are accurate to 2e-6: float32 products where that is enough, else float64.

    `blocks` is called once, or twice where the first pass shows a spectrum too wide for float32 products.
    """
    if n_rows * dim * dim <= SMALL:
        return moments(blocks(), dtype=torch.float64)
    first = moments(blocks())
    spectra = [spectrum(first, centred=centred).singular_values for centred in (True, False)]
    wide = any(bool(values[0] > CONDITION * values[-1]) for values in spectra)
    return moments(blocks(), dtype=torch.float64) if wide else first


def moments_of(table: VectorTable) -> Moments:
    """Compute the moments of all rows of a table, in one pass, or two where the spectrum is very wide.

    >>> from dimscope.vectors.table import table_from_tensor
    >>> moments_of(table_from_tensor(torch.eye(4)))
    Moments(4 x 4)
    """
    return table_moments(lambda: (rows for _, rows in table.blocks()), table.n_used, table.dim)


def principal_components(of: Moments, k: int, *, centred: bool = True) -> Float[Tensor, "d k"]:
    """Compute the k leading components as orthonormal columns; signs such that each column's largest entry is positive."""
    _, vectors = torch.linalg.eigh(of.scatter(centred=centred))
    leading = vectors.flip(1)[:, :k]
    signs = leading.gather(0, leading.abs().argmax(dim=0, keepdim=True)).sign()
    return leading * signs
