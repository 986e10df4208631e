"""Texts from every kind of source: the same characters, in bounded pieces, and one clear line where there is no text."""

import gzip
import hashlib
import io
import json
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrices import PROPERTY

from dimscope.errors import InvalidArgument, NetworkError
from dimscope.texts import records, urls
from dimscope.texts import texts as module
from dimscope.texts.texts import open_text, text_from_string

WORDS = "Die Möwe sah 7 Schiffe 🚢 und\nflog — ohne Eile — weiter.\n"


def read(text: module.Text) -> str:
    return "".join(text.pieces())


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refused(source: object, **arguments) -> str:
    """Return the message of the refusal: one line."""
    with pytest.raises(InvalidArgument) as caught:
        read(open_text(str(source), **arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- files, standard input, built-in texts -------------------------------------------------------------------------


def test_a_file_is_read_as_it_is_and_anew_at_each_call(tmp_path):
    text = open_text(write(tmp_path / "möwe.txt", WORDS))
    assert (text.name, read(text), read(text)) == ("möwe.txt", WORDS, WORDS)
    assert text.n_bytes == len(WORDS.encode())


def test_the_fingerprint_of_a_file_changes_with_it(tmp_path):
    path = tmp_path / "a.txt"
    before = open_text(write(path, "one")).fingerprint
    assert json.loads(json.dumps(before)) == before == open_text(str(path)).fingerprint
    assert (before["name"], before["size"]) == ("a.txt", 3)
    os.utime(path, ns=(0, before["mtime_ns"] + 1))
    assert open_text(str(path)).fingerprint != before


@pytest.mark.parametrize(("key", "file"), [("prose", "prose.txt"), ("html", "page.html")])
def test_the_texts_of_the_package(key, file):
    text = open_text(f"builtin:{key}")
    data = (Path(module.__file__).parent.parent / "builtin/texts" / file).read_bytes()
    assert (text.name, read(text).encode(), text.n_bytes) == (f"builtin {key}", data, len(data))
    assert "builtin:prose, builtin:html, not builtin:verse" in refused("builtin:verse")


def test_standard_input_is_read_once_and_can_be_repeated():
    text = open_text("-", stdin=io.BytesIO(WORDS.encode()))
    assert (text.name, read(text), read(text)) == ("standard input", WORDS, WORDS)
    assert text.fingerprint["sha256"] == hashlib.sha256(WORDS.encode()).hexdigest()


def test_standard_input_above_the_cap_is_refused(monkeypatch):
    monkeypatch.setattr(urls, "LARGEST", 10)
    assert "standard input: more than" in refused("-", stdin=io.BytesIO(b"a" * 11))
    assert read(open_text("-", stdin=io.BytesIO(b"a" * 10))) == "a" * 10


def test_a_pipe_is_held_as_standard_input_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"through a pipe",))
    writer.start()
    text = open_text(str(tmp_path / "pipe"))
    writer.join()
    assert read(text) == read(text) == "through a pipe"


