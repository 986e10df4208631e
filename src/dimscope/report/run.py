"""From an opened checkpoint to the finished page: runs the studies into a folder and writes the page from their tables."""

from pathlib import Path
from typing import Any

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.report.page import write_page
from dimscope.results import ResultFolder, write_json
from dimscope.studies.embedding import EmbeddingSettings, fingerprint, study_embedding


def run_report(checkpoint: Checkpoint, directory: Path, settings: EmbeddingSettings) -> tuple[Path, dict[str, Any]]:
    """Writes DIR/tables/*.parquet, DIR/report.json and DIR/index.html; finished tables in DIR are used again."""
    facts = study_embedding(checkpoint, ResultFolder(directory, fingerprint(checkpoint)), settings)
    write_json(directory / "report.json", facts)
    return write_page(directory), facts
