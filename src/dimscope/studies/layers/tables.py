"""Rows of the tables of the layers study from the collection of one pass: one model, text, condition and draw."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.activations.collection import Collection
from dimscope.activations.predictions import QUANTITIES, Predictions
from dimscope.activations.site_sums import SiteSums
from dimscope.geometry.dimension import FLOAT32_EPS, linear_dimensions
from dimscope.geometry.grouped import variance_counts
from dimscope.geometry.half_samples import FEWEST_ROWS, Replicated, groups_of
from dimscope.geometry.metrics import (
    ANISOTROPY,
    LARGEST_ACTIVATION,
    MASSIVE_ACTIVATIONS,
    MEAN_COSINE,
    NUMERICAL_RANK,
    ROGUE_DIMENSION_INDEX,
    ROGUE_DIMENSION_SHARE,
    STABLE_RANK,
    variance_count_name,
)
from dimscope.geometry.nulls import white_noise_spectrum
from dimscope.geometry.spectrum import Spectrum, decompose, spectrum_of
from dimscope.geometry.token_types import TypeSpectra, type_spectra
from dimscope.studies.layers.rows import (
    FEWEST,
    LAYERS,
    PREDICTIONS,
    RAW,
    TYPES,
    Pass,
    Preprocessed,
    Rows,
    dimension_row,
    row,
    with_error,
)
from dimscope.studies.layers.state_measures import TYPE_MEANS, WITHIN_TYPES, States, state_rows, type_variants
from dimscope.texts.window_sums import interval
from dimscope.vectors.moments import Moments, combined

SMALLEST = 64  # rows of the smallest sample of the curve over N


@dataclass(frozen=True, slots=True)
class LayerSpectra:
    """The centred spectrum of all states of a layer, and what the sampled states add to it.

    Attributes:
        spectrum: The spectrum.
        counts: The variance counts by their names, with their errors; none where no error was computed.
        types: The spectra between and within token types; None where they were not computed.
    """

    spectrum: Spectrum
    counts: Mapping[str, Replicated] = field(default_factory=dict)
    types: TypeSpectra | None = None


def layer_spectra(
    collection: Collection, thresholds: tuple[float, ...], *, first: bool = True
) -> dict[int, LayerSpectra]:
    """Return the spectra of every layer, with the errors of the counts of some shares of the variance.

    Further draws of a shuffle (not `first`) have the spectrum of all states alone.
    """
    sample = collection.reservoir.sample()
    groups = groups_of(sample.windows)
    spectra = {}
    for layer, sums in collection.sites.items():
        everything, rows = combined(sums.parts.values()), sample.layers[layer]
        if not first:
            spectra[layer] = LayerSpectra(spectrum_of(everything))
            continue
        types = type_spectra(rows, sample.tokens) if len(rows) else None
        if len(rows) < FEWEST_ROWS:
            spectra[layer] = LayerSpectra(spectrum_of(everything), types=types)
            continue
        of = decompose(everything)
        counts = variance_counts(rows, groups, of.axes, of.spectrum.singular_values.square(), thresholds)
        names = map(variance_count_name, thresholds)
        spectra[layer] = LayerSpectra(of.spectrum, dict(zip(names, counts, strict=True)), types)
    return spectra


def layers_frame(
    identity: Pass, collection: Collection, spectra: Mapping[int, LayerSpectra], thresholds: tuple[float, ...]
) -> pl.DataFrame:
    """Return every measure of every site; a measure that does not exist is null.

    Further draws of a shuffle serve the spread only, so they have no preprocessing and no errors.

    Args:
        identity: The pass.
        collection: Its collection.
        spectra: The `layer_spectra` of the collection.
        thresholds: Shares of the variance for which components are counted.
    """
    rows: list[dict[str, Any]] = []
    first, one_window = identity.draw == 0, collection.n_windows == 1
    states = States(collection.reservoir.sample(), real=identity.condition == "real", first=first)
    for layer, sums in collection.sites.items():
        everything, raw = combined(sums.parts.values()), spectra[layer]
        variants = [Preprocessed(RAW, raw.spectrum)]
        if first:
            variants += [*_variants(sums, everything, raw.spectrum), *type_variants(states, layer, raw.types)]
        of_layer: list[dict[str, Any]] = []
        for variant in variants:
            of_layer += _spectral_rows(variant, thresholds, one_window=one_window)
        of_layer += _whole_rows(sums, everything)
        of_layer += state_rows(states, layer)
        of_layer = [_with_count_error(measured, raw) for measured in of_layer]
        rows += (identity.row(site=sums.name, layer=layer, **measured) for measured in of_layer)
    return pl.DataFrame(rows, schema=LAYERS).with_columns(pl.col(pl.Float64).fill_nan(None))


def _with_count_error(measured: dict[str, Any], raw: LayerSpectra) -> dict[str, Any]:
    """Return a row; that of a variance count of the raw centred states gets its error. Counts grow with N: no interval."""
    if measured["preprocess"] != RAW or not measured["centred"] or measured["metric"] not in raw.counts:
        return measured
    return with_error(measured, raw.counts[measured["metric"]], interval=False)


def _variants(sums: SiteSums, everything: Rows, raw: Spectrum) -> Iterator[Preprocessed]:
    """Yield the rows uncentred, without the first token, without massive tokens, and z-scored."""
    yield Preprocessed(RAW, spectrum_of(everything, centred=False))
    for name, position in (("without first token", 0), ("without massive tokens", 1)):
        parts = [part for kind, part in sums.parts.items() if not kind[position]]
        n = sum(part.count for part in parts)
        if n == sums.count:
            yield Preprocessed(name, raw)
        elif n >= FEWEST:
            yield Preprocessed(name, spectrum_of(combined(parts)), sums.count - n)
    yield Preprocessed("z-scored", spectrum_of(everything, standardised=True))


def rank_tolerance(n: int, dim: int, *, one_window: bool) -> float:
    """Return the relative tolerance of the numerical rank, in units of the eps of float32.

    max(N, d) eps in one window, as in `matrix_rank`; d eps in a stream, where it must not grow with N.
    """
    return (max(n, dim) if one_window else dim) * FLOAT32_EPS


@cache
def _noise(n: int, dim: int, centred: bool, thresholds: tuple[float, ...], tolerance: float) -> Mapping[str, float]:
    spectrum = white_noise_spectrum(n, dim, 1.0, centred=centred)
    return {d.metric: d.value for d in linear_dimensions(spectrum, thresholds, tolerance=tolerance)}


def _spectral_rows(
    variant: Preprocessed, thresholds: tuple[float, ...], *, one_window: bool
) -> Iterator[dict[str, Any]]:
    spectrum = variant.spectrum
    n, dim = spectrum.n_rows, spectrum.dim
    tolerance = rank_tolerance(n, dim, one_window=one_window)
    null = _noise(n, dim, spectrum.centred, thresholds, tolerance)
    family = linear_dimensions(spectrum, thresholds, tolerance=tolerance)
    rank = next(d.value for d in family if d.metric == NUMERICAL_RANK)
    columns = {"preprocess": variant.preprocess, "centred": spectrum.centred, "n_dropped": variant.n_dropped}
    for d in family:
        yield dimension_row(d.metric, d.value, n, dim, null[d.metric], rank=rank, **columns)
    widest = float(spectrum.explained_variance_ratio[:1].sum())
    yield row(ANISOTROPY, widest, n, dim, null=1 / null[STABLE_RANK], **columns)


def _whole_rows(sums: SiteSums, everything: Rows) -> Iterator[dict[str, Any]]:
    """Yield the measures that need no spectrum: mean cosine, massive activations, the widest coordinate."""
    n, dim = sums.count, sums.dim
    m, total = sums.unit_count, sums.unit_total
    # Ethayarajh 2019: the mean over pairs is (||sum u||^2 - m) / (m (m - 1)).
    cosine = float((total.cpu().square().sum() - m) / (m * (m - 1))) if m > 1 and total is not None else math.nan
    yield row(MEAN_COSINE, cosine, n, dim, null=0.0, centred=False, n_dropped=n - m)
    yield row(MASSIVE_ACTIVATIONS, sums.n_massive, n, dim, centred=False)
    yield row(LARGEST_ACTIVATION, sums.largest, n, dim, centred=False)
    variances = _variances(everything)
    share = float(variances.max() / variances.sum()) if bool(variances.sum() > 0) else math.nan
    yield row(ROGUE_DIMENSION_SHARE, share, n, dim, null=1 / dim)
    yield row(ROGUE_DIMENSION_INDEX, int(variances.argmax()), n, dim)


def _variances(rows: Rows) -> Float[Tensor, " d"]:
    if isinstance(rows, Moments):
        return rows.scatter(centred=True).diagonal().clamp_min(0) / rows.count
    return rows.double().var(dim=0, correction=0)


def type_spectra_frame(identity: Pass, collection: Collection, spectra: Mapping[int, LayerSpectra]) -> pl.DataFrame:
    """Return the variance of every component of the type means and of the states minus these, of every site.

    `share` is of the variance of all sampled states, so both parts of a layer add up to 1.
    """
    frames = []
    for layer, of_layer in spectra.items():
        types = of_layer.types
        if types is None:
            continue
        whole = float(types.all_rows.singular_values.square().sum())
        for part, spectrum in ((TYPE_MEANS, types.between), (WITHIN_TYPES, types.within)):
            shares = spectrum.singular_values.square() / whole if whole > 0 else torch.zeros(0, dtype=torch.float64)
            frame = pl.DataFrame({"index": np.arange(1, len(shares) + 1), "share": shares.numpy()})
            n_tokens = types.all_rows.n_rows
            columns = {"site": collection.sites[layer].name, "layer": layer, "part": part, "n_tokens": n_tokens}
            frames.append(identity.with_columns(frame, **columns))
    return pl.concat(frames)


def scree_frame(identity: Pass, collection: Collection, spectra: Mapping[int, LayerSpectra]) -> pl.DataFrame:
    """Return the share of the variance of every component of every site (centred, raw), beside white noise."""
    frames = []
    for layer, raw in spectra.items():
        spectrum = raw.spectrum
        n = spectrum.n_rows
        noise = white_noise_spectrum(n, spectrum.dim, 1.0, centred=True).explained_variance_ratio
        shares = spectrum.explained_variance_ratio
        columns = {
            "index": torch.arange(1, len(shares) + 1), "share": shares, "cumulative": shares.cumsum(0),
            "null_share": noise, "null_cumulative": noise.cumsum(0),
        }  # fmt: skip
        frame = pl.DataFrame({key: value.numpy() for key, value in columns.items()})
        frames.append(identity.with_columns(frame, site=collection.sites[layer].name, layer=layer, n_tokens=n))
    return pl.concat(frames)


def curve_frame(identity: Pass, collection: Collection, thresholds: tuple[float, ...]) -> pl.DataFrame:
    """Return the linear dimensions over N: growing random parts of the reservoir, from 64 rows on."""
    rows = []
    sample = collection.reservoir.sample()
    order = torch.randperm(len(sample.ends), generator=torch.Generator().manual_seed(0))
    sizes = [n for n in (SMALLEST << i for i in range(20)) if n < len(order)] + [len(order)]
    for layer, states in sample.layers.items():
        for n in sizes:
            spectrum = spectrum_of(states[order[:n]])
            tolerance = rank_tolerance(n, spectrum.dim, one_window=False)  # otherwise the rank could fall while N grows
            null = _noise(n, spectrum.dim, True, thresholds, tolerance)
            columns = {"site": collection.sites[layer].name, "layer": layer, "n_tokens": n}
            rows += [
                identity.row(**columns, metric=d.metric, value=d.value, null=null[d.metric])
                for d in linear_dimensions(spectrum, thresholds, tolerance=tolerance)
            ]
    return pl.DataFrame(rows, schema_overrides=TYPES).with_columns(pl.col(pl.Float64).fill_nan(None))


def confidence_frame(identity: Pass, predictions: Predictions) -> pl.DataFrame:
    """Return the histogram of the max log-softmax, on bins that depend on the vocabulary only."""
    edges, counts = predictions.edges, predictions.counts
    width, n = float(edges[1] - edges[0]), max(int(counts.sum()), 1)
    frame = pl.DataFrame({"bin_left": edges[:-1].numpy(), "bin_right": edges[1:].numpy(), "count": counts.numpy()})
    return identity.with_columns(frame.with_columns(density=pl.col("count") / (n * width)))


def predictions_frame(identity: Pass, predictions: Predictions) -> pl.DataFrame:
    """Return loss, entropy, max log-softmax (nats, means over positions) and bits per byte.

    Standard errors and 95% intervals are over windows, whose positions depend on each other.
    """
    sums = predictions.by_window.stacked()
    totals = sums.sum(dim=0).tolist()
    numbers = {name: (2 * i + 1, 2 * i, 1.0) for i, name in enumerate(QUANTITIES)}  # of which sum over which
    numbers["bits per byte"] = (1, len(totals) - 1, math.log(2))
    rows = []
    for metric, (numerator, denominator, unit) in numbers.items():
        if totals[denominator]:
            ratio = interval(sums, lambda s, n=numerator, d=denominator, u=unit: s[..., n] / s[..., d] / u)
            spread = {"stderr": ratio.stderr, "low": ratio.low, "high": ratio.high}
            n_tokens = int(totals[0 if metric == "bits per byte" else denominator])
            rows.append(identity.row(metric=metric, value=ratio.value, **spread, n_tokens=n_tokens))
    return pl.DataFrame(rows, schema=PREDICTIONS).with_columns(pl.col(pl.Float64).fill_nan(None))


def text_frame(identity: Pass, collection: Collection, bos: str | None) -> pl.DataFrame:
    """Return the size of the text of a pass, and its number of distinct tokens.

    The windows of a compared model differ in their tokens; `window_length` is their mean.
    """
    unique = torch.tensor(collection.unique, dtype=torch.float64)
    row = identity.row(
        n_windows=collection.n_windows, window_length=round(collection.n_tokens / collection.n_windows), n_tokens=collection.n_tokens,
        unique_tokens=float(unique.mean()), unique_tokens_sd=float(unique.std()) if len(unique) > 1 else None,
        unique_in_all=int(collection.seen.sum()), bos=bos,
    )  # fmt: skip
    return pl.DataFrame([row], schema_overrides=TYPES | {"bos": pl.String, "unique_tokens_sd": pl.Float64})
