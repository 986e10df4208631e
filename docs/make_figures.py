"""Draws the figures of the README and the docs from a finished report.

dimscope report builtin --with embedding layers damage -o report && python docs/make_figures.py report       (needs the `export` extra)
"""

import sys
from pathlib import Path

import polars as pl

from dimscope.report import figures, theme
from dimscope.report.curves import damages

folder = Path(sys.argv[1])
spectrum = pl.read_parquet(folder / "tables/spectrum.parquet").filter(preprocess="centred")
dimensions = pl.read_parquet(folder / "tables/dimensions.parquet").filter(preprocess="centred")
layers = pl.read_parquet(folder / "tables/layers.parquet").filter(preprocess="raw", centred=True, text="builtin prose")
damage = damages(pl.read_parquet(folder / "tables/damage.parquet"))[0]
images = Path(__file__).parent / "images"
images.mkdir(exist_ok=True)
for name, figure, title in (
    ("spectrum", figures.spectrum(spectrum), "Directions of the built-in model's table, widest first, beside chance"),
    (
        "dimensions",
        figures.dimensions(dimensions, len(spectrum)),
        "Ten ways to count its dimensions, each beside two nulls",
    ),
    (
        "layers",
        figures.layer_profile(layers, "variance count 95%"),
        "The built-in model fills half to three quarters of the dimensions that noise would",
    ),
    ("damage", figures.damage_by_kept(damage), "Truncation does the least damage to the built-in model"),
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
