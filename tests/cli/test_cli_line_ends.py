"""A text with CRLF gives the numbers of the same text with LF, in every study and with a warning; or its own, on request."""

from __future__ import annotations

import json
from pathlib import Path

import models
import polars as pl
import polars.selectors as cs
import pytest
from polars.testing import assert_frame_equal

import dimscope

pytestmark = pytest.mark.slow  # whole commands

STUDIES = ("layers", "damage", "narrowing")
LIGHT = (
    "--layers.shuffles", "0", "--layers.shuffles-across", "0", "--layers.no-random-weights", "--damage.change", "truncate:50%",
    "--narrowing.width", "24", "--narrowing.basis", "raw", "--windows", "2", "--length", "32",
)  # fmt: skip
TABLES = ("layers", "texts", "confidence", "damage", "plan")
TIMES = cs.starts_with("prefill", "decode")  # no two runs take the same
LINES = models.TEXT.replace(". ", ".\n")


@pytest.fixture(scope="module")
def reports(checkpoint, cli, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Return the folder and stderr of three reports: on a text with LF, with CRLF, and with CRLF kept."""
    folder, made = tmp_path_factory.mktemp("line-ends"), {}
    runs = {"lf": ("\n", ()), "crlf": ("\r\n", ()), "kept": ("\r\n", ("--keep-line-ends",))}
    for name, (end, options) in runs.items():
        text = folder / name / "lines.txt"
        text.parent.mkdir()
        text.write_bytes(LINES.replace("\n", end).encode())
        out = folder / name / "out"
        ran = cli("report", checkpoint("llama"), "--studies", *STUDIES, "--text", text, *LIGHT, *options, "-o", out)
        assert ran.returncode == 0, ran.stderr
        made[name] = out, ran.stderr
    return made


def tables(out: Path) -> dict[str, pl.DataFrame]:
    return {name: pl.read_parquet(out / "tables" / f"{name}.parquet").drop(TIMES) for name in TABLES}


def test_a_text_with_crlf_gives_the_numbers_of_the_text_with_lf(reports):
    lf, crlf, kept = (tables(reports[name][0]) for name in ("lf", "crlf", "kept"))
    for name in TABLES:
        assert_frame_equal(crlf[name], lf[name])
        assert not kept[name].equals(lf[name])


def test_every_study_warns_of_line_ends_that_it_changed(reports):
    sentence = f"lines.txt: {LINES.count(chr(10)):,} CRLF line ends were read as LF; --keep-line-ends keeps them"
    for name, expected in (("lf", []), ("crlf", [sentence]), ("kept", [])):
        out, stderr = reports[name]
        studies = json.loads((out / "report.json").read_text(encoding="utf-8"))["studies"]
        assert [studies[study]["warnings"] for study in STUDIES] == [expected] * len(STUDIES)
        assert stderr.count(sentence) == len(expected) * len(STUDIES)
        assert (sentence in (out / "index.html").read_text(encoding="utf-8")) == bool(expected)


def test_a_string_is_read_as_a_file_is(checkpoint):
    def loss(end: str, **options: bool) -> float:
        return dimscope.evaluate(str(checkpoint("llama")), text=LINES.replace("\n", end), length=32, **options).loss

    assert loss("\r\n") == loss("\r") == loss("\n") != loss("\r\n", keep_line_ends=True)
    text, settings = LINES.replace("\n", "\r\n"), {"windows": 1, "length": 32}
    for options in ({}, {"keep_line_ends": True}):
        result = dimscope.damage(str(checkpoint("llama")), changes="truncate:50%", text=text, **settings, **options)
        assert [w for w in result.facts.warnings if "CRLF" in w] == ([] if options else [
            f"text: {LINES.count(chr(10)):,} CRLF line ends were read as LF; --keep-line-ends keeps them"
        ])  # fmt: skip
