"""From an opened checkpoint to the finished page: run studies into a folder, and write the page from all tables there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.page.render import Page, render_page, table_download
from dimscope.page.section import Facts, Tables
from dimscope.storage import STATE, alone, write_json, write_whole
from dimscope.studies import STUDIES
from dimscope.studies.study import SILENT, Monitor, Study, StudyCode, StudyResult, run_study


def run_studies(
    checkpoint: Checkpoint, settings: Mapping[Study, Any], out: Path, monitor: Monitor = SILENT
) -> list[StudyResult]:
    """Run studies into one folder, each with its settings: OUT/tables/*.parquet, OUT/report.json and OUT/index.html.

    Finished tables in the folder are used again. What other studies of the same model left there stays on the page.

    Raises:
        DimscopeError: What a study raises; every study has checked the checkpoint before the first begins.
    """
    for study in settings:
        study.load().check(checkpoint)
    results = []
    for study, own in settings.items():
        result = run_study(study, checkpoint, own, out=out, monitor=monitor)
        if not result.waiting:
            with alone(out / STATE):  # shards that finish together
                _add(result, out)
        results.append(result)
    return results


def _add(result: StudyResult, out: Path) -> None:
    """Put the facts of a study into report.json beside those of other studies of the same model, and write the page."""
    path, facts = out / "report.json", dict(result.report)
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if before.get("fingerprint") == facts["fingerprint"]:
        facts["studies"] = {**before.get("studies", {}), **facts["studies"]}
    write_json(path, facts)
    write_page(out)


def write_page(directory: Path) -> Path:
    """Write DIR/index.html from DIR/report.json and the tables in DIR/tables that it names, whole or not at all.

    Sections whose tables are missing are left out.

    Raises:
        FileNotFoundError: There is no report.json.
    """
    directory = Path(directory)
    facts = Facts.from_json(json.loads((directory / "report.json").read_text(encoding="utf-8")))
    named = [name for study in facts.studies.values() for name in study.tables]
    files = [path for name in sorted(set(named)) if (path := directory / "tables" / f"{name}.parquet").exists()]
    tables = {path.stem: pl.read_parquet(path) for path in files}
    page = directory / "index.html"
    write_whole(page, render_page(make_page(tables, facts), [table_download(path) for path in files]).encode())
    return page


def make_page(tables: Tables, facts: Facts) -> Page:
    """Return what the page shows: every study of the run, in the order of `STUDIES`."""
    codes: list[StudyCode] = [study.load() for study in STUDIES if study.name in facts.studies]
    return Page(
        facts,
        tuple(highlight for code in codes for highlight in code.highlights(tables, facts)),
        tuple(section for code in codes for section in code.make_sections(tables, facts)),
        {name: value for code in codes for name, value in code.page_data(tables, facts).items()},
    )
