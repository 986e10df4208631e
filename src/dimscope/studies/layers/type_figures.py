"""Figures about the parts of the variance that are between token types and within them."""

import plotly.graph_objects as go
import polars as pl

from dimscope.page import charts
from dimscope.page.theme import Mark, figure, log_ticks, series_mark
from dimscope.studies.layers.state_figures import FIRST, FLOOR
from dimscope.studies.layers.state_measures import TYPE_MEANS, WITHIN_TYPES

PARTS = {TYPE_MEANS: "vocabulary (between tokens)", WITHIN_TYPES: "context (within tokens)"}


def type_scree(spectra: pl.DataFrame, layer: int) -> go.Figure:
    """Draw the variance of the first components of both parts, as a share of that of all states, of one layer at a time.

    `spectra` are rows of the table of type spectra of one model and text; the figure has every layer and shows `layer`.
    """
    shown = spectra.filter((pl.col("index") <= FIRST) & (pl.col("share") >= FLOOR))
    ends = shown["share"].to_numpy()
    ticks = log_ticks(float(ends.min()), float(ends.max())) if len(ends) else None
    fig = figure(
        400,
        xaxis={"title": {"text": "component, the widest of its part first"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "share of the variance"}, "tickformat": "~%", "type": "log", "tickvals": ticks},
    )
    marks: dict[str, Mark] = {part: series_mark(i) for i, part in enumerate(PARTS)}
    for (number,), of_layer in shown.group_by("layer", maintain_order=True):
        for part, name in PARTS.items():
            points = of_layer.filter(pl.col("part") == part).sort("index")
            if points.is_empty():
                continue
            meta, hover = {"layer": int(str(number))}, f"{name}, component %{{x}}: %{{y:.2~%}}<extra></extra>"
            fig.add_trace(
                charts.line(
                    points["index"], points["share"], name, marks[part], markers=False, visible=number == layer, meta=meta,
                    hovertemplate=hover,
                )
            )  # fmt: skip
    return fig
