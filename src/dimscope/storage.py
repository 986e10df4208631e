"""Result tables on disk: Parquet with a JSON of provenance beside each, written whole or not at all, reused when asked again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import polars as pl

from dimscope.errors import DimscopeError, InvalidArgument

if TYPE_CHECKING:
    from torch import Tensor

STATE = ".dimscope-state"  # what an unfinished run keeps in its folder
PACKAGES = ("dimscope", "torch", "transformers", "numpy", "scipy", "polars")


FORMAT = 2  # of the tables: their names and columns; tables of another format are computed again
COLUMNS = {
    "model": pl.String, "revision": pl.String, "text": pl.String, "condition": pl.String, "site": pl.String,
    "metric": pl.String, "preprocess": pl.String, "layer": pl.Int64, "n_tokens": pl.Int64, "seed": pl.Int64,
    "value": pl.Float64, "stderr": pl.Float64, "low": pl.Float64, "high": pl.Float64, "null": pl.Float64,
}  # fmt: skip
"""The columns that mean the same in every table: where a table has one, this is its type.

`null` is the value that noise of the same shape, or theory, expects; `seed` is null where nothing is random.
"""

RETIRED = {"on", "kept", "n", "draw", "of_dim", "prefill", "decode", "expected"}
"""Names that columns had before format 2."""


def check_columns(name: str, table: pl.DataFrame) -> None:
    """Assert that a table keeps to the common columns: their names and types, and finite numbers or nulls."""
    for column, kind in table.schema.items():
        assert column not in RETIRED, f"table {name}: column {column!r} has another name since format 2"
        expected = COLUMNS.get(column, kind)
        assert kind == expected, f"table {name}: column {column!r} is {kind}, and {expected} in every other table"
        if column in ("value", "stderr", "low", "high", "null"):
            assert not bool(table[column].is_nan().any()), f"table {name}: NaN in column {column!r}; a gap is null"


@cache
def versions() -> Mapping[str, str]:
    """The versions that a result depends on."""
    return {"python": platform.python_version()} | {p: version(p) for p in PACKAGES}


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file such that it is there with all its bytes, or not at all, whatever interrupts."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Tensors as a safetensors file, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole_file(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as e:  # its word for a full disk
            raise OSError(None, str(e)) from e


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """A temporary path to write a file to; it takes the place of `path` once all its bytes are on disk."""
    temporary = beside(path, "tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(path)


@contextmanager
def whole_folder(out: Path) -> Generator[Path]:
    """A hidden folder beside `out`, not there yet or empty, that takes its place once all files in it are on disk.

    What an interrupted run left in it goes first; nothing of it is left where anything is raised.
    """
    partial = beside(out, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(out):
            partial.mkdir(parents=True)
        yield partial
        with writing(out):
            for path in partial.iterdir():
                _sync(path)
            if out.exists():
                out.rmdir()
            partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def beside(path: Path, what: str) -> Path:
    """A hidden name in the same folder."""
    return path.with_name(f".{path.name}.{what}")


def _sync(path: Path) -> None:
    with path.open("rb+") as f:
        os.fsync(f.fileno())


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Turns what the system says (disk full, no permission, a file in the way) into one line."""
    try:
        yield
    except DimscopeError:  # some are an OSError too
        raise
    except OSError as e:
        raise InvalidArgument(f"{path} cannot be written: {e.strerror or e}") from e


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode())


def write_table(path: Path, table: pl.DataFrame) -> None:
    """A frame as Parquet (zstd), whole or not at all."""
    import io

    buffer = io.BytesIO()
    table.write_parquet(buffer, compression="zstd")
    write_whole(path, buffer.getvalue())


class Store(Protocol):
    """Where finished tables are kept. A study that is given one need not know whether it is on disk."""

    @property
    def folder(self) -> Path | None:
        """The folder of the run, for locks and for states of unfinished work; None where all is in memory."""
        ...

    def table(self, name: str, arguments: Mapping[str, Any], compute: Callable[[], pl.DataFrame]) -> pl.DataFrame:
        """The table `name`, computed where it is not finished yet or depends on other arguments."""
        ...

    def drop(self, name: str) -> None:
        """Forget a table that this run does not have."""
        ...