# ---- pieces --------------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.lists(st.sampled_from(["a", "é", "漢", "🚢", " ", "\n", "\r\n", "word"]), min_size=1), st.integers(2, 9))
def test_pieces_join_to_the_text_whatever_their_size(parts, size):
    whole = "".join([*parts, "x"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", size)
        patch.setattr(module, "READ_BYTES", 3)  # a third of the characters lie across two blocks
        pieces = list(open_text("-", stdin=io.BytesIO(whole.encode()), keep_line_ends=True).pieces())
    assert "".join(pieces) == whole
    assert max(map(len, pieces)) <= size


def test_pieces_end_after_a_line_break_or_a_space_where_there_is_one(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "PIECE", 8)
    text = open_text(write(tmp_path / "a.txt", "abc de\nf gh ijk ab lmnopqrstuvw xyz"))
    assert list(text.pieces()) == ["abc de\n", "f gh ", "ijk ab ", "lmnopqrs", "tuvw xyz"]


def test_a_file_larger_than_a_piece_is_never_held_whole(tmp_path):
    path = write(tmp_path / "large.txt", WORDS * 500_000)  # 32 MB
    tracemalloc.start()
    try:
        pieces = open_text(path).pieces()
        assert len(next(pieces)) <= module.PIECE
        assert sum(1 for _ in pieces) > 25
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30e6  # a few pieces of 4 bytes a character; the whole is 110 MB


# ---- what is no text -----------------------------------------------------------------------------------------------


def test_what_is_not_there(tmp_path):
    assert refused(tmp_path / "none.txt").startswith(f"{tmp_path / 'none.txt'}: no such file or folder; pass a file")
    assert "no such file" in refused(tmp_path / "none.parquet:text")
    assert "cannot be read (File name too long)" in refused("a" * 300)
    assert "`texts` has an empty string" in refused("")


@pytest.mark.parametrize("sentence", ["The cat sat.", "It was the best of times, " * 20, "Mr. Smith\nwent out"])
def test_a_sentence_is_told_from_a_missing_file(sentence):
    message = refused(sentence)
    assert message.startswith((f"'{sentence.split()[0]} ", f"'{sentence[:40]}...'"))
    assert message.endswith(
        "no such file or folder; to pass the text itself, use `text=...` in Python or - for standard input"
    )


def test_a_string_is_a_text():
    text = text_from_string(WORDS, "words")
    assert (text.name, read(text), read(text), text.n_bytes) == ("words", WORDS, WORDS, len(WORDS.encode()))
    assert text.fingerprint != text_from_string(WORDS + ".", "words").fingerprint
    assert read(text_from_string("builtin:prose")) == "builtin:prose"
    for blank in ("", " \n\t"):
        with pytest.raises(InvalidArgument, match="text: there is no text in it"):
            text_from_string(blank)


@pytest.mark.parametrize("content", ["", " \n\t\r\n", "\ufeff", "\ufeff \n", " " * 3_000_000], ids=range(5))
def test_a_file_without_text(content, tmp_path):
    assert "there is no text in it" in refused(write(tmp_path / "blank.txt", content))


def test_binary_files(tmp_path):
    assert "looks like a binary file (the byte at offset 4 is NUL)" in refused(write(tmp_path / "a.txt", b"abcd\0e"))
    noise = b"".join(hashlib.sha256(bytes([i])).digest() for i in range(99)).replace(b"\0", b"\1")
    assert "control characters); pass plain text" in refused(write(tmp_path / "b.txt", noise))
    refused(write(tmp_path / "c.txt", gzip.compress(WORDS.encode())))


def test_another_encoding_is_named_with_the_byte(tmp_path):
    message = refused(write(tmp_path / "latin.txt", "Die Möwe".encode("latin-1")))
    assert message.startswith(f"{tmp_path / 'latin.txt'}: not UTF-8 (the byte F6 at offset 5); convert it to UTF-8")
    for encoding in ("utf-16", "utf-16-be"):
        data = WORDS.encode(encoding)
        assert "is UTF-16; convert it" in refused(
            write(tmp_path / "b.txt", data if data[0] == 0xFF else b"\xfe\xff" + data)
        )
    assert "not UTF-8 (the byte E2 at offset 3)" in refused(write(tmp_path / "cut.txt", b"abc\xe2\x80"))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_wrong_byte_far_into_the_file_is_found_when_it_is_read(mark, tmp_path):
    data = mark + "漢".encode() * 1_500_000
    text = open_text(write(tmp_path / "late.txt", data + b"\xff and more"))
    pieces = text.pieces()
    next(pieces)
    with pytest.raises(InvalidArgument, match=rf"the byte FF at offset {len(data):,}\)"):
        list(pieces)


def test_a_byte_order_mark_is_dropped(tmp_path):
    assert read(open_text(write(tmp_path / "bom.txt", b"\xef\xbb\xbf" + WORDS.encode()))) == WORDS


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    for name in ("a.txt", "a.parquet"):
        path = write(tmp_path / name, "secret")
        Path(path).chmod(0)
        assert "no permission to read it" in refused(path)


def test_a_file_that_goes_away_is_named(tmp_path):
    text = open_text(write(tmp_path / "a.txt", "here"))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InvalidArgument, match="no such file"):
        read(text)


# ---- folders -------------------------------------------------------------------------------------------------------


def test_the_files_of_a_folder_run_on_in_order_and_words_never_join(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, content in {
        "b.md": "second", "a.txt": "first", "sub/c.HTML": "<p>third</p>\n", "sub/d.htm": "", "sub/e.txt": "last",
        "ignored.bin": "\0",
    }.items():  # fmt: skip
        write(tmp_path / name, content)
    text = open_text(str(tmp_path))
    assert text.name == f"{tmp_path.name}/"
    assert read(text) == "first\nsecond\n<p>third</p>\nlast"
    assert text.n_bytes == sum(map(len, ("first", "second", "<p>third</p>\n", "last")))
    write(tmp_path / "sub/d.htm", "x")
    assert open_text(str(tmp_path)).fingerprint != text.fingerprint
    write(tmp_path / "sub/d.htm", "caf\xe9".encode("latin-1"))
    assert refused(tmp_path).startswith(f"{tmp_path / 'sub/d.htm'}: not UTF-8")


def test_a_folder_without_texts(tmp_path):
    write(tmp_path / "model.bin", "x")
    assert "no text files in this folder (*.txt, *.md, *.html, *.htm)" in refused(tmp_path)
    write(tmp_path / "a.txt", "  ")
    assert "there is no text in it" in refused(tmp_path)


# ---- Parquet -------------------------------------------------------------------------------------------------------


def parquet(path: Path, **columns) -> str:
    pl.DataFrame(columns).write_parquet(path, row_group_size=1000)
    return str(path)


def test_a_column_of_strings_runs_on_without_its_nulls(tmp_path):
    rows = [None if i % 7 == 0 else f"row {i}" + "\n" * (i % 2) for i in range(2500)]
    source = parquet(tmp_path / "[data].parquet", story=rows, id=list(range(2500)))
    expected = "\n".join(row.removesuffix("\n") for row in rows if row)
    for text in (open_text(source), open_text(f"{source}:story")):
        assert text.name == "[data].parquet:story"
        assert read(text).rstrip("\n") == expected
    assert text.fingerprint["column"] == "story"


def test_columns_that_must_be_named(tmp_path):
    source = parquet(tmp_path / "a.parquet", title=["t"], body=["b"], id=[1])
    for wrong in (source, f"{source}:id", f"{source}:nothing"):
        assert f"those are title, body; pass {source}:title" in refused(wrong)
    assert read(open_text(f"{source}:body")) == "b"
    assert read(open_text(parquet(tmp_path / "b.parquet", title=["t"], text=["x"]))) == "x"
    assert "no column of strings" in refused(parquet(tmp_path / "c.parquet", id=[1]))
    assert "there is no text in it" in refused(parquet(tmp_path / "d.parquet", text=pl.Series([None], dtype=pl.String)))


LINES = [
    {"id": "a", "text": "The cat\nsat."},
    {"id": "b", "text": None},
    {"id": "c"},
    {"id": "d", "text": "Ein Dörfchen"},
]


def json_lines(path: Path, rows: list, between: str = "\n") -> str:
    return write(path, between.join(json.dumps(row) for row in rows))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
@pytest.mark.parametrize("between", ["\n", "\n\n", "\r\n"])
def test_records_run_on_in_order_without_those_that_have_no_text(tmp_path, name, between):
    source = json_lines(tmp_path / name, LINES, between)
    for named in (source, f"{source}:text"):
        text = open_text(named)
        assert (text.name, read(text), read(text)) == (f"{name}:text", "The cat\nsat.\nEin Dörfchen", read(text))
    assert read(open_text(f"{source}:id")) == "a\nb\nc\nd"


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (LINES, "The cat\nsat.\nEin Dörfchen"),
        ({"id": 1, "text": "one"}, "one"),
        (["one", "two"], "one\ntwo"),
        ({"chapters": ["one", "two"]}, "one\ntwo"),
        ([{"content": "x", "title": "t"}], "x"),
        ([{"n": 1, "story": "x", "tags": ["t"]}], "x"),
    ],
)
def test_a_json_file_is_a_list_of_records_or_one(tmp_path, value, text, indent):
    path = write(tmp_path / "a.json", json.dumps(value, indent=indent))
    assert read(open_text(path)) == text


