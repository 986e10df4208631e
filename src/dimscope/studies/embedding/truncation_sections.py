"""The section about fewer dimensions: what truncation and PCA keep of neighbours and similarities, size by size."""

import plotly.graph_objects as go
import polars as pl

from dimscope.geometry.metrics import NEIGHBOR_OVERLAP, SIMILARITY_CORRELATION
from dimscope.geometry.truncation import COORDINATES, PCA, ROTATION, TRUNCATION
from dimscope.page.charts import band, line
from dimscope.page.section import Facts, Grid, Plot, Section, Tables
from dimscope.page.theme import GAUSSIAN_NULL, HIGHLIGHT, MEASURED, PERMUTED_NULL, Mark, figure
from dimscope.page.wording import share
from dimscope.studies.embedding.truncation_answers import (
    ANSWERED,
    TARGETS,
    Difference,
    Needed,
    answer,
    curve,
    difference,
    needed,
    truncation_of,
)

MARKS: dict[str, Mark] = {
    ROTATION: GAUSSIAN_NULL,
    COORDINATES: PERMUTED_NULL,
    TRUNCATION: Mark("#d55e00", "square", "solid"),
    PCA: MEASURED,
}
"""In the order in which they are drawn: the methods that are asked for come last, on top of their baselines."""

ROWS_PER_DIMENSION = 10  # below which the components of a fit differ much from those of all rows
NAMES = {TRUNCATION: "truncation (first coordinates)"}


def truncation_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell how many dimensions keep the neighbours, by PCA and by truncation."""
    frame = truncation_of(tables)
    if frame is None:
        return None
    n, row = frame["neighbors"][0], facts.row
    overlap, ranks = "neighbours kept", "rank correlation"
    return Section(
        anchor="truncation",
        name="Fewer dimensions",
        title=answer(tables, facts.dim, row),
        findings=_findings(frame),
        blocks=(
            Plot(
                "neighbor-overlap",
                curves(frame, NEIGHBOR_OVERLAP, facts.dim, overlap),
                f"share of the {n} nearest neighbours kept in fewer dimensions",
            ),
            _grid(frame, facts.dim),
            Plot(
                "similarity-ranks",
                curves(frame, SIMILARITY_CORRELATION, facts.dim, ranks),
                "rank correlation of the cosines in fewer and in all dimensions",
            ),
        ),
        how_to_read=(
            f"Each {row} has {n} nearest neighbours by cosine in all {facts.dim:,} dimensions. The first figure shows how many "
            "of them are still among the nearest in fewer dimensions. Truncation keeps the first coordinates, as Matryoshka "
            "models are trained for. PCA keeps the leading components of the centred rows and adds the mean back. Grey is a "
            "random rotation, brown random coordinates: a method at their height has no better choice of directions than "
            "chance. The second figure compares the order of cosines with random others instead of the nearest."
        ),
        caveat=_caveat(frame, facts),
        tables=("truncation",),
    )


def curves(frame: pl.DataFrame, metric: str, dim: int, title: str) -> go.Figure:
    """Draw what every method keeps against the number of dimensions, up to all of them, with 95% intervals over queries."""
    ticks = [size for i in range(7) if (size := dim >> i) >= 1]
    least = min(0.0, float(frame.filter(metric=metric)["value"].to_numpy().min()))
    fig = figure(
        400,
        xaxis={"title": {"text": "dimensions kept"}, "type": "log", "tickvals": ticks},
        yaxis={
            "title": {"text": title},
            "range": [least - 0.02, 1.03],
            "tickformat": ".0%" if metric == NEIGHBOR_OVERLAP else "",
        },
    )
    for method, mark in MARKS.items():
        points = curve(frame, method, metric).select("size", "value", "stderr")
        points = points.vstack(pl.DataFrame({"size": [dim], "value": [1.0], "stderr": [0.0]}))
        fig.add_traces(band(points["size"], points["value"], 1.96 * points["stderr"], mark))
        hover = f"{NAMES.get(method, method)}<br>%{{x}} dimensions: %{{y:.3f}}<extra></extra>"
        fig.add_trace(line(points["size"], points["value"], NAMES.get(method, method), mark, hovertemplate=hover))
    for target in sorted({target for of, target in TARGETS if of == metric}):
        fig.add_hline(y=target, line={"color": HIGHLIGHT.colour, "width": 1, "dash": "dot"})
    return fig


def _grid(frame: pl.DataFrame, dim: int) -> Grid:
    largest = int(frame["size"].to_numpy().max())
    header = tuple(
        f"{target:.0%} of the neighbours" if metric == NEIGHBOR_OVERLAP else f"rank correlation {target:g}"
        for metric, target in TARGETS
    )
    rows = tuple(
        (NAMES.get(method, method), *(_cell(needed(frame, method, *target, dim), dim, largest) for target in TARGETS))
        for method in ANSWERED
    )
    return Grid(f"Dimensions that are needed, of {dim:,}", ("", *header), rows, frozenset({1, 2, 3}))


def _cell(needed: Needed, dim: int, largest: int) -> str:
    if needed.possible == dim:
        return f"more than {largest:,}"
    size = "all" if needed.size == dim else f"{needed.size:,}"
    return size if needed.possible == needed.size else f"{size} (perhaps {needed.possible:,})"


def _findings(frame: pl.DataFrame) -> tuple[str, ...]:
    """Say what PCA and truncation gain over a random rotation, and which of the two is the better."""
    pca, cut = (difference(frame, method, ROTATION) for method in (PCA, TRUNCATION))
    first = (
        f"On average over the sizes PCA keeps {share(pca.value)} of the neighbours, truncation {share(cut.value)} and a random "
        f"rotation {share(pca.other)}: PCA keeps {_against(pca)} a random rotation, truncation {_against(cut)} one."
    )
    return first, _advice(difference(frame, PCA, TRUNCATION), cut)


def _against(difference: Difference) -> str:
    return "clearly more than" if difference.more else "clearly fewer than" if difference.fewer else "about as many as"


def _advice(pca: Difference, cut: Difference) -> str:
    """Answer the question: truncate or PCA."""
    if pca.more:
        order = "the first coordinates hold more than others, and PCA holds still more" if cut.more else ""
        return f"PCA is the better way to fewer dimensions{': ' + order if order else ''}."
    if pca.fewer:
        return "Truncation is the better way to fewer dimensions."
    return "Neither is clearly better than the other, and truncation needs no fit."


def _caveat(frame: pl.DataFrame, facts: Facts) -> str:
    first, row = frame.row(0, named=True), facts.row
    few = first["fitted"] < ROWS_PER_DIMENSION * facts.dim
    more = f" Fitted on more {row}s, PCA would keep more." if few else ""
    return (
        f"Measured on {first['n_tokens']:,} {row}s and their neighbours among {first['candidates']:,}; PCA was fitted on "
        f"{first['fitted']:,} others.{more} Among more {row}s the nearest are closer together, so fewer of them are kept. A "
        "size counts as needed if it and all larger ones that were tried reach the target with the lower end of their "
        "interval; “perhaps” is the smallest size that may reach it. Neighbours are not a task: whether lost ones matter, a "
        "retrieval or classification score has to show."
    )
