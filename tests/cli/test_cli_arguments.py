"""Arguments that do not fit: one line, exit code 2, nothing written; and models without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import damage
import models
import pytest

pytestmark = pytest.mark.slow  # whole commands or studies

ARGUMENTS = {
    "an unknown command": (["inspcet"], ["inspcet"]),
    "an unknown option": (["inspect", "MODEL", "--bogus"], ["--bogus"]),
    "an unknown option of report": (["report", "MODEL", "-o", "OUT", "--fast"], ["--fast"]),
    "too many models": (["inspect", "MODEL", "MODEL"], []),
    "an unknown side": (["tokens", "MODEL", "--side", "middle"], ["side"]),
    "no number": (["tokens", "MODEL", "--limit", "many"], ["limit"]),
    "an unknown study": (["report", "MODEL", "-o", "OUT", "--with", "astrology"], ["with"]),
    "an option without its value": (["report", "MODEL", "-o"], ["-o"]),
    "a report without a folder": (["report", "MODEL"], ["-o"]),
    "a sample of nobody": (["report", "MODEL", "-o", "OUT", "--embedding.knn-sample", "0"], ["--knn-sample", "0"]),
    "vectors without a folder": (["tokens", "MODEL", "--vectors"], ["--vectors", "--out"]),
    "no query": (["neighbors", "MODEL"], ["query"]),
    "an empty query": (["neighbors", "MODEL", ""], ["query"]),
    "a row beyond the table": (["neighbors", "MODEL", "#512"], ["512", "511"]),
    "an expression with an empty term": (["neighbors", "MODEL", "#5 -  - #6"], ["term"]),
    "no neighbours": (["neighbors", "MODEL", "#5", "-k", "0"], ["-k", "0"]),
    "too many components": (["neighbors", "MODEL", "#5", "--components", "33"], ["33", "32"]),
    "an unknown metric": (["neighbors", "MODEL", "#5", "--metric", "taxi"], ["metric"]),
    "ids without a colon": (["correlate", "MODEL", "--ids", "10"], ["--ids", "10"]),
    "ids backwards": (["correlate", "MODEL", "--ids", "20:10"], ["--ids", "20:10"]),
    "ids that are no numbers": (["correlate", "MODEL", "--ids", "a:b"], ["--ids", "a:b"]),
    "ids below zero": (["correlate", "MODEL", "--ids=-5:5"], ["--ids", "-5:5"]),
    "ids beyond the table": (["correlate", "MODEL", "--ids", "0:513"], ["--ids", "0:513", "512"]),
    "no ids at all": (["correlate", "MODEL", "--ids", "5:5"], ["--ids", "5:5"]),
    "a correlation above one": (["correlate", "MODEL", "--at-least", "1.5"], ["--at-least", "1.5"]),
    "a negative radius": (["pairs", "MODEL", "--radius=-1"], ["radius", "-1"]),
    "a radius of NaN": (["pairs", "MODEL", "--radius", "nan"], ["radius", "nan"]),
    "an endless radius": (["pairs", "MODEL", "--radius", "inf"], ["radius", "inf"]),
    "a radius of words": (["pairs", "MODEL", "--radius", "near"], ["radius"]),
    "no permutation": (["spectrum", "MODEL", "--permutations", "0"], ["--permutations", "0"]),
    "an enormous seed": (["report", "MODEL", "-o", "OUT", "--seed", str(1 << 70)], ["seed"]),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_do_not_fit(checkpoint, cli, refused, tmp_path, case):
    arguments, named = ARGUMENTS[case]
    places = {"MODEL": str(checkpoint("qwen2")), "OUT": str(tmp_path / "out")}
    refused(cli(*(places.get(a, a) for a in arguments), cwd=tmp_path), *named)
    assert not list(tmp_path.iterdir())


def test_refusals_of_arguments_are_one_line_in_json_mode_too(checkpoint, cli, refused):
    refused(cli("correlate", checkpoint("qwen2"), "--ids", "9:3", "--json"), "9:3")
    refused(cli("inspect", "./nowhere", "--json"), "nowhere")


def test_an_encoder_has_no_output_table(checkpoint, cli, refused):
    refused(cli("tokens", checkpoint("bert"), "--side", "output"), "output table")


# ---- where results go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "tokens", "spectrum", "report"])
def test_results_go_to_a_folder_not_to_a_file(checkpoint, cli, refused, tmp_path, command):
    occupied = tmp_path / "occupied"
    occupied.write_text("mine")
    for out in (occupied, occupied / "below"):
        refused(cli(command, checkpoint("qwen2"), "-o", out), "occupied", "folder")
    assert occupied.read_text() == "mine"


def unwritable(tmp_path: Path) -> Path | None:
    """A folder in which this user, even root, cannot make files."""
    tmp_path.chmod(0o555)
    for place in (tmp_path, Path("/proc/self"), Path("/sys"), Path("/sys/kernel")):
        try:
            (place / "dimscope-probe").mkdir()
        except OSError:
            if place.is_dir():
                return place
        else:
            (place / "dimscope-probe").rmdir()
    return None


@pytest.mark.parametrize("command", ["inspect", "report"])
def test_a_folder_that_cannot_be_written_is_refused(checkpoint, cli, refused, tmp_path, command):
    folder = tmp_path / "locked"
    folder.mkdir()
    place = unwritable(folder)
    if place is None:
        pytest.skip("this user may write everywhere")
    refused(cli(command, checkpoint("qwen2"), "-o", place / "out"), place)


def test_a_folder_that_is_occupied_below_is_refused(checkpoint, cli, refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tables").write_text("a file where the tables go")
    result = cli("report", checkpoint("qwen2"), "-o", tmp_path / "out")
    refused(result, tmp_path / "out" / "tables", "cannot be written")


# ---- without a tokenizer -------------------------------------------------------------------------------------------


def test_without_a_tokenizer_everything_but_text_works(checkpoint, cli, refused, digest, tmp_path):
    folder = checkpoint("qwen2", tokenizer=None)
    before = digest(folder)
    tokens = json.loads(cli("tokens", folder, "--json").stdout)["tokens"]
    assert {(t["label"], t["category"], t["piece"]) for t in tokens} == {
        (f"#{i}", "ordinary", None) for i in range(512)
    }
    near = json.loads(cli("neighbors", folder, "#5 - #6 + #7", "-k", "3", "--json").stdout)
    assert len(near["neighbors"]) == 6
    refused(cli("neighbors", folder, " water", "-o", tmp_path / "out"), "tokenizer", "#")
    refused(cli("neighbors", folder, "#5 - water"), "tokenizer")
    report = cli("report", folder, "-o", tmp_path / "report")
    assert report.returncode == 0, report.stderr
    facts = models.read_json(tmp_path / "report" / "report.json")
    assert facts["studies"]["embedding"]["facts"]["tokenizer_size"] is None
    assert "tokenizer" in facts["studies"]["embedding"]["warnings"][0]
    for command, options in (
        ("pairs", ()),
        ("correlate", ("--ids", "0:9")),
        ("spectrum", ()),
        ("tokens", ("--untrained",)),
    ):
        result = cli(command, folder, *options)
        assert (result.returncode, result.stderr) == (0, "")
    assert not (tmp_path / "out").exists()
    assert digest(folder) == before


BROKEN_TOKENIZERS = {
    "half of tokenizer.json": lambda folder: damage.break_json(folder / "tokenizer.json"),
    "an empty tokenizer.json": lambda folder: (folder / "tokenizer.json").write_text(""),
    "a tokenizer.json of another kind": lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"}'),
    "half of tokenizer_config.json": lambda folder: damage.break_json(folder / "tokenizer_config.json"),
    "a list as tokenizer_config.json": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "a vocab.json alone": lambda folder: lone_vocabulary(folder, '{"a": 0, "b": 1}'),
    "a broken vocab.json alone": lambda folder: lone_vocabulary(folder, "{"),
    "a tokenizer.model of noise": lambda folder: lone_vocabulary(folder, "noise", "tokenizer.model"),
}


def lone_vocabulary(folder: Path, text: str, name: str = "vocab.json") -> None:
    damage.remove_tokenizer(folder)
    (folder / name).write_text(text)


@pytest.mark.parametrize("broken", BROKEN_TOKENIZERS)
def test_studies_go_on_without_a_damaged_tokenizer(checkpoint, editable, cli, broken):
    folder = editable(checkpoint("qwen2"))
    BROKEN_TOKENIZERS[broken](folder)
    result = cli("tokens", folder, "--json")
    assert result.returncode == 0, result.stderr[-300:]
    assert len(json.loads(result.stdout)["tokens"]) == 512
    assert "Traceback" not in result.stderr
