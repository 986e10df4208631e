"""What a study is, how one is run, and the result that it gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import polars as pl

    from dimscope.checkpoints.checkpoint import Checkpoint
    from dimscope.page.section import Facts, Section, SectionMaker, Tables
    from dimscope.storage import Store

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
    """Who follows a run: `announce` gets one line per stage, `watch` whatever the study shows while it works."""

    announce: Callable[[str], object] = lambda line: None
    watch: Callable[[Any], object] | None = None


SILENT = Monitor()


class RunFunction(Protocol):
    """Runs a study. Every finished table goes through the store, which may have it already."""

    def __call__(self, checkpoint: Checkpoint, settings: Any, store: Store, monitor: Monitor, /) -> RunOutput: ...


@dataclass(frozen=True, slots=True)
class Summary:
    """The answer of a study for a terminal: one sentence with its number and unit, then tables, the first rows of each."""

    answer: str
    frames: Mapping[str, pl.DataFrame]
    files: tuple[str, ...] = ()
    """Tables of the study that are too large to print and that JSON gives too."""


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
        made = (make(tables, facts) for make in self.sections)
        return [section for section in made if section is not None]


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
    """

    name: str
    question: str
    settings: type
    load: Callable[[], StudyCode]
    example: str = ""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StudyResult:
    """The tables of a study, and ways to look at them."""

    study: Study
    tables: Mapping[str, pl.DataFrame] = field(repr=False)
    report: Mapping[str, Any] = field(repr=False)
    """What report.json holds: the model, the versions, and under "studies" the facts of this study."""
    waiting: Sequence[str] = ()

    @property
    def facts(self) -> Facts:
        """Return what the page knows of the model and the run."""
        from dimscope.page.section import Facts

        return Facts.from_json(self.report)


def run_study(
    study: Study,
    checkpoint: Checkpoint,
    settings: Any,
    *,
    out: Path | None = None,
    monitor: Monitor = SILENT,
) -> StudyResult:
    """Run one study: into a folder, where finished tables are used again, or in memory.

    Raises:
        DimscopeError: What the study, and opening, reading and running its models raise.
    """
    from dimscope.storage import MemoryStore, ResultFolder
    from dimscope.studies.provenance import checkpoint_facts, fingerprint

    began = time.monotonic()
    store: Store = MemoryStore() if out is None else ResultFolder(out, fingerprint(checkpoint))
    output = study.load().run(checkpoint, settings, store, monitor)
    own = {
        "facts": dict(output.facts),
        "tables": list(output.tables),
        "warnings": list(output.warnings),
        "seconds": round(time.monotonic() - began, 1),
    }
    report = checkpoint_facts(checkpoint) | {"studies": {study.name: own}, "fingerprint": fingerprint(checkpoint)}
    return StudyResult(study, output.tables, report, output.waiting)
