"""Line ends: CRLF and CR are read as LF wherever a text comes from and however it is cut, and kept on request."""

import io
import re
from itertools import pairwise

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrices import PROPERTY

from dimscope.texts import line_ends
from dimscope.texts import texts as module
from dimscope.texts.line_ends import CarriageReturns, count_carriage_returns, with_lf
from dimscope.texts.texts import Text, open_text, text_from_string

CONTENT = "one\r\ntwo\rthree\n\r\n\r\rfour\r"
LF = "one\ntwo\nthree\n\n\n\nfour\n"


def read(text: Text) -> str:
    return "".join(text.pieces())


@PROPERTY
@given(st.text("\r\na"), st.lists(st.integers(0, 30)), st.integers(2, 5))
def test_any_cut_of_a_text_gives_the_same_line_ends(content, cuts, size):
    bounds = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    parts = [content[a:b] for a, b in pairwise(bounds)]
    expected = re.sub("\r\n?", "\n", content)
    assert "".join(with_lf(parts)) == expected
    counted = count_carriage_returns(parts) or CarriageReturns(0, 0)
    assert (counted.crlf, counted.cr) == (content.count("\r\n"), len(re.findall("\r(?!\n)", content)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", size)
        patch.setattr(module, "READ_BYTES", 3)
        source = open_text("-", stdin=io.BytesIO(f"x{content}".encode()))
        assert list(source.pieces()) == list(text_from_string(f"x{expected}").pieces())


@pytest.mark.parametrize("kind", ["file", "standard input", "string", "parquet"])
def test_every_source_is_read_with_lf_unless_line_ends_are_kept(kind, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(CONTENT.encode())
    pl.DataFrame({"text": [CONTENT]}).write_parquet(tmp_path / "a.parquet")

    def opened(keep: bool) -> Text:
        if kind == "string":
            return text_from_string(CONTENT, keep_line_ends=keep)
        source = {"file": path, "standard input": "-", "parquet": tmp_path / "a.parquet"}[kind]
        return open_text(str(source), stdin=io.BytesIO(CONTENT.encode()), keep_line_ends=keep)

    text, kept = opened(False), opened(True)
    assert (read(text), read(kept)) == (LF, CONTENT)
    assert (text.changed_line_ends(), kept.changed_line_ends()) == (CarriageReturns(2, 4), None)
    assert text.fingerprint != kept.fingerprint


def test_a_crlf_that_lies_across_two_documents_is_one_line_end(tmp_path):
    contents = {"a.txt": "one\r", "b.txt": "\ntwo\r", "c.txt": "three\r\n", "d.txt": "\nfour"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode())
    pl.DataFrame({"text": list(contents.values())}).write_parquet(tmp_path / "rows.parquet")
    for source in (tmp_path, tmp_path / "rows.parquet"):
        text = open_text(str(source))
        assert read(text) == "one\ntwo\nthree\n\nfour"
        assert text.changed_line_ends() == CarriageReturns(2, 1)


def test_a_long_text_is_counted_in_part_and_then_no_number_is_given(monkeypatch):
    monkeypatch.setattr(line_ends, "COUNTED", 10)
    counted = text_from_string("a\r\nb\rc\n").changed_line_ends()
    assert str(counted) == "1 CRLF and 1 CR line ends"
    parts = ["a\r\n"] * 4
    assert (str(count_carriage_returns(parts)), str(count_carriage_returns([*parts, "a"]))) == (
        "4 CRLF line ends",
        "CRLF line ends",
    )
    assert text_from_string("a\nb").changed_line_ends() is None
