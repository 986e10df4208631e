"""What commands print: tables on a terminal, JSON on request, Parquet into a folder."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dimscope.storage import versions, write_json, write_table


@dataclass(frozen=True, slots=True)
class Output:
    """The result of a command: `frames` are printed without their `hidden` columns, and written whole.

    No frame is named like a fact, since JSON puts both side by side.

    Attributes:
        facts: Names and values, printed before the frames.
        frames: The tables. Empty ones are not printed.
        hidden: Columns that are not printed.
        files_only: Tables too large to print: JSON and Parquet only.
        answer: The result in one sentence with number and unit, printed first.
        split_by: Frame to column: one table per value of the column is printed, each with the limit of its own.
    """

    facts: Mapping[str, Any]
    frames: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    hidden: Sequence[str] = ()
    files_only: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    answer: str | None = None
    split_by: Mapping[str, str] = field(default_factory=dict)


def write(output: Output, folder: Path) -> None:
    """FOLDER/NAME.parquet for every frame, and FOLDER/provenance.json."""
    for name, frame in {**output.frames, **output.files_only}.items():
        write_table(folder / f"{name}.parquet", frame)
    write_json(folder / "provenance.json", plain({**output.facts, "versions": versions()}))


def print_json(output: Output) -> None:
    """One JSON object on standard output: the answer, the facts, and every frame as a list of rows."""
    answer = {} if output.answer is None else {"answer": output.answer}
    tables = {name: plain(frame.to_dicts()) for name, frame in {**output.frames, **output.files_only}.items()}
    json.dump({**answer, **plain(dict(output.facts)), **tables}, sys.stdout, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


def print_tables(output: Output, limit: int) -> None:
    """Print the answer, the facts, and the first `limit` rows of each frame or of each of its groups."""
    console = Console(highlight=False)
    if output.answer is not None:
        console.print(escape(output.answer))
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in output.facts.items():
        facts.add_row(f"[bold]{key.replace('_', ' ')}[/bold]", _cell(value))
    console.print(facts)
    for name, whole in output.frames.items():
        column = output.split_by.get(name)
        for frame in [whole] if column is None or whole.is_empty() else whole.partition_by(column, maintain_order=True):
            if frame.is_empty():
                continue
            console.print(
                _table(name, frame.drop(c for c in output.hidden if c in frame.columns), limit, console.width)
            )
            if len(frame) > limit:
                console.print(f"{limit} of {len(frame):,} rows; --limit shows more, --json and --out give all")


def plain(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinities become null, bytes hexadecimal."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if isinstance(value, Path) else value


def _table(name: str, frame: pl.DataFrame, limit: int, width: int) -> Table:
    """Return a rich table; columns that say the same in every row go into its title."""
    constant = [
        c for c in frame.columns if len(frame) > 1 and frame[c].n_unique() == 1 and frame.schema[c] == pl.String
    ]
    title = " · ".join(
        [name.replace("_", " "), *(str(frame[c][0]) for c in constant if frame[c][0] not in (None, name))]
    )
    table = Table(
        title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    shown = frame.drop(constant)
    cells = {column: [_cell(value) for value in shown[column].head(limit)] for column in shown.columns}
    widest = _folded(cells, width)
    for column, dtype in shown.schema.items():
        right = "right" if dtype.is_numeric() else "left"
        table.add_column(column.replace("_", " "), justify=right, overflow="fold", no_wrap=column == widest)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    return table


def _folded(cells: dict[str, list[str]], width: int) -> str | None:
    """Fold the widest names of a table that is wider than the terminal behind a dot, slash or underscore.

    Names such as those of tensors have no spaces, and would otherwise break anywhere.

    Returns:
        The column whose cells were folded in place; None where none was.
    """
    widths = {column: max(map(len, [*values, *column.split("_")]), default=0) + 2 for column, values in cells.items()}
    names = [column for column, values in cells.items() if values and not any(" " in value for value in values)]
    if sum(widths.values()) < width or not names:
        return None
    widest = max(names, key=widths.__getitem__)
    left = max(12, width - 2 - sum(widths.values()) + widths[widest])
    cells[widest] = [_fold(value, left) for value in cells[widest]]
    return widest


def _fold(name: str, width: int) -> str:
    r"""Return a name in lines of at most this width, as far as its dots, slashes and underscores allow.

    >>> _fold("model.layers.0.mlp.weight", 12)
    'model.\nlayers.0.\nmlp.weight'
    """
    lines = [""]
    for part in re.findall(r"[^./_]*[./_]|[^./_]+$", name) or [name]:
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e9 else f"{value:.4g}"
    if isinstance(value, bytes):
        return value.hex(" ")
    return escape(str(value))
