"""From what was collected of one pass (one model, text, condition and draw) to rows of the tables of the layers study."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.activations.collection import Collection, SiteSums
from dimscope.activations.predictions import QUANTITIES, Predictions
from dimscope.geometry.dimension import FLOAT32_EPS, effective_rank, linear_dimensions
from dimscope.geometry.intrinsic import intrinsic_dimensions, white_noise_dimension
from dimscope.geometry.nulls import white_noise_spectrum
from dimscope.geometry.spectrum import Spectrum, spectrum_of
from dimscope.vectors.moments import Moments, combined

LAYERS = {
    "model": pl.String, "text": pl.String, "condition": pl.String, "draw": pl.Int64, "site": pl.String, "layer": pl.Int64,
    "preprocess": pl.String, "centred": pl.Boolean, "metric": pl.String, "scale": pl.Int64, "value": pl.Float64,
    "stderr": pl.Float64, "null": pl.Float64, "of_dim": pl.Float64, "of_rank": pl.Float64, "of_null": pl.Float64,
    "n_tokens": pl.Int64, "n_dropped": pl.Int64, "dim": pl.Int64,
}  # fmt: skip
PREDICTIONS = {
    "model": pl.String, "text": pl.String, "condition": pl.String, "draw": pl.Int64, "metric": pl.String,
    "value": pl.Float64, "stderr": pl.Float64, "n_tokens": pl.Int64,
}  # fmt: skip
SMALLEST = 64  # rows of the shortest stretch of the curve over N
FEWEST = 3  # rows from which there is a dimension to speak of

Held = Tensor | Moments


@dataclass(frozen=True, slots=True)
class Pass:
    """Which pass over which text a row belongs to."""

    model: str
    text: str
    condition: str
    draw: int = 0

    def row(self, **values: Any) -> dict[str, Any]:
        return {"model": self.model, "text": self.text, "condition": self.condition, "draw": self.draw, **values}


@dataclass(frozen=True, slots=True)
class Cloud:
    """The rows of a site after one preprocessing, as their spectrum, and how many were left out."""

    preprocess: str
    spectrum: Spectrum
    n_dropped: int = 0


def raw_spectra(collection: Collection) -> dict[int, Spectrum]:
    """The centred spectrum of every layer."""
    return {layer: spectrum_of(combined(sums.parts.values())) for layer, sums in collection.sites.items()}


def layers_frame(
    of: Pass, collection: Collection, spectra: Mapping[int, Spectrum], thresholds: tuple[float, ...]
) -> pl.DataFrame:
    """Every measure of every site; what does not exist is null. `spectra` are the `raw_spectra` of the collection.

    Further draws of a shuffle are there for the spread, and have the raw rows only.
    """
    found: list[dict[str, Any]] = []
    sample = collection.reservoir.sample().layers
    for layer, sums in collection.sites.items():
        held, whole = combined(sums.parts.values()), spectra[layer]
        rows: list[dict[str, Any]] = []
        for cloud in _clouds(sums, held, whole) if of.draw == 0 else [Cloud("raw", whole)]:
            rows += _spectral_rows(cloud, thresholds, one_window=collection.n_windows == 1)
        rows += _whole_rows(sums, held)
        rows += _sampled_rows(sample[layer])
        found += (of.row(site=sums.name, layer=layer, **row) for row in rows)
    return pl.DataFrame(found, schema=LAYERS).with_columns(pl.col(pl.Float64).fill_nan(None))


def _clouds(sums: SiteSums, held: Held, whole: Spectrum) -> Iterator[Cloud]:
    """The rows raw (centred, and not), without the first token, without massive tokens, and z-scored."""
    yield Cloud("raw", whole)
    yield Cloud("raw", spectrum_of(held, centred=False))
    for name, place in (("without first token", 0), ("without massive tokens", 1)):
        kept = [part for kind, part in sums.parts.items() if not kind[place]]
        n = sum(part.count for part in kept)
        if n == sums.count:
            yield Cloud(name, whole)
        elif n >= FEWEST:
            yield Cloud(name, spectrum_of(combined(kept)), sums.count - n)
    yield Cloud("z-scored", spectrum_of(held, standardised=True))


def rank_tolerance(n: int, dim: int, *, one_window: bool) -> float:
    """max(N, d) eps of float32 in one window, as `matrix_rank` has it; d eps in a stream, where it must not grow with N."""
    return (max(n, dim) if one_window else dim) * FLOAT32_EPS


@cache
def _noise(n: int, dim: int, centred: bool, thresholds: tuple[float, ...], tolerance: float) -> Mapping[str, float]:
    found = linear_dimensions(white_noise_spectrum(n, dim, 1.0, centred=centred), thresholds, tolerance=tolerance)
    return {d.metric: d.value for d in found}


def _spectral_rows(cloud: Cloud, thresholds: tuple[float, ...], *, one_window: bool) -> Iterator[dict[str, Any]]:
    of = cloud.spectrum
    tolerance = rank_tolerance(of.n_rows, of.dim, one_window=one_window)
    null = _noise(of.n_rows, of.dim, of.centred, thresholds, tolerance)
    family = linear_dimensions(of, thresholds, tolerance=tolerance)
    rank = next(d.value for d in family if d.metric == "numerical rank")
    place: dict[str, Any] = {"preprocess": cloud.preprocess, "centred": of.centred, "n_dropped": cloud.n_dropped}
    for d in family:
        yield _row(d.metric, d.value, of.n_rows, of.dim, null[d.metric], rank=rank, **place)
    widest = float(of.explained_variance_ratio[:1].sum())
    yield _row("anisotropy", widest, of.n_rows, of.dim, 1 / null["stable rank"], dimension=False, **place)


def _row(
    metric: str, value: float, n: int, dim: int, null: float | None = None, *, rank: float | None = None,
    dimension: bool = True, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A row of the table; a number of dimensions is also told as a share of the width, of the rank and of the null."""
    shares = (
        {"of_dim": value / dim, "of_rank": _ratio(value, rank), "of_null": _ratio(value, null)} if dimension else {}
    )
    return {"preprocess": "raw", "centred": True, "metric": metric, "value": float(value), "null": null, "n_tokens": n,
            "n_dropped": 0, "dim": dim, **shares, **more}  # fmt: skip


