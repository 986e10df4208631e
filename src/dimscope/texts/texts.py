"""Texts for a model: opened from files, folders, Parquet, URLs or memory, read piece by piece. Knows nothing of tokens."""

import codecs
import errno
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

from dimscope.errors import InvalidArgument
from dimscope.texts import urls
from dimscope.texts.line_ends import CarriageReturns, count_carriage_returns, with_lf

PIECE = 1 << 20  # characters
READ_BYTES = 1 << 20  # bytes of a file read at once
ROWS = 512  # of a Parquet file read at once
BUILTIN = {"prose": "prose.txt", "html": "page.html"}
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
            which the *.txt, *.md, *.html and *.htm files at any depth are read in the order of their paths; or a Parquet
            file, "data.parquet:column", without its nulls (without a column: the only one of strings, or "text").
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
        return _from_bytes(document.name, document.data)
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
    path, column = _split_column(source)
    with _file_errors(path):
        path.stat()
        if path.is_dir():
            return _folder(path)
        if path.suffix == ".parquet":
            return _parquet(path, column)
        if path.is_file():
            return _Source(path.name, lambda: _read_file(path), _facts(path), path.stat().st_size)
        with path.open("rb") as pipe:  # or a device: it can be read only once
            return _from_bytes(path.name, _read_whole(str(path), pipe.read))


def _split_column(source: str) -> tuple[Path, str | None]:
    head, mark, column = source.rpartition(".parquet:")
    if not mark or Path(source).exists():
        return Path(source), None
    return Path(f"{head}.parquet"), column


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
            raise _undecodable(label, data, e.start, offset) from e
        yield part
        offset, rest = offset + used, data[used:]


def _undecodable(label: str, data: bytes, start: int, offset: int) -> InvalidArgument:
    controls = sum(data.count(c) for c in range(32) if c not in b"\t\n\v\f\r\x1b")
    if controls > MOST_CONTROLS * len(data):
        return _binary(label, f"{controls / len(data):.0%} control characters")
    return InvalidArgument(
        f"{label}: not UTF-8 (the byte {data[start]:02X} at offset {offset + start:,}); convert it to UTF-8, "
        "e.g. iconv -f ISO-8859-1 -t UTF-8 if it is Latin-1"
    )


def _binary(label: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{label}: looks like a binary file ({why}); pass plain text or Parquet")


# ---- Parquet -------------------------------------------------------------------------------------------------------


def _parquet(path: Path, column: str | None) -> _Source:
    import polars as pl

    with path.open("rb"):  # polars words the error of a file without permission differently
        pass
    with _parquet_errors(path):
        schema = pl.scan_parquet(path, glob=False).collect_schema()
    column = _choose_column(path, column, [name for name, dtype in schema.items() if dtype == pl.String])
    fingerprint = {**_facts(path), "column": column}
    return _Source(f"{path.name}:{column}", lambda: _run_on(_read_rows(path, column)), fingerprint, None)


def _choose_column(path: Path, column: str | None, strings: list[str]) -> str:
    if column is None:
        column = strings[0] if len(strings) == 1 else "text"
    if column in strings:
        return column
    if not strings:
        raise InvalidArgument(f"{path}: no column of strings in it")
    raise InvalidArgument(
        f"{path}: {column!r} is no column of strings; those are {', '.join(strings)}; pass {path}:{strings[0]}"
    )


def _read_rows(path: Path, column: str) -> Iterator[list[str]]:
    import polars as pl

    with _file_errors(path), _parquet_errors(path):
        frame, start = pl.scan_parquet(path, glob=False).select(column), 0
        while len(rows := frame.slice(start, ROWS).collect().to_series()):
            yield from ([row] for row in rows.drop_nulls())
            start += ROWS


@contextmanager
def _parquet_errors(path: Path) -> Generator[None]:
    from polars.exceptions import PolarsError

    try:
        yield
    except PolarsError as e:
        raise InvalidArgument(f"{path}: no Parquet file, or a damaged one ({str(e).splitlines()[0]})") from e
