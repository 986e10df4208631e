"""Result tables on disk: whole or not there, reused only for the same recipe, made again after any damage."""

import errno
import hashlib
import json
import os
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from dimscope.errors import InvalidArgument
from dimscope.storage import (
    FORMAT,
    MemoryStore,
    ResultFolder,
    check_folder,
    versions,
    write_json,
    write_table,
    write_whole,
)

FRAME = pl.DataFrame({"id": [1, 2], "label": ["␣a", None]}, schema={"id": pl.Int64, "label": pl.String})


class Computation:
    """A frame and how often it was computed."""

    def __init__(self, frame=FRAME):
        self.frame, self.runs = frame, 0

    def __call__(self):
        self.runs += 1
        return self.frame


@pytest.fixture
def compute():
    return Computation()


def folder(path, **recipe):
    return ResultFolder(path, {"model": "m", "seed": 0} | recipe)


def files(path):
    return sorted(p.name for p in path.rglob("*") if p.is_file())


# ---- writing -------------------------------------------------------------------------------------------------------


def test_a_file_is_written_with_its_folders_and_nothing_beside_it(tmp_path):
    write_whole(tmp_path / "a" / "b" / "c.bin", b"\x00\xff")
    assert (tmp_path / "a" / "b" / "c.bin").read_bytes() == b"\x00\xff"
    assert files(tmp_path) == ["c.bin"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "t.json"
    write_whole(path, b"old")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(*((os, "fsync") if broken == "fsync" else (Path, "replace")), stop)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert files(tmp_path) == ["t.json"]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    seen = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append("fsync"), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, other: (seen.append("replace"), replace(self, other))[1])
    write_whole(tmp_path / "x", b"1")
    assert seen[:2] == ["fsync", "replace"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_does_not_have_are_refused_and_nothing_is_written(tmp_path, value):
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "x.json", {"a": [1, value]})
    assert files(tmp_path) == []


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(InvalidArgument, match=r"taken/x\.json cannot be written: \w+"):
        write_json(tmp_path / "taken" / "x.json", {})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidArgument, match="cannot be written: No space left"):
        write_table(tmp_path / "x.parquet", FRAME)
    assert not (tmp_path / "x.parquet").exists()


def test_json_is_readable_text(tmp_path):
    write_json(tmp_path / "x.json", {"label": "␣été"})
    assert "␣été" in (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"label": "␣été"}


def test_a_frame_comes_back_with_its_types(tmp_path):
    frame = FRAME.with_columns(
        r=pl.Series([[1.0, 2.0], [3.0, 4.0]], dtype=pl.Array(pl.Float32, 2)),
        bytes=pl.Series([b"\xff", None], dtype=pl.Binary),
        value=pl.Series([float("nan"), float("inf")]),
    )
    write_table(tmp_path / "x.parquet", frame)
    assert_frame_equal(pl.read_parquet(tmp_path / "x.parquet"), frame)
    assert files(tmp_path) == ["x.parquet"]


# ---- finished tables -----------------------------------------------------------------------------------------------


def test_a_table_is_computed_once(tmp_path, compute):
    for _ in range(3):
        assert_frame_equal(folder(tmp_path).table("t", {"k": 10}, compute), FRAME)
    assert compute.runs == 1
    assert files(tmp_path) == ["t.json", "t.parquet"]


def test_the_provenance_says_what_made_it(tmp_path, compute):
    folder(tmp_path).table("t", {"k": 10}, compute)
    provenance = json.loads((tmp_path / "tables" / "t.json").read_text(encoding="utf-8"))
    run = {"recipe": {"model": "m", "seed": 0}, "arguments": {"k": 10}, "format": FORMAT}
    assert provenance["recipe"] == run
    assert provenance["rows"] == 2
    assert provenance["sha256"] == hashlib.sha256((tmp_path / "tables" / "t.parquet").read_bytes()).hexdigest()
    assert provenance["versions"] == versions()
    assert {"python", "dimscope", "torch", "transformers"} <= provenance["versions"].keys()


def test_a_table_of_an_older_format_is_computed_again(tmp_path, compute, monkeypatch):
    monkeypatch.setattr("dimscope.storage.FORMAT", FORMAT - 1)
    folder(tmp_path).table("t", {}, compute)
    monkeypatch.undo()
    folder(tmp_path).table("t", {}, compute)
    assert compute.runs == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"layer": pl.Series([1], dtype=pl.Int32)}, "'layer' is Int32"),
        ({"text": [1]}, "'text' is Int64"),
        ({"stderr": [None]}, "'stderr' is Null"),
        ({"value": [float("nan")]}, "NaN in column 'value'"),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_common_column_has_one_type_everywhere(tmp_path, columns, message, in_memory):
    store = MemoryStore() if in_memory else folder(tmp_path)
    with pytest.raises(AssertionError, match=message):
        store.table("t", {}, lambda: pl.DataFrame(columns))
    assert files(tmp_path) == []


def test_in_memory_a_table_is_computed_once_and_nothing_is_written(tmp_path, compute, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = MemoryStore()
    for _ in range(2):
        assert store.table("t", {}, compute) is FRAME
    store.drop("t")
    assert store.table("t", {}, compute) is FRAME
    assert compute.runs == 2
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [({"seed": 1}, {"k": 10}), ({"extra": None}, {"k": 10}), ({}, {"k": 11}), ({}, {})],
    ids=str,
)
def test_another_recipe_or_argument_is_computed_again(tmp_path, compute, recipe, arguments):
    folder(tmp_path).table("t", {"k": 10}, compute)
    other = Computation(FRAME.head(1))
    assert len(folder(tmp_path, **recipe).table("t", arguments, other)) == 1
    assert (compute.runs, other.runs) == (1, 1)
    assert len(pl.read_parquet(tmp_path / "tables" / "t.parquet")) == 1
    folder(tmp_path).table("t", {"k": 10}, compute)
    assert compute.runs == 2


