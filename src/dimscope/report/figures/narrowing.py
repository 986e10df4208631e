"""Figures about narrowing: what every candidate costs against what it saves."""

import math

import plotly.graph_objects as go
import polars as pl

from dimscope.report.theme import GAUSSIAN_NULL, Mark, basis_mark, figure, log_ticks
from dimscope.studies.narrowing_advice import DENSE, DROP, HEALED, NARROW

LEAST_KL = 1e-4  # below it, rounding is as large


def _points(rows: pl.DataFrame, x: str, name: str, mark: Mark, labels: list[str], *, line: bool = True) -> go.Scatter:
    return go.Scatter(
        x=rows[x].to_numpy(), y=rows["kl"].clip(LEAST_KL).to_numpy(), name=name, mode="lines+markers" if line else "markers",
        line={"color": mark.colour, "dash": mark.dash, "width": 2.5},
        marker={"color": mark.colour, "symbol": mark.symbol, "size": 10 if line else 16},
        customdata=labels, hovertemplate=f"%{{customdata}}<br>KL %{{y:.4f}} nats<extra>{name}</extra>",
    )  # fmt: skip


def narrowing_plan(plan: pl.DataFrame, x: str) -> go.Figure:
    """Draw KL against a share of the dense model's parameters ("parameters"), or against "prefill_ratio", the speed."""
    dense = plan.filter(pl.col("method") == DENSE)["parameters"][0]
    rows = plan.with_columns(pl.col("parameters") / dense).drop_nulls(x)
    drawn = rows.filter(pl.col("method").is_in([NARROW, HEALED, DROP]))["kl"].clip(LEAST_KL)
    low, high = float(drawn.to_numpy().min(initial=1.0)) / 1.5, float(drawn.to_numpy().max(initial=0.01)) * 1.5
    ticks = [tick for tick in log_ticks(low, high) if low <= tick <= high]
    share = x == "parameters"
    least = float(rows[x].to_numpy().min(initial=1.0))
    axis = (
        {"title": {"text": "parameters, of the dense model's"}, "tickformat": ".0%", "range": [1.0, least - 0.03]}
        if share
        else {"title": {"text": "reading speed, times the dense model's"}, "ticksuffix": "×"}
    )
    fig = figure(
        440, xaxis=axis,
        yaxis={
            "title": {"text": "KL to the dense model (nats)"}, "type": "log", "tickvals": ticks,
            "ticktext": [f"{t:g}" for t in ticks], "range": [math.log10(low), math.log10(high)],
        },
    )  # fmt: skip
    narrow = rows.filter(pl.col("method") == NARROW)
    for (basis,), own in narrow.group_by("basis", maintain_order=True):
        labels = [f"width {w}, {p:.0%} of the parameters" for w, p in own.select("width", "parameters").iter_rows()]
        fig.add_trace(_points(own.sort("width", descending=True), x, str(basis), basis_mark(str(basis)), labels))
    dropped = rows.filter(pl.col("method") == DROP).sort("layers", descending=True)
    labels = [f"{n} layers, {p:.0%} of the parameters" for n, p in dropped.select("layers", "parameters").iter_rows()]
    fig.add_trace(_points(dropped, x, DROP, GAUSSIAN_NULL, labels))
    for row in rows.filter(pl.col("method") == HEALED).partition_by("width"):
        basis = str(row["basis"][0])
        mark = Mark(basis_mark(basis).colour, "star")
        fig.add_trace(_points(row, x, f"{basis}, healed", mark, [f"width {row['width'][0]}, healed"], line=False))
    return fig
