"""Every colour, mark and layout rule of the figures and the page, in one place.

A colour means one thing everywhere. All data colours keep a contrast of 3:1 or more on the light and on the dark page,
and categories also differ in shape, so that nothing hangs on colour vision alone.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal

import plotly.graph_objects as go

from dimscope.interventions.perturbations import PERTURBATIONS, Mark

ThemeName = Literal["light", "dark"]


@dataclass(frozen=True, slots=True)
class Surface:
    """The colours of the page around the data, for one theme."""

    background: str
    panel: str
    text: str
    muted: str
    grid: str
    accent: str


# Hues after Okabe and Ito (2008), darkened or lightened until they stand out on white and on near-black alike.
CATEGORY_MARKS: dict[str, Mark] = {
    "ordinary": Mark("#3f86cf", "circle"),
    "special": Mark("#d55e00", "diamond"),
    "byte": Mark("#009e73", "square"),
    "undecodable": Mark("#b07f00", "triangle-up"),
    "unreachable": Mark("#c45a9c", "cross"),
    "beyond": Mark("#8d79d6", "x"),
    "vectors": Mark("#3f86cf", "circle"),  # rows that are no tokens
}

# The measured table shares the blue of ordinary tokens: blue is what the model holds, grey and brown are chance.
MEASURED = Mark("#3f86cf", "circle", "solid")
GAUSSIAN_NULL = Mark("#82878f", "diamond-open", "dash")
PERMUTED_NULL = Mark("#a8703a", "square-open", "dot")
SURROGATE = Mark("#82878f", "triangle-down-open", "dot")
HIGHLIGHT = Mark("#e0402f", "circle-open")

# What a model was given: real text stays the blue of measurements. The order is that of legends.
CONDITION_MARKS: dict[str, Mark] = {
    "real": MEASURED,
    "shuffled": Mark("#d55e00", "square", "longdash"),
    "shuffled across": Mark("#a8703a", "diamond", "longdashdot"),
    "random weights": Mark("#8d79d6", "triangle-up", "dot"),
}
WHITE_NOISE = "white noise"
GAUSSIAN_STATES = "Gaussian, same covariance"

# Texts, models or preprocessings side by side: the first is the one studied, the others stand beside it.
SERIES_MARKS: tuple[Mark, ...] = (
    MEASURED,
    Mark("#009e73", "square", "longdash"),
    Mark("#b07f00", "triangle-up", "dashdot"),
    Mark("#c45a9c", "diamond", "dot"),
    Mark("#8d79d6", "cross", "longdashdot"),
    Mark("#a8703a", "x", "dash"),
)

# Ways to choose the directions that are kept. What an embedding table gives has the marks of the changes of tables.
BASIS_MARKS: dict[str, Mark] = {
    "learned": Mark("#c45a9c", "circle"),
    "normalised": Mark("#009e73", "diamond"),
    "raw": Mark("#a8703a", "triangle-up", "dash"),
    "embedding": PERTURBATIONS["truncate"].mark,
    "coordinates": PERTURBATIONS["coordinates"].mark,
    "random": PERTURBATIONS["project"].mark,
}

ROLE_COLOURS: dict[str, str] = {
    "input embedding": "#3f86cf",
    "output embedding": "#8d79d6",
    "position embedding": "#c45a9c",
    "attention": "#b07f00",
    "mlp": "#82878f",
    "norm": "#009e73",
    "other": "#a8703a",
}

SURFACES: dict[ThemeName, Surface] = {
    "light": Surface("#ffffff", "#f4f6f8", "#1c2430", "#56606e", "#dfe3e8", "#1f66ad"),
    "dark": Surface("#12161c", "#1c222b", "#e6eaf0", "#a3adba", "#333c48", "#7db8f0"),
}

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Liberation Sans', sans-serif"
CLEAR = "rgba(0,0,0,0)"

# A template takes them out of every figure, wherever it is drawn. plotly.js 4 has the first, older versions the others.
UPLOAD_BUTTONS = ["sendChartToCloud", "sendDataToCloud", "editInChartStudio"]

# A figure outside the page (README, notebook) does not know what is behind it: mid-greys are legible on both.
_NEUTRAL = Surface(CLEAR, "#f4f6f8", "#72777f", "#72777f", "rgba(128,128,128,0.28)", "#3f86cf")

_SEQUENTIAL: dict[ThemeName, list[str]] = {
    "light": ["#a9cbe8", "#5a97cc", "#2c5f9e", "#12264d"],
    "dark": ["#33557c", "#5a8fc4", "#b5cfe6", "#fff3c4"],
}


def _scale(colours: list[str]) -> list[list[float | str]]:
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def _diverging(middle: str) -> list[list[float | str]]:
    return _scale(["#2166ac", "#67a9cf", middle, "#ef8a62", "#b2182b"])


def _axis(surface: Surface) -> dict[str, object]:
    return {
        "automargin": True,
        "gridcolor": surface.grid,
        "zerolinecolor": surface.grid,
        "linecolor": surface.muted,
        "tickcolor": surface.muted,
        "ticks": "outside",
        "ticklen": 4,
        "title": {"standoff": 8},
        "separatethousands": True,
    }


def _layout(surface: Surface, theme: ThemeName) -> go.layout.Template:
    axis = _axis(surface)
    panel = SURFACES[theme].panel  # also the middle of the diverging scale: no correlation, no ink
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": surface.text},
            "paper_bgcolor": CLEAR,
            "plot_bgcolor": CLEAR,
            "margin": {"l": 8, "r": 12, "t": 16, "b": 8},
            "xaxis": axis,
            "yaxis": axis,
            "title": {"font": {"size": 14}, "x": 0.5, "xanchor": "center"},
            "legend": {
                "orientation": "h",
                "x": 0,
                "y": 1.02,
                "xanchor": "left",
                "yanchor": "bottom",
                "bgcolor": CLEAR,
                "itemsizing": "constant",
            },
            "hoverlabel": {
                "bgcolor": panel,
                "bordercolor": surface.muted,
                "font": {"color": SURFACES[theme].text, "family": FONT},
                "align": "left",
            },
            "colorscale": {"sequential": _scale(_SEQUENTIAL[theme]), "diverging": _diverging(panel)},
            "coloraxis": {"colorbar": {"outlinewidth": 0, "thickness": 12, "ticks": "outside"}},
            "annotationdefaults": {"font": {"color": surface.text}, "arrowcolor": surface.muted},
            "shapedefaults": {"line": {"color": surface.muted}},
            "modebar": {
                "bgcolor": CLEAR,
                "color": surface.muted,
                "activecolor": surface.accent,
                "remove": UPLOAD_BUTTONS,
            },
            "hovermode": "closest",
        }
    )


NEUTRAL_TEMPLATE = _layout(_NEUTRAL, "light")


def template(theme: ThemeName) -> go.layout.Template:
    """Return the plotly template of the page in this theme; the page swaps it with one relayout."""
    return _layout(SURFACES[theme], theme)


def css_variables(theme: ThemeName) -> str:
    """Return the page's custom properties for this theme, so that CSS and figures cannot drift apart."""
    return " ".join(f"--{name}: {value};" for name, value in asdict(SURFACES[theme]).items())


def log_ticks(low: float, high: float) -> list[float]:
    """Return the values to label on a logarithmic axis: steps of 1-2-5, or powers of ten where the range is long."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    return [float(f"{step}e{power}") for power in range(first, last + 1) for step in steps]


def series_mark(index: int) -> Mark:
    """Return how the index-th of several texts, models or preprocessings is drawn; after six they begin again."""
    return SERIES_MARKS[index % len(SERIES_MARKS)]


def basis_mark(basis: str) -> Mark:
    """Return how a basis of a narrowing is drawn."""
    return BASIS_MARKS.get(basis) or series_mark(sum(basis.encode()))


def tint(colour: str, alpha: float) -> str:
    """Return a hex colour made translucent, for bands that lie under their line."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def figure(height: int, **layout: object) -> go.Figure:
    """Start an empty figure in the house style, `height` pixels tall; its width follows the page."""
    return go.Figure(layout={"template": NEUTRAL_TEMPLATE, "height": height, **layout})
