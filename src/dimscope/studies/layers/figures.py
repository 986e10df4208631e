"""Figures along the depth of a model: a number per layer, for real and shuffled text, and for random weights."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from dimscope.geometry.metrics import NUMERICAL_RANK, TWO_NN
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
    series_mark,
    tint,
)
from dimscope.studies.layers.profiles import NORM, axis_label, conditions, profile

UPPER, LOWER = (0.42, 1.0), (0.0, 0.3)
"""The domains of two panels over one axis of layers."""


def layer_axis(layers: Iterable[tuple[int, str]]) -> dict[str, Any]:
    """Return the axis of layers from (number, site): "emb", 1, 2, ..., "norm", thinned out where there are many."""
    sites = sorted(dict(layers).items())
    last = sites[-1][0] if sites else 0
    step = max(1, math.ceil(last / 12))
    ends = {0: "emb"} | {layer: "norm" for layer, site in sites if site == NORM}
    # A number too near the label "norm" would overlap it on a phone.
    inner = [i for i, _ in sites if i % step == 0 and i not in ends and (last not in ends or last - i >= step)]
    ticks = sorted([*inner, *(i for i, _ in sites if i in ends)])
    margin = 0.04 * max(last, 1) + 0.1
    return {
        "title": {"text": "layer"},
        "tickvals": ticks,
        "ticktext": [ends.get(i, str(i)) for i in ticks],
        "tickangle": 0,
        "range": [(sites[0][0] if sites else 0) - margin, last + margin],
        "showgrid": False,
        "zeroline": False,
    }


def profile_line(points: pl.DataFrame, name: str, mark: Mark, y: str = "value", **options: Any) -> go.Scatter:
    """Return a profile as a line through marked points; hovering a point shows its site."""
    hover = f"{name}: %{{y:,.4~g}}<extra>%{{customdata}}</extra>"
    options = {"customdata": points["site"].to_list(), "hovertemplate": hover} | options
    return charts.line(points["layer"], points[y], name, mark, **options)


def profile_band(
    points: pl.DataFrame, mark: Mark, y: str = "value", spread: str = "spread", **options: Any
) -> list[go.Scatter]:
    """Return the area of one standard deviation around a profile; nothing where there is no spread."""
    return charts.band(points["layer"], points[y], points[spread], mark, **options)


def noise_line(points: pl.DataFrame, y: str = "null", name: str = WHITE_NOISE, **options: Any) -> list[go.Scatter]:
    """Return the null along the layers, dashed and grey; nothing where it was not computed."""
    points = finite(points, y)
    # A line through one layer is invisible.
    mode = "lines" if points.height > 1 else "markers"
    trace = profile_line(points, name, GAUSSIAN_NULL, y, mode=mode, **options)
    return [] if points.is_empty() else [trace]


def condition_name(condition: str, points: pl.DataFrame) -> str:
    """Return the legend of a condition, with the number of draws where the line is their mean."""
    draws = points["n_draws"].to_numpy().max(initial=1)
    return f"{condition} ({draws} draws)" if draws > 1 else condition


def layer_profile(rows: pl.DataFrame, metric: str, *, top: float | None = None) -> go.Figure:
    """Draw a count by layer for every condition beside white noise and the numerical rank; below, as a share of noise.

    `rows` are the raw, centred rows of one model and text. `top` fixes the end of the y axis, to compare texts.
    """
    profiles = {name: profile(rows, metric, name) for name in conditions(rows)}
    real = profiles.get("real", profile(rows, metric))
    fig = _panels(rows, axis_label(metric), top)
    fig.add_traces(noise_line(real))
    for condition, points in reversed(profiles.items()):
        mark = CONDITION_MARKS[condition]
        fig.add_traces([*profile_band(points, mark), profile_line(points, condition_name(condition, points), mark)])
    fig.add_traces(list(_ranks(rows)))
    _relative_panel(fig, profiles)
    return fig


def _panels(rows: pl.DataFrame, upper: str, top: float | None = None, height: int = 520) -> go.Figure:
    sites = rows.select("layer", "site").iter_rows()
    axis_range = {"range": [0, top * 1.04]} if top else {}
    return figure(
        height,
        xaxis={**layer_axis(sites), "anchor": "y2"},
        yaxis={"title": {"text": upper}, "rangemode": "tozero", "domain": UPPER, **axis_range},
        yaxis2={"rangemode": "tozero", "domain": LOWER, "nticks": 4},
        legend={"traceorder": "reversed"},
    )


def _relative_panel(fig: go.Figure, profiles: Mapping[str, pl.DataFrame]) -> None:
    """Draw real and shuffled as a share of white noise; of the numerical rank where there is no noise."""
    real = profiles.get("real")
    column = "share_of_null" if real is not None and real["share_of_null"].is_not_null().any() else "share_of_rank"
    reference = WHITE_NOISE if column == "share_of_null" else "rank"
    tops = (float(finite(points, column)[column].to_numpy().max(initial=1.0)) for points in profiles.values())
    title = {"text": f"% of {reference.removeprefix('white ')}"}
    fig.update_layout(yaxis2={"title": title, "tickformat": ".0%", "range": [0, 1.08 * max(tops, default=1.0)]})
    for condition in ("shuffled", "real"):
        points, mark = profiles.get(condition), CONDITION_MARKS[condition]
        if points is not None and points[column].is_not_null().any():
            shown = {"yaxis": "y2", "showlegend": False}
            hover = f"{condition}: %{{y:.1%}} of {reference}<extra>%{{customdata}}</extra>"
            fig.add_traces(profile_band(points, mark, column, f"{column}_spread", yaxis="y2"))
            fig.add_trace(profile_line(points, condition, mark, column, **shown).update(hovertemplate=hover))


def _ranks(rows: pl.DataFrame) -> Iterable[go.Scatter]:
    """Draw the numerical rank of real text, and of another condition only where it differs."""
    real = profile(rows, NUMERICAL_RANK)
    for condition in reversed(conditions(rows)):
        points = profile(rows, NUMERICAL_RANK, condition)
        same = points.select("layer", "value").equals(real.select("layer", "value"))
        if points.is_empty() or (same and condition != "real"):
            continue
        mark = CONDITION_MARKS[condition]
        name = NUMERICAL_RANK if condition == "real" else f"{NUMERICAL_RANK}, {condition}"
        thin = {"color": mark.colour, "dash": "dot", "width": 1.5}
        mode = "lines" if points.height > 1 else "markers"
        yield profile_line(points, name, mark, mode=mode).update(
            line=thin, marker={"symbol": "line-ew-open", "size": 14}
        )


def preprocessings(rows: pl.DataFrame, metric: str) -> go.Figure:
    """Draw a metric by layer once per preprocessing; `rows` are the centred ones of one model, text and condition."""
    names = rows["preprocess"].unique(maintain_order=True).to_list()
    groups = {name: profile(rows.filter(pl.col("preprocess") == name), metric) for name in names}
    return _series(rows, groups, metric)


def texts_profile(rows: pl.DataFrame, metric: str) -> go.Figure:
    """Draw a metric of real text by layer once per text; `rows` are the raw, centred ones of one model."""
    names = rows["text"].unique(maintain_order=True).to_list()
    return _series(rows, {name: profile(rows.filter(pl.col("text") == name), metric) for name in names}, metric)


def _series(rows: pl.DataFrame, groups: Mapping[str, pl.DataFrame], metric: str) -> go.Figure:
    sites = rows.select("layer", "site").iter_rows()
    axis = {"title": {"text": axis_label(metric)}, "rangemode": "tozero"}
    fig = figure(400, xaxis=layer_axis(sites), yaxis=axis)
    marked = [(name, points, series_mark(i)) for i, (name, points) in enumerate(groups.items())]
    # The first is drawn last, on top of the others; the legend reads from the first on.
    fig.add_traces(
        [profile_line(points, name, mark) for name, points, mark in reversed(marked) if not points.is_empty()]
    )
    return fig.update_layout(legend={"traceorder": "reversed"})


def models_profile(rows: pl.DataFrame, metric: str) -> go.Figure:
    """Draw a count as a share of each model's own width over relative depth: 0 the embeddings, 1 the last block."""
    fig = figure(
        400,
        xaxis={"title": {"text": "relative depth<br>(0: embeddings, 1: last block)"}, "range": [-0.03, 1.03]},
        yaxis={
            "title": {"text": axis_label(metric).replace("components", "share of dimensions")},
            "tickformat": ".0%",
            "rangemode": "tozero",
        },
        legend={"traceorder": "reversed"},
    )
    names = rows["model"].unique(maintain_order=True).to_list()
    for i, name in reversed(list(enumerate(names))):
        points = profile(rows.filter((pl.col("model") == name) & (pl.col("site") != NORM)), metric)
        if not points.is_empty():
            depth = points["layer"] / max(int(points["layer"].to_numpy().max()), 1)
            trace = profile_line(points, f"{name} (d = {points['dim'][0]:,})", series_mark(i), "share_of_dim")
            fig.add_trace(trace.update(x=depth.to_numpy()))
    return fig.update_traces(hovertemplate="%{customdata}: %{y:.1%} of d<extra>%{fullData.name}</extra>")


