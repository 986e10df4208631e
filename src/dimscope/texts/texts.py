"""Texts for a model: opened from files, folders, records, URLs or memory, read piece by piece. Knows nothing of tokens."""

import codecs
import errno
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dimscope.errors import InvalidArgument
from dimscope.texts import urls
from dimscope.texts.line_ends import CarriageReturns, count_carriage_returns, with_lf
from dimscope.texts.records import SUFFIXES as RECORDS
from dimscope.texts.records import json_field, parquet_column, parquet_rows, split_field

PIECE = 1 << 20  # characters
READ_BYTES = 1 << 20  # bytes of a file read at once
SCANNED = 64  # blocks after a byte that is not UTF-8, which show what encoding a text has
NOT_IN_WINDOWS_1252 = {0x81, 0x8D, 0x8F, 0x90, 0x9D}
BUILTIN = {"prose": "prose.txt", "html": "page.html"}
JSON = tuple(suffix for suffix in RECORDS if suffix != ".parquet")
SUFFIXES = (".txt", ".md", ".html", ".htm")
SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
SOURCES = "pass a file, a folder, a URL, - or builtin:prose"
SHOWN = 40  # characters of a sentence that an error repeats
MOST_CONTROLS = 0.02  # share of control characters; random bytes have a tenth, texts in any encoding next to none


@dataclass(frozen=True, slots=True)
class Text:
    """A text that can be read again and again, in bounded memory.

    Each call of `pieces` reads it from its beginning: strings of at most `PIECE` characters, cut after a line break, or
    else a space, where their second half has one. Reading raises InvalidArgument where the source is no text.
    """

    name: str  # as it is shown: a file's name, "builtin prose", a URL without its query, "standard input"
    pieces: Callable[[], Iterator[str]]
    fingerprint: dict[str, Any]  # JSON; the same as long as the source has not changed
    n_bytes: int | None  # of the source, where that is known before it is read
    changed_line_ends: Callable[[], CarriageReturns | None] = lambda: None  # counts those that `pieces` gives as LF


@dataclass(frozen=True, slots=True)
class _Source:
    """A text as it is stored: its parts have any size, and line ends as they are. Else as in `Text`."""

    name: str
    parts: Callable[[], Iterator[str]]
    fingerprint: dict[str, Any]
    n_bytes: int | None


def open_text(source: str, *, stdin: io.BufferedIOBase | None = None, keep_line_ends: bool = False) -> Text:
    """Open the text at a source, and read as far as its first piece that is not white space.

    Several documents (files of a folder, rows of a Parquet file) are read as one text. A document that another follows
    gets a line break at its end where it has none, so that words never join. Text is UTF-8, or what a URL's header
    says; a byte order mark is dropped. CRLF and CR are read as LF: a carriage return is a token that models rarely saw,
    and it changes their numbers. Standard input and URLs are read at once and kept in memory, up to 64 MiB.

    Args:
        source: "builtin:prose" or "builtin:html"; "-" for standard input; an http or https URL; a file; a folder, of
            which the *.txt, *.md, *.html and *.htm files at any depth are read in the order of their paths; or a file of
            records (.parquet, .jsonl, .ndjson, .json), "data.parquet:column" or "data.jsonl:field", without its nulls
            (without a name: "text", "content", or the only column or field of strings).
        stdin: what to read for "-" instead of standard input.
        keep_line_ends: keep CRLF and CR as they are.

    Raises:
        InvalidArgument: for a source that does not exist, cannot be read, is empty or not UTF-8.
        NetworkError: for a URL that cannot be read.

    >>> open_text("builtin:prose").name
    'builtin prose'
    """
    return _text(_open(source, stdin), keep_line_ends)


def text_from_string(text: str, name: str = "text", *, keep_line_ends: bool = False) -> Text:
    """Return a text from a string: the text itself, not the name of a file. CRLF and CR are read as LF.

    Args:
        text: the text.
        name: to call it by in tables and figures.
        keep_line_ends: keep CRLF and CR as they are.

    Raises:
        InvalidArgument: for an empty string, or white space only.

    >>> list(text_from_string("The cat sat.").pieces())
    ['The cat sat.']
    """
    # Lone surrogates cannot be written as UTF-8; a tokenizer could not read them either.
    return _text(_from_bytes(name, text.encode("utf-8", "replace")), keep_line_ends)


