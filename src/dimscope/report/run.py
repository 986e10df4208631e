"""From an opened checkpoint to the finished page: runs a study into a folder and writes the page from all tables there."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.report.page import write_page
from dimscope.results import ResultFolder, write_json
from dimscope.studies.damage import Writing, study_damage
from dimscope.studies.damage_plan import DamageSettings
from dimscope.studies.embedding import EmbeddingSettings, study_embedding
from dimscope.studies.layer_plan import LayersSettings
from dimscope.studies.layers import sharing, study_layers
from dimscope.studies.narrowing_bench import NarrowSettings
from dimscope.studies.narrowing_plan import plan_narrowing
from dimscope.studies.provenance import fingerprint


def run_report(checkpoint: Checkpoint, directory: Path, settings: EmbeddingSettings) -> tuple[Path, dict[str, Any]]:
    """Studies the embedding table: DIR/tables/*.parquet, DIR/report.json and DIR/index.html, and its facts.

    Finished tables in DIR are used again; what another study of the same model left there stays on the page.
    """
    folder = ResultFolder(directory, fingerprint(checkpoint))
    facts = study_embedding(checkpoint, folder, settings)
    return _told(folder, facts), facts


def run_layers(
    checkpoint: Checkpoint,
    directory: Path,
    settings: LayersSettings,
    others: Sequence[Checkpoint] = (),
    announce: Callable[[str], object] | None = None,
) -> tuple[dict[str, Any], dict[str, pl.DataFrame]]:
    """Studies the hidden layers, as `run_report` does the embedding table: the facts, and the tables by name.

    Where shards are missing there is no page yet, and no tables.
    """
    folder = ResultFolder(directory, fingerprint(checkpoint))
    facts, tables = study_layers(checkpoint, folder, settings, others, announce)
    if tables:
        with sharing(directory, settings):
            _told(folder, facts)
    return facts, tables


def run_damage(
    checkpoint: Checkpoint,
    directory: Path,
    settings: DamageSettings,
    announce: Callable[[str], object] | None = None,
    watch: Callable[[Writing], object] | None = None,
) -> tuple[dict[str, Any], dict[str, pl.DataFrame]]:
    """Studies what the model loses when its embedding table is changed: the facts, and the tables by name."""
    folder = ResultFolder(directory, fingerprint(checkpoint))
    facts, tables = study_damage(checkpoint, folder, settings, announce, watch)
    _told(folder, facts)
    return facts, tables


def run_narrowing(
    checkpoint: Checkpoint,
    directory: Path,
    settings: NarrowSettings,
    *,
    widths: Sequence[int] = (),
    bases: Sequence[str] = (),
    announce: Callable[[str], object] | None = None,
) -> tuple[dict[str, Any], dict[str, pl.DataFrame]]:
    """Plans a narrowing of the model, without writing one: the facts, and the tables by name."""
    folder = ResultFolder(directory, fingerprint(checkpoint))
    facts, tables = plan_narrowing(checkpoint, folder, settings, widths=widths, bases=bases, announce=announce)
    _told(folder, facts)
    return facts, tables


def _told(folder: ResultFolder, facts: Mapping[str, Any]) -> Path:
    """Writes report.json and the page. Studies of the same model that are there already are kept."""
    path, mark = folder.path / "report.json", folder.recipe
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if before.get("fingerprint") != mark:
        before = {}
    both = {key: {**before.get(key, {}), **facts[key]} for key in ("study", "tables")}
    warnings = list(dict.fromkeys([*before.get("warnings", []), *facts["warnings"]]))
    write_json(path, {**before, **facts, **both, "warnings": warnings, "fingerprint": dict(mark)})
    return write_page(folder.path)
