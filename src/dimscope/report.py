"""From an opened model or vectors to the finished page: run studies into a folder, and write the page from all tables there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import polars as pl

from dimscope import studies
from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.page.render import write_page
from dimscope.page.section import Facts
from dimscope.storage import FORMAT, STATE, alone, write_json
from dimscope.studies.study import SILENT, Monitor, Study, StudyResult, page_of, run_study
from dimscope.vectors.table import VectorTable


def run_studies(
    source: Checkpoint | VectorTable, settings: Mapping[Study, Any], out: Path | None, monitor: Monitor = SILENT
) -> list[StudyResult]:
    """Run studies, each with its settings: in memory, or into one folder.

    A folder gets OUT/tables/*.parquet, OUT/report.json and OUT/index.html. Finished tables in it are used again. What
    other studies of the same model left there stays on the page.

    Raises:
        DimscopeError: What a study raises; every study has checked the source before the first begins.
    """
    for study in settings:
        study.check(source)
    results = []
    for study, own in settings.items():
        result = run_study(study, source, own, out=out, monitor=monitor)
        if out is not None and not result.waiting:
            # A state folder that is still there belongs to shards, and two may finish together.
            with alone(out / STATE) if (out / STATE).exists() else nullcontext():
                _add(result, out)
        results.append(result)
    return results


def _add(result: StudyResult, out: Path) -> None:
    """Put the facts of a study into report.json beside those of other studies of the same model, and write the page."""
    path, report, name = out / "report.json", dict(result.report), result.study.name
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if before.get("fingerprint") == report["fingerprint"]:
        finished, own = _current(before), report["studies"][name]
        if not result.n_computed and name in finished:
            own = own | {"seconds": finished[name].get("seconds")}  # in which its tables were computed
        report["studies"] = {**finished, name: own}
    write_json(path, report)
    rewrite_page(out)


def _current(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of report.json whose tables have the columns and rows of this version."""
    numbers = {study.name: [FORMAT, study.definition] for study in studies.STUDIES}
    entries = report.get("studies", {}).items()
    return {name: own for name, own in entries if own.get("definition") == numbers.get(name, own.get("definition"))}


def rewrite_page(out: Path) -> Path:
    """Write OUT/index.html anew from OUT/report.json and the tables in OUT/tables that it names.

    Sections whose tables are missing are left out, and studies whose tables are those of another version.

    Raises:
        FileNotFoundError: There is no report.json.
    """
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    facts = Facts.from_json(report | {"studies": _current(report)})
    names = {name for study in facts.studies.values() for name in study.tables}
    files = {name: path for name in sorted(names) if (path := out / "tables" / f"{name}.parquet").exists()}
    tables = {name: pl.read_parquet(path) for name, path in files.items()}
    codes = [study.load() for study in studies.STUDIES if study.name in facts.studies]
    return write_page(page_of(codes, tables, facts), out)
