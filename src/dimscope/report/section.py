"""The nouns of the page: what a run knows about its model, and a section with its finding, pictures and limits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import plotly.graph_objects as go
import polars as pl

from dimscope.checkpoints.checkpoint import title_of

Tables = Mapping[str, pl.DataFrame]


@dataclass(frozen=True, slots=True)
class Facts:
    """What report.json says about the model and the run; keys that later versions add are kept in `raw` only."""

    model: str
    vocab_size: int
    hidden_size: int
    n_parameters: int
    tied: bool
    architecture: str = "unknown architecture"
    dtype: str = "unknown"
    revision: str | None = None
    tokenizer_size: int | None = None
    seconds: float | None = None
    warnings: tuple[str, ...] = ()
    study: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    knn: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Return the model's name as people say it: a hub id whole, of a path its last part."""
        return title_of(self.model)

    @classmethod
    def from_json(cls, report: Mapping[str, Any]) -> "Facts":
        """Read the facts from a parsed report.json; raises TypeError where a required key is missing."""
        known = {f.name for f in fields(cls)} - {"raw", "warnings"}
        # A null stands for "unknown", which is what the default says.
        given = {key: value for key, value in report.items() if key in known and value is not None}
        return cls(**given, warnings=tuple(report.get("warnings") or ()), raw=dict(report))


@dataclass(frozen=True, slots=True)
class Token:
    """A token in an HTML table: a link to its place on the map; bold where both sides of a comparison share it."""

    id: int
    label: str
    shared: bool = False

    @property
    def kind(self) -> str:
        """Return "token": how the template tells cells apart."""
        return "token"


Cell = Token | str


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure on the page; `explorer` adds the map's controls, `log_toggle` a switch of the y axis."""

    anchor: str
    figure: go.Figure
    alt: str
    caption: str = ""
    log_toggle: bool = False
    explorer: bool = False
    square: bool = False

    @property
    def kind(self) -> str:
        """Return "plot": how the template tells blocks apart."""
        return "plot"


@dataclass(frozen=True, slots=True)
class Grid:
    """Small HTML table; cells are tokens or ready text, `numeric` names the columns set flush right."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[int] = frozenset()

    @property
    def kind(self) -> str:
        """Return "table": how the template tells blocks apart."""
        return "table"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote after a change, how many of its tokens are those of the undamaged model, and how much it repeats."""

    change: str
    text: str
    same: str
    repeated: str


@dataclass(frozen=True, slots=True)
class Gallery:
    """The answers to one prompt, one below the other; `opened` where the reader sees them at first."""

    prompt: str
    answers: tuple[Answer, ...]
    opened: bool = False

    @property
    def kind(self) -> str:
        """Return "gallery": how the template tells blocks apart."""
        return "gallery"


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The layers whose traces a section's figures hold, as (number, name), and the one shown at first."""

    layers: tuple[tuple[int, str], ...]
    chosen: int
    label: str = "Layer"


@dataclass(frozen=True, slots=True)
class Section:
    """One section: its finding as the title, what shows it, how to read that, and what it does not say.

    `findings` are further sentences under the title; `choice` lets the reader change the layer that the figures show.
    """

    anchor: str
    name: str
    title: str
    blocks: tuple[Plot | Grid | Gallery, ...]
    how_to_read: str
    caveat: str
    tables: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    choice: LayerChoice | None = None


SectionMaker = Callable[[Tables, Facts], Section | None]


def measure(tables: Tables, metric: str, preprocess: str | None = None, table: str = "input") -> dict[str, Any] | None:
    """Return the row of measures.parquet for this metric, or None where it was not measured."""
    if "measures" not in tables:
        return None
    rows = tables["measures"].filter((pl.col("metric") == metric) & (pl.col("table") == table))
    if preprocess is not None:
        rows = rows.filter(pl.col("preprocess") == preprocess)
    # Unless told otherwise the page speaks of the centred table.
    rows = rows.sort(pl.col("preprocess") != "centred", maintain_order=True)
    return rows.row(0, named=True) if rows.height and rows["value"][0] is not None else None


def dimension(tables: Tables, metric: str, preprocess: str = "centred", table: str = "input") -> dict[str, Any] | None:
    """Return the row of dimensions.parquet for this metric, or None where it was not measured."""
    if "dimensions" not in tables:
        return None
    frame = tables["dimensions"]
    rows = frame.filter(
        (pl.col("metric") == metric) & (pl.col("preprocess") == preprocess) & (pl.col("table") == table)
    )
    return rows.row(0, named=True) if rows.height and rows["value"][0] is not None else None


def explained_variance(tables: Tables) -> list[float]:
    """Return the share of variance of each component of the centred input table, or nothing without a spectrum."""
    if "spectrum" not in tables:
        return []
    rows = tables["spectrum"].filter((pl.col("table") == "input") & (pl.col("preprocess") == "centred")).sort("index")
    return rows["explained_variance_ratio"].to_list()


def table_sides(frame: pl.DataFrame) -> list[str]:
    """Return which tables a frame measures: ["input"], or ["input", "output"] for an untied model."""
    return [side for side in ("input", "output") if (frame["table"] == side).any()]
