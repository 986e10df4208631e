"""The study of damage on disk: what it stores, reuses and computes again, what it announces, and what it refuses."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import damage as spoil
import polars as pl
import pytest
from damage_oracles import LENGTH, PROMPTS, damage_settings
from models import TEXT
from polars.testing import assert_frame_equal

import dimscope
from dimscope.errors import InvalidArgument, NonFiniteRows, TokenizerMissing, UnsupportedCheckpoint
from dimscope.studies.damage.run import GenerationProgress
from dimscope.studies.damage.study import DAMAGE as STUDY
from dimscope.studies.study import run_study

pytestmark = pytest.mark.slow  # whole commands or studies

FULL = {"prompts": PROMPTS, "decoding": "sample", "new_tokens": 6, "draws": 2, "token_errors": True}
SOME = ("truncate:8", "project:20", "noise:0.5", "truncate:16+shift:1")
AGAIN = {"rel_tol": 1e-6, "abs_tol": 1e-6}  # float32 states of a model that was loaded anew, wherever in memory it lies


def same(left: pl.DataFrame, right: pl.DataFrame) -> None:
    """Check that two tables are equal: texts, tokens, counts and nulls exactly, float32 numbers to their rounding."""
    assert_frame_equal(left, right, **AGAIN)


def same_tables(left: Mapping[str, pl.DataFrame], right: Mapping[str, pl.DataFrame]) -> None:
    assert list(left) == list(right)
    for name in left:
        same(left[name], right[name])


def stamps(folder: Path) -> dict[str, int]:
    """When each file of the tables was written."""
    paths = (path for path in (folder / "tables").rglob("*") if path.is_file())
    return {path.relative_to(folder / "tables").as_posix(): path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="module")
def uninterrupted(study, lively, tmp_path_factory):
    """Folder, facts and tables of a study that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, *study(lively("untied"), folder, *SOME, **FULL)


def test_the_tables_are_those_of_the_points_one_below_the_other(uninterrupted):
    folder, _, tables = uninterrupted
    assert set(tables) == {
        "damage", "windows", "breaking", "claims", "generations", "token_errors", "operator", "operator_block", "operator_histogram",
    }  # fmt: skip
    for name, table in tables.items():
        assert_frame_equal(pl.read_parquet(folder / f"tables/{name}.parquet"), table, check_exact=True)
    for name, n in (("damage", 8), ("generations", 5), ("token_errors", 7)):
        parts = [pl.read_parquet(path) for path in (folder / "tables/points").glob(f"*.{name}*.parquet")]
        assert len(parts) == n
        whole = tables[name].drop("n_same", strict=False)
        assert_frame_equal(pl.concat(parts), whole, check_row_order=False, check_exact=True)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".parquet", ".json"}


def test_an_interrupted_study_resumes_where_it_stopped(study, lively, uninterrupted, tmp_path):
    """Six tokens are heard at each of the five points whose prompts are answered; Ctrl-C comes with one of them."""
    after, heard = 9, list[GenerationProgress]()

    def stop(writing: GenerationProgress) -> None:
        heard.append(writing)
        if len(heard) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(lively("untied"), tmp_path, *SOME, watch=stop, **FULL)
    assert not (tmp_path / "tables/damage.parquet").exists()
    finished = stamps(tmp_path)
    # all numbers of the points before, and those of the point that was being written
    assert len([name for name in finished if name.endswith(".damage.json")]) == heard[-1].number
    assert len([name for name in finished if name.endswith(".generations.json")]) == (after - 1) // 6
    # of every table of the points before, the undamaged one aside
    errors = [name for name in finished if ".token_errors." in name and name.endswith(".json")]
    assert len(errors) == max(0, heard[-1].number - 2)
    _, tables = study(lively("untied"), tmp_path, *SOME, **FULL)
    same_tables(tables, uninterrupted[2])
    now = stamps(tmp_path)
    assert {name: now[name] for name in finished} == finished
    assert now.keys() == stamps(uninterrupted[0]).keys()


def test_ctrl_c_before_the_first_point_leaves_nothing(study, lively, tmp_path):
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(lively("untied"), tmp_path / "out", "truncate:8", announce=stop)
    assert not list(tmp_path.rglob("*.*"))


def test_what_is_finished_needs_no_model(study, lively, uninterrupted, tmp_path, monkeypatch):
    folder = shutil.copytree(uninterrupted[0], tmp_path / "out")
    before = stamps(folder)
    for name in ("load_model", "open_table"):
        monkeypatch.delattr(f"dimscope.studies.damage.inputs.{name}")
    _, tables = study(lively("untied"), folder, *SOME, **FULL)
    for name, table in uninterrupted[2].items():
        assert_frame_equal(tables[name], table, check_exact=True)
    assert stamps(folder) == before


