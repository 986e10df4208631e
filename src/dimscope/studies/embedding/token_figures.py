"""Figures about rows: the token map, id ranges, correlation, norms, under-trained scores and hubness.

A trace that holds one point per token names its columns in `meta`: {"x": "pc1", "y": "pc2", "category": "ordinary"}.
The page holds every token column once and fills such traces from it.
"""

import html
import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import polars as pl

from dimscope.page.theme import CATEGORY_MARKS, GAUSSIAN_NULL, HIGHLIGHT, MEASURED, figure, log_ticks

TOKEN_HOVER = "<b>%{text}</b><br>#%{customdata}<extra></extra>"


def plain(labels: Sequence[str] | pl.Series) -> list[str]:
    """Escape labels for plotly, which would read `<b>` or `<a href>` inside a text as markup."""
    return [html.escape(label, quote=False) for label in labels]


def component_name(component: str, explained: Sequence[float] = ()) -> str:
    """Name a coordinate column for an axis: "pc3" becomes "component 3 (4.1% of the variance)"."""
    index = int(component.removeprefix("pc"))
    share = f" ({explained[index - 1]:.1%} of the variance)" if index <= len(explained) else ""
    return f"component {index}{share}"


def token_map(
    tokens: pl.DataFrame, x: str = "pc1", y: str = "pc2", *, explained: Sequence[float] = (), colour: str = "category"
) -> go.Figure:
    """Draw every token at its coordinates on two components, coloured by category or by norm."""
    low, high = _robust_range(tokens["norm"])
    fig = figure(
        600,
        xaxis={"title": {"text": component_name(x, explained)}},
        yaxis={"title": {"text": component_name(y, explained)}},
        coloraxis={"cmin": low, "cmax": high, "colorbar": {"title": {"text": "norm"}}},
        dragmode="pan",
    )
    for category, rows in _by_category(tokens):
        fig.add_trace(_token_trace(rows, x, y, category, len(tokens)))
    if colour == "norm":
        for trace, (_, rows) in zip(fig.data, _by_category(tokens), strict=True):
            trace.marker.color, trace.marker.coloraxis = rows["norm"].to_numpy(), "coloraxis"
            # A legend can show one colour per entry only, and here colour no longer means category.
            trace.showlegend = False
    return fig