def _ratio(value: float, of: float | None) -> float | None:
    return value / of if of and math.isfinite(of) else None


def _whole_rows(sums: SiteSums, held: Held) -> Iterator[dict[str, Any]]:
    """What one pass knows without a spectrum: mean cosine, massive activations, the widest coordinate."""
    n, dim, told = sums.count, sums.dim, {"dimension": False}
    m, total = sums.unit_count, sums.unit_total
    # Ethayarajh 2019: the mean over pairs is (||sum u||^2 - m) / (m (m - 1)).
    cosine = float((total.cpu().square().sum() - m) / (m * (m - 1))) if m > 1 and total is not None else math.nan
    yield _row("mean cosine", cosine, n, dim, 0.0, centred=False, n_dropped=n - m, **told)
    yield _row("massive activations", sums.n_massive, n, dim, centred=False, **told)
    yield _row("largest activation", sums.largest, n, dim, centred=False, **told)
    spread = _variances(held)
    share = float(spread.max() / spread.sum()) if bool(spread.sum() > 0) else math.nan
    yield _row("rogue dimension share", share, n, dim, 1 / dim, **told)
    yield _row("rogue dimension index", int(spread.argmax()), n, dim, **told)


def _variances(of: Held) -> Float[Tensor, " d"]:
    if isinstance(of, Moments):
        return of.scatter(centred=True).diagonal().clamp_min(0) / of.count
    return of.double().var(dim=0, correction=0)


def _sampled_rows(sample: Float[Tensor, "n d"]) -> Iterator[dict[str, Any]]:
    """What moments cannot tell, on the reservoir: norms, the entropy of unit rows, intrinsic dimensions."""
    if len(sample) < FEWEST:
        return
    n, dim = sample.shape
    yield _row("median norm", float(sample.double().norm(dim=1).median()), n, dim, centred=False, dimension=False)
    # Centred first, then of length 1, and not centred again: the eRank of Wei et al. 2024 (arXiv 2401.17139).
    unit = torch.nn.functional.normalize(sample.double() - sample.double().mean(dim=0), dim=1)
    null = effective_rank(white_noise_spectrum(n, dim, 1.0, centred=True), of_lambda=True)
    value = effective_rank(spectrum_of(unit, centred=False), of_lambda=True)
    yield _row("effective rank (unit rows)", value, n, dim, null)
    for e in intrinsic_dimensions(sample):
        noise = white_noise_dimension(e.n_used, dim).get((e.metric, e.scale))
        place: dict[str, Any] = {"n_dropped": e.n_dropped, "stderr": e.stderr, "scale": e.scale}
        yield _row(e.metric, e.value, e.n_used, dim, noise, **place)


