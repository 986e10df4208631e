"""Tables as the layers study writes them, made by formula: power-law spectra, steeper where structure is planted."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from dimscope.page.section import Tables
from dimscope.studies.layers.rows import LAYERS

PREPROCESSINGS = ("raw", "without first token", "without massive tokens", "z-scored")
THRESHOLDS = (0.8, 0.95, 0.99)
VOCABULARY = 4096
SIGNS = np.array([1, -1, 1, -1, 1, -1, 1])  # of differences between half-samples


@dataclass(frozen=True, slots=True)
class Model:
    """A made-up model: how many blocks, how wide, and whether a norm follows the last block."""

    name: str = "toy-6"
    blocks: int = 6
    dim: int = 256
    final_norm: bool = True

    def sites(self) -> list[tuple[int, str]]:
        last = [(self.blocks, f"block {self.blocks}, before final norm" if self.final_norm else f"block {self.blocks}")]
        norm = [(self.blocks + 1, "after final norm")] if self.final_norm else []
        return [(0, "embeddings"), *((i, f"block {i}") for i in range(1, self.blocks)), *last, *norm]


@dataclass(frozen=True, slots=True)
class Plan:
    """What was run; `steeper` is added to the exponent of real spectra from block 1 on: above 0, real needs fewer."""

    models: tuple[Model, ...] = (Model(),)
    texts: tuple[str, ...] = ("prose", "html")
    shuffles: int = 5
    random_weights: bool = True
    windows: int = 3
    length: int = 512
    steeper: float = 0.3
    curve: bool = False

    @property
    def n_tokens(self) -> int:
        return self.windows * self.length

    def runs(self) -> list[tuple[Model, str, str, int]]:
        conditions = [("real", 0), *(("shuffled", i) for i in range(self.shuffles))]
        conditions += [("random weights", 0)] if self.random_weights else []
        return [(model, text, name, draw) for model in self.models for text in self.texts for name, draw in conditions]


def study_facts(plan: Plan, **changes: Any) -> dict[str, Any]:
    """Return what report.json holds under study.layers."""
    facts = {
        "texts": list(plan.texts), "models": [model.name for model in plan.models], "thresholds": list(THRESHOLDS),
        "shuffles": plan.shuffles, "n_windows": plan.windows, "window_length": plan.length, "show_layer": 3,
        "dtype": "float32", "bos": None, "rank_tolerance": "max(N, d) x eps(float32)", "preset": None,
    }  # fmt: skip
    return {**facts, **changes}


def layer_tables(plan: Plan | None = None) -> Tables:
    """Return every table of the study; `curve` only where the plan asks for it."""
    plan = plan or Plan()
    tables = {
        "layers": pl.DataFrame(list(_layers(plan)), schema=LAYERS),
        "type_spectra": pl.DataFrame(list(_type_spectra(plan))),
        "texts": pl.DataFrame(list(_texts(plan))),
        "confidence": pl.DataFrame(list(_confidence(plan))),
        "predictions": pl.DataFrame(list(_predictions(plan)), infer_schema_length=None),
        "scree": pl.concat(list(_scree(plan))),
        "similarity": pl.DataFrame(list(_similarity(plan)), infer_schema_length=None),
    }
    return {**tables, "curve": pl.DataFrame(list(_curve(plan)))} if plan.curve else tables


def shares(plan: Plan, model: Model, text: str, condition: str, layer: int, draw: int = 0) -> np.ndarray:
    """Return the share of variance of each component: k to the power -alpha."""
    alpha = 0.75 + 0.08 * abs(layer - model.blocks / 2) + 0.12 * plan.texts.index(text)
    if condition == "real" and layer > 0:
        alpha += plan.steeper
    if condition == "random weights":
        alpha -= 0.45
    if condition == "shuffled" and layer > 0:
        alpha += 0.01 * math.sin(7 * draw + layer)
    return _normed(np.arange(1, model.dim + 1) ** -alpha)


def noise(plan: Plan, dim: int, n_tokens: int = 0) -> np.ndarray:
    """Return the shares of white noise: nearly flat, the flatter the longer the sample."""
    ratio = math.sqrt(dim / (n_tokens or plan.n_tokens))
    return _normed(np.linspace((1 + ratio) ** 2, max(1 - ratio, 0.0) ** 2 + 1e-9, dim))


def count(share: np.ndarray, threshold: float) -> int:
    """Return how many components hold that share of the variance."""
    return int(np.searchsorted(np.cumsum(share), threshold - 1e-12) + 1)


def _normed(values: np.ndarray) -> np.ndarray:
    return values / values.sum()


def _spectral(share: np.ndarray) -> dict[str, float]:
    counts = {f"variance count {t:.0%}": float(count(share, t)) for t in THRESHOLDS}
    ratio = float(1 / (share**2).sum())
    return {**counts, "numerical rank": float(len(share)), "participation ratio": ratio, "stable rank": 1 / share[0]}


def _layers(plan: Plan) -> Iterable[dict[str, Any]]:
    for model, text, condition, draw in plan.runs():
        for layer, site in model.sites():
            place = {"model": model.name, "text": text, "condition": condition, "seed": None if condition == "real" else draw, "site": site,
                     "layer": layer}  # fmt: skip
            share = shares(plan, model, text, condition, layer, draw)
            null = _spectral(noise(plan, model.dim))
            for position, preprocess in enumerate(PREPROCESSINGS):
                changed = _normed(share ** (1 - 0.1 * position))
                for metric, value in _spectral(changed).items():
                    halves = SIGNS * (0.5 if condition == "real" else -0.5)  # a difference has the standard error 0.5
                    spread = {"stderr": 0.25, "halves": halves} if preprocess == "raw" and draw == 0 else {}
                    yield _row(plan, model, place, preprocess, metric, value, null[metric], **spread)
            yield from _types(plan, model, place, share)
            yield from _intrinsic(plan, model, place, share)


def _intrinsic(plan: Plan, model: Model, place: dict[str, Any], share: np.ndarray) -> Iterable[dict[str, Any]]:
    dimension = 4 + 0.1 / (share**2).sum()
    for preprocess, times in (("raw", 0.4), ("one state per type", 1.0)):
        value = times * dimension
        errors = {"stderr": 0.3, "halves": SIGNS * 0.6, "gaussian": 3 * dimension}
        yield _row(plan, model, place, preprocess, "TwoNN, maximum likelihood", value, 0.2 * model.dim, **errors)
        for step in range(6):
            scale = {"scale": 2**step, "stderr": 0.2 / (step + 1), "gaussian": 3 * dimension / (1 + 0.1 * step)}
            yield _row(plan, model, place, preprocess, "GRIDE", value / (1 + 0.2 * step), 0.2 * model.dim, **scale)


def _types(plan: Plan, model: Model, place: dict[str, Any], share: np.ndarray) -> Iterable[dict[str, Any]]:
    part = max(1 - 0.05 * place["layer"], 0.1)
    errors = {"stderr": 0.01, "low": part - 0.02, "high": min(part + 0.02, 1.0), "halves": SIGNS * 0.02}
    yield _row(plan, model, place, "raw", "variance between token types", part, 0.0, **errors)
    yield _row(plan, model, place, "raw", "same-token nearest neighbors", part * 0.8, 0.01)
    for position, preprocess in enumerate(("type means", "type mean removed")):
        changed = _normed(share ** (1 - 0.1 * position))
        yield _row(plan, model, place, preprocess, "variance count 95%", float(count(changed, 0.95)), 0.8 * model.dim)


def _type_spectra(plan: Plan) -> Iterable[dict[str, Any]]:
    for model, text, condition, draw in plan.runs():
        for layer, site in model.sites() if condition == "real" else []:
            share = shares(plan, model, text, condition, layer, draw)
            for part, size in (("type means", 1 - 0.05 * layer), ("type mean removed", 0.05 * layer)):
                for index, value in enumerate(size * share[:80], 1):
                    yield {
                        "model": model.name, "text": text, "condition": condition, "seed": None, "index": index, "share": value,
                        "site": site, "layer": layer, "part": part, "n_tokens": plan.n_tokens,
                    }  # fmt: skip


def _row(
    plan: Plan, model: Model, place: dict[str, Any], preprocess: str, metric: str, value: float, null: float | None,
    **columns: Any,
) -> dict[str, Any]:  # fmt: skip
    dropped = plan.windows if preprocess == "without first token" else 0
    return {
        **place, "preprocess": preprocess, "centred": True, "metric": metric, "value": value,
        "null": null, "share_of_dim": value / model.dim, "share_of_rank": value / model.dim,
        "share_of_null": value / null if null else None, "n_tokens": plan.n_tokens - dropped, "n_dropped": dropped,
        "dim": model.dim, **columns,
    }  # fmt: skip


def _texts(plan: Plan) -> Iterable[dict[str, Any]]:
    for model, text, condition, draw in plan.runs():
        if condition != "random weights":
            yield {
                "model": model.name, "text": text, "condition": condition, "seed": None if condition == "real" else draw,
                "n_windows": plan.windows,
                "window_length": plan.length, "n_tokens": plan.n_tokens, "unique_tokens": 240.0,
                "unique_tokens_sd": 12.5, "unique_in_all": 520, "bos": None,
            }  # fmt: skip


_SURE = {"real": -1.6, "shuffled": -3.4, "random weights": -7.6}


def _confidence(plan: Plan) -> Iterable[dict[str, Any]]:
    edges = np.linspace(-math.log(VOCABULARY), 0, 41)
    for model, text, condition, draw in plan.runs():
        middle = (edges[:-1] + edges[1:]) / 2
        bell = np.exp(-(((middle - _SURE[condition] - 0.05 * draw) / (0.4 - 0.5 * _SURE[condition] / 3)) ** 2))
        counts = np.rint(bell / bell.sum() * plan.n_tokens).astype(int)
        for left, right, n in zip(edges[:-1], edges[1:], counts, strict=True):
            density = n / counts.sum() / (right - left)
            yield {
                "model": model.name, "text": text, "condition": condition, "seed": None if condition == "real" else draw, "bin_left": left,
                "bin_right": right, "count": int(n), "density": density,
            }  # fmt: skip


def _predictions(plan: Plan) -> Iterable[dict[str, Any]]:
    for model, text, condition, draw in plan.runs():
        sure = _SURE[condition] - 0.05 * draw
        values = {"loss": 1.8 - sure, "bits per byte": 0.7 - 0.4 * sure, "entropy": 0.9 - sure, "max log-softmax": sure}
        for metric, value in values.items():
            yield {
                "model": model.name, "text": text, "condition": condition, "seed": None if condition == "real" else draw, "metric": metric,
                "value": value, "stderr": 0.02, "low": value - 0.05, "high": value + 0.05, "n_tokens": plan.n_tokens,
            }  # fmt: skip


def _scree(plan: Plan) -> Iterable[pl.DataFrame]:
    for model, text, condition, draw in plan.runs():
        for layer, site in model.sites() if draw == 0 else []:
            share, null = shares(plan, model, text, condition, layer), noise(plan, model.dim)
            values = {
                "share": share,
                "cumulative": share.cumsum(),
                "null_share": null,
                "null_cumulative": null.cumsum(),
            }
            names = {"model": model.name, "text": text, "condition": condition, "site": site, "layer": layer}
            frame = pl.DataFrame({"index": np.arange(1, model.dim + 1), **values})
            yield frame.with_columns(n_tokens=plan.n_tokens, **{name: pl.lit(value) for name, value in names.items()})


def _similarity(plan: Plan) -> Iterable[dict[str, Any]]:
    for model in plan.models:
        for text in plan.texts:
            yield from (
                _pair(plan, "between layers", (model, *here), (model, *there), text)
                for here in model.sites()
                for there in model.sites()
            )
            names = [*(["shuffled"] if plan.shuffles else []), *(["random weights"] if plan.random_weights else [])]
            for condition in names:
                comparison = f"real and {condition}"
                yield from (_pair(plan, comparison, (model, *s), (model, *s), text, condition) for s in model.sites())
    first = plan.models[0]
    for other in plan.models[1:]:
        sides = [((first, *here), (other, *there)) for here in first.sites() for there in other.sites()]
        yield from (_pair(plan, "between models", *side, plan.texts[0]) for side in sides)


Side = tuple[Model, int, str]


def _pair(plan: Plan, comparison: str, one: Side, two: Side, text: str, condition: str = "real") -> dict[str, Any]:
    (model, layer, site), (other, other_layer, other_site) = one, two
    cka = math.exp(-0.25 * abs(layer / model.blocks - other_layer / other.blocks) * 6)
    if condition != "real":
        cka = math.exp(-(0.15 if condition == "shuffled" else 0.45) * layer)
    same = model.dim == other.dim
    return {
        "comparison": comparison, "model": model.name, "text": text, "site": site, "layer": layer,
        "other_model": other.name, "other_text": text, "other_condition": condition, "other_site": other_site,
        "other_layer": other_layer, "cka": cka, "cka_null_sd": 1 / plan.n_tokens, "overlap": 0.1 + 0.8 * cka if same else None,
        "overlap_null": 16 / model.dim if same else None, "overlap_null_sd": 0.02 if same else None, "k": 16, "n_tokens": plan.n_tokens,
    }  # fmt: skip


def _curve(plan: Plan) -> Iterable[dict[str, Any]]:
    for model, text, condition, draw in plan.runs():
        for layer, site in model.sites() if draw == 0 else []:
            for n in (plan.n_tokens // 8, plan.n_tokens // 4, plan.n_tokens // 2, plan.n_tokens):
                top = count(shares(plan, model, text, condition, layer), 0.95)
                null = count(noise(plan, model.dim, n), 0.95)
                yield {
                    "model": model.name, "text": text, "condition": condition, "site": site, "layer": layer,
                    "metric": "variance count 95%", "n_tokens": n, "value": top * (1 - 0.15 * math.log2(plan.n_tokens / n)),
                    "null": float(null),
                }  # fmt: skip