def _by_category(tokens: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    groups = ((category, tokens.filter(pl.col("category") == category)) for category in CATEGORY_MARKS)
    return [(category, rows) for category, rows in groups if not rows.is_empty()]


def _token_trace(rows: pl.DataFrame, x: str, y: str, category: str, total: int) -> go.Scattergl:
    mark = CATEGORY_MARKS[category]
    # Among many tokens the ordinary ones become a cloud, out of which the others stand.
    crowded = total > 20_000
    size, opacity = ((3, 0.45) if category == "ordinary" else (5, 0.75)) if crowded else (6, 0.85)
    return go.Scattergl(
        x=rows[x].to_numpy(),
        y=rows[y].to_numpy(),
        text=plain(rows["label"]),
        customdata=rows["id"].cast(pl.Int32).to_numpy(),
        mode="markers",
        name=f"{category} ({rows.height:,})",
        marker={
            "color": mark.colour,
            "symbol": mark.symbol,
            "size": size,
            "opacity": opacity,
        },
        hovertemplate=TOKEN_HOVER,
        meta={"x": x, "y": y, "category": category},
    )


def _robust_range(values: pl.Series) -> tuple[float, float]:
    # A few extreme norms would otherwise leave one colour for all the rest.
    low, high = values.quantile(0.01), values.quantile(0.99)
    if low is None or high is None:
        return 0.0, 1.0
    return low, high if high > low else low + 1.0


def id_scatter(
    tokens: pl.DataFrame,
    first: int = 0,
    stop: int = 100,
    x: str = "pc1",
    y: str = "pc3",
    *,
    explained: Sequence[float] = (),
) -> go.Figure:
    """Draw the tokens with first <= id < stop on two components, labelled wherever a label finds room."""
    rows = tokens.filter(pl.col("id").is_between(first, stop, closed="left"))
    fig = figure(
        560,
        xaxis={"title": {"text": component_name(x, explained)}},
        yaxis={"title": {"text": component_name(y, explained)}},
    )
    labels = [label if len(label) <= 14 else label[:13] + "…" for label in rows["label"]]
    positions = iter(_label_positions(rows[x].to_numpy(), rows[y].to_numpy(), labels))
    placed = dict(zip(rows["id"], positions, strict=True))
    short = dict(zip(rows["id"], plain(labels), strict=True))
    for category, group in _by_category(rows):
        mark = CATEGORY_MARKS[category]
        fig.add_scatter(
            x=group[x].to_numpy(),
            y=group[y].to_numpy(),
            text=[short[i] if placed[i] else "" for i in group["id"]],
            textposition=[placed[i] or "top center" for i in group["id"]],
            hovertext=plain(group["label"]),
            customdata=group["id"].to_numpy(),
            mode="markers+text",
            name=f"{category} ({group.height:,})",
            marker={"color": mark.colour, "symbol": mark.symbol, "size": 7},
            textfont={"size": 11},
            hovertemplate="<b>%{hovertext}</b><br>#%{customdata}<extra></extra>",
            cliponaxis=False,
        )
    return fig


_SIDES = {
    "top center": (-0.5, 0.35),
    "bottom center": (-0.5, -1.35),
    "middle right": (0.12, -0.5),
    "middle left": (-1.12, -0.5),
}


def _label_positions(
    x: np.ndarray, y: np.ndarray, labels: Sequence[str], canvas: tuple[int, int] = (620, 440)
) -> list[str | None]:
    """Choose a free side for each label in turn on a canvas of that many pixels, or None where all sides are taken."""
    across, up = _to_pixels(x, canvas[0]), _to_pixels(y, canvas[1])
    # Points are obstacles as well: a label must not cover a neighbour's marker.
    taken = [(px - 4, py - 4, px + 4, py + 4) for px, py in zip(across, up, strict=True)]
    chosen: list[str | None] = []
    for own, (px, py, label) in enumerate(zip(across, up, labels, strict=True)):
        width, height = 7 * len(label) + 4, 14
        boxes = {
            side: (px + dx * width, py + dy * height, px + (dx + 1) * width, py + (dy + 1) * height)
            for side, (dx, dy) in _SIDES.items()
        }
        others = [box for i, box in enumerate(taken) if i != own]
        side = next((s for s, box in boxes.items() if not any(_overlap(box, other) for other in others)), None)
        if side:
            taken.append(boxes[side])
        chosen.append(side)
    return chosen


def _to_pixels(values: np.ndarray, size: int) -> np.ndarray:
    span = np.ptp(values) if len(values) else 0.0
    return (values - values.min()) / span * size if span > 0 else np.zeros(len(values))


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def correlation(matrix: pl.DataFrame, axis: str = "token id") -> go.Figure:
    """Draw the Pearson correlation of an id range as a heat map whose colours always run from -1 to 1."""
    # An id in every name keeps tokens with equal labels apart on the category axes.
    names = [f"{label}  #{i}" for label, i in zip(plain(matrix["label"]), matrix["id"], strict=True)]
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, len(names)) if s * 10 >= len(names))
    ticks = {
        "tickvals": names[::step],
        "ticktext": [f"{i:,}" for i in matrix["id"][::step]],
        "title": {"text": axis},
        "showgrid": False,
    }
    fig = figure(
        640,
        xaxis={**ticks, "constrain": "domain"},
        yaxis={**ticks, "autorange": "reversed", "scaleanchor": "x", "constrain": "domain"},
        coloraxis={"cmin": -1, "cmax": 1, "autocolorscale": True, "colorbar": {"title": {"text": "r"}}},
    )
    fig.add_heatmap(
        z=matrix["r"].to_numpy().astype(np.float32),
        x=names,
        y=names,
        coloraxis="coloraxis",
        hovertemplate="%{y}<br>%{x}<br>r = %{z:.3f}<extra></extra>",
    )
    return fig