def scree_frame(of: Pass, collection: Collection, spectra: Mapping[int, Spectrum]) -> pl.DataFrame:
    """Share of the variance of every component of every site (centred, raw), beside white noise."""
    frames = []
    for layer, s in spectra.items():
        noise = white_noise_spectrum(s.n_rows, s.dim, 1.0, centred=True).explained_variance_ratio
        shares = s.explained_variance_ratio
        columns = {
            "index": torch.arange(1, len(shares) + 1), "share": shares, "cumulative": shares.cumsum(0),
            "null_share": noise, "null_cumulative": noise.cumsum(0),
        }  # fmt: skip
        frame = pl.DataFrame({key: value.numpy() for key, value in columns.items()})
        constants = {**of.row(), "site": collection.sites[layer].name, "layer": layer, "n_tokens": s.n_rows}
        frames.append(frame.with_columns(**{key: pl.lit(value) for key, value in constants.items()}))
    return pl.concat(frames)


def curve_frame(of: Pass, collection: Collection, thresholds: tuple[float, ...]) -> pl.DataFrame:
    """The linear dimensions over N: growing random parts of the reservoir, from 64 rows on."""
    found = []
    sample = collection.reservoir.sample()
    order = torch.randperm(len(sample.ends), generator=torch.Generator().manual_seed(0))
    sizes = [n for n in (SMALLEST << i for i in range(20)) if n < len(order)] + [len(order)]
    for layer, rows in sample.layers.items():
        for n in sizes:
            s = spectrum_of(rows[order[:n]])
            tolerance = rank_tolerance(n, s.dim, one_window=False)  # else the rank could fall while N grows
            null = _noise(n, s.dim, True, thresholds, tolerance)
            for d in linear_dimensions(s, thresholds, tolerance=tolerance):
                place = {"site": collection.sites[layer].name, "layer": layer, "metric": d.metric, "n_tokens": n}
                found.append(of.row(**place, value=d.value, null=null[d.metric]))
    return pl.DataFrame(found).with_columns(pl.col(pl.Float64).fill_nan(None))


def confidence_frame(of: Pass, predictions: Predictions) -> pl.DataFrame:
    """The histogram of the max log-softmax, on bins that depend on the vocabulary only."""
    edges, counts = predictions.edges, predictions.counts
    width, n = float(edges[1] - edges[0]), max(int(counts.sum()), 1)
    frame = pl.DataFrame({"bin_left": edges[:-1].numpy(), "bin_right": edges[1:].numpy(), "count": counts.numpy()})
    return frame.with_columns(
        density=pl.col("count") / (n * width), **{key: pl.lit(value) for key, value in of.row().items()}
    )


def predictions_frame(of: Pass, predictions: Predictions) -> pl.DataFrame:
    """Loss, entropy, max log-softmax (nats, means over positions) and bits per byte.

    Standard errors are those of independent positions, which neighbours in a text are not: a lower bound.
    """
    rows = []
    for quantity, (n, total, squares) in zip(QUANTITIES, predictions.sums.tolist(), strict=True):
        if n:
            mean = total / n
            error = math.sqrt(max(squares / n - mean**2, 0.0) / n)
            rows.append(of.row(metric=quantity, value=mean, stderr=error, n_tokens=int(n)))
    n, total, _ = predictions.sums[0].tolist()
    if n and predictions.n_bytes:
        value = total / math.log(2) / predictions.n_bytes
        rows.append(of.row(metric="bits per byte", value=value, stderr=None, n_tokens=int(n)))
    return pl.DataFrame(rows, schema=PREDICTIONS)


def text_frame(of: Pass, collection: Collection, length: int, bos: str | None) -> pl.DataFrame:
    """How much text a pass saw, and how many different tokens."""
    unique = torch.tensor(collection.unique, dtype=torch.float64)
    row = of.row(
        n_windows=collection.n_windows, window_length=length, n_tokens=collection.n_tokens,
        unique_tokens=float(unique.mean()), unique_tokens_sd=float(unique.std()) if len(unique) > 1 else None,
        unique_in_all=int(collection.seen.sum()), bos=bos,
    )  # fmt: skip
    return pl.DataFrame([row], schema_overrides={"bos": pl.String, "unique_tokens_sd": pl.Float64})
