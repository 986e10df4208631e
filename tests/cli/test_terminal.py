"""What a command prints: the answer first, no empty table, limits for each group, names whole at 80 columns."""

import json

import polars as pl
import pytest

from dimscope.cli import app
from dimscope.cli.terminal import Output, print_json, print_tables
from dimscope.studies.layers.settings import LayersSettings

HITS = pl.DataFrame({"query": ["water"] * 5 + ["king"] * 2, "rank": [*range(1, 6), 1, 2], "side": ["input"] * 7})


@pytest.fixture(autouse=True)
def _narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def printed(capsys: pytest.CaptureFixture[str], output: Output, limit: int = 40) -> str:
    print_tables(output, limit)
    return capsys.readouterr().out


def test_the_answer_comes_first_and_the_seconds_come_last_of_the_facts(capsys) -> None:
    text = printed(capsys, Output({"model": "m", "seconds": 1.5}, {"hits": HITS}, answer="Two [queries]."))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["Two", "[queries]."]
    assert lines[1:3] == [["model", "m"], ["seconds", "1.5"]]


def test_empty_tables_and_hidden_columns_are_not_printed(capsys) -> None:
    text = printed(capsys, Output({}, {"hits": HITS, "nothing": HITS.clear()}, hidden=frozenset({"rank"})))
    assert "nothing" not in text
    assert "rank" not in text


def test_every_group_has_the_limit_to_itself(capsys) -> None:
    text = printed(capsys, Output({}, {"hits": HITS}, split_by={"hits": "query"}), limit=2)
    assert "water" in text
    assert "king" in text
    assert text.count("2 of 5 rows") == 1  # the second query has two, and they are all there


def test_a_table_of_the_programs_own_names_breaks_none_of_them_at_80_columns(capsys) -> None:
    names = ["effective rank (entropy of lambda)", "participation ratio, corrected"]
    table = pl.DataFrame({"metric": names, "order": [1, 2], "value": [99.8, 16.7], "null_gaussian": [248.4, 256.1]})
    text = printed(capsys, Output({}, {"dimensions": table}))
    assert all(name in text for name in names)
    assert max(map(len, text.splitlines())) <= 80


def test_json_is_one_object_with_the_answer_the_facts_and_every_row(capsys) -> None:
    frame = pl.DataFrame({"value": [1.0, float("nan")], "raw": [b"\x01", None]})
    print_json(Output({"model": "m"}, {"hits": frame}, files_only={"all": HITS}, answer="Two."))
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["answer", "model", "hits", "all"]
    assert result["hits"] == [{"value": 1.0, "raw": "01"}, {"value": None, "raw": None}]
    assert len(result["all"]) == 7


def test_messages_of_the_library_name_the_options_of_the_command_line() -> None:
    assert app.with_options("`texts` takes files") == "--text takes files"  # whose option has a name of its own
    assert app.with_options("`shuffles` must be 0 or more, got -1") == "--shuffles must be 0 or more, got -1"
    assert app.with_options("pass `skip_nonfinite`") == "pass --skip-nonfinite"


def test_other_options_override_those_of_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[LayersSettings] = []

    def record(study, model, settings, common) -> None:
        chosen.append(settings)

    monkeypatch.setattr("dimscope.cli.studies.run_command", record)
    assert app.main(["layers", "--preset", "notebook"]) == 0
    assert app.main(["layers", "--preset=notebook", "--shuffles", "4"]) == 0
    assert [settings.shuffles for settings in chosen] == [1, 4]
    assert chosen[0].windows == chosen[1].windows == 1


def test_ctrl_c_exits_with_130_and_says_that_the_command_resumes(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupt(*arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dimscope.cli.studies.run_command", interrupt)
    assert app.main(["layers"]) == 130
    assert "the same command resumes" in capsys.readouterr().err
