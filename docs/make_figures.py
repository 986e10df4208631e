"""Draws the figures of the README and the docs from a finished report.

dimscope report builtin --studies embedding layers damage narrowing -o report
python docs/make_figures.py report                                              (needs the `export` extra)
"""

import json
import sys
from pathlib import Path

import plotly.graph_objects as go
import polars as pl

from dimscope.geometry.metrics import CHANCE_EDGE
from dimscope.page import theme
from dimscope.studies.damage import figures as damage_figures
from dimscope.studies.damage.losses import all_losses
from dimscope.studies.embedding import spectrum_figures
from dimscope.studies.layers import figures as layers_figures
from dimscope.studies.narrowing import figures as narrowing_figures

folder = Path(sys.argv[1])
spectrum = pl.read_parquet(folder / "tables/spectrum.parquet").filter(preprocess="centred", rows="trained")
dimensions = pl.read_parquet(folder / "tables/dimensions.parquet").filter(preprocess="centred", rows="trained")
measures = pl.read_parquet(folder / "tables/measures.parquet").filter(rows="trained")
layers = pl.read_parquet(folder / "tables/layers.parquet").filter(preprocess="raw", centred=True, text="builtin prose")
damage = all_losses(*(pl.read_parquet(folder / f"tables/{name}.parquet") for name in ("damage", "windows")))[0]
plan = pl.read_parquet(folder / "tables/plan.parquet")
measured = json.loads((Path(__file__).parents[1] / "benchmarks/results/narrowing.json").read_text())["quality"][
    "builtin"
]


def learning_curves(curves: list[dict]) -> go.Figure:
    """Draw the held-out KL by the steps of a learned basis, one line for each width and seed."""
    figure = theme.figure(
        440,
        xaxis={"title": {"text": "steps of 16 x 160 tokens"}},
        yaxis={"title": {"text": "held-out KL to the dense model (nats)"}, "rangemode": "tozero"},
    )
    widths = sorted({curve["width"] for curve in curves}, reverse=True)
    for curve in curves:
        mark, first = theme.series_mark(widths.index(curve["width"])), curve["seed"] == 0
        steps, values = zip(*curve["points"], strict=True)
        figure.add_trace(
            go.Scatter(
                x=steps, y=values, name=f"width {curve['width']}", mode="lines+markers", showlegend=first,
                line={"color": mark.colour, "dash": mark.dash}, marker={"color": mark.colour, "symbol": mark.symbol},
            )
        )  # fmt: skip
    return figure


images = Path(__file__).parent / "images"
images.mkdir(exist_ok=True)
for name, figure, title in (
    (
        "spectrum",
        spectrum_figures.spectrum(spectrum, edge=measures.filter(metric=CHANCE_EDGE)["value"].item()),
        "Directions of the built-in model's trained rows, widest first, beside chance",
    ),
    (
        "dimensions",
        spectrum_figures.dimensions(dimensions, len(spectrum)),
        "Ten ways to count the dimensions of the trained rows, each beside two nulls",
    ),
    (
        "layers",
        layers_figures.layer_profile(layers, "variance count 95%"),
        "The built-in model fills half to three quarters of the dimensions that noise would",
    ),
    (
        "damage",
        damage_figures.damage_by_kept(damage),
        "What the built-in model loses by the share of dimensions kept, with 95% intervals",
    ),
    (
        "narrowing",
        narrowing_figures.narrowing_plan(plan, "parameters"),
        "Narrowing the built-in model costs less than leaving out layers, if the directions are well chosen",
    ),
    (
        "narrowing-learning",
        learning_curves(measured["curves"]),
        "A learned basis halves the KL within forty steps (three seeds each)",
    ),
):
    figure.update_layout(
        template=theme.template("light"),
        title=title,
        title_x=0.02,
        title_xanchor="left",
        margin_t=90,
        paper_bgcolor="white",
        plot_bgcolor="white",
    )
    figure.write_image(images / f"{name}.png", width=900, height=max(440, figure.layout.height), scale=2)
