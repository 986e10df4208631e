"""Lines and bands as every figure draws them."""

from typing import Any

import plotly.graph_objects as go
import polars as pl

from dimscope.page.theme import Mark, tint

MANY = 16
"""Points of a line from which its markers become small: else they would touch and look like one thick line."""


def line(x: pl.Series, y: pl.Series, name: str, mark: Mark, *, markers: bool = True, **options: Any) -> go.Scatter:
    """Return a curve in the colour, dash and symbol of its mark.

    Args:
        x: Positions, in their order.
        y: Values, as many as `x`.
        name: Entry of the legend.
        mark: How the curve is drawn.
        markers: Whether every point gets a symbol.
        **options: Further properties of the trace, such as hovertemplate or yaxis; they override these.
    """
    looks: dict[str, Any] = {
        "line": {"color": mark.colour, "dash": mark.dash, "width": 2.5},
        "mode": "lines+markers" if markers else "lines",
    }
    if markers:
        looks["marker"] = {"color": mark.colour, "symbol": mark.symbol, "size": 8 if len(x) <= MANY else 5}
    return go.Scatter(x=x.to_numpy(), y=y.to_numpy(), name=name, **(looks | options))


def band(x: pl.Series, y: pl.Series, spread: pl.Series, mark: Mark, **options: Any) -> list[go.Scatter]:
    """Return the area of one `spread` below and above a curve; nothing where no point has a spread."""
    return interval_band(x, y - spread, y + spread, mark, **options)


def interval_band(x: pl.Series, low: pl.Series, high: pl.Series, mark: Mark, **options: Any) -> list[go.Scatter]:
    """Return the area between the ends of intervals; nothing where no point has one."""
    rows = pl.DataFrame({"x": x, "low": low, "high": high}).drop_nulls(["low", "high"])
    if rows.is_empty():
        return []
    outline = {
        "x": pl.concat([rows["x"], rows["x"].reverse()]), "y": pl.concat([rows["high"], rows["low"].reverse()])
    }  # fmt: skip
    looks = {"mode": "lines", "line": {"width": 0}, "fill": "toself", "fillcolor": tint(mark.colour, 0.22)}
    points = {name: series.to_numpy() for name, series in outline.items()}
    return [go.Scatter(**points, **(looks | {"hoverinfo": "skip", "showlegend": False} | options))]
