"""Figures about damage: KL by dimensions kept, by strength and by error; errors by their closed form; the operator."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from dimscope.evaluation.yardstick import MARKS, TOLERANCE
from dimscope.page.charts import interval_band, line
from dimscope.page.section import finite
from dimscope.page.theme import GAUSSIAN_NULL, MEASURED, figure, log_ticks, tint
from dimscope.studies.damage.curves import kind_mark
from dimscope.studies.damage.losses import Losses
from dimscope.studies.damage.tables import RELATIVE

UPPER, LOWER = (0.42, 1.0), (0.0, 0.32)
LEAST_KL = 1e-4  # nats; rounding to bfloat16 changes a model by as much
UNIT_AXES = {
    "standard deviations": "strength (sd of the table's entries)",
    "factor": "factor of all rows",
    "bits": "bits of an entry",
}


def _line(points: pl.DataFrame, x: str, kind: str, hover: str, **options: Any) -> go.Scatter:
    hover = f"{kind} %{{customdata:,.4~g}}: {hover}<extra></extra>"
    strengths = points["strength"].to_numpy()
    return line(points[x], points["value"], kind, kind_mark(kind), customdata=strengths, hovertemplate=hover, **options)


def _curve(points: pl.DataFrame, x: str, kind: str, hover: str, **options: Any) -> list[go.Scatter]:
    """Return the line of a kind, above the band of its 95% intervals."""
    axes = {name: value for name, value in options.items() if name == "yaxis"}
    intervals = interval_band(points[x], points["low"], points["high"], kind_mark(kind), **axes)
    return [*intervals, _line(points, x, kind, hover, **options)]


def _kl(losses: Losses, kind: str) -> pl.DataFrame:
    """Return the KL after the changes of a kind for a logarithmic axis: what is lower is drawn at its end."""
    return losses.curve("kl", kind).with_columns(pl.col("value", "low", "high").clip(lower_bound=LEAST_KL))


def _kl_axis(curves: Iterable[pl.DataFrame]) -> dict[str, Any]:
    """Return the logarithmic axis of the KL, on which the tolerance of the yardstick always is."""
    values = [value for points in curves for name in ("value", "low", "high") for value in points[name].drop_nulls()]
    low, high = min([*values, TOLERANCE.kl]) / 1.5, max([*values, TOLERANCE.kl]) * 1.5
    ticks = [tick for tick in log_ticks(low, high) if low <= tick <= high]
    return {
        "title": {"text": "KL (nats)"}, "type": "log", "range": [math.log10(low), math.log10(high)], "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }  # fmt: skip


def _marks(fig: go.Figure, start: float, end: float, *, right: bool = False) -> list[go.Scatter]:
    """Return a line for each mark of the yardstick on the axis of the KL, with its name at the left or the right end."""
    low, high = (10**edge for edge in fig.layout.yaxis.range)
    return [
        go.Scatter(
            x=[start, end], y=[mark.kl, mark.kl], name=mark.name, mode="lines+text", hoverinfo="skip", showlegend=False,
            text=["", mark.name.split("to ")[1]] if right else [mark.name.split("to ")[1], ""], textposition=["top right", "top left"],
            textfont={"size": 11, "color": GAUSSIAN_NULL.colour},
            line={"color": GAUSSIAN_NULL.colour, "dash": GAUSSIAN_NULL.dash, "width": 1.5},
        )
        for mark in MARKS
        if low < mark.kl < high
    ]  # fmt: skip


def damage_by_kept(losses: Losses) -> go.Figure:
    """Draw the KL by the share of the dimensions that are kept, and below it how often the first choice stays the same."""
    curves = {kind: _kl(losses, kind) for kind in losses.kept_kinds()}
    start = max(0.0, min([1.0, *(share for points in curves.values() for share in points["kept_share"])]) - 0.04)
    fig = figure(
        520,
        xaxis={
            "title": {"text": "share of the dimensions kept"}, "tickformat": ".0%", "range": [start, 1.02], "anchor": "y2",
        },
        yaxis=_kl_axis(curves.values()) | {"domain": UPPER},
        yaxis2={
            "title": {"text": "same first<br>choice"}, "tickformat": ".0%", "range": [0, 1.06], "domain": LOWER, "nticks": 4,
        },
    )  # fmt: skip
    fig.add_traces(_marks(fig, start, 1.02))
    for kind, points in curves.items():
        fig.add_traces(_curve(points, "kept_share", kind, "KL %{y:.3g}, %{x:.1%} kept"))
    for kind in curves:
        hover = "the same first choice at %{y:.0%} of positions"
        fig.add_traces(_curve(losses.curve("top_1", kind), "kept_share", kind, hover, showlegend=False, yaxis="y2"))
    return fig


def damage_by_strength(losses: Losses, kinds: list[str], unit: str) -> go.Figure:
    """Draw the KL by the strength of kinds that keep all dimensions, on logarithmic axes."""
    curves = {kind: _kl(losses, kind).filter(pl.col("strength") > 0) for kind in kinds}
    strengths = [strength for points in curves.values() for strength in points["strength"]] or [1.0]
    first, last = min(strengths), max(strengths)
    ticks = [tick for tick in log_ticks(first, last) if first <= tick <= last]
    low, high = first / 1.2, last * 1.2
    fig = figure(
        400,
        xaxis={
            "title": {"text": UNIT_AXES[unit]}, "type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks],
            "range": [math.log10(low), math.log10(high)],
        },
        yaxis=_kl_axis(curves.values()),
    )  # fmt: skip
    fig.add_traces(_marks(fig, low, high, right=True))
    for kind, points in curves.items():
        if unit == "factor":  # growing and shrinking: the KL is 0 between them
            fig.add_trace(_line(points, "strength", kind, "KL %{y:.3g}", mode="markers"))
            continue
        fig.add_traces(_curve(points, "strength", kind, "KL %{y:.3g}"))
    return fig


def damage_by_error(losses: Losses) -> go.Figure:
    """Draw the KL by the relative error of the table, one line per kind: equal errors are not equal damage."""
    curves = {kind: _kl(losses, kind).drop_nulls("error").sort("error") for kind in losses.kinds()}
    # A few huge errors would squeeze the others into a corner.
    furthest = min(3.0, max((float(c["error"].to_numpy().max(initial=0.0)) for c in curves.values()), default=1.0))
    shown = {
        kind: points.filter((pl.col("error") <= furthest) & (pl.col("error") > 0)) for kind, points in curves.items()
    }
    fig = figure(
        440,
        xaxis={"title": {"text": "relative error of the table, ‖W − W′‖ / ‖W‖"}, "range": [0, furthest * 1.03]},
        yaxis=_kl_axis(shown.values()),
    )
    fig.add_traces(_marks(fig, 0, furthest * 1.03, right=True))
    hover = "error %{x:.3f}, KL %{y:.3g}"
    for kind, points in shown.items():
        if kind == "scale":  # growing and shrinking make equal errors: no line from one to the other
            fig.add_trace(_line(points, "error", kind, hover, mode="markers"))
            continue
        fig.add_traces(_curve(points, "error", kind, hover))
    return fig


def closed_form(damage: pl.DataFrame) -> go.Figure:
    """Draw every measured relative error against its closed form; the diagonal is agreement."""
    rows = finite(finite(damage.filter(pl.col("metric") == RELATIVE)), "null").filter(pl.col("null") > 0)
    ends = np.concatenate([rows["null"].to_numpy(), rows["value"].to_numpy()])
    ends = ends[ends > 0]
    low, high = float(ends.min(initial=1.0)) / 1.3, float(ends.max(initial=1.0)) * 1.3
    ticks = [tick for tick in log_ticks(low, high) if low <= tick <= high]
    labels = [f"{tick:g}" for tick in ticks]
    axis = {"type": "log", "range": [math.log10(low), math.log10(high)], "tickvals": ticks, "ticktext": labels}
    fig = figure(
        440,
        xaxis={"title": {"text": "relative error by the closed form"}, **axis},
        yaxis={"title": {"text": "relative error measured"}, **axis},
    )
    diagonal = {"color": GAUSSIAN_NULL.colour, "dash": "dash", "width": 1.5}
    fig.add_trace(go.Scatter(x=[low, high], y=[low, high], mode="lines", line=diagonal, name="equal", hoverinfo="skip"))
    for (kind,), points in rows.group_by("kind", maintain_order=True):
        mark = kind_mark(str(kind))
        fig.add_trace(
            go.Scatter(
                x=points["null"].to_numpy(), y=points["value"].to_numpy(), mode="markers", name=str(kind),
                marker={"color": mark.colour, "symbol": mark.symbol, "size": 9, "opacity": 0.75},
                customdata=points["change"].to_list(),
                hovertemplate="%{customdata}: expected %{x:.4f}, measured %{y:.4f}<extra></extra>",
            )
        )  # fmt: skip
    return fig


def operator_block(entries: pl.DataFrame, sd: float) -> go.Figure:
    """Draw the top left of a projection as a picture; colours end at four standard deviations of what is off the diagonal."""
    side = int(entries["row"].to_numpy().max(initial=0)) + 1
    matrix = entries.sort("row", "column")["value"].to_numpy().reshape(side, side)
    reach = 4 * sd or 1.0
    fig = figure(
        440,
        xaxis={"title": {"text": "dimension"}, "constrain": "domain", "showgrid": False},
        yaxis={
            "title": {"text": "dimension"}, "autorange": "reversed", "scaleanchor": "x", "constrain": "domain",
            "showgrid": False,
        },
        coloraxis={"cmin": -reach, "cmax": reach, "autocolorscale": True, "colorbar": {"title": {"text": "entry"}}},
    )  # fmt: skip
    hover = "row %{y}, column %{x}: %{z:.4f}<extra></extra>"
    fig.add_trace(go.Heatmap(z=matrix, coloraxis="coloraxis", hovertemplate=hover))
    return fig


def operator_histogram(bins: pl.DataFrame) -> go.Figure:
    """Draw the entries off the diagonal as a histogram beside the normal curve that theory expects."""
    middle, density = bins["middle"].to_numpy(), bins["density"].to_numpy()
    fig = figure(
        400,
        xaxis={"title": {"text": f"entry / expected sd ({bins['sd'][0]:.3g})"}},
        yaxis={"title": {"text": "density"}, "rangemode": "tozero"},
    )
    fig.add_trace(
        go.Scatter(
            x=middle, y=density, name="measured", mode="lines", line={"color": MEASURED.colour, "shape": "hvh", "width": 2},
            fill="tozeroy", fillcolor=tint(MEASURED.colour, 0.25), hovertemplate="%{x:.2f}: %{y:.3f}<extra></extra>",
        )
    )  # fmt: skip
    normal = np.exp(-(middle**2) / 2) / math.sqrt(2 * math.pi)
    null = GAUSSIAN_NULL
    fig.add_trace(
        go.Scatter(
            x=middle, y=normal, name="normal", mode="lines", line={"color": null.colour, "dash": null.dash, "width": 2}
        )
    )
    return fig
