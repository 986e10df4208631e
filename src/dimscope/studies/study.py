"""What a study is, how one is run, and the result that it gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dimscope.errors import InvalidArgument

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import polars as pl

    from dimscope.checkpoints.checkpoint import Checkpoint
    from dimscope.page.render import Page
    from dimscope.page.section import Facts, Section, SectionMaker, Tables
    from dimscope.storage import Store
    from dimscope.vectors.table import VectorTable

Highlight = tuple[str, str, str]
"""A number of the head of the page: its name, its value, a note."""


@dataclass(frozen=True, slots=True)
class RunOutput:
    """The tables of a finished study, and what the page must know of the run beside them.

    `facts` becomes JSON. `waiting` names the shards that are missing; as long as there are any, there are no tables.
    """

    tables: dict[str, pl.DataFrame]
    facts: Mapping[str, Any]
    warnings: Sequence[str] = ()
    waiting: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Monitor:
    """Who follows a run.

    Attributes:
        announce: Called with a line before something long starts: what is going to run, and what it costs.
        stage: Called with a line when a stage is finished, for logs without progress bars.
        watch: Called with whatever a study shows while it works; None where nobody watches.
    """

    announce: Callable[[str], object] = lambda line: None
    stage: Callable[[str], object] = lambda line: None
    watch: Callable[[Any], object] | None = None


SILENT = Monitor()


class RunFunction(Protocol):
    """Runs a study. Every finished table goes through the store, which may have it already."""

    def __call__(self, source: Any, settings: Any, store: Store, monitor: Monitor, /) -> RunOutput:
        """Run the study on a Checkpoint; where the study takes vectors, also on a VectorTable."""
        ...


@dataclass(frozen=True, slots=True)
class Summary:
    """The answer of a study for a terminal: one sentence with its number and unit, then tables, the first rows of each."""

    answer: str
    frames: Mapping[str, pl.DataFrame]
    files: tuple[str, ...] = ()
    """Tables of the study that are too large to print; JSON gives them too."""

    def __str__(self) -> str:
        """Return the answer and the first table, as a frame prints."""
        table = next(iter(self.frames.values()), None)
        return self.answer if table is None else f"{self.answer}\n{table}"

    __repr__ = __str__


def _no_highlights(tables: Tables, facts: Facts) -> list[Highlight]:
    return []


def _no_page_data(tables: Tables, facts: Facts) -> Mapping[str, Any]:
    return {}


def _accept(checkpoint: Checkpoint) -> None:
    """Accept every checkpoint."""


@dataclass(frozen=True, slots=True)
class StudyCode:
    """The functions of a study, which import torch.

    Attributes:
        run: From a checkpoint and settings to tables.
        sections: Makers of the sections of the page, in their order; a maker returns None where its tables are missing.
        summarise: The answer in a sentence and a few small tables.
        check: Raises DimscopeError for a checkpoint that the study cannot work on; reads no weights.
        highlights: What the head of the page says.
        page_data: What the scripts of the page need beside the figures.
    """

    run: RunFunction
    sections: tuple[SectionMaker, ...]
    summarise: Callable[[Tables, Facts], Summary]
    check: Callable[[Checkpoint], object] = _accept
    highlights: Callable[[Tables, Facts], list[Highlight]] = _no_highlights
    page_data: Callable[[Tables, Facts], Mapping[str, Any]] = _no_page_data

    def make_sections(self, tables: Tables, facts: Facts) -> list[Section]:
        """Return the sections whose tables are there."""
        sections = (make(tables, facts) for make in self.sections)
        return [section for section in sections if section is not None]


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """One question to a model. Neither this nor the settings import torch, so that `--help` need not.

    Attributes:
        name: As in `--studies`, as a command, in report.json and as `dimscope.NAME`.
        question: What the study answers, in one sentence; the help of its command.
        settings: A frozen dataclass of keyword arguments, whose `__post_init__` raises InvalidArgument.
        load: Imports and returns the code of the study.
        example: A command line to try.
        presets: Values of settings by the name of a preset, which other options override.
        definition: Number of the definition of its tables: a change of their columns or rows raises it, and tables of another
            number are computed again.
        takes_vectors: Whether the study also runs on N x d vectors that belong to no model.
    """

    name: str
    question: str
    settings: type
    load: Callable[[], StudyCode]
    example: str = ""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    definition: int = 1
    takes_vectors: bool = False

    def check(self, source: Checkpoint | VectorTable) -> None:
        """Raise DimscopeError for a source that the study cannot work on; reads no weights."""
        from dimscope.checkpoints.checkpoint import Checkpoint

        if isinstance(source, Checkpoint):
            self.load().check(source)
        elif not self.takes_vectors:
            raise InvalidArgument(f"{self.name} runs a model, and {source.name} holds vectors; pass a model")


@dataclass(frozen=True, slots=True)
class StudyResult:
    """The tables of a study, and ways to look at them.

    Attributes:
        study: The study that was run.
        tables: Polars frames by name; `.to_pandas()` of a frame gives pandas.
        report: What report.json holds: the model, the versions, and under "studies" the facts of this study.
        waiting: The shards that are missing, as "2/3"; as long as there are any, there are no tables.
        n_computed: Tables that this run computed, those of its parts included; the others were finished before.
    """

    study: Study
    tables: Mapping[str, pl.DataFrame]
    report: Mapping[str, Any]
    waiting: Sequence[str] = ()
    n_computed: int = 0

    @property
    def facts(self) -> Facts:
        """Return what the page knows of the model and the run."""
        from dimscope.page.section import Facts

        return Facts.from_json(self.report)

    def summary(self) -> Summary:
        """Return the answer in one sentence, and the tables that say most."""
        return self.study.load().summarise(self.tables, self.facts)

    def figures(self) -> dict[str, go.Figure]:
        """Return every figure of the page by name, as plotly figures."""
        from dimscope.page.section import Plot

        sections = self.study.load().make_sections(self.tables, self.facts)
        return {
            block.anchor: block.figure for section in sections for block in section.blocks if isinstance(block, Plot)
        }

    def figure(self, name: str) -> go.Figure:
        """Return one figure of the page.

        Raises:
            InvalidArgument: There is no figure of this name; the message lists the names.
        """
        figures = self.figures()
        if name not in figures:
            raise InvalidArgument(f"there is no figure {name!r}; the figures are {', '.join(figures)}")
        return figures[name]

    def page(self, out: str | Path) -> Path:
        """Write the tables and the page of this study into a folder, and return the path of the page."""
        from dimscope.page.render import write_page
        from dimscope.storage import write_json, write_table

        out = Path(out)
        for name, frame in self.tables.items():
            write_table(out / "tables" / f"{name}.parquet", frame)
        write_json(out / "report.json", dict(self.report))
        code, facts = self.study.load(), self.facts
        return write_page(page_of([code], self.tables, facts), out)

    def __repr__(self) -> str:
        """Return the answer and the names of the tables, in a few lines."""
        if self.waiting:
            return f"{self.study.name}: waiting for shards {', '.join(self.waiting)}"
        tables = ", ".join(f"{name} ({len(frame):,} rows)" for name, frame in self.tables.items())
        return f"{self.summary().answer}\ntables: {tables}"

    def _repr_html_(self) -> str:
        """Return the answer and its first table for a notebook."""
        from html import escape

        summary = self.summary()
        table = next(iter(summary.frames.values()), None)
        return f"<p>{escape(summary.answer)}</p>" + ("" if table is None else table.head(20)._repr_html_())


def page_of(codes: Sequence[StudyCode], tables: Tables, facts: Facts) -> Page:
    """Return what the page shows of finished studies, in their order."""
    from dimscope.page.render import Page

    return Page(
        facts,
        tuple(highlight for code in codes for highlight in code.highlights(tables, facts)),
        tuple(section for code in codes for section in code.make_sections(tables, facts)),
        {name: value for code in codes for name, value in code.page_data(tables, facts).items()},
    )


def run_study(
    study: Study,
    source: Checkpoint | VectorTable,
    settings: Any,
    *,
    out: Path | None = None,
    monitor: Monitor = SILENT,
) -> StudyResult:
    """Run one study: into a folder, where finished tables are used again, or in memory.

    Raises:
        DimscopeError: What the study, and opening, reading and running its models raise.
    """
    from dimscope.checkpoints.checkpoint import Checkpoint
    from dimscope.storage import FORMAT, CountingStore, MemoryStore, ResultFolder
    from dimscope.studies.provenance import definition_number, fingerprint, source_facts

    began = time.monotonic()
    mark = fingerprint(source)  # of a model or vectors in memory this reads all numbers
    recipe = mark | {"definition": study.definition}
    store = CountingStore(MemoryStore() if out is None else ResultFolder(out, recipe, definition_number))
    output = study.load().run(source, settings, store, monitor)
    own = {
        "facts": dict(output.facts),
        "tables": list(output.tables),
        "warnings": [*(source.notes if isinstance(source, Checkpoint) else ()), *output.warnings],
        "seconds": round(time.monotonic() - began, 1),
        "definition": [FORMAT, study.definition],
    }
    report = source_facts(source) | {"studies": {study.name: own}, "fingerprint": mark}
    return StudyResult(study, output.tables, report, output.waiting, n_computed=store.n_computed)
