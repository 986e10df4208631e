"""Dimensions of rows that come in groups, such as the hidden states of windows: rows of a group depend on each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.geometry.half_samples import Replicated, half_samples


@dataclass(frozen=True, slots=True)
class _ProductSums:
    """Sums of products of rows x (n of them in g groups), by group; s_g is the sum of the rows of a group."""

    counts: Float[Tensor, " g"]
    norms: Float[Tensor, " g"]
    """Sum of |x|^2."""
    products: Float[Tensor, "g g"]
    """s_g . s_h."""
    squares: Float[Tensor, "g g"]
    """Sum of (x . y)^2, x in g and y in h."""
    triples: Float[Tensor, "g g g"]
    """Sum of (x . s_h) (x . s_k), x in g."""

    def of(self, kept: Int[Tensor, " h"]) -> _ProductSums:
        """Return the sums of some of the groups."""
        return _ProductSums(
            self.counts[kept], self.norms[kept], self.products[kept][:, kept], self.squares[kept][:, kept],
            self.triples[kept][:, kept][:, :, kept],
        )  # fmt: skip


def participation_ratio_across(rows: Float[Tensor, "n d"], groups: Int[np.ndarray, " n"]) -> Replicated:
    """Estimate (tr Sigma)^2 / tr(Sigma^2) from products of rows of different groups.

    tr(Sigma^2) is the mean of ((x_i - x_k) . (x_j - x_l))^2 / 4, and (tr Sigma)^2 that of |x_i - x_k|^2 |x_j - x_l|^2 / 4,
    over rows of four different groups; each product that these expand to is averaged by itself (U-statistics). Nothing
    but the groups is taken for independent, and nothing for Gaussian. NaN for fewer than 4 groups, or where tr(Sigma^2) is
    estimated at 0 or less.

    Args:
        rows: The rows.
        groups: The group of each, from 0 on; rows of no group (-1) are left out.
    """
    grouped = groups >= 0
    groups = groups[grouped]
    sums = _product_sums(rows[torch.from_numpy(grouped)], torch.from_numpy(groups))
    differences = [
        _ratio(sums.of(torch.from_numpy(np.unique(groups[one]))))
        - _ratio(sums.of(torch.from_numpy(np.unique(groups[two]))))
        for one, two in half_samples(groups)
    ]
    return Replicated(_ratio(sums), tuple(differences) if np.isfinite(differences).all() else ())


def _product_sums(rows: Float[Tensor, "n d"], groups: Int[Tensor, " n"]) -> _ProductSums:
    centred = rows.double() - rows.double().mean(dim=0)  # changes no estimate, and keeps the digits
    gram = centred @ centred.T
    member = torch.nn.functional.one_hot(groups).double()
    with_sums = gram @ member  # x . s_h
    triples = torch.stack([part.T @ part for part in (with_sums[groups == g] for g in range(member.shape[1]))])
    return _ProductSums(
        member.sum(dim=0), member.T @ gram.diagonal(), member.T @ with_sums, member.T @ gram.square() @ member, triples
    )


def _ratio(sums: _ProductSums) -> float:
    """Return the estimate of (tr Sigma)^2 / tr(Sigma^2): means over rows of different groups, of all products at once."""
    n, pairs = sums.counts, _off_diagonal(sums.products)
    two, three, four = (_distinct(n, k) for k in (2, 3, 4))
    if four <= 0:
        return float("nan")
    row_sums = pairs.sum(dim=1)
    apart = (pairs.sum() ** 2 - 4 * row_sums.square().sum() + 2 * pairs.square().sum()) / four  # (x.y)(z.w)
    g = torch.arange(len(n))
    triples = sums.triples.clone()
    triples[g, g, :] = triples[g, :, g] = triples[:, g, g] = 0
    square = _off_diagonal(sums.squares).sum() / two - 2 * triples.sum() / three + apart
    norm_pairs = (sums.norms.sum() ** 2 - sums.norms.square().sum()) / two
    norm_triples = (sums.norms * (pairs.sum() - 2 * row_sums)).sum() / three
    trace = norm_pairs - 2 * norm_triples + apart
    return float(trace / square) if square > 1e-12 * trace else float("nan")


def _off_diagonal(matrix: Float[Tensor, "g g"]) -> Float[Tensor, "g g"]:
    return matrix - torch.diag(matrix.diagonal())


def _distinct(n: Float[Tensor, " g"], k: int) -> Float[Tensor, ""]:
    """Return the number of ordered choices of k = 2, 3 or 4 rows from k different groups of n rows, by power sums."""
    p1, p2, p3, p4 = (n.pow(i).sum() for i in range(1, 5))
    return {
        2: p1**2 - p2,
        3: p1**3 - 3 * p1 * p2 + 2 * p3,
        4: p1**4 - 6 * p1**2 * p2 + 3 * p2**2 + 8 * p1 * p3 - 6 * p4,
    }[k]


def variance_counts(
    rows: Float[Tensor, "n d"],
    groups: Int[np.ndarray, " n"],
    axes: Float[Tensor, "d m"],
    variances: Float[Tensor, " m"],
    thresholds: Sequence[float],
) -> list[Replicated]:
    """Return the variance count of each threshold, with fractions, and its differences between halves to first order.

    To first order the variance along a principal component differs between halves, and the component does not
    (infinitesimal jackknife: Jaeckel 1972), so one decomposition serves all. Fractions interpolate the cumulative share of
    the variance: a count in whole steps would hide differences smaller than one.

    Args:
        rows: A sample of the rows.
        groups: Their groups; rows of no group (-1) are left out.
        axes: All principal components of all rows, the widest first.
        variances: The variance along each of them.
        thresholds: Shares of the variance.
    """
    energy = ((rows.double() - rows.double().mean(dim=0)) @ axes).square()
    mean = energy[torch.from_numpy(groups >= 0)].mean(dim=0)
    halves = [
        torch.stack(
            [variances * torch.where(mean > 0, energy[torch.from_numpy(half)].mean(dim=0) / mean, 1.0) for half in pair]
        )
        for pair in half_samples(groups)
    ]
    counts = []
    for threshold in thresholds:
        differences = [_fractional_count(pair, threshold).diff().neg().item() for pair in halves]
        counts.append(Replicated(float(_fractional_count(variances[None], threshold)), tuple(differences)))
    return counts


def _fractional_count(variances: Float[Tensor, "h m"], threshold: float) -> Float[Tensor, " h"]:
    """Return where the cumulative share of the variance, interpolated linearly, reaches a threshold."""
    cumulative = variances.cumsum(dim=1) / variances.sum(dim=1, keepdim=True)
    after = torch.searchsorted(cumulative, torch.full((len(variances), 1), threshold, dtype=torch.float64))
    after = after.clamp_max(variances.shape[1] - 1)
    high = cumulative.gather(1, after)
    low = torch.where(after > 0, cumulative.gather(1, (after - 1).clamp_min(0)), 0.0)
    return (after + ((threshold - low) / (high - low).clamp_min(1e-300)).clamp(0, 1))[:, 0]
