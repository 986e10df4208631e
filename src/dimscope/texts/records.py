"""Texts in records: a column of a Parquet file, or a field of JSON objects. Read in bounded memory; knows nothing of tokens.

JSON Lines (.jsonl, .ndjson) is read line by line. A .json file is a list of records, a single record, or JSON Lines as well.
"""

import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dimscope.errors import InvalidArgument

ROWS = 512  # of a Parquet file read at once
LINES = (".jsonl", ".ndjson")
SUFFIXES = (".parquet", ".json", *LINES)
USUAL = ("text", "content")  # fields that are taken where none is named, in this order
SEARCHED = 100  # records in which fields are searched
SPACE = " \t\n\r"
Parts = Callable[[], Iterable[str]]


def split_field(source: str) -> tuple[Path, str | None]:
    """Split "data.jsonl:field" into the path and the field; None where no field is named.

    >>> split_field("a/data.parquet:body")[1], split_field("a/data.parquet")[1]
    ('body', None)
    """
    match = re.fullmatch(rf"(.*(?:{'|'.join(map(re.escape, SUFFIXES))})):([^/]+)", source)
    if match is None or Path(source).exists():
        return Path(source), None
    return Path(match[1]), match[2]


# ---- JSON ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JsonField:
    """A field of the records of a JSON text, or the strings of a list of them (no field).

    Attributes:
        label: The path or address, for messages.
        parts: The text of the file; each call reads it from its beginning.
        lines: Whether each line is one record.
        field: The field.
    """

    label: str
    parts: Parts
    lines: bool
    field: str | None

    def documents(self) -> Iterator[list[str]]:
        """Yield the text of each record; none for records without it.

        Raises:
            InvalidArgument: The text is no JSON, or a field holds no text.
        """
        for line, record in _records(self.label, self.parts(), self.lines):
            value = record.get(self.field) if isinstance(record, dict) else record
            if value is None:
                continue
            texts = value if isinstance(value, list) else [value]
            if not all(isinstance(text, str) for text in texts):
                named = "the record" if self.field is None else repr(self.field)
                raise InvalidArgument(f"{self.label}: {named} in line {line:,} is {_kind(value)}, not text")
            # A lone surrogate, which JSON can escape, is no character of a text.
            yield from ([text if text.isascii() else text.encode("utf-8", "replace").decode()] for text in texts)


def json_field(label: str, parts: Parts, suffix: str, field: str | None) -> JsonField:
    """Find the field with the text: the one that is named, "text", "content", or the only one that holds strings.

    Raises:
        InvalidArgument: There is no such field, or there are several that hold strings.
    """
    lines = suffix in LINES
    first = [record for _, record in islice(_records(label, parts(), lines), SEARCHED)]
    objects = [record for record in first if isinstance(record, dict)]
    if not objects and field is None:  # a list of strings, or nothing at all
        return JsonField(label, parts, lines, None)
    names = dict.fromkeys(key for record in objects for key in record)
    strings = [name for name in names if any(isinstance(record.get(name), str) for record in objects)]
    strings = strings or [name for name in names if any(_is_list_of_text(record.get(name)) for record in objects)]
    if field is None:
        usual = [name for name in USUAL if name in strings]
        field = usual[0] if usual else strings[0] if len(strings) == 1 else None
    elif field not in names:
        raise InvalidArgument(f"{label}: no field {field!r} in it; the fields are {_listed(names) or 'none'}")
    if field is None:
        reason = f"those with text are {_listed(strings)}; pass {label}:{strings[0]}" if strings else (
            f"no field holds text; the fields are {_listed(names) or 'none'}"
        )  # fmt: skip
        raise InvalidArgument(f"{label}: JSON is read as records, and {reason}")
    return JsonField(label, parts, lines, field)


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(element, str) for element in value)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "something else")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _records(label: str, parts: Iterable[str], lines: bool) -> Iterator[tuple[int, Any]]:
    """Yield the records of a JSON text, each with the line in which it begins."""
    yield from _lines(label, parts) if lines else _values(label, parts)


