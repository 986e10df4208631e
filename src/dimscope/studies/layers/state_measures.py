"""Measures of individual hidden states, on the sample of a pass: by token type, from distances, and across windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.activations.reservoir import Sample
from dimscope.geometry.dimension import effective_rank
from dimscope.geometry.grouped import participation_ratio_across
from dimscope.geometry.half_samples import groups_of
from dimscope.geometry.intrinsic import (
    distinct_rows,
    gaussian_dimension,
    intrinsic_dimensions,
    white_noise_dimension,
)
from dimscope.geometry.metrics import (
    BETWEEN_TYPES,
    EFFECTIVE_RANK_UNIT_ROWS,
    MEDIAN_NORM,
    PARTICIPATION_RATIO_ACROSS,
    SAME_TOKEN_NEIGHBORS,
)
from dimscope.geometry.nulls import white_noise_spectrum
from dimscope.geometry.spectrum import spectrum_of
from dimscope.geometry.token_types import (
    TypeSpectra,
    one_of_each,
    same_type_neighbors,
    variance_between_types,
    without_type_means,
)
from dimscope.studies.layers.rows import FEWEST, RAW, Preprocessed, dimension_row, row, with_error

ONE_PER_TYPE, TYPE_MEANS, WITHIN_TYPES = "one state per type", "type means", "type mean removed"


@dataclass(frozen=True)
class States:
    """The sampled states of a pass, and which of them stand for their token types.

    Attributes:
        sample: The states of all layers.
        real: Whether they are those of the trained model on real text: these have all measures.
        first: Whether they are of the first draw: further draws serve the spread of the first measure only.
    """

    sample: Sample
    real: bool = True
    first: bool = True

    @cached_property
    def groups(self) -> Int[np.ndarray, " n"]:
        """The group of windows of each state, for errors."""
        return groups_of(self.sample.windows)

    @cached_property
    def one_per_type(self) -> Int[np.ndarray, " m"]:
        """Positions of one state of each token type, the same at all layers.

        A position whose state is a copy of another one at some layer is left out at all of them, unless half of a layer
        are copies: then the layers have no rows in common.
        """
        positions = one_of_each(self.sample.tokens)
        kept = np.ones(len(positions), dtype=bool)
        for rows in self.sample.layers.values():
            distinct = np.zeros(len(positions), dtype=bool)
            distinct[distinct_rows(rows[torch.from_numpy(positions)]).numpy()] = True
            if distinct.sum() > len(positions) / 2:
                kept &= distinct
        return positions[kept]

    @property
    def leading(self) -> str:
        """The population whose intrinsic dimensions have errors and comparisons, each of which takes as long as they do."""
        return ONE_PER_TYPE if len(self.one_per_type) >= FEWEST else RAW

    @cached_property
    def repeated(self) -> Int[np.ndarray, " m"]:
        """Positions of the states of tokens that occur at least twice in the sample."""
        _, groups, counts = np.unique(self.sample.tokens, return_inverse=True, return_counts=True)
        return np.flatnonzero(counts[groups] > 1)


def state_rows(states: States, layer: int) -> Iterator[dict[str, Any]]:
    """Yield the measures of the sampled states of one layer."""
    rows = states.sample.layers[layer]
    if len(rows) < FEWEST:
        return
    yield from _norms(rows)
    between = variance_between_types(rows, states.sample.tokens, states.groups)
    yield with_error(row(BETWEEN_TYPES, between.value, *rows.shape, null=0.0), between)
    yield from _intrinsic_rows(rows, states, ONE_PER_TYPE, states.one_per_type)
    if states.first:
        yield from _first_rows(rows, states)
    if states.real:
        within = without_type_means(rows, states.sample.tokens)
        yield from _intrinsic_rows(within, states, WITHIN_TYPES, states.repeated)


def _first_rows(rows: Float[Tensor, "n d"], states: States) -> Iterator[dict[str, Any]]:
    """Yield the measures that further draws do not have."""
    n, dim = rows.shape
    across = participation_ratio_across(rows, states.groups)
    n_grouped = int(np.count_nonzero(states.groups >= 0))
    yield with_error(dimension_row(PARTICIPATION_RATIO_ACROSS, across.value, n_grouped, dim, float(dim)), across)
    neighbors = same_type_neighbors(rows, states.sample.tokens)
    yield row(SAME_TOKEN_NEIGHBORS, neighbors.share, n, dim, null=neighbors.by_chance, centred=False)
    yield from _intrinsic_rows(rows, states, RAW, np.arange(n))


def _norms(rows: Float[Tensor, "n d"]) -> Iterator[dict[str, Any]]:
    n, dim = rows.shape
    yield row(MEDIAN_NORM, float(rows.double().norm(dim=1).median()), n, dim, centred=False)
    # Centred first, then of length 1, and not centred again: the eRank of Wei et al. 2024 (arXiv 2401.17139).
    unit = torch.nn.functional.normalize(rows.double() - rows.double().mean(dim=0), dim=1)
    null = effective_rank(white_noise_spectrum(n, dim, 1.0, centred=True), of_lambda=True)
    yield dimension_row(
        EFFECTIVE_RANK_UNIT_ROWS, effective_rank(spectrum_of(unit, centred=False), of_lambda=True), n, dim, null
    )


def _intrinsic_rows(
    rows: Float[Tensor, "n d"], states: States, preprocess: str, positions: Int[np.ndarray, " m"]
) -> Iterator[dict[str, Any]]:
    """Yield the intrinsic dimensions of the states at some positions, beside white noise and Gaussian states."""
    chosen, dim = rows[torch.from_numpy(positions)], rows.shape[1]
    leads = preprocess == states.leading
    estimates = intrinsic_dimensions(chosen, groups=states.groups[positions], errors=leads and states.first)
    leading, surrogate = leads and states.real, {}
    if estimates and leading:
        whole = estimates[0].n_used == len(chosen)
        surrogate = gaussian_dimension(chosen if whole else chosen[distinct_rows(chosen)])
    with_null = estimates and (leading or preprocess == RAW)
    white = white_noise_dimension(estimates[0].n_used, dim) if with_null else {}
    for e in estimates:
        null = white.get((e.metric, e.scale))
        measured = dimension_row(
            e.metric, e.value, e.n_used, dim, null, preprocess=preprocess, n_dropped=len(rows) - e.n_used, scale=e.scale,
            gaussian=surrogate.get((e.metric, e.scale)),
        )  # fmt: skip
        yield with_error(measured, e.replicated)


def type_variants(states: States, layer: int, types: TypeSpectra | None) -> Iterator[Preprocessed]:
    """Yield the spectra of one state per type, of the means of the types, and of the states minus these."""
    rows = states.sample.layers[layer]
    n, n_one = len(rows), len(states.one_per_type)
    if n_one >= FEWEST:
        yield Preprocessed(ONE_PER_TYPE, spectrum_of(rows[torch.from_numpy(states.one_per_type)]), n - n_one)
    if types is not None and types.n_types >= FEWEST:
        yield Preprocessed(TYPE_MEANS, types.between, 0)
    if types is not None and types.within.n_rows >= FEWEST:
        yield Preprocessed(WITHIN_TYPES, types.within, 0)
