"""What commands print: a table on a terminal, JSON on request, Parquet into a folder."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table

from dimscope.results import versions, write_json, write_table

console = Console()


def show(
    frames: Mapping[str, pl.DataFrame], facts: Mapping[str, Any], *, as_json: bool, out: Path | None, limit: int = 40, export: Mapping[str, pl.DataFrame] | None = None
) -> None:
    """Prints frames (their first `limit` rows) or all of them as JSON; with `out`, writes them (or `export`) there as well."""
    if out is not None:
        for name, frame in (export or frames).items():
            write_table(out / f"{name}.parquet", frame)
        write_json(out / "provenance.json", plain({**facts, "versions": versions()}))
    if as_json:
        tables = {name: plain(frame.to_dicts()) for name, frame in frames.items()}
        json.dump({**plain(dict(facts)), **tables}, sys.stdout, ensure_ascii=False, allow_nan=False)
        sys.stdout.write("\n")
        return
    for key, value in facts.items():
        console.print(f"[bold]{key}[/bold] {_cell(value)}", highlight=False)
    for name, frame in frames.items():
        _print_table(name, frame, limit)
    if out is not None:
        console.print(f"written to {out}", highlight=False, markup=False)


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


def _print_table(name: str, frame: pl.DataFrame, limit: int) -> None:
    table = Table(title=name.replace("_", " "), title_justify="left", title_style="bold")
    for column, dtype in frame.schema.items():
        table.add_column(column, justify="right" if dtype.is_numeric() else "left", overflow="fold")
    for row in frame.head(limit).iter_rows():
        table.add_row(*map(_cell, row))
    console.print(table)
    if len(frame) > limit:
        console.print(f"{limit} of {len(frame):,} rows; --limit shows more, --json and --out give all")


def _cell(value: Any) -> str:
    from rich.markup import escape

    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e9 else f"{value:.5g}"
    if isinstance(value, bytes):
        return value.hex(" ")
    return escape(str(value))
