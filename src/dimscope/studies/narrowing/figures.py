"""Figures about narrowing: what every candidate costs against what it saves."""

import math

import plotly.graph_objects as go
import polars as pl

from dimscope.page.section import finite
from dimscope.page.theme import GAUSSIAN_NULL, Mark, basis_mark, figure, log_ticks
from dimscope.page.wording import count
from dimscope.studies.narrowing.advice import DENSE, DROP, HEALED, NARROW

LEAST_KL = 1e-4  # nats; rounding to bfloat16 changes a model by as much


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
    rows = finite(plan.with_columns(pl.col("parameters") / dense).drop_nulls(x), "kl")
    drawn = rows.filter(pl.col("method").is_in([NARROW, HEALED, DROP]))
    values = drawn["kl"].clip(LEAST_KL).to_list() or [0.01, 1.0]
    low, high = min(values) / 1.5, max(values) * 1.5
    inside = [tick for tick in log_ticks(low, high) if low <= tick <= high]
    ticks = inside if len(inside) > 1 else [low * 1.2, high / 1.2]  # a short range between two round numbers
    positions = [*drawn[x].to_list(), 1.0]
    if x == "parameters":
        axis = {"title": {"text": "parameters, share of the dense model's"}, "tickformat": ".0%"}
        axis["range"] = [max(positions) + (0.03 if max(positions) > 1 else 0), min(positions) - 0.03]
    else:
        axis = {"title": {"text": "reading speed, relative to the dense model's"}, "ticksuffix": "×"}
    fig = figure(
        440, xaxis=axis,
        yaxis={
            "title": {"text": "KL to the dense model (nats)"}, "type": "log", "tickvals": ticks,
            "ticktext": [f"{t:.2g}" for t in ticks], "range": [math.log10(low), math.log10(high)],
        },
    )  # fmt: skip
    narrow = rows.filter(pl.col("method") == NARROW)
    for (basis,), own in narrow.sort("width", descending=True).group_by("basis", maintain_order=True):
        labels = [f"width {w}, {p:.0%} of the parameters" for w, p in own.select("width", "parameters").iter_rows()]
        fig.add_trace(_points(own, x, str(basis), basis_mark(str(basis)), labels))
    dropped = rows.filter(pl.col("method") == DROP).sort("layers", descending=True)
    labels = [
        f"{count(n, 'layer')}, {p:.0%} of the parameters" for n, p in dropped.select("layers", "parameters").iter_rows()
    ]
    fig.add_trace(_points(dropped, x, DROP, GAUSSIAN_NULL, labels))
    for row in rows.filter(pl.col("method") == HEALED).partition_by("width"):
        basis = str(row["basis"][0])
        mark = Mark(basis_mark(basis).colour, "star")
        fig.add_trace(_points(row, x, f"{basis}, healed", mark, [f"width {row['width'][0]}, healed"], line=False))
    return fig