def looks_like_text(source: str) -> bool:
    """Return whether a source reads as a sentence, not as a path: several words without the suffix of a file.

    >>> looks_like_text("The cat sat."), looks_like_text("my texts/the cat.txt"), looks_like_text("cat")
    (True, False, False)
    """
    is_file_name = re.fullmatch(r"\.\w{1,8}", Path(source.strip()).suffix) is not None
    return len(source.split()) > 1 and not is_file_name


def _text(source: _Source, keep_line_ends: bool) -> Text:
    name, parts, n_bytes = source.name, source.parts, source.n_bytes
    if not any(map(str.strip, parts())):
        raise InvalidArgument(f"{name}: there is no text in it, or only white space; pass another text")
    fingerprint = source.fingerprint | {"line_ends": "kept" if keep_line_ends else "LF"}
    if keep_line_ends:
        return Text(name, lambda: _cut(parts()), fingerprint, n_bytes)
    return Text(name, lambda: _cut(with_lf(parts())), fingerprint, n_bytes, lambda: count_carriage_returns(parts()))


def _open(source: str, stdin: io.BufferedIOBase | None) -> _Source:
    if source.startswith("builtin:"):
        return _builtin(source.removeprefix("builtin:"))
    if source == "-":
        return _from_bytes("standard input", _read_whole("standard input", (stdin or sys.stdin.buffer).read))
    if match := SCHEME.match(source):
        document = urls.download(source, match[1].lower())
        whole = _from_bytes(document.name, document.data)
        if (suffix := Path(urlsplit(document.name).path).suffix) not in JSON:
            return whole
        records = json_field(document.name, whole.parts, suffix, None)
        return replace(
            whole, parts=lambda: _run_on(records.documents()), fingerprint=whole.fingerprint | {"field": records.field}
        )
    if not source:  # would be the current folder
        raise InvalidArgument(f"`texts` has an empty string; {SOURCES}")
    return _path(source)


def _builtin(key: str) -> _Source:
    if key not in BUILTIN:
        raise InvalidArgument(f"the built-in texts are {', '.join(f'builtin:{k}' for k in BUILTIN)}, not builtin:{key}")
    return _from_bytes(f"builtin {key}", files("dimscope.builtin").joinpath("texts", BUILTIN[key]).read_bytes())


def _from_bytes(name: str, data: bytes) -> _Source:
    """Return a source that is in memory already, as UTF-8."""
    fingerprint = {"name": name, "sha256": hashlib.sha256(data).hexdigest()}
    return _Source(name, lambda: _decoded(name, io.BytesIO(data).read), fingerprint, len(data))


def _read_whole(label: str, read: Callable[[int], bytes]) -> bytes:
    data = read(urls.LARGEST + 1)
    if len(data) > urls.LARGEST:
        raise InvalidArgument(f"{label}: {urls.too_large()}; save it to a file and pass that")
    return data


# ---- files and folders ---------------------------------------------------------------------------------------------


def _path(source: str) -> _Source:
    path, field = split_field(source)
    with _file_errors(path):
        path.stat()
        if path.is_dir():
            return _folder(path)
        if path.suffix in RECORDS and path.is_file():
            return _records(path, field)
        if path.is_file():
            return _Source(path.name, lambda: _read_file(path), _facts(path), path.stat().st_size)
        with path.open("rb") as pipe:  # or a device: it can be read only once
            return _from_bytes(path.name, _read_whole(str(path), pipe.read))


def _records(path: Path, field: str | None) -> _Source:
    """Return the text of a file of records: Parquet, JSON Lines or JSON."""
    if path.suffix == ".parquet":
        field = parquet_column(path, field)
        return _Source(
            f"{path.name}:{field}", lambda: _run_on(_rows(path, field)), {**_facts(path), "column": field}, None
        )
    records = json_field(str(path), lambda: _read_file(path), path.suffix, field)
    fingerprint = {**_facts(path), "field": records.field}
    name = path.name if records.field is None else f"{path.name}:{records.field}"
    return _Source(name, lambda: _run_on(records.documents()), fingerprint, None)


def _rows(path: Path, column: str) -> Iterator[list[str]]:
    with _file_errors(path):
        yield from parquet_rows(path, column)


def _folder(path: Path) -> _Source:
    paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise InvalidArgument(f"{path}: no text files in this folder ({', '.join('*' + s for s in SUFFIXES)})")
    listing = [{**_facts(p), "name": p.relative_to(path).as_posix()} for p in paths]
    name, size = f"{path.resolve().name}/", sum(p.stat().st_size for p in paths)
    # One hash for the list: it goes into every provenance file, and a corpus may have many thousands of files.
    sha256 = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    fingerprint = {"name": name, "files": len(paths), "size": size, "listing_sha256": sha256}
    return _Source(name, lambda: _run_on(map(_read_file, paths)), fingerprint, size)