def test_without_a_folder_the_tables_are_the_same(lively, text, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = damage_settings(text, *SOME, **FULL)
    result = run_study(STUDY, dimscope.open(str(lively("untied"))), settings)
    same_tables(result.tables, uninterrupted[2])
    assert not list(tmp_path.iterdir())


def test_a_lost_point_is_computed_again_and_no_other(study, lively, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted[0], tmp_path / "out")
    lost = sorted((folder / "tables/points").glob("noise-*.damage.parquet"))[0]
    lost.unlink()
    (folder / "tables/damage.json").unlink()
    before = stamps(folder)
    _, tables = study(lively("untied"), folder, *SOME, **FULL)
    same_tables(tables, uninterrupted[2])
    changed_files = {name for name, stamp in stamps(folder).items() if before.get(name) != stamp}
    stem = lost.name.removesuffix(".parquet")
    assert changed_files == {f"points/{stem}.parquet", f"points/{stem}.json", "damage.parquet", "damage.json"}


def test_other_prompts_do_not_judge_the_points_anew(study, lively, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted[0], tmp_path / "out")
    before = stamps(folder)
    other = {**FULL, "prompts": ("In the winter of 1907",)}
    _, tables = study(lively("untied"), folder, *SOME, **other)
    assert set(tables["generations"]["prompt"]) == {"In the winter of 1907"}
    changed_files = {name for name, stamp in stamps(folder).items() if before[name] != stamp}
    assert changed_files == {name for name in before if "generations" in name or name.startswith("claims")}
    assert_frame_equal(tables["damage"], uninterrupted[2]["damage"], check_exact=True)
    _, without = study(lively("untied"), folder, *SOME, draws=2)
    assert "generations" not in without
    assert not (folder / "tables/generations.parquet").exists()  # it would be taken for one of this study
    assert_frame_equal(without["damage"], uninterrupted[2]["damage"], check_exact=True)


def test_another_seed_and_length_compute_the_numbers_anew(study, lively, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted[0], tmp_path / "out")
    before = stamps(folder)
    _, tables = study(lively("untied"), folder, *SOME, draws=2, seed=1, length=12, windows=2)
    now = stamps(folder)
    points = [name for name in now if ".damage." in name and before.get(name) != now[name]]
    assert len(points) == 2 * 8  # a table and its provenance for each point
    rows = tables["damage"].filter(pl.col("metric") == "KL")
    assert set(rows["n_tokens"]) == {24}
    assert set(rows["seed"]) == {None, 1, 2}


def test_another_text_is_read_and_the_old_numbers_are_not_mixed_in(study, lively, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted[0], tmp_path / "out")
    other = tmp_path / "keeper.txt"  # of the same name
    other.write_text(TEXT.replace("the", "one"))
    _, tables = study(lively("untied"), folder, *SOME, draws=2, texts=(str(other),))
    _, fresh = study(lively("untied"), tmp_path / "fresh", *SOME, draws=2, texts=(str(other),))
    same_tables(tables, fresh)
    assert (
        tables["damage"].filter(pl.col("metric") == "loss")["value"][0]
        != uninterrupted[2]["damage"].filter(pl.col("metric") == "loss")["value"][0]
    )


# ---- facts and announcements ---------------------------------------------------------------------------------------


def test_the_facts_say_what_was_run(uninterrupted):
    assert uninterrupted[1] == {
        "preset": None, "draws": 2, "seed": 0, "sides": ("input",), "system": None, "decoding": "sample",
        "new_tokens": 6, "texts": ("keeper.txt",), "window_length": LENGTH, "n_changes": 7, "template": False,
        "chat": False, "dtype": "float32", "device": "cpu",
    }  # fmt: skip


def test_the_announcement_counts_changes_tokens_and_steps(study, lively, tmp_path):
    lines: list[str] = []
    settings = {"prompts": PROMPTS, "new_tokens": 5, "draws": 3, "texts": ("generated", "builtin:prose")}
    study(lively("untied"), tmp_path / "one", "truncate:8", "noise:1", announce=lines.append, **settings)
    study(lively("untied"), tmp_path / "two", "truncate:8", announce=lines.append)
    # three answers of five tokens at most: undamaged, truncated, and one of the three draws of noise
    assert [line.partition(" on cpu")[0] for line in lines] == [
        "4 changes and the unchanged model, 96 tokens each, 15 steps of generation",
        "1 change and the unchanged model, 48 tokens each",
    ]


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 65}, "^`length` must be at most 64, "),
        ({"length": 2}, "`length` must be 3 or more, got 2"),
        ({"length": 1, "texts": ("generated",)}, "`length` must be 2 or more"),
        ({"texts": ()}, "^`texts` takes files"),
        ({"windows": 4000}, "`windows` must be 1 to .* windows of 16 tokens, got 4000"),
        ({"texts": ("short",)}, "at least 2"),
        ({"texts": ("short",), "from_start": True}, "at least 2"),
        ({"prompts": ("word " * 40,)}, "the prompt .* the model reads at most 64"),
        ({"prompts": ("word",), "chat": True}, "no chat template"),
        ({"changes": ("truncate:33",)}, "from 0 to 32, got 33"),
        ({"device": "abacus"}, "`device` .*abacus"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(study, lively, tmp_path, settings, message):
    if settings.get("texts") == ("short",):
        (tmp_path / "short.txt").write_text("A")
        settings = {**settings, "texts": (str(tmp_path / "short.txt"),)}
    with pytest.raises(InvalidArgument, match=message):
        study(lively("untied"), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_damaged(study, checkpoint, editable, tmp_path):
    for folder, error in (
        (checkpoint("llama", tokenizer=None), TokenizerMissing),
        (checkpoint("bert"), UnsupportedCheckpoint),
    ):
        with pytest.raises(error):
            study(folder, tmp_path / "out", "truncate:8")
        assert not (tmp_path / "out").exists()
    broken = editable(checkpoint("llama"))
    spoil.set_rows(broken, [5, 9], math.nan)
    with pytest.raises(NonFiniteRows, match="2 of 512 rows"):
        study(broken, tmp_path / "out", "truncate:8")
    assert not (tmp_path / "out" / "tables" / "damage.parquet").exists()
