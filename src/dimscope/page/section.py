"""What the page is made of: facts about the model and the run, and sections with a finding, figures and caveats."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import plotly.graph_objects as go
import polars as pl

from dimscope.checkpoints.checkpoint import title_of

Tables = Mapping[str, pl.DataFrame]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StudyFacts:
    """What report.json says about one study: its own facts, the names of its tables, warnings, and the seconds it took."""

    facts: Mapping[str, Any]
    tables: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What report.json says about the model, or the vectors, and the run; keys of later versions are kept in `raw` only.

    Attributes:
        name: The name or path of the model or the vectors.
        n_rows: Rows of the table: the size of the vocabulary of a model.
        dim: Dimensions of a row: the hidden size of a model.
        n_parameters: Parameters of the model; None for vectors.
        tied: Whether a model reads and predicts with one table; None where it has no table to predict with.
        architecture: The class of the model.
        dtype: The dtype in which the numbers are stored.
        revision: The commit of a model from the hub.
        studies: The facts of each study by its name.
        versions: Versions of the packages.
        raw: The whole report.
    """

    name: str
    n_rows: int
    dim: int
    n_parameters: int | None = None
    tied: bool | None = None
    architecture: str = "unknown architecture"
    dtype: str = "unknown"
    revision: str | None = None
    studies: Mapping[str, StudyFacts] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Return the human-readable name: a hub id whole, of a path its last part."""
        return title_of(self.name)

    @property
    def is_model(self) -> bool:
        """Return whether this is a model: vectors have no vocabulary and no parameters."""
        return self.n_parameters is not None

    @property
    def row(self) -> str:
        """Return what a row of the table is, as a noun: "token", or "row" where it is no model."""
        return "token" if self.is_model else "row"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return the warnings of all studies, each once."""
        return tuple(dict.fromkeys(line for study in self.studies.values() for line in study.warnings))

    @property
    def seconds(self) -> float | None:
        """Return how long the studies took together, or None where one does not say."""
        seconds = [study.seconds for study in self.studies.values()]
        return None if not seconds or None in seconds else sum(s for s in seconds if s is not None)

    def of(self, study: str) -> Mapping[str, Any]:
        """Return the facts of a study; nothing where it was not run."""
        return self.studies[study].facts if study in self.studies else {}

    def typed(self, study: str, kind: type[T]) -> T:
        """Return the facts of a study as its own dataclass, without what other versions added; defaults where it was not run."""
        stored, names = self.of(study), {f.name for f in fields(kind)}  # ty: ignore[invalid-argument-type]
        return kind(**{name: value for name, value in stored.items() if name in names})

    @classmethod
    def from_json(cls, report: Mapping[str, Any]) -> "Facts":
        """Read the facts from a parsed report.json.

        Raises:
            TypeError: A required key is missing.
        """
        names = {f.name for f in fields(cls)} - {"raw", "studies"}
        of_model = {"model": "name", "vectors": "name", "vocab_size": "n_rows", "hidden_size": "dim"}
        renamed = {of_model.get(key, key): value for key, value in report.items()}
        # A null stands for "unknown", which is what the default says.
        present = {key: value for key, value in renamed.items() if key in names and value is not None}
        studies = {
            name: StudyFacts(own["facts"], tuple(own["tables"]), tuple(own.get("warnings") or ()), own.get("seconds"))
            for name, own in report.get("studies", {}).items()
        }
        return cls(**present, studies=studies, raw=dict(report))


@dataclass(frozen=True, slots=True)
class Token:
    """A token in an HTML table: a link to its point on the map; bold where both sides of a comparison have it."""

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
    """What a model generates after a change: how many tokens agree with the undamaged model, and how much it repeats."""

    change: str
    text: str
    same: str
    repeated: str


@dataclass(frozen=True, slots=True)
class Gallery:
    """The answers to one prompt, one below the other; `opened` ones are unfolded at first."""

    prompt: str
    answers: tuple[Answer, ...]
    opened: bool = False

    @property
    def kind(self) -> str:
        """Return "gallery": how the template tells blocks apart."""
        return "gallery"


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The layers that the reader of a section can choose from, as (number, name), and the one shown at first."""

    layers: tuple[tuple[int, str], ...]
    chosen: int
    label: str = "Layer"


@dataclass(frozen=True, slots=True)
class Section:
    """One section: its finding as the title, figures and tables, how to read them, and a caveat.

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


def table(tables: Tables, name: str) -> pl.DataFrame | None:
    """Return a table, or None where it is missing or empty."""
    frame = tables.get(name)
    return None if frame is None or frame.is_empty() else frame


def finite(frame: pl.DataFrame, column: str = "value") -> pl.DataFrame:
    """Return the rows whose value exists: neither null nor NaN nor infinite."""
    # A column of nulls only may come without a type, and then has no finite numbers to ask for.
    return frame.filter(pl.col(column).cast(pl.Float64).is_finite().fill_null(False))
