"""The page as a file: whole, self-contained, safe against its labels, small at the size of a real vocabulary."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from small_tables import REPORT

from dimscope.page.render import EMBED_LIMIT
from dimscope.page.section import Tables
from dimscope.report import rewrite_page
from dimscope.storage import FORMAT

Write = Callable[..., Path]


class Outline(HTMLParser):
    """Collects what a browser would see: tags, ids, titles and everything that points somewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"href", "src", "srcset", "data", "action"}]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["h2"] and data.strip():
            self.headings.append(data.strip())


@pytest.fixture(scope="module")
def text(small_run: Path) -> str:
    """Return the page of the small tables."""
    return rewrite_page(small_run).read_text(encoding="utf-8")


def test_page_is_one_whole_file_and_the_same_for_the_same_run(small_run: Path, text: str) -> None:
    path = rewrite_page(small_run)
    assert path == small_run / "index.html"
    assert sorted(p.name for p in small_run.iterdir()) == ["index.html", "report.json", "tables"]
    assert path.read_text(encoding="utf-8") == text
    assert text.startswith("<!doctype html>")
    assert text.rstrip().endswith("</html>")


def test_old_page_survives_a_failure(tables: Tables, run_folder: Write) -> None:
    folder = run_folder(tables)
    before = rewrite_page(folder).read_bytes()
    (folder / "report.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
        rewrite_page(folder)
    assert (folder / "index.html").read_bytes() == before


def test_nothing_in_the_page_points_elsewhere(text: str) -> None:
    elsewhere = [link for link in Outline(text).links if not re.match(r"#|data:|tables/\w+\.parquet$", link)]
    assert elsewhere == []
    assert """http-equiv="Content-Security-Policy" content="default-src 'none';""" in text


def test_hostile_labels_are_text_and_nothing_else(text: str) -> None:
    # Theme choice, payload, plotly, page script: a label that broke out would add a fifth.
    assert Outline(text).tags.count("script") == 4
    assert "<script>alert(1)" not in text
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text
    assert "my model&#39;s &lt;tiny&gt;" in text
    assert "a &lt;warning&gt;" in text


def test_headings_are_the_findings(text: str) -> None:
    headings = Outline(text).headings
    assert len(headings) == 14
    assert headings[0] == "What is an effective dimension?"
    assert headings[-1] == "Computed in 2 seconds with these arguments and versions"


@pytest.mark.parametrize(
    ("changes", "headings"),
    [
        ({"studies": {}}, ["Computed with these arguments and versions"]),
        ({"studies": {"unknown": {"facts": {}, "tables": []}}}, ["Computed with these arguments and versions"]),
        ({}, ["What is an effective dimension?", "Computed in 2 seconds with these arguments and versions"]),
    ],
    ids=["no study", "an unknown study", "no table"],
)
def test_page_without_results_still_opens(run_folder: Write, changes: dict[str, object], headings: list[str]) -> None:
    page = rewrite_page(run_folder({}, changes)).read_text(encoding="utf-8")
    assert Outline(page).headings == headings


def test_folder_without_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        rewrite_page(tmp_path)


def _vocabulary(size: int = 151_936) -> pl.DataFrame:
    """Return a token table as large as that of Qwen2.5 with random numbers, which compress worst."""
    rng = np.random.default_rng(0)
    kinds = np.array(["ordinary"] * (size - 290) + ["beyond"] * 290)
    letters = rng.integers(0x61, 0x7B, (size, 9)).astype(np.uint32)
    columns = {f"pc{i}": rng.standard_normal(size).astype(np.float32) for i in range(1, 11)}
    return pl.DataFrame(
        {
            "id": np.arange(size),
            "label": letters.view("<U9").ravel().tolist(),
            "category": kinds,
            "norm": rng.random(size, dtype=np.float32),
            **columns,
            "untrained_score": rng.random(size, dtype=np.float32),
            "untrained": kinds == "beyond",
        }
    ).with_columns(
        pl.lit(None, dtype=pl.String).alias(name) for name in ("reason", "untrained_sign", "untrained_reason")
    )


def _random_neighbours(size: int = 151_936, k: int = 10) -> pl.DataFrame:
    rng = np.random.default_rng(1)
    return pl.DataFrame(
        {
            "id": np.repeat(np.arange(size), k),
            "rank": np.tile(np.arange(1, k + 1), size),
            "neighbor": rng.integers(0, size, size * k),
            "cosine": rng.random(size * k, dtype=np.float32),
        }
    )


@pytest.mark.slow
def test_page_of_a_whole_vocabulary_stays_small(tables: Tables, run_folder: Write) -> None:
    matrix = np.random.default_rng(2).random((500, 500), dtype=np.float32)
    correlation = pl.DataFrame(
        {"id": range(500), "label": ["x"] * 500, "r": pl.Series(matrix, dtype=pl.Array(pl.Float32, 500))}
    )
    large = {**tables, "tokens": _vocabulary(), "knn": _random_neighbours(), "correlation": correlation}
    folder = run_folder(large)
    path = rewrite_page(folder)
    assert path.stat().st_size <= 25_000_000
    assert (folder / "tables" / "tokens.parquet").stat().st_size > EMBED_LIMIT
    assert 'id="table-tokens" href="tables/tokens.parquet"' in path.read_text(encoding="utf-8")


def test_a_study_of_another_version_is_left_out(run_folder: Write, tables: Tables) -> None:
    own = REPORT["studies"]["embedding"]
    folder = run_folder(tables)
    shown = Outline(rewrite_page(folder).read_text(encoding="utf-8")).headings
    old = {**REPORT, "studies": {"embedding": {**own, "definition": [FORMAT - 1, 2]}}}
    (folder / "report.json").write_text(json.dumps(old), encoding="utf-8")
    assert len(shown) > 5
    assert Outline(rewrite_page(folder).read_text(encoding="utf-8")).headings == [
        "Computed with these arguments and versions"
    ]