def test_long_json_texts_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "READ_BYTES", 1000)
    rows = [{"text": f"row {i} " + "é" * (i % 7) * 500 + "\n"} for i in range(300)]
    expected = "".join(row["text"] for row in rows)
    for name, content in (("a.jsonl", "\n".join(map(json.dumps, rows))), ("a.json", json.dumps(rows))):
        assert read(open_text(write(tmp_path / name, content))) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', "line 3 is no JSON (Expecting value)"),
        ("a.json", '[{"text": "x"},\n {"text": "y"},\n {"text"}]', "line 3 is no JSON (Expecting ':' delimiter)"),
        ("a.json", '[{"text": "x"},\n', "line 2 is no JSON (Expecting value)"),
        ("a.jsonl", '{"title": "t", "body": "b", "n": 1}', "those with text are title, body; pass {path}:title"),
        ("a.jsonl", '{"n": 1}', "no field holds text; the fields are n"),
        ("a.jsonl", '{"text": "x"}\n{"text": 7}', "'text' in line 2 is a number, not text"),
        ("a.json", '[{"text": "x"}, 3]', "'text' in line 1 is a number, not text"),
        ("a.jsonl", "[" * 100_000, "line 1 is no JSON (nested too deeply)"),
        ("a.json", "[]", "there is no text in it"),
        ("a.jsonl", "", "there is no text in it"),
    ],
)
def test_records_that_cannot_be_read_are_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(InvalidArgument) as caught:
        read(open_text(path))
    assert message.format(path=path) in str(caught.value)
    assert str(caught.value).startswith((path, f"{name}: "))
    assert "\n" not in str(caught.value)