def intrinsic_profile(rows: pl.DataFrame, metric: str = TWO_NN) -> go.Figure:
    """Draw an intrinsic dimension by layer and condition; the bars are standard errors, the band is over the draws."""
    sites = rows.select("layer", "site").iter_rows()
    chosen = finite(rows.filter(pl.col("metric") == metric))
    nulls = (*finite(chosen, "null")["null"], *finite(chosen, "gaussian")["gaussian"])
    ends = [float(v) for v in (*chosen["value"], *nulls) if v > 0]
    # White noise is so far above the layers that a linear axis would show them as one line.
    ticks = log_ticks(min(ends), max(ends)) if ends else None
    axis = {"title": {"text": "intrinsic dimension (TwoNN)"}, "type": "log", "tickvals": ticks, "rangemode": "tozero"}
    fig = figure(400, xaxis=layer_axis(sites), yaxis=axis, legend={"traceorder": "reversed"})
    real = profile(rows, metric)
    fig.add_traces(noise_line(real))
    if (gaussian := finite(real, "gaussian")).height:
        fig.add_trace(profile_line(gaussian, GAUSSIAN_STATES, SURROGATE, "gaussian"))
    _add_conditions(fig, rows, metric)
    return fig


def _add_conditions(fig: go.Figure, rows: pl.DataFrame, metric: str) -> None:
    """Add the profile of each condition, with its standard errors, or a band over the draws."""
    for condition in reversed(conditions(rows)):
        points, mark = profile(rows, metric, condition), CONDITION_MARKS[condition]
        if points.is_empty():
            continue
        trace = profile_line(points, condition_name(condition, points), mark)
        if points["spread"].is_null().all() and points["stderr"].is_not_null().any():
            trace.error_y = {"array": points["stderr"].to_numpy(), "thickness": 1.5, "width": 3}
        fig.add_traces([*profile_band(points, mark), trace])