def _lines(label: str, parts: Iterable[str]) -> Iterator[tuple[int, Any]]:
    buffer, number = [], 0
    for part in chain(parts, ["\n"]):
        *whole, rest = part.split("\n")
        for line in whole:
            number += 1
            text = "".join([*buffer, line])
            buffer = []
            if text.strip():
                try:
                    yield number, json.loads(text)
                except (ValueError, RecursionError) as e:
                    raise _no_json(label, number, e) from e
        buffer.append(rest)


def _values(label: str, parts: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Yield the elements of a list, or values one after the other, which a single record and JSON Lines are too."""
    stream, decoder = iter(parts), json.JSONDecoder()
    buffer, position, line = "", 0, 1
    in_list: bool | None = None
    while True:
        start = _after_space(buffer, position, "," if in_list else "")
        line += buffer.count("\n", position, start)
        position = start
        try:
            if in_list is None and buffer[position : position + 1] == "[":
                in_list, position = True, position + 1
                continue
            if in_list and buffer[position : position + 1] == "]":
                return
            value, stop = decoder.raw_decode(buffer, position)
        except (ValueError, RecursionError) as e:
            # Twice as much each time: a record that many parts hold is not decoded once for every part.
            more = "".join(islice(stream, max(1, len(buffer) - position >> 20)))
            if not more:
                if position == len(buffer) and not in_list:
                    return
                error_line = line + buffer.count("\n", position, getattr(e, "pos", position))
                raise _no_json(label, error_line, e) from e
            buffer, position = buffer[position:] + more, 0
            continue
        in_list = bool(in_list)
        yield line, value
        line += buffer.count("\n", position, stop)
        position = stop


def _after_space(buffer: str, position: int, separators: str) -> int:
    skipped = SPACE + separators
    while position < len(buffer) and buffer[position] in skipped:
        position += 1
    return position


def _no_json(label: str, line: int, error: Exception) -> InvalidArgument:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
    return InvalidArgument(
        f"{label}: line {line:,} is no JSON ({reason}); to read the file as it is, pass it through -"
    )


# ---- Parquet -------------------------------------------------------------------------------------------------------


def parquet_column(path: Path, column: str | None) -> str:
    """Find the column with the text: the one that is named, the only one of strings, or one of the usual names.

    Raises:
        InvalidArgument: There is no such column, or the file is no Parquet file.
    """
    import polars as pl

    with path.open("rb"):  # polars words the error of a file without permission differently
        pass
    with parquet_errors(path):
        schema = pl.scan_parquet(path, glob=False).collect_schema()
    strings = [name for name, dtype in schema.items() if dtype == pl.String]
    if column is None:
        column = next((name for name in USUAL if name in strings), strings[0] if len(strings) == 1 else USUAL[0])
    if column in strings:
        return column
    if not strings:
        raise InvalidArgument(f"{path}: no column of strings in it")
    raise InvalidArgument(
        f"{path}: {column!r} is no column of strings; those are {', '.join(strings)}; pass {path}:{strings[0]}"
    )


def parquet_rows(path: Path, column: str) -> Iterator[list[str]]:
    """Yield the strings of a column, without nulls.

    Raises:
        InvalidArgument: The file is damaged.
    """
    import polars as pl

    with parquet_errors(path):
        frame, start = pl.scan_parquet(path, glob=False).select(column), 0
        while len(rows := frame.slice(start, ROWS).collect().to_series()):
            yield from ([row] for row in rows.drop_nulls())
            start += ROWS


@contextmanager
def parquet_errors(path: Path) -> Generator[None]:
    """Turn errors of polars into InvalidArgument."""
    from polars.exceptions import PolarsError

    try:
        yield
    except PolarsError as e:
        raise InvalidArgument(f"{path}: no Parquet file, or a damaged one ({str(e).splitlines()[0]})") from e
