"""Rows of the tables of the layers study from the collection of one pass: one model, text, condition and draw."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.activations.collection import Collection
from dimscope.activations.predictions import QUANTITIES, Predictions
from dimscope.activations.site_sums import SiteSums
from dimscope.geometry.dimension import FLOAT32_EPS, effective_rank, linear_dimensions
from dimscope.geometry.intrinsic import intrinsic_dimensions, white_noise_dimension
from dimscope.geometry.metrics import (
    ANISOTROPY,
    EFFECTIVE_RANK_UNIT_ROWS,
    LARGEST_ACTIVATION,
    MASSIVE_ACTIVATIONS,
    MEAN_COSINE,
    MEDIAN_NORM,
    NUMERICAL_RANK,
    ROGUE_DIMENSION_INDEX,
    ROGUE_DIMENSION_SHARE,
    STABLE_RANK,
)
from dimscope.geometry.nulls import white_noise_spectrum
from dimscope.geometry.spectrum import Spectrum, spectrum_of
from dimscope.vectors.moments import Moments, combined

LAYERS = {
    "model": pl.String, "text": pl.String, "condition": pl.String, "seed": pl.Int64, "site": pl.String, "layer": pl.Int64,
    "preprocess": pl.String, "centred": pl.Boolean, "metric": pl.String, "scale": pl.Int64, "value": pl.Float64,
    "stderr": pl.Float64, "null": pl.Float64, "share_of_dim": pl.Float64, "share_of_rank": pl.Float64, "share_of_null": pl.Float64,
    "n_tokens": pl.Int64, "n_dropped": pl.Int64, "dim": pl.Int64,
}  # fmt: skip
PREDICTIONS = {
    "model": pl.String, "text": pl.String, "condition": pl.String, "seed": pl.Int64, "metric": pl.String,
    "value": pl.Float64, "stderr": pl.Float64, "n_tokens": pl.Int64,
}  # fmt: skip
TYPES = {"seed": pl.Int64, "layer": pl.Int64, "n_tokens": pl.Int64}  # of columns whose type polars would guess
SMALLEST = 64  # rows of the smallest sample of the curve over N
FEWEST = 3  # rows that a dimension needs

Rows = Tensor | Moments  # few rows themselves, many as their moments


@dataclass(frozen=True, slots=True)
class Pass:
    """The pass that a row belongs to.

    Attributes:
        model: Title of the model.
        text: Name of the text.
        condition: "real", "shuffled", "shuffled across" or "random weights".
        draw: Number of the random draw, from 0 on.
        seed: The same as a column of the tables: the seed of the study plus the draw; None where nothing is random.
    """

    model: str
    text: str
    condition: str
    draw: int = 0
    seed: int | None = None

    def row(self, **values: Any) -> dict[str, Any]:
        """Return a row of a table about this pass."""
        return {"model": self.model, "text": self.text, "condition": self.condition, "seed": self.seed, **values}

    def with_columns(self, frame: pl.DataFrame, **constants: Any) -> pl.DataFrame:
        """Return a frame about this pass, with its columns and other constant ones."""
        literals = {name: pl.lit(value, dtype=TYPES.get(name)) for name, value in self.row(**constants).items()}
        return frame.with_columns(**literals)


@dataclass(frozen=True, slots=True)
class Preprocessed:
    """The spectrum of the rows of a site after one preprocessing, and how many rows were dropped."""

    preprocess: str
    spectrum: Spectrum
    n_dropped: int = 0


def raw_spectra(collection: Collection) -> dict[int, Spectrum]:
    """Return the centred spectrum of every layer."""
    return {layer: spectrum_of(combined(sums.parts.values())) for layer, sums in collection.sites.items()}


def layers_frame(
    identity: Pass, collection: Collection, spectra: Mapping[int, Spectrum], thresholds: tuple[float, ...]
) -> pl.DataFrame:
    """Return every measure of every site; a measure that does not exist is null.

    Further draws of a shuffle serve the spread only, so they have no preprocessing.

    Args:
        identity: The pass.
        collection: Its collection.
        spectra: The `raw_spectra` of the collection.
        thresholds: Shares of the variance for which components are counted.
    """
    rows: list[dict[str, Any]] = []
    sample = collection.reservoir.sample().layers
    for layer, sums in collection.sites.items():
        everything, raw = combined(sums.parts.values()), spectra[layer]
        variants = _variants(sums, everything, raw) if identity.draw == 0 else [Preprocessed("raw", raw)]
        of_layer: list[dict[str, Any]] = []
        for variant in variants:
            of_layer += _spectral_rows(variant, thresholds, one_window=collection.n_windows == 1)
        of_layer += _whole_rows(sums, everything)
        of_layer += _sampled_rows(sample[layer])
        rows += (identity.row(site=sums.name, layer=layer, **row) for row in of_layer)
    return pl.DataFrame(rows, schema=LAYERS).with_columns(pl.col(pl.Float64).fill_nan(None))


def _variants(sums: SiteSums, everything: Rows, raw: Spectrum) -> Iterator[Preprocessed]:
    """Yield the rows raw (centred and uncentred), without the first token, without massive tokens, and z-scored."""
    yield Preprocessed("raw", raw)
    yield Preprocessed("raw", spectrum_of(everything, centred=False))
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
        yield _dimension_row(d.metric, d.value, n, dim, null[d.metric], rank=rank, **columns)
    widest = float(spectrum.explained_variance_ratio[:1].sum())
    yield _row(ANISOTROPY, widest, n, dim, null=1 / null[STABLE_RANK], **columns)


def _row(metric: str, value: float, n: int, dim: int, **columns: Any) -> dict[str, Any]:
    """Return a row of the table; `columns` override those of raw and centred rows."""
    usual = {"preprocess": "raw", "centred": True, "null": None, "n_dropped": 0}
    return usual | {"metric": metric, "value": float(value), "n_tokens": n, "dim": dim} | columns


def _dimension_row(
    metric: str, value: float, n: int, dim: int, null: float | None, *, rank: float | None = None, **columns: Any
) -> dict[str, Any]:
    """Return a row about a number of dimensions, also as a share of the width, of the rank and of white noise."""
    shares = {
        "share_of_dim": value / dim, "share_of_rank": _ratio(value, rank), "share_of_null": _ratio(value, null)
    }  # fmt: skip
    return _row(metric, value, n, dim, null=null, **shares, **columns)


def _ratio(value: float, whole: float | None) -> float | None:
    return value / whole if whole and math.isfinite(whole) else None


def _whole_rows(sums: SiteSums, everything: Rows) -> Iterator[dict[str, Any]]:
    """Yield the measures that need no spectrum: mean cosine, massive activations, the widest coordinate."""
    n, dim = sums.count, sums.dim
    m, total = sums.unit_count, sums.unit_total
    # Ethayarajh 2019: the mean over pairs is (||sum u||^2 - m) / (m (m - 1)).
    cosine = float((total.cpu().square().sum() - m) / (m * (m - 1))) if m > 1 and total is not None else math.nan
    yield _row(MEAN_COSINE, cosine, n, dim, null=0.0, centred=False, n_dropped=n - m)
    yield _row(MASSIVE_ACTIVATIONS, sums.n_massive, n, dim, centred=False)
    yield _row(LARGEST_ACTIVATION, sums.largest, n, dim, centred=False)
    variances = _variances(everything)
    share = float(variances.max() / variances.sum()) if bool(variances.sum() > 0) else math.nan
    yield _row(ROGUE_DIMENSION_SHARE, share, n, dim, null=1 / dim)
    yield _row(ROGUE_DIMENSION_INDEX, int(variances.argmax()), n, dim)


def _variances(rows: Rows) -> Float[Tensor, " d"]:
    if isinstance(rows, Moments):
        return rows.scatter(centred=True).diagonal().clamp_min(0) / rows.count
    return rows.double().var(dim=0, correction=0)


def _sampled_rows(sample: Float[Tensor, "n d"]) -> Iterator[dict[str, Any]]:
    """Yield the measures of individual states, on the reservoir: norms, entropy of unit rows, intrinsic dimensions."""
    if len(sample) < FEWEST:
        return
    n, dim = sample.shape
    yield _row(MEDIAN_NORM, float(sample.double().norm(dim=1).median()), n, dim, centred=False)
    # Centred first, then of length 1, and not centred again: the eRank of Wei et al. 2024 (arXiv 2401.17139).
    unit = torch.nn.functional.normalize(sample.double() - sample.double().mean(dim=0), dim=1)
    null = effective_rank(white_noise_spectrum(n, dim, 1.0, centred=True), of_lambda=True)
    value = effective_rank(spectrum_of(unit, centred=False), of_lambda=True)
    yield _dimension_row(EFFECTIVE_RANK_UNIT_ROWS, value, n, dim, null)
    for e in intrinsic_dimensions(sample):
        noise = white_noise_dimension(e.n_used, dim).get((e.metric, e.scale))
        columns = {"n_dropped": e.n_dropped, "stderr": e.stderr, "scale": e.scale}
        yield _dimension_row(e.metric, e.value, e.n_used, dim, noise, **columns)


def scree_frame(identity: Pass, collection: Collection, spectra: Mapping[int, Spectrum]) -> pl.DataFrame:
    """Return the share of the variance of every component of every site (centred, raw), beside white noise."""
    frames = []
    for layer, spectrum in spectra.items():
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

    Standard errors assume independent positions. Neighbours in a text are dependent, so they are lower bounds.
    """
    rows = []
    for quantity, (n, total, squares) in zip(QUANTITIES, predictions.sums.tolist(), strict=True):
        if n:
            mean = total / n
            error = math.sqrt(max(squares / n - mean**2, 0.0) / n)
            rows.append(identity.row(metric=quantity, value=mean, stderr=error, n_tokens=int(n)))
    n, total, _ = predictions.sums[0].tolist()
    if n and predictions.n_bytes:
        value = total / math.log(2) / predictions.n_bytes
        rows.append(identity.row(metric="bits per byte", value=value, stderr=None, n_tokens=int(n)))
    return pl.DataFrame(rows, schema=PREDICTIONS)


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