def shares_profile(rows: pl.DataFrame, metric: str, title: str) -> go.Figure:
    """Draw a share by layer and condition; the bars are standard errors, the band is over the draws."""
    sites = rows.select("layer", "site").iter_rows()
    axis = {"title": {"text": title.replace(" between", "<br>between")}, "tickformat": ".0%", "range": [0, 1.04]}
    fig = figure(400, xaxis=layer_axis(sites), yaxis=axis, legend={"traceorder": "reversed"})
    _add_conditions(fig, rows, metric)
    return fig


def alignment(pairs: pl.DataFrame) -> go.Figure:
    """Draw how similar a layer is on real text and otherwise: CKA above, overlap of the leading components below.

    Both are beside their nulls: CKA beside two standard deviations around 0, which randomly paired tokens give. `pairs` are
    rows of the similarity table of one model and text, one per layer and other condition.
    """
    fig = _panels(pairs, "CKA")
    margins = 2 * pairs["cka_null_sd"].to_numpy()
    lowest = min(float(pairs["cka"].fill_null(0.0).to_numpy().min()), float(-margins.max()))
    # The markers of CKA near 0 need a margin below it.
    fig.update_layout(yaxis={"range": [min(-0.04, 1.1 * lowest), 1.04]})
    has_overlap = pairs["overlap"].is_not_null().any()
    if not has_overlap:
        fig.update_layout(height=380, yaxis={"domain": [0, 1]}, xaxis={"anchor": "y"})
    else:
        k = int(pairs["k"].to_numpy().max())
        title = {"text": f"overlap of<br>first {k}"}
        fig.update_layout(yaxis2={"title": title, "range": [0, 1.04]})
        fig.add_traces(noise_line(_nulls(pairs), "overlap_null", "overlap by chance (k/d)", yaxis="y2"))
    fig.add_traces(_chance_band(_nulls(pairs)))
    for condition in [name for name in reversed(CONDITION_MARKS) if name in set(pairs["other_condition"])]:
        points, mark = pairs.filter(pl.col("other_condition") == condition).sort("layer"), CONDITION_MARKS[condition]
        fig.add_trace(_cka_line(finite(points, "cka"), f"real and {condition}", mark))
        if has_overlap:
            fig.add_trace(
                profile_line(finite(points, "overlap"), condition, mark, "overlap", yaxis="y2", showlegend=False)
            )
    return fig


def _cka_line(points: pl.DataFrame, name: str, mark: Mark) -> go.Scatter:
    hover = f"{name}: %{{y:.4~g}} (by chance 0 ± %{{customdata[1]:.2~g}})<extra>%{{customdata[0]}}</extra>"
    return profile_line(
        points, name, mark, "cka", customdata=points.select("site", "cka_null_sd").rows(), hovertemplate=hover
    )


def _chance_band(points: pl.DataFrame) -> list[go.Scatter]:
    chance = points.with_columns(cka=pl.lit(0.0), margin=2 * pl.col("cka_null_sd"))
    looks = {"showlegend": True, "fillcolor": tint(GAUSSIAN_NULL.colour, 0.5)}
    return profile_band(chance, GAUSSIAN_NULL, "cka", "margin", name="CKA by chance (0 ± 2 sd)", **looks)


def _nulls(pairs: pl.DataFrame) -> pl.DataFrame:
    return pairs.unique("layer", keep="first").sort("layer")


def highest(frames: Sequence[pl.DataFrame], metric: str) -> float:
    """Return the largest value that a profile of these frames reaches, its null and rank included: a common y axis."""
    tops = [0.0]
    for rows in frames:
        chosen = finite(rows.filter(pl.col("metric").is_in([metric, NUMERICAL_RANK])))
        nulls = finite(chosen.filter(pl.col("metric") == metric), "null")
        tops += [float(chosen["value"].to_numpy().max(initial=0)), float(nulls["null"].to_numpy().max(initial=0))]
    return max(tops)