def norms_by_id(tokens: pl.DataFrame, axis: str = "token id") -> go.Figure:
    """Draw the length of every row against its id, with the median of each fiftieth of the table."""
    fig = figure(
        380, xaxis={"title": {"text": axis}}, yaxis={"title": {"text": "norm of the row"}, "rangemode": "tozero"}
    )
    for category, rows in _by_category(tokens):
        fig.add_trace(_token_trace(rows, "id", "norm", category, len(tokens)))
    width = max(1, math.ceil(len(tokens) / 50))
    medians = tokens.group_by(pl.col("id") // width * width + width // 2).agg(pl.col("norm").median()).sort("id")
    fig.add_scattergl(
        x=medians["id"].to_numpy(),
        y=medians["norm"].to_numpy(),
        mode="lines",
        name=f"median of {width:,} ids",
        line={"color": HIGHLIGHT.colour, "width": 2.5},
        hovertemplate="around id %{x:,}: median %{y:.4g}<extra></extra>",
    )
    return fig


def norms_by_category(tokens: pl.DataFrame) -> go.Figure:
    """Draw the spread of norms in each category as a box of quartiles with whiskers at 1% and 99%."""
    groups = _by_category(tokens)
    fig = figure(
        110 + 54 * len(groups),
        xaxis={"title": {"text": "norm of the row"}, "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "ticks": ""},
        showlegend=False,
    )
    for category, rows in groups:
        low, q1, median, q3, high = (rows["norm"].quantile(q) for q in (0.01, 0.25, 0.5, 0.75, 0.99))
        name = f"{category} ({rows.height:,})"
        fig.add_box(
            y=[name], q1=[q1], median=[median], q3=[q3], lowerfence=[low], upperfence=[high],
            name=name, orientation="h", marker={"color": CATEGORY_MARKS[category].colour},
        )  # fmt: skip
    return fig


def untrained_scores(tokens: pl.DataFrame, threshold: float | None, *, bins: int = 60) -> go.Figure:
    """Draw how far every token lies from the rows that were never trained, by category, with the threshold."""
    fig = figure(
        380,
        # Overlaid, not stacked: on a logarithmic axis only heights measured from the bottom can be read.
        barmode="overlay",
        bargap=0.04,
        xaxis={"title": {"text": "score (0: untrained, 1: usual)"}},
        yaxis=_count_axis(tokens.height, "token"),
    )
    scored = tokens.filter(pl.col("untrained_score").is_finite())
    farthest = float(scored["untrained_score"].to_numpy().max(initial=1.0))
    edges = np.linspace(0.0, farthest * 1.0001, bins + 1)
    for category, rows in _by_category(scored):
        counts, _ = np.histogram(rows["untrained_score"].to_numpy(), bins=edges)
        fig.add_bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=counts,
            name=f"{category} ({rows.height:,})",
            marker={"color": CATEGORY_MARKS[category].colour, "line": {"width": 0}, "opacity": 0.8},
            hovertemplate=f"{category}: %{{y:,}} with a score near %{{x:.2f}}<extra></extra>",
        )
    if threshold is not None:
        fig.add_vline(threshold, line={"color": HIGHLIGHT.colour, "dash": "dash", "width": 2})
        fig.add_annotation(
            x=threshold,
            y=1,
            yref="paper",
            text=f"threshold {threshold:.2f}",
            showarrow=False,
            xanchor="left",
            yanchor="top",
            xshift=5,
        )
    return fig


def _count_axis(most: int, row: str) -> dict[str, object]:
    # Starting below 1 leaves a bar or dot for a single row some height.
    top = max(most, 10)
    axis_range = [math.log10(0.6), math.log10(1.5 * top)]
    return {"title": {"text": f"{row}s"}, "type": "log", "tickvals": log_ticks(1, top), "range": axis_range}


def hubness(hubs: pl.DataFrame, row: str = "token") -> go.Figure:
    """Draw how many rows are a near neighbour of how many others, beside a graph with random edges (Poisson)."""
    counts = hubs.group_by("in_degree").len().sort("in_degree")
    mean = float(hubs["in_degree"].to_numpy().mean())
    fig = figure(
        380,
        xaxis={"title": {"text": "in-degree (neighbour lists that it is in)"}, "rangemode": "tozero"},
    )
    degrees = np.arange(counts["in_degree"].to_numpy().max() + 1)
    expected = np.array([hubs.height * _poisson(int(k), mean) for k in degrees])
    shown = expected >= 0.6
    fig.update_yaxes(_count_axis(int(max(counts["len"].to_numpy().max(), expected.max())), row))
    fig.add_scatter(
        x=degrees[shown], y=expected[shown], mode="lines", name="random neighbours",
        line={"color": GAUSSIAN_NULL.colour, "dash": GAUSSIAN_NULL.dash, "width": 2},
        hovertemplate=f"random: %{{y:,.0f}} {row}s with in-degree %{{x}}<extra></extra>",
    )  # fmt: skip
    fig.add_scatter(
        x=counts["in_degree"].to_numpy(), y=counts["len"].to_numpy(), mode="markers", name="this table",
        marker={"color": MEASURED.colour, "size": 7},
        hovertemplate=f"%{{y:,}} {row}s with in-degree %{{x}}<extra></extra>",
    )  # fmt: skip
    return fig


def _poisson(k: int, mean: float) -> float:
    return math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) if mean > 0 else float(k == 0)
