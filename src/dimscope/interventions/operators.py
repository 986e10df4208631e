"""The entries of a random projection as a matrix, compared with theory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class OperatorStatistics:
    """Mean and standard deviations of the entries of a projector on k of d dimensions, each beside its expectation.

    Of a projector on a uniformly random k-space: the diagonal has mean k / d exactly and standard deviation
    sqrt(2 k (d - k) / (d^2 (d + 2))), the rest mean 0 and standard deviation sqrt(k (d - k) / ((d - 1) d (d + 2)))
    (second moments of the Haar measure; Collins & Sniady 2006).
    """

    diagonal_mean: float
    diagonal_sd: float
    off_diagonal_sd: float
    expected_diagonal_mean: float
    expected_diagonal_sd: float
    expected_off_diagonal_sd: float


def operator_statistics(projector: Float[Tensor, "d d"], k: int) -> OperatorStatistics:
    """Return the statistics of a projector of rank k.

    Raises:
        ValueError: The projector has fewer than two dimensions.
    """
    d = len(projector)
    if d < 2:
        raise ValueError("a projector of one dimension has nothing off its diagonal")
    diagonal = projector.diagonal()
    rest = projector[~torch.eye(d, dtype=torch.bool)]
    spread = k * (d - k)
    return OperatorStatistics(
        float(diagonal.mean()),
        float(diagonal.std(correction=0)),
        float(rest.square().mean().sqrt()),
        k / d,
        math.sqrt(2 * spread / (d**2 * (d + 2))),
        math.sqrt(spread / ((d - 1) * d * (d + 2))),
    )
