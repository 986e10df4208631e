"""Figures about the states of one layer at a time, and of pairs of layers: scree, scale, sample size, similarity.

A trace of one layer has it in `meta`: {"layer": 3}. The page shows the layer that its reader chooses.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from dimscope.geometry.metrics import GRIDE
from dimscope.page import charts
from dimscope.page.section import finite
from dimscope.page.theme import (
    CONDITION_MARKS,
    GAUSSIAN_NULL,
    GAUSSIAN_STATES,
    SURROGATE,
    WHITE_NOISE,
    Mark,
    figure,
    log_ticks,
    tint,
)
from dimscope.studies.layers.profiles import NORM, axis_label, conditions

FIRST = 60
"""Components of the scree; the cumulative curve shows all."""
FLOOR = 1e-5
"""Smaller shares are rounding errors of a rank-deficient sample, and would compress the rest of the axis."""
KEPT = 120
"""Points of a curve over thousands of components: more than a screen resolves."""


def scree(spectra: pl.DataFrame, layer: int) -> go.Figure:
    """Draw the share of variance of each of the first components; the figure has every layer and shows `layer`.

    `spectra` are rows of the scree table of one model and text.
    """
    shown = spectra.filter(pl.col("index") <= FIRST)
    shares = np.concatenate([finite(shown, column)[column].to_numpy() for column in ("share", "null_share")])
    low, high = max(float(shares.min(initial=1.0)), FLOOR), float(shares.max(initial=2 * FLOOR))
    fig = figure(
        400,
        xaxis={"title": {"text": f"component (first {min(FIRST, spectra['index'].n_unique())})"}},
        yaxis={
            "title": {"text": "share of the variance"},
            "type": "log",
            "tickvals": log_ticks(low, high),
            "tickformat": "~%",
        },
        legend={"traceorder": "reversed"},
    )
    for number, name, mark, points in _curves(shown, "share", "null_share"):
        points = points.filter(pl.col("y") >= FLOOR)
        hover = f"{name}, component %{{x}}: %{{y:.2~%}} of the variance<extra></extra>"
        curve = points["index"], points["y"]
        fig.add_trace(_curve(curve, name, mark, number, layer, hovertemplate=hover))
    return fig


def cumulative_scree(spectra: pl.DataFrame, layer: int, threshold: float) -> go.Figure:
    """Draw the variance held by the first k components; the legend counts those that reach the threshold."""
    fig = figure(
        400,
        xaxis={"title": {"text": "number of components kept"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "share of the variance"}, "tickformat": ".0%", "range": [0, 1.02]},
        legend={
            "traceorder": "reversed",
            "title": {"text": f"components for {100 * threshold:g}%", "side": "top"},
        },
    )
    fig.add_hline(threshold, line={"dash": "dot", "width": 1})
    for number, name, mark, points in _curves(spectra, "cumulative", "null_cumulative"):
        crossing = points.filter(pl.col("y") >= threshold - 1e-12).head(1)
        count = f"{crossing['index'][0]:,}" if crossing.height else "not reached"
        kept, visible = _thinned(points), number == layer
        hover = f"{name}: the first %{{x}} hold %{{y:.1%}}<extra></extra>"
        curve = kept["index"], kept["y"]
        fig.add_trace(_curve(curve, f"{name}: {count}", mark, number, layer, hovertemplate=hover))
        fig.add_trace(_crossing(crossing, mark, visible, number))
    return fig


def _crossing(point: pl.DataFrame, mark: Mark, visible: bool, layer: int) -> go.Scatter:
    x, y = point["index"].to_list(), point["y"].to_list()
    return go.Scatter(
        x=x * 2, y=[*y, *[0.0] * len(y)], mode="lines+markers", visible=visible, meta={"layer": layer},
        line={"color": mark.colour, "width": 1, "dash": "dot"}, showlegend=False, hoverinfo="skip",
        marker={"color": mark.colour, "symbol": mark.symbol, "size": [9, 0][: 2 * len(x)], "opacity": 1},
    )  # fmt: skip


Curve = tuple[int, str, Mark, pl.DataFrame]


def _curves(spectra: pl.DataFrame, value: str, null: str) -> Iterable[Curve]:
    """Yield (layer, name, mark, points with columns index and y) for each curve; the real one last, on top."""
    for (layer,), of_layer in spectra.group_by("layer", maintain_order=True):
        noise = finite(of_layer.filter(pl.col("condition") == "real"), null).sort("index")
        if noise.height:
            yield int(str(layer)), WHITE_NOISE, GAUSSIAN_NULL, noise.select("index", y=null)
        for condition in reversed(conditions(of_layer)):
            points = finite(of_layer.filter(pl.col("condition") == condition), value).sort("index")
            yield int(str(layer)), condition, CONDITION_MARKS[condition], points.select("index", y=value)


def _thinned(points: pl.DataFrame) -> pl.DataFrame:
    """Keep the first components one by one, where the curve bends, and then even steps up to the last."""
    last = points.height - 1
    bend = np.arange(min(20, points.height))
    return points[np.unique(np.concatenate([bend, np.linspace(0, max(last, 0), KEPT).round().astype(int)]))[: last + 1]]


def _curve(
    points: tuple[pl.Series, pl.Series], name: str, mark: Mark, layer: int, shown: int, *, markers: bool = False,
    **options: Any,
) -> go.Scatter:  # fmt: skip
    """Return the curve of one layer, as (x, y), which the page shows once that layer is chosen."""
    visible, meta = layer == shown, {"layer": layer}
    return charts.line(*points, name, mark, markers=markers, visible=visible, meta=meta, **options)


def confidence(bins: pl.DataFrame) -> go.Figure:
    """Draw the densities of the probability of the first choice on the same bins; shuffles as the mean of the draws.

    `bins` are rows of the confidence table of one model and text.
    """
    lowest = float(bins["bin_left"].to_numpy().min(initial=-1.0))
    ticks = [-math.log(10) * power for power in range(5, -1, -1) if -math.log(10) * power >= lowest]
    fig = figure(
        400,
        xaxis={
            "title": {"text": "probability of the first choice<br>(below: minus its logarithm)"},
            "tickvals": ticks,
            "ticktext": [f"{100 * math.exp(tick):.3g}%<br>{abs(tick):.1f}" for tick in ticks],
            # The margin is for the last label, which plotly hides where it would leave the figure.
            "range": [lowest, -0.03 * lowest],
        },
        yaxis={"title": {"text": "share of positions per nat"}, "rangemode": "tozero"},
        legend={"traceorder": "reversed"},
    )
    for condition in reversed(conditions(bins)):
        fig.add_traces(_densities(bins.filter(pl.col("condition") == condition), condition))
    return fig


def _densities(bins: pl.DataFrame, condition: str) -> list[go.Scatter]:
    mark = CONDITION_MARKS[condition]
    means = bins.group_by("bin_left", "bin_right").agg(
        pl.col("density").mean(), pl.col("density").std(ddof=1).alias("spread"), pl.len().alias("draws")
    )
    means = means.sort("bin_left")
    draws = int(means["draws"].to_numpy().max(initial=1))
    # A step line needs the right edge of the last bin as a point of its own.
    edges = [*means["bin_left"], *means["bin_right"].tail(1)]
    heights = [*means["density"], *means["density"].tail(1)]
    name = f"{condition} (mean of {draws})" if draws > 1 else condition
    steps = go.Scatter(
        x=edges, y=heights, name=name, mode="lines", line={"color": mark.colour, "shape": "hv", "width": 2},
        fill="tozeroy" if condition == "real" else None, fillcolor=tint(mark.colour, 0.25),
        hovertemplate=f"{condition}: density %{{y:.3f}} at log-probability %{{x:.2f}}<extra></extra>",
    )  # fmt: skip
    if draws < 2:
        return [steps]
    spread = [*means["spread"], *means["spread"].tail(1)]
    pairs = list(zip(heights, spread, strict=True))
    shape = {"color": mark.colour, "shape": "hv", "width": 0}
    outline = {"mode": "lines", "line": shape, "hoverinfo": "skip", "showlegend": False}
    low = go.Scatter(x=edges, y=[max(h - s, 0) for h, s in pairs], **outline)
    high = go.Scatter(x=edges, y=[h + s for h, s in pairs], fill="tonexty", fillcolor=tint(mark.colour, 0.3), **outline)
    return [low, high, steps]


def similarity_matrix(pairs: pl.DataFrame, rows: str = "layer", columns: str = "layer") -> go.Figure:
    """Draw CKA between layers, or between the layers of two models, as a heat map whose colours run from 0 to 1.

    `pairs` are rows of the similarity table of one comparison and text.
    """
    ys, xs = _names(pairs, "layer", "site"), _names(pairs, "other_layer", "other_site")
    cells = {(row["layer"], row["other_layer"]): row["cka"] for row in pairs.iter_rows(named=True)}
    symmetric = bool((pairs["comparison"] == "between layers").all())
    if symmetric:
        # The comparison is symmetric, so one half of the matrix may be missing.
        xs = ys = {**xs, **ys}
        cells = {(b, a): value for (a, b), value in cells.items()} | cells
        cells = {(a, a): 1.0 for a in ys} | cells
    z = [[cells.get((y, x)) for x in sorted(xs)] for y in sorted(ys)]
    x_names, y_names = [xs[x] for x in sorted(xs)], [ys[y] for y in sorted(ys)]
    axis = {"type": "category", "tickangle": 0, "showgrid": False}
    fig = figure(
        560,
        xaxis={**axis, "title": {"text": columns}, "dtick": math.ceil(len(x_names) / 12), "constrain": "domain"},
        yaxis={
            **axis, "title": {"text": rows}, "dtick": math.ceil(len(y_names) / 16), "constrain": "domain",
            "autorange": "reversed", "scaleanchor": "x" if symmetric else None,
        },
        coloraxis={"cmin": 0, "cmax": 1, "autocolorscale": True, "colorbar": {"title": {"text": "CKA"}}},
    )  # fmt: skip
    # Gaps between many small cells would hide them.
    gap = 1 if max(len(xs), len(ys)) <= 16 else 0
    fig.add_heatmap(
        z=z, x=x_names, y=y_names, coloraxis="coloraxis", hoverongaps=False, xgap=gap, ygap=gap,
        texttemplate="%{z:.2f}" if max(len(xs), len(ys)) <= 10 else None, textfont={"size": 11},
        hovertemplate=f"{rows} %{{y}}, {columns} %{{x}}: CKA %{{z:.3f}}<extra></extra>",
    )  # fmt: skip
    return fig


def _names(pairs: pl.DataFrame, layer: str, site: str) -> dict[int, str]:
    ends = {"embeddings": "emb", NORM: "norm"}
    return {number: ends.get(name, str(number)) for number, name in pairs.select(layer, site).iter_rows()}


def scale_curve(rows: pl.DataFrame, layer: int) -> go.Figure:
    """Draw the GRIDE dimension over the order of the neighbours; the figure has every layer and shows `layer`."""
    gride = finite(rows.filter((pl.col("metric") == GRIDE) & pl.col("scale").is_not_null()))
    positive = [value for column in ("value", "gaussian") for value in finite(gride, column)[column] if value > 0] or [
        1.0
    ]
    low, high = min(positive), max(positive)
    scales = sorted(gride["scale"].unique())
    fig = figure(
        400,
        xaxis={"title": {"text": "neighbours n1 (n2 = 2 n1)"}, "type": "log", "tickvals": scales},
        # One range for all layers, so that they can be compared when the reader switches; a layer of high dimension would
        # compress the others on a linear axis.
        yaxis={
            "title": {"text": "intrinsic dimension (GRIDE)"},
            "type": "log",
            "tickvals": log_ticks(low, high),
            "range": [math.log10(0.9 * low), math.log10(1.1 * high)],
        },
        legend={"traceorder": "reversed"},
    )
    fig.update_xaxes(ticktext=[f"{scale:,}" for scale in scales])
    for (number,), of_layer in gride.group_by("layer", maintain_order=True):
        gaussian = finite(of_layer.filter(pl.col("condition") == "real"), "gaussian").sort("scale")
        if gaussian.height:
            curve = gaussian["scale"], gaussian["gaussian"]
            fig.add_trace(_curve(curve, GAUSSIAN_STATES, SURROGATE, int(str(number)), layer, markers=True))
        for condition in reversed(conditions(of_layer)):
            points = _over(of_layer.filter(pl.col("condition") == condition), "scale")
            curve, mark = (points["scale"], points["value"]), CONDITION_MARKS[condition]
            trace = _curve(curve, condition, mark, int(str(number)), layer, markers=True)
            fig.add_trace(_with_errors(trace, points["stderr"]))
    return fig


def _over(rows: pl.DataFrame, column: str) -> pl.DataFrame:
    means = [pl.col("value").mean(), pl.col("stderr").mean()] if "stderr" in rows.columns else [pl.col("value").mean()]
    return rows.group_by(column).agg(*means).sort(column)


def _with_errors(trace: go.Scatter, errors: pl.Series) -> go.Scatter:
    """Add standard errors as bars, where there are any."""
    if errors.is_not_null().any():
        trace.error_y = {"array": errors.to_numpy(), "thickness": 1.5, "width": 3}
    return trace


def sample_curve(rows: pl.DataFrame, metric: str, layer: int) -> go.Figure:
    """Draw how a metric grows with the number of tokens, beside white noise; the figure has every layer and shows `layer`.

    `rows` are rows of the curve table of one model and text.
    """
    chosen = finite(rows.filter(pl.col("metric") == metric))
    sizes = sorted(chosen["n_tokens"].unique())
    top = float(np.nanmax([1.0, *chosen["value"], *finite(chosen, "null")["null"]]))
    fig = figure(
        400,
        xaxis={"title": {"text": "tokens measured (N)"}, "type": "log", "tickvals": sizes},
        yaxis={"title": {"text": axis_label(metric)}, "range": [0, 1.05 * top]},
        legend={"traceorder": "reversed"},
    )
    fig.update_xaxes(ticktext=[f"{size:,}" for size in sizes])
    for (number,), of_layer in chosen.group_by("layer", maintain_order=True):
        real = finite(of_layer.filter(pl.col("condition") == "real"), "null").sort("n_tokens")
        if real.height:
            curve = real["n_tokens"], real["null"]
            fig.add_trace(_curve(curve, WHITE_NOISE, GAUSSIAN_NULL, int(str(number)), layer))
        for condition in reversed(conditions(of_layer)):
            points = _over(of_layer.filter(pl.col("condition") == condition), "n_tokens")
            curve, mark = (points["n_tokens"], points["value"]), CONDITION_MARKS[condition]
            fig.add_trace(_curve(curve, condition, mark, int(str(number)), layer, markers=True))
    return fig