def test_a_field_that_is_not_there(tmp_path):
    path = json_lines(tmp_path / "a.jsonl", LINES)
    assert "no field 'body' in it; the fields are id, text" in refused(f"{path}:body")


def test_lone_surrogates_of_json_are_replaced(tmp_path):
    assert read(open_text(write(tmp_path / "a.jsonl", r'{"text": "a\ud800b é"}'))) == "a?b é"


def test_windows_1252_is_told_from_latin_1_by_bytes_that_latin_1_has_no_text_for(tmp_path):
    quoted = "He said \u201cM\u00f6we\u201d \u2013 twice"
    for text, encoding, named in (
        (quoted, "cp1252", "iconv -f WINDOWS-1252 -t UTF-8 if it is Windows-1252"),
        ("Möwe " * 300_000 + quoted, "cp1252", "WINDOWS-1252"),  # the first sign of it lies far behind the first byte
        ("Die Möwe", "latin-1", "iconv -f ISO-8859-1 -t UTF-8 if it is Latin-1"),
    ):
        assert named in refused(write(tmp_path / "a.txt", text.encode(encoding)))
    mixed = "漢字 ".encode() * 9 + b"M\xf6we"  # the bytes 80 to 9F of whole characters are no sign
    assert "ISO-8859-1" in refused(write(tmp_path / "b.txt", mixed))


def test_what_only_calls_itself_parquet(tmp_path):
    assert "no Parquet file, or a damaged one" in refused(write(tmp_path / "a.parquet", "text"))


def test_a_row_group_is_never_held_whole(tmp_path, monkeypatch):
    source, asked = parquet(tmp_path / "a.parquet", text=[f"row {i}\n" for i in range(3000)]), []
    rows = pl.LazyFrame.slice
    monkeypatch.setattr(pl.LazyFrame, "slice", lambda *a: asked.append(a[1:]) or rows(*a))
    monkeypatch.setattr(module, "PIECE", 100)
    next(open_text(source).pieces())
    assert set(asked) == {(0, records.ROWS)}


