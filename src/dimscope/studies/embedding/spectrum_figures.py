"""Figures about directions: the parameter budget, the spectrum, and the family of dimensions beside its nulls."""

import textwrap

import numpy as np
import plotly.graph_objects as go
import polars as pl

from dimscope.page.theme import GAUSSIAN_NULL, HIGHLIGHT, MEASURED, PERMUTED_NULL, ROLE_COLOURS, Mark, figure, log_ticks
from dimscope.page.wording import share

# (column in dimensions.parquet, column in spectrum.parquet, legend, mark); the measurement comes last, on top.
CURVES: tuple[tuple[str, str, str, Mark], ...] = (
    ("null_gaussian", "gaussian_singular_value", "random Gaussian table", GAUSSIAN_NULL),
    ("null_permuted", "permuted_singular_value", "columns permuted", PERMUTED_NULL),
    ("value", "singular_value", "this table", MEASURED),
)


def budget(parameters: pl.DataFrame) -> go.Figure:
    """Draw who owns the parameters: the tables outside the blocks and every block, stacked by role."""
    rows = parameters.filter(pl.col("n_parameters") > 0).with_columns(place=_place())
    places = rows.group_by("place", maintain_order=True).agg(pl.col("block").first()).sort("block", nulls_last=False)
    total = int(rows["n_parameters"].sum())
    fig = figure(
        170 + 19 * places.height,
        barmode="stack",
        xaxis={"title": {"text": "parameters"}, "tickformat": "~s"},
        yaxis={"autorange": "reversed", "type": "category", "ticks": "", "dtick": max(1, places.height // 40)},
        bargap=0.15,
        legend={"traceorder": "normal"},
    )
    for role, colour in ROLE_COLOURS.items():
        of_role = rows.filter(pl.col("role") == role).group_by("place").agg(pl.col("n_parameters").sum())
        sizes = places.join(of_role, on="place", how="left", maintain_order="left")["n_parameters"].fill_null(0)
        if of_role.is_empty():
            continue
        fig.add_bar(
            y=places["place"].to_list(),
            x=sizes.to_numpy(),
            orientation="h",
            name=f"{role} {share(int(sizes.sum()) / total)}",
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate=f"{role}, %{{y}}: %{{x:,}} parameters<extra></extra>",
        )
    return fig


def _place() -> pl.Expr:
    return (
        pl.when(pl.col("block").is_not_null())
        .then(pl.format("block {}", pl.col("block")))
        .when(pl.col("role").str.contains("embedding"))
        .then(pl.col("role"))
        .otherwise(pl.lit("outside the blocks"))
    )


def spectrum(curves: pl.DataFrame, *, log: bool = True, edge: float | None = None) -> go.Figure:
    """Draw the singular values of one table and one preprocessing against their index, with both nulls and the chance edge.

    Columns without values are left out. Zeros have no place on a logarithmic axis and vanish there.
    """
    values = curves["singular_value"].to_numpy()
    positive = values[values > 0]
    ticks = log_ticks(positive.min(), positive.max()) if log and len(positive) else None
    fig = figure(
        380,
        xaxis={"title": {"text": "index of the singular value"}},
        yaxis={"title": {"text": "singular value"}, "type": "log" if log else "linear", "tickvals": ticks},
    )
    for _, column, name, mark in CURVES:
        if curves[column].is_not_null().any():
            sd = curves.get_column("permuted_sd", default=None) if column == "permuted_singular_value" else None
            fig.add_trace(_line(curves["index"], curves[column], name, mark, "singular value", sd))
    if edge is not None:
        ends = curves["index"][[0, -1]]
        line = go.Scatter(
            x=ends.to_numpy(), y=[edge, edge], mode="lines", name="chance edge (95%)",
            line={"color": HIGHLIGHT.colour, "width": 1.5, "dash": "dash"},
            hovertemplate=f"95% of tables without structure stay below {edge:.4g}<extra></extra>",
        )  # fmt: skip
        fig.add_trace(line)
    return fig


def cumulative_variance(curves: pl.DataFrame) -> go.Figure:
    """Draw the share of variance held by the first k components, for the table and for both nulls."""
    fig = figure(
        380,
        xaxis={"title": {"text": "number of components kept"}},
        yaxis={"title": {"text": "share of the variance"}, "tickformat": ".0%", "range": [0, 1.02]},
    )
    for _, column, name, mark in CURVES:
        if curves[column].is_not_null().any():
            energy = curves[column] ** 2
            share_of_first = energy.cum_sum() / max(energy.sum(), np.finfo(float).tiny)
            fig.add_trace(_line(curves["index"], share_of_first, name, mark, "share of the variance"))
    return fig


# The nulls often coincide: a wide grey line stays visible under a narrow brown one.
_WIDTHS = {GAUSSIAN_NULL: 4.5, PERMUTED_NULL: 2, MEASURED: 2.5}


def _line(x: pl.Series, y: pl.Series, name: str, mark: Mark, quantity: str, sd: pl.Series | None = None) -> go.Scatter:
    """Return a curve, with the standard deviation over the random seeds in its hover text where there is one."""
    spread = "" if sd is None else " (sd over seeds %{customdata:.2g})"
    return go.Scatter(
        x=x.to_numpy(),
        y=y.to_numpy(),
        name=name,
        mode="lines",
        line={"color": mark.colour, "dash": mark.dash, "width": _WIDTHS[mark]},
        customdata=None if sd is None else sd.to_numpy(),
        hovertemplate=f"{name}<br>%{{x}}: {quantity} %{{y:.4g}}{spread}<extra></extra>",
    )


def dimensions(family: pl.DataFrame, dim: int) -> go.Figure:
    """Draw every dimension of one table as a dot between 0 and `dim`, beside its two nulls."""
    rows = family.with_columns(name=_measure_name(family))
    names = rows["name"].to_list()
    fig = figure(
        110 + 40 * rows.height,
        xaxis={"title": {"text": f"dimensions (of {dim:,})"}, "range": [0, dim * 1.04]},
        yaxis={"autorange": "reversed", "type": "category", "ticks": "", "dtick": 1},
    )
    fig.add_trace(_connections(rows))
    for column, _, label, mark in CURVES:
        fig.add_scatter(
            x=rows[column].to_numpy(),
            y=names,
            mode="markers",
            name=label,
            marker={
                "color": mark.colour,
                "symbol": mark.symbol,
                "size": 11,
                "line": {"width": 2, "color": mark.colour},
            },
            hovertemplate=f"{label}: %{{x:,.1f}}<extra>%{{y}}</extra>",
        )
    return fig


def _measure_name(family: pl.DataFrame) -> pl.Series:
    # Two lines per name keep the axis narrow enough for a phone.
    uncentred = family["preprocess"] == "uncentred"
    named = zip(family["metric"], uncentred, strict=True)
    texts = [f"{metric} · uncentred" if raw else metric for metric, raw in named]
    return pl.Series("name", ["<br>".join(textwrap.wrap(text, 27)) for text in texts])


def _connections(rows: pl.DataFrame) -> go.Scatter:
    """Join each measurement to its Gaussian null with a thin line: its length is the finding."""
    ends = [v for value, null in rows.select("value", "null_gaussian").iter_rows() for v in (value, null, None)]
    return go.Scatter(
        x=ends,
        y=[name for label in rows["name"] for name in (label, label, label)],
        mode="lines",
        line={"color": GAUSSIAN_NULL.colour, "width": 1},
        hoverinfo="skip",
        showlegend=False,
    )


def participation_ratio(points: np.ndarray) -> float:
    """Return (sum l)^2 / sum l^2 of the covariance eigenvalues l of the points, 1 to d; 0 for points that coincide."""
    centred = points - points.mean(axis=0)
    covariance = centred.T @ centred
    energy = float((covariance**2).sum())
    return float(np.trace(covariance)) ** 2 / energy if energy > 0 else 0.0


def intro_panels() -> tuple[go.Figure, ...]:
    """Draw the introduction: 60 points on a line, near a line and in a round cloud, titled with their dimension."""
    rng = np.random.default_rng(7)
    along, across = rng.standard_normal((2, 60))
    turn = np.array([[0.88, 0.475], [-0.475, 0.88]])
    widths = {"on a line": 0.0, "near a line": 0.2, "round cloud": 1.0}
    return tuple(_intro_panel(np.stack([along, width * across], axis=1) @ turn, name) for name, width in widths.items())


def _intro_panel(points: np.ndarray, name: str) -> go.Figure:
    axis = {
        "range": [-3.2, 3.2],
        "zeroline": True,
        "showticklabels": False,
        "ticks": "",
        "showgrid": False,
        "constrain": "domain",
    }
    fig = figure(
        280,
        title={
            "text": f"{name}: dimension <b>{participation_ratio(points):.2f}</b>",
            "y": 0.98,
            "yanchor": "top",
        },
        margin={"t": 36},
        xaxis=axis,
        yaxis={**axis, "scaleanchor": "x"},
        showlegend=False,
    )
    fig.add_scatter(
        x=points[:, 0], y=points[:, 1], mode="markers", marker={"color": MEASURED.colour, "size": 7}, hoverinfo="skip"
    )
    return fig
