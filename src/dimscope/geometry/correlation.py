"""Pearson correlation between rows, as a matrix for some of them, and as blocks over all of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.geometry.neighbors import norms
from dimscope.geometry.pairs import LEADING, Groups, Pairs, connected_groups, pairs_within
from dimscope.geometry.spectrum import principal_components
from dimscope.vectors.moments import moments


def standardised(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return rows minus their own mean, of norm 1: their inner products are Pearson correlations. Constant rows become zero."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    lengths = norms(centred)
    # What rounding leaves of a constant row is not a direction.
    residue = 8 * torch.finfo(rows.dtype).eps * norms(rows)
    return centred.div_(torch.where(lengths > residue, lengths, math.inf).to(rows.dtype))


def correlation_matrix(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Compute the Pearson correlation of every pair of rows over their d coordinates, in float64, within [-1, 1]."""
    unit = standardised(rows.double())
    return (unit @ unit.T).clamp(-1, 1)


class CorrelatedBlocks(NamedTuple):
    """Groups of rows linked by high correlations, and the pairs that link them."""

    groups: Groups
    pairs: Pairs


def correlated_blocks(rows: Float[Tensor, "n d"], at_least: float, *, progress: bool = False) -> CorrelatedBlocks:
    """Return groups of rows linked by correlations of at least `at_least`, and those pairs (distance = sqrt(2 - 2 r)).

    Correlation r is distance sqrt(2 (1 - r)) between standardised rows, so the search for close pairs finds all of them.
    """
    unit = standardised(rows)
    components = principal_components(moments(unit.split(8192)), LEADING)
    # Constant rows have no correlation with anything, but as zero vectors they lie at distance 0 from each other.
    constant = unit.norm(dim=1) < 0.5
    pairs = pairs_within(unit, components, math.sqrt(2 * (1 - at_least)), progress=progress)
    defined = ~(constant[pairs.first] | constant[pairs.second]).numpy()
    pairs = Pairs(pairs.first[defined], pairs.second[defined], pairs.distance[defined])
    return CorrelatedBlocks(connected_groups(pairs, len(rows)), pairs)