# ---- URLs ----------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.pages[self.path.partition("?")[0]](self)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def answer(self, status: int, body: bytes, *, length: int | None = None, **headers: str) -> None:
        self.begin(status, **{"Content-Length": str(len(body) if length is None else length), **headers})
        self.wfile.write(body)
        self.close_connection = True

    def begin(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def drip(self, byte: bytes, pause: float) -> None:
        """Send for long without a length, until the client hangs up or the test is over."""
        self.begin(200, Content_Type="text/plain")
        self.close_connection = True
        with suppress(ConnectionError):
            for _ in range(500):
                if not self.server.over.wait(pause):
                    self.wfile.write(byte)


Page = Callable[[_Handler], None]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Return `serve(pages)`: a server on a local port that answers paths by functions; its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(pages: dict[str, Page]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        server.pages, server.over = pages, threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


def unreachable(source: str) -> str:
    with pytest.raises(NetworkError) as caught:
        open_text(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_url_is_read_once_and_held(serve):
    asked = []
    url = serve({"/a.txt": lambda h: asked.append(1) or h.answer(200, WORDS.encode())})
    text = open_text(f"{url}/a.txt?token=secret#top")
    assert (text.name, read(text), read(text), asked) == (f"{url}/a.txt", WORDS, WORDS, [1])
    assert text.fingerprint["sha256"] == hashlib.sha256(WORDS.encode()).hexdigest()


def test_the_charset_of_the_header_is_honoured(serve):
    def page(charset: str, data: bytes) -> Page:
        return lambda h: h.answer(200, data, Content_Type=f"text/html; charset={charset}")

    url = serve(
        {
            "/latin": page("ISO-8859-1", "Möwe".encode("latin-1")),
            "/bom": page("UTF-8", "\ufeffMöwe".encode()),
            "/none": lambda h: h.answer(200, "Möwe".encode("latin-1")),
            "/lie": page("us-ascii", "Möwe".encode()),
            "/unknown": page("klingon", b"x"),
        }
    )
    assert read(open_text(f"{url}/latin")) == read(open_text(f"{url}/bom")) == "Möwe"
    assert f"{url}/none: not UTF-8 (the byte F6 at offset 1)" in refused(f"{url}/none")
    assert "the server calls it us-ascii, but" in refused(f"{url}/lie")
    assert "the server calls it klingon, but" in refused(f"{url}/unknown")


def test_redirects_are_followed_to_http_only(serve, tmp_path):
    def to(place: str) -> Page:
        return lambda h: h.answer(302, b"", Location=place)

    secret = write(tmp_path / "secret.txt", "secret")
    url = serve(
        {
            "/old": to("/new"),
            "/new": lambda h: h.answer(200, b"moved"),
            "/file": to(f"file://{secret}"),
            "/ftp": to("ftp://127.0.0.1/a"),
            "/data": to("data:,secret"),
            "/loop": to("/loop"),
        }
    )
    assert read(open_text(f"{url}/old")) == "moved"
    for page in ("file", "ftp", "data", "loop"):
        assert unreachable(f"{url}/{page}").startswith(f"{url}/{page}: cannot be read (")


@pytest.mark.parametrize("source", ["file:///etc/hostname", "ftp://127.0.0.1/a", "gopher://x/y", "S3://bucket/a.txt"])
def test_other_schemes_are_refused(source):
    assert "begin with http:// or https://" in refused(source)


def test_passwords_and_tokens_do_not_get_into_messages(serve):
    assert "hunter2" not in refused("http://me:hunter2@127.0.0.1/a")
    url = serve({"/a": lambda h: h.answer(403, b"")})
    message = unreachable(f"{url}/a?token=hunter2")
    assert (
        message == f"{url}/a: cannot be read (the server answers 403 Forbidden); check the address and the connection"
    )


def test_what_cannot_be_reached(serve, hub_endpoint):
    url = serve({"/gone": lambda h: h.answer(404, b"not here")})
    assert "the server answers 404 Not Found" in unreachable(f"{url}/gone")
    assert "Connection refused" in unreachable(f"{hub_endpoint}/a")
    assert "cannot be read" in unreachable("http://127.0.0.1:notaport/")
    assert "no URL" in refused("http://[::1/a")


def test_a_server_that_says_nothing(serve, monkeypatch):
    monkeypatch.setattr(urls, "TIMEOUT", 0.2)
    url = serve({"/slow": lambda h: h.server.over.wait(20), "/stuck": lambda h: (h.begin(200), h.server.over.wait(20))})
    assert "no answer for 0.2 s" in unreachable(f"{url}/slow")
    assert "no answer for 0.2 s" in unreachable(f"{url}/stuck")


def test_a_server_that_drips_is_left_at_the_deadline(serve, monkeypatch):
    monkeypatch.setattr(urls, "DEADLINE", 0.3)
    url, begin = serve({"/drip": lambda h: h.drip(b"a", 0.02)}), time.monotonic()
    assert "not complete after 0.3 s" in unreachable(f"{url}/drip")
    assert time.monotonic() - begin < 5


def test_bodies_above_the_cap(serve, monkeypatch):
    monkeypatch.setattr(urls, "LARGEST", 1 << 20)
    url = serve(
        {"/endless": lambda h: h.drip(b"a" * 65_536, 0), "/said": lambda h: h.answer(200, b"a", length=1 << 40)}
    )
    for page in ("endless", "said"):
        assert f"{url}/{page}: more than 1 MiB" in unreachable(f"{url}/{page}")


def test_a_download_that_breaks_off(serve):
    url = serve({"/cut": lambda h: h.answer(200, b"only this", length=1000)})
    assert "broke off after 9 of 1,000 bytes" in unreachable(f"{url}/cut")


def test_a_binary_or_empty_page(serve):
    url = serve({"/pdf": lambda h: h.answer(200, b"%PDF\0\0"), "/empty": lambda h: h.answer(200, b"")})
    assert "looks like a binary file" in refused(f"{url}/pdf")
    assert "there is no text in it" in refused(f"{url}/empty")