def test_tables_of_one_run_do_not_stand_in_for_each_other(tmp_path, compute):
    folder(tmp_path).table("a", {}, compute)
    folder(tmp_path).table("b", {}, compute)
    assert compute.runs == 2


def test_arguments_are_compared_as_json_has_them(tmp_path, compute):
    for arguments in ({"ids": (0, 500), "k": {1: 2}}, {"k": {1: 2}, "ids": [0, 500]}):
        folder(tmp_path).table("t", arguments, compute)
    assert compute.runs == 1


class Killed(BaseException):
    """What a kill looks like from inside: nothing catches it."""


def kill(*_):
    raise Killed


def test_a_kill_while_computing_leaves_the_other_tables(tmp_path, compute):
    folder(tmp_path).table("a", {}, compute)
    with pytest.raises(Killed):
        folder(tmp_path).table("b", {}, kill)
    folder(tmp_path).table("a", {}, compute)
    assert compute.runs == 1
    assert files(tmp_path) == ["a.json", "a.parquet"]


def test_a_kill_between_parquet_and_json_leads_to_a_new_computation(tmp_path, compute, monkeypatch):
    monkeypatch.setattr("dimscope.storage.write_json", kill)
    with pytest.raises(Killed):
        folder(tmp_path).table("t", {}, compute)
    monkeypatch.undo()
    assert files(tmp_path) == ["t.parquet"]
    assert_frame_equal(folder(tmp_path).table("t", {}, compute), FRAME)
    assert compute.runs == 2


@pytest.mark.parametrize("last", ["compute", "write_table", "write_json"])
def test_a_kill_while_a_table_is_replaced_never_leaves_old_rows_under_the_new_recipe_or_the_reverse(
    tmp_path, compute, monkeypatch, last
):
    folder(tmp_path).table("t", {}, compute)
    new = Computation(FRAME.head(1))
    if last != "compute":
        monkeypatch.setattr(f"dimscope.storage.{last}", kill)
    with pytest.raises(Killed):
        folder(tmp_path, seed=1).table("t", {}, kill if last == "compute" else new)
    monkeypatch.undo()
    assert len(folder(tmp_path).table("t", {}, Computation(FRAME))) == 2
    assert len(folder(tmp_path, seed=1).table("t", {}, new)) == 1


def test_a_failed_computation_leaves_the_error_and_no_table(tmp_path):
    with pytest.raises(ZeroDivisionError):
        folder(tmp_path).table("t", {}, lambda: 1 // 0)
    assert files(tmp_path) == []


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"null", b"[]", b'"recipe"', b"{}"], ids=repr)
def test_a_damaged_provenance_leads_to_a_new_computation(tmp_path, compute, damage):
    folder(tmp_path).table("t", {}, compute)
    (tmp_path / "tables" / "t.json").write_bytes(damage)
    assert_frame_equal(folder(tmp_path).table("t", {}, compute), FRAME)
    assert compute.runs == 2


def test_a_missing_parquet_leads_to_a_new_computation(tmp_path, compute):
    folder(tmp_path).table("t", {}, compute)
    (tmp_path / "tables" / "t.parquet").unlink()
    folder(tmp_path).table("t", {}, compute)
    assert compute.runs == 2


def test_a_parquet_that_does_not_match_its_digest_leads_to_a_new_computation(tmp_path, compute):
    folder(tmp_path).table("t", {}, compute)
    path = tmp_path / "tables" / "t.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert_frame_equal(folder(tmp_path).table("t", {}, compute), FRAME)
    assert compute.runs == 2


def test_what_the_caller_gave_is_left_as_it_was(tmp_path, compute):
    recipe, arguments = {"model": "m"}, {"ids": (1, 2)}
    ResultFolder(tmp_path, recipe).table("t", arguments, compute)
    assert recipe == {"model": "m"}
    assert arguments == {"ids": (1, 2)}


# ---- the schema ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"value": [1]}, "'value' is Int64, and Float64"),
        ({"layer": ["3"]}, "'layer' is String, and Int64"),
        ({"null": [float("nan")]}, "NaN in column 'null'; a gap is null"),
        ({"n": [1]}, "'n' has another name"),
    ],
)
@pytest.mark.parametrize("store", ["folder", "memory"])
def test_a_table_that_breaks_the_schema_is_never_finished(tmp_path, columns, words, store):
    target = MemoryStore() if store == "memory" else ResultFolder(tmp_path, {})
    with pytest.raises(AssertionError, match=words):
        target.table("t", {}, lambda: pl.DataFrame(columns))
    assert not list(tmp_path.rglob("*.parquet"))


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_a_folder_that_can_be_made_is_accepted_and_not_made(tmp_path, monkeypatch):
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "deep")
    monkeypatch.chdir(tmp_path)
    check_folder(Path("relative"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "inside", "a/b"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(InvalidArgument, match=r"results go to a folder, and .*taken is a file"):
        check_folder(tmp_path / "taken" / below)


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(InvalidArgument, match="no permission to write"):
        check_folder(tmp_path / "new")