@dataclass(frozen=True, slots=True)
class MemoryStore:
    """Tables kept for as long as the run lasts."""

    tables: dict[str, pl.DataFrame] = field(default_factory=dict)
    folder: None = None

    def table(self, name: str, arguments: Mapping[str, Any], compute: Callable[[], pl.DataFrame]) -> pl.DataFrame:
        """The table `name`, computed once."""
        if name not in self.tables:
            table = compute()
            check_columns(name, table)
            self.tables[name] = table
        return self.tables[name]

    def drop(self, name: str) -> None:
        """Forget a table that this run does not have."""
        self.tables.pop(name, None)


@dataclass(frozen=True, slots=True)
class ResultFolder:
    """The finished tables of one run: DIR/tables/NAME.parquet with DIR/tables/NAME.json.

    `recipe` is what every table of the run depends on (model, its fingerprint, seed). A finished table is used again
    only where its recipe, with the table's own arguments, is the same, and where `definition_number` still gives the
    numbers that it gave for the table's metrics.
    """

    path: Path
    recipe: Mapping[str, Any]
    definition_number: Callable[[str], int] = lambda metric: 1

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.path

    def table(self, name: str, arguments: Mapping[str, Any], compute: Callable[[], pl.DataFrame]) -> pl.DataFrame:
        """The table `name`: read where it is finished, else computed and put on disk before anything else begins."""
        recipe = {"recipe": dict(self.recipe), "arguments": dict(arguments), "format": FORMAT}
        recipe = json.loads(json.dumps(recipe))
        parquet, provenance = self.path / "tables" / f"{name}.parquet", self.path / "tables" / f"{name}.json"
        finished = _read_json(provenance)
        current = finished.get("recipe") == recipe and self._defined_as(finished.get("definitions", {}))
        if current and parquet.exists() and finished.get("sha256") == _digest(parquet):
            return pl.read_parquet(parquet)
        with writing(provenance):
            provenance.unlink(missing_ok=True)  # from here to the end of the write there is no finished table
        table = compute()
        check_columns(name, table)
        write_table(parquet, table)
        names = table["metric"].drop_nulls().unique().sort().to_list() if "metric" in table.columns else []
        definitions = {name: self.definition_number(name) for name in names}
        facts = {"recipe": recipe, "definitions": definitions, "rows": len(table), "sha256": _digest(parquet)}
        write_json(provenance, facts | {"versions": versions()})
        return table

    def _defined_as(self, definitions: Mapping[str, int]) -> bool:
        """Return whether the metrics of a finished table still have these definition numbers."""
        return all(self.definition_number(name) == number for name, number in definitions.items())

    def drop(self, name: str) -> None:
        """Takes a table away that this run does not have: what an earlier one left would be taken for its own."""
        for suffix in (".json", ".parquet"):
            (self.path / "tables" / f"{name}{suffix}").unlink(missing_ok=True)


@dataclass(slots=True)
class CountingStore:
    """A store that counts the tables which were not finished before."""

    store: Store
    n_computed: int = 0

    @property
    def folder(self) -> Path | None:
        """The folder of the run."""
        return self.store.folder

    def table(self, name: str, arguments: Mapping[str, Any], compute: Callable[[], pl.DataFrame]) -> pl.DataFrame:
        """The table `name`, counted where it is computed."""

        def counted() -> pl.DataFrame:
            self.n_computed += 1
            return compute()

        return self.store.table(name, arguments, counted)

    def drop(self, name: str) -> None:
        """Forget a table that this run does not have."""
        self.store.drop(name)


@contextmanager
def alone(path: Path) -> Generator[None]:
    """One process at a time in a folder of results; the others wait. A process that ends lets go, however it ends."""
    from filelock import FileLock

    lock = FileLock(path / "lock")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_folder(path: Path) -> None:
    """Makes sure, without writing anything, that results can go to a folder. Raises InvalidArgument where they cannot."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InvalidArgument(f"{path}: results go to a folder, and {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise InvalidArgument(f"{path}: no permission to write there")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