def _facts(path: Path) -> dict[str, Any]:
    facts = path.stat()
    return {"name": path.name, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}


def _read_file(path: Path) -> Iterator[str]:
    with _file_errors(path), path.open("rb") as file:
        yield from _decoded(str(path), file.read)


@contextmanager
def _file_errors(path: Path) -> Generator[None]:
    try:
        yield
    except FileNotFoundError as e:
        raise _missing(str(path)) from e
    except PermissionError as e:
        raise InvalidArgument(f"{path}: no permission to read it") from e
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG and looks_like_text(str(path)):
            raise _missing(str(path)) from e
        raise InvalidArgument(f"{path}: cannot be read ({e.strerror or e})") from e


def _missing(source: str) -> InvalidArgument:
    if not looks_like_text(source):
        return InvalidArgument(f"{source}: no such file or folder; {SOURCES}")
    start = " ".join(source[: 2 * SHOWN].split())
    start = f"{start[:SHOWN]}..." if len(start) > SHOWN else start
    return InvalidArgument(
        f"{start!r}: no such file or folder; to pass the text itself, use `text=...` in Python or - for standard input"
    )


def _run_on(documents: Iterable[Iterable[str]]) -> Iterator[str]:
    ended = True
    for document in documents:
        for number, part in enumerate(filter(None, document)):
            if number == 0 and not ended:
                yield "\n"
            yield part
            ended = part.endswith(("\n", "\r"))  # a CRLF may lie across two documents


def _cut(parts: Iterable[str]) -> Iterator[str]:
    buffer = ""
    for part in parts:
        buffer += part
        while len(buffer) > PIECE:
            # A break in the first half does not count: pieces of a few characters would make this quadratic.
            end = next((n + 1 for c in "\n " if (n := buffer.rfind(c, PIECE // 2, PIECE)) >= 0), PIECE)
            yield buffer[:end]
            buffer = buffer[end:]
    if buffer:
        yield buffer


# ---- bytes to characters -------------------------------------------------------------------------------------------


def _decoded(label: str, read: Callable[[int], bytes]) -> Iterator[str]:
    """Decode UTF-8 block by block; a character that two blocks share comes with the second."""
    first = read(READ_BYTES)
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InvalidArgument(f"{label}: is UTF-16; convert it to UTF-8, e.g. iconv -f UTF-16 -t UTF-8")
    offset = len(codecs.BOM_UTF8) if first.startswith(codecs.BOM_UTF8) else 0
    rest = b""
    for block in chain([first[offset:]], iter(partial(read, READ_BYTES), b""), [None]):
        data = rest + (block or b"")
        if (nul := data.find(b"\0")) >= 0:
            raise _binary(label, f"the byte at offset {offset + nul:,} is NUL")
        try:
            part, used = codecs.utf_8_decode(data, "strict", block is None)
        except UnicodeDecodeError as e:
            rest = b"".join(islice(iter(partial(read, READ_BYTES), b""), SCANNED))
            raise _undecodable(label, data, e.start, offset, rest) from e
        yield part
        offset, rest = offset + used, data[used:]


def _undecodable(label: str, data: bytes, start: int, offset: int, following: bytes) -> InvalidArgument:
    controls = sum(data.count(c) for c in range(32) if c not in b"\t\n\v\f\r\x1b")
    if controls > MOST_CONTROLS * len(data):
        return _binary(label, f"{controls / len(data):.0%} control characters")
    encoding, name = _likely_encoding(data + following)
    return InvalidArgument(
        f"{label}: not UTF-8 (the byte {data[start]:02X} at offset {offset + start:,}); convert it to UTF-8, "
        f"e.g. iconv -f {encoding} -t UTF-8 if it is {name}"
    )


def _likely_encoding(data: bytes) -> tuple[str, str]:
    """Return the name of an encoding for iconv, and for readers.

    The bytes 80 to 9F are quotation marks and dashes in Windows-1252, and controls, which no text has, in Latin-1.
    """
    foreign = {ord(c) - 0xDC00 for c in data.decode("utf-8", "surrogateescape") if 0xDC80 <= ord(c) <= 0xDCFF}
    if any(byte < 0xA0 for byte in foreign) and not foreign & NOT_IN_WINDOWS_1252:
        return "WINDOWS-1252", "Windows-1252"
    return "ISO-8859-1", "Latin-1"


def _binary(label: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{label}: looks like a binary file ({why}); pass plain text, Parquet or JSON Lines")
