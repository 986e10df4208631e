"""Similarity of the states of the same tokens: between layers, between real text and other conditions, between two models."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.activations.reservoir import Sample, common
from dimscope.geometry.representation_similarity import centred_gram, debiased_cka, leading_subspace, subspace_overlap
from dimscope.studies.layers.rows import Pass

TOKENS = 1024  # compared at most: every layer has a Gram matrix of that size
FEWEST = 4  # tokens that the debiased CKA needs
COMPONENTS = 16  # of the subspaces that are compared
SIMILARITY = {
    "comparison": pl.String, "model": pl.String, "text": pl.String, "site": pl.String, "layer": pl.Int64,
    "other_model": pl.String, "other_text": pl.String, "other_condition": pl.String, "other_site": pl.String,
    "other_layer": pl.Int64, "cka": pl.Float64, "cka_null_sd": pl.Float64, "overlap": pl.Float64,
    "overlap_null": pl.Float64, "overlap_null_sd": pl.Float64, "k": pl.Int64, "n_tokens": pl.Int64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison: its pass, the names of its sites, and its states at sampled tokens."""

    identity: Pass
    sites: Mapping[int, str]
    sample: Sample


def between_layers(one: Side) -> pl.DataFrame:
    """Compare every layer of a pass with every layer of the same pass, in both directions."""
    return _frame("between layers", one, one, ((a, b) for a in one.sites for b in one.sites))


def between_conditions(real: Side, other: Side) -> pl.DataFrame:
    """Compare every layer on real text with itself on shuffled text, or with random weights, at the same positions."""
    shared = [layer for layer in real.sites if layer in other.sites]
    return _frame(f"real and {other.identity.condition}", real, other, ((layer, layer) for layer in shared))


def between_models(one: Side, other: Side) -> pl.DataFrame:
    """Compare every layer of one model with every layer of another, at the bytes of the text where tokens of both end."""
    return _frame("between models", one, other, ((a, b) for a in one.sites for b in other.sites))


def _frame(comparison: str, one: Side, other: Side, pairs: Iterable[tuple[int, int]]) -> pl.DataFrame:
    samples = (one.sample, one.sample) if other is one else common(one.sample, other.sample)
    n = min(len(samples[0].ends), TOKENS)
    if n < FEWEST:
        return pl.DataFrame(schema=SIMILARITY)
    positions = np.linspace(0, len(samples[0].ends) - 1, n).round().astype(np.int64)  # spread over the whole text
    left = _states(samples[0].at(positions))
    right = left if other is one else _states(samples[1].at(positions))
    cka = debiased_cka(left.grams, right.grams)
    rows = []
    for a, b in pairs:
        row = {
            "comparison": comparison, "model": one.identity.model, "text": one.identity.text, "site": one.sites[a], "layer": a,
            "other_model": other.identity.model, "other_text": other.identity.text, "other_condition": other.identity.condition,
            "other_site": other.sites[b], "other_layer": b, "cka": float(cka[left.index[a], right.index[b]]),
            # Over all pairings of the tokens of any two clouds: see `debiased_cka`.
            "cka_null_sd": (2 / (n * (n - 3))) ** 0.5, "n_tokens": n,
        }  # fmt: skip
        rows.append(row | _overlap(left.bases[a], right.bases[b]))
    return pl.DataFrame(rows, schema=SIMILARITY).with_columns(pl.col(pl.Float64).fill_nan(None))


@dataclass(frozen=True, slots=True)
class _States:
    index: Mapping[int, int]  # layer -> row of `grams`
    grams: Float[Tensor, "l m"]
    bases: Mapping[int, Float[Tensor, "d k"]]


def _states(sample: Sample) -> _States:
    layers = list(sample.layers)
    grams = torch.stack([centred_gram(sample.layers[layer]) for layer in layers])
    bases = {layer: leading_subspace(sample.layers[layer], COMPONENTS) for layer in layers}
    return _States({layer: i for i, layer in enumerate(layers)}, grams, bases)


def _overlap(left: Float[Tensor, "d k"], right: Float[Tensor, "e j"]) -> dict[str, Any]:
    """Return the overlap of two subspaces, or nothing where they are subspaces of different spaces."""
    if left.shape[0] != right.shape[0] or 0 in (left.shape[1], right.shape[1]):
        return {}
    overlap = subspace_overlap(left, right)
    return {
        "overlap": overlap.overlap,
        "overlap_null": overlap.null,
        "overlap_null_sd": overlap.null_sd,
        "k": overlap.k,
    }
