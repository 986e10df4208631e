"""Figures about damage: loss by dimensions kept, by strength and by error; errors by their closed form; the operator."""

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from dimscope.page.charts import band, line
from dimscope.page.section import finite
from dimscope.page.theme import GAUSSIAN_NULL, MEASURED, figure, log_ticks, tint
from dimscope.studies.damage.curves import Damage, kind_mark
from dimscope.studies.damage.plan import UNDAMAGED
from dimscope.studies.damage.tables import LOSS, RELATIVE, TOP_1

UPPER, LOWER = (0.42, 1.0), (0.0, 0.32)
UNIT_AXES = {
    "standard deviations": "strength (sd of the table's entries)",
    "factor": "factor of all rows",
    "bits": "bits of an entry",
}


def _line(points: pl.DataFrame, x: str, kind: str, hover: str, **options: Any) -> go.Scatter:
    hover = f"{kind} %{{customdata:,.4~g}}: {hover}<extra></extra>"
    strengths = points["strength"].to_numpy()
    return line(points[x], points["value"], kind, kind_mark(kind), customdata=strengths, hovertemplate=hover, **options)


def _band(points: pl.DataFrame, x: str, kind: str, **options: Any) -> list[go.Scatter]:
    """Return one standard deviation over the seeds around a curve; nothing where there is one seed."""
    return band(points[x], points["value"], points["spread"], kind_mark(kind), **options)


def _curve(points: pl.DataFrame, x: str, kind: str, hover: str, **options: Any) -> list[go.Scatter]:
    """Return the line of a kind, above its band."""
    axes = {name: value for name, value in options.items() if name == "yaxis"}
    return [*_band(points, x, kind, **axes), _line(points, x, kind, hover, **options)]


def _base_line(low: float, high: float, base: float, **options: Any) -> go.Scatter:
    return go.Scatter(
        x=[low, high], y=[base, base], name=UNDAMAGED, mode="lines", hoverinfo="skip",
        line={"color": GAUSSIAN_NULL.colour, "dash": GAUSSIAN_NULL.dash, "width": 1.5}, **options,
    )  # fmt: skip


def damage_by_kept(damage: Damage) -> go.Figure:
    """Draw the loss by the share of the dimensions that are kept, and below it how often the first choice stays the same."""
    kinds = damage.kept_kinds()
    shares = [float(damage.curve(LOSS, kind)["kept_share"].to_numpy().min(initial=1.0)) for kind in kinds]
    start = max(0.0, min(shares, default=0.0) - 0.04)
    fig = _loss_above_agreement(start)
    if damage.base is not None:
        fig.add_trace(_base_line(start, 1.02, damage.base))
    for kind in kinds:
        fig.add_traces(_curve(damage.curve(LOSS, kind), "kept_share", kind, "loss %{y:.3f}, %{x:.1%} kept"))
    for kind in kinds:
        hover = "the same first choice at %{y:.0%} of positions"
        fig.add_traces(_curve(damage.curve(TOP_1, kind), "kept_share", kind, hover, showlegend=False, yaxis="y2"))
    return fig


def _loss_above_agreement(start: float) -> go.Figure:
    """Return the empty figure of two panels over the share of dimensions kept."""
    loss = {"title": {"text": "loss (nats per token)"}, "domain": UPPER}
    agreement = {
        "title": {"text": "same first<br>choice"}, "tickformat": ".0%", "range": [0, 1.06], "domain": LOWER, "nticks": 4,
    }  # fmt: skip
    shares = {"tickformat": ".0%", "range": [start, 1.02], "anchor": "y2"}
    return figure(
        520, xaxis={"title": {"text": "share of the dimensions kept"}, **shares}, yaxis=loss, yaxis2=agreement
    )


def _with_base(damage: Damage, points: pl.DataFrame, unit: str) -> pl.DataFrame:
    """Return the points of scaling with the undamaged model at a factor of 1."""
    if unit != "factor" or damage.base is None or points.filter(pl.col("strength") == 1).height:
        return points
    own = {"strength": 1.0, "kept_share": None, "value": damage.base, "spread": None, "n_seeds": 1, "error": 0.0}
    return pl.concat([points, pl.DataFrame([own], schema=points.schema)]).sort("strength")


def damage_by_strength(damage: Damage, kinds: list[str], unit: str) -> go.Figure:
    """Draw the loss by the strength of kinds that keep all dimensions, on a logarithmic axis."""
    curves = {kind: _with_base(damage, damage.curve(LOSS, kind), unit).filter(pl.col("strength") > 0) for kind in kinds}
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
        yaxis={"title": {"text": "loss (nats per token)"}},
    )  # fmt: skip
    if damage.base is not None:
        fig.add_trace(_base_line(low, high, damage.base))
    for kind, points in curves.items():
        fig.add_traces(_curve(points, "strength", kind, "loss %{y:.3f}"))
    return fig


def damage_by_error(damage: Damage) -> go.Figure:
    """Draw the loss by the relative error of the table, one line per kind: equal errors are not equal damage."""
    fig = figure(
        440,
        xaxis={"title": {"text": "relative error of the table, ‖W − W′‖ / ‖W‖"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "loss (nats per token)"}},
    )
    curves = {kind: damage.curve(LOSS, kind).drop_nulls("error").sort("error") for kind in damage.kinds()}
    # A few huge errors would squeeze the others into a corner.
    furthest = min(3.0, max((float(c["error"].to_numpy().max(initial=0.0)) for c in curves.values()), default=1.0))
    if damage.base is not None:
        fig.add_trace(_base_line(0, furthest, damage.base))
    hover = "error %{x:.3f}, loss %{y:.3f}"
    for kind, points in curves.items():
        shown = points.filter(pl.col("error") <= furthest)
        if kind == "scale":  # growing and shrinking make equal errors: no line from one to the other
            fig.add_trace(_line(shown, "error", kind, hover, mode="markers"))
            continue
        fig.add_traces(_curve(shown, "error", kind, hover))
    fig.update_xaxes(range=[0, furthest * 1.03])
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
