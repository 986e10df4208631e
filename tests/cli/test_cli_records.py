"""Texts in records, and in other encodings, through the commands that read texts."""

from __future__ import annotations

import json

import models
import polars as pl
import pytest

pytestmark = pytest.mark.slow  # whole commands

LIGHT = ("--truncate", "50%", "--windows", "2", "--length", "16")


def loss(cli, folder, text: object) -> float:
    result = cli("damage", folder, *LIGHT, "--text", text, "--json")
    assert result.returncode == 0, result.stderr[-600:]
    return next(row["loss"] for row in json.loads(result.stdout)["changes 1"] if row["change"] == "undamaged")


def test_records_have_the_numbers_of_their_text(checkpoint, cli, tmp_path):
    folder, lines = checkpoint("llama"), models.TEXT.splitlines(keepends=True)
    rows = [{"id": str(n), "story": line} for n, line in enumerate(lines)]
    (tmp_path / "a.txt").write_text(models.TEXT, encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps([{"text": row["story"]} for row in rows], indent=1), encoding="utf-8")
    pl.DataFrame({"n": range(len(rows)), "content": [row["story"] for row in rows]}).write_parquet(
        tmp_path / "a.parquet"
    )
    expected = loss(cli, folder, tmp_path / "a.txt")
    for text in ("a.jsonl:story", "a.json", "a.parquet"):
        assert loss(cli, folder, tmp_path / text) == expected


def test_texts_that_cannot_be_read_are_one_line(checkpoint, cli, refused, tmp_path):
    folder = checkpoint("llama")
    quoted = "\u201cThe keeper\u201d counted \u2013 ships".encode("cp1252")
    for name, content, words in (
        ("a.jsonl", b'{"id": "a", "story": "b"}', ("id, story", "a.jsonl:id")),
        ("b.jsonl", b'{"text": "a"}\n{"text": "b"\n', ("line 2 is no JSON",)),
        ("c.txt", quoted, ("not UTF-8 (the byte 93 at offset 0)", "iconv -f WINDOWS-1252")),
    ):
        (tmp_path / name).write_bytes(content)
        refused(cli("layers", folder, "--text", tmp_path / name, "-o", tmp_path / "out"), name, *words)
