"""`dimscope damage` end to end: what it prints and writes, what it reuses, and kill -9 and Ctrl-C in the middle."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import models
import numpy as np
import polars as pl
import pytest
import torch
import transformers
from polars.testing import assert_frame_equal
from rich.console import Console

from dimscope.cli.damage import progress_table
from dimscope.interventions.perturbations import PERTURBATIONS
from dimscope.studies.damage.run import GenerationProgress

pytestmark = pytest.mark.slow  # whole commands or studies

READ = ("--length", "16", "--windows", "3")
ASK = ("--prompt", "The keeper counted", "In the winter", "--new-tokens", "6")
SOME = ("--truncate", "75%,8", "--project", "50%", "--noise", "0.1,1", "--draws", "2")
TABLES = {"damage", "windows", "breaking", "claims", "generations", "operator", "operator_block", "operator_histogram"}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A file with the text on which the tests' tokenizers were trained."""
    path = tmp_path_factory.mktemp("texts") / "keeper.txt"
    path.write_text(models.TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def studied(checkpoint, cli, digest, text, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a small study with a page, and what the command printed. Read only."""
    folder, out = checkpoint("llama"), tmp_path_factory.mktemp("damage") / "out"
    before = digest(folder)
    printed = succeed(cli("damage", folder, *SOME, "--text", text, *READ, *ASK, "-o", out))
    assert digest(folder) == before  # the model is read, never written
    return out, printed


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    """Check that a command succeeded, and return what it printed."""
    assert result.returncode == 0, result.stderr[-600:]
    return result.stdout


def read_tables(folder: Path) -> dict[str, pl.DataFrame]:
    return {path.stem: pl.read_parquet(path) for path in (folder / "tables").glob("*.parquet")}


def read_facts(folder: Path) -> dict[str, Any]:
    return models.read_json(folder / "report.json")


def without_times(facts: dict[str, Any]) -> dict[str, Any]:
    """Return what report.json says, apart from the seconds that each study took."""
    studies = {name: {**study, "seconds": 0} for name, study in facts["studies"].items()}
    return {**facts, "studies": studies}


def same(left: Path, right: Path) -> None:
    """Check that two folders hold the same tables: the same processor, one thread, so to the last bit."""
    one, other = read_tables(left), read_tables(right)
    assert one.keys() == other.keys()
    for name in one:
        assert_frame_equal(one[name], other[name], check_exact=True)


def stamps(folder: Path) -> dict[str, int]:
    """When each file below the tables was written."""
    paths = (path for path in (folder / "tables").rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in paths}


def changes(frame: pl.DataFrame) -> list[str]:
    return frame["change"].unique(maintain_order=True).to_list()


def values(frame: pl.DataFrame, metric: str, **where: Any) -> list[float]:
    rows = frame.filter(pl.col("metric") == metric, *(pl.col(name) == value for name, value in where.items()))
    return rows["value"].to_list()


# ---- what is printed and written --------------------------------------------------------------------------------------------------


def test_a_study_is_tables_facts_and_a_page(studied, checkpoint):
    out, _ = studied
    assert {path.name for path in out.iterdir() if path.name[0] != "."} == {"tables", "index.html", "report.json"}
    tables = read_tables(out)
    assert tables.keys() == TABLES
    assert changes(tables["damage"]) == ["undamaged", "truncate 24", "truncate 8", "project 16", "noise 0.1", "noise 1"]
    assert set(tables["damage"].filter(pl.col("change") == "noise 1")["seed"]) == {0, 1}
    report = read_facts(out)
    assert set(report["studies"]["damage"]["tables"]) == TABLES
    assert (report["model"], report["tied"]) == (str(checkpoint("llama")), False)
    study = report["studies"]["damage"]["facts"]
    assert (study["texts"], study["window_length"], study["n_changes"]) == (["keeper.txt"], 16, 2 + 2 + 4)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "</html>" in page
    assert len(re.findall(r'<section id="', page)) >= 3
    assert not list(out.rglob("*.tmp"))


def test_the_terminal_gets_a_line_for_each_change_and_the_answers(studied):
    out, printed = studied
    for change in ("undamaged", "truncate 24", "truncate 8", "project 16", "noise 0.1", "noise 1"):
        assert re.search(rf"^ *{re.escape(change)} ", printed, re.MULTILINE), change
    assert "index.html" in printed
    assert "breaking" in printed
    assert "beliefs" in printed
    assert "In the winter" in printed
    assert "keeper.txt" in printed
    [loss] = values(read_tables(out)["damage"], "loss", change="truncate 8")
    assert f"{loss:.4g}" in printed


def test_the_errors_of_an_evaluation_are_those_of_its_windows(studied):
    """Of three windows of one length: the standard error of the mean of their means."""
    tables = read_tables(studied[0])
    windows = tables["windows"].filter(pl.col("change") == "truncate 8")
    means = {
        "loss": windows["loss"] / windows["n_predicted"], "KL": windows["kl"] / windows["n_positions"],
        "loss rise": windows["loss_rise"] / windows["n_predicted"],
    }  # fmt: skip
    for metric, values in means.items():
        row = tables["damage"].filter(pl.col("change") == "truncate 8", pl.col("metric") == metric).row(0, named=True)
        assert len(values) == 3
        assert row["value"] == pytest.approx(values.mean())
        assert row["stderr"] == pytest.approx(values.std() / math.sqrt(3))


def test_json_holds_what_the_tables_hold(studied, checkpoint, cli, text, tmp_path):
    command = ("damage", checkpoint("llama"), *SOME, "--text", text, *READ, *ASK, "--json")
    result = json.loads(succeed(cli(*command, cwd=tmp_path)))
    assert not list(tmp_path.iterdir())  # without --out nothing is left
    tables = read_tables(studied[0])
    assert result["model"] == str(checkpoint("llama"))
    assert "page" not in result
    for name, table in (("damage", "damage"), ("operator", "operator")):
        assert_frame_equal(pl.DataFrame(result[name], schema=tables[table].schema), tables[table], check_exact=True)
    assert re.search("harmless|cannot tell", result["answer"])
    answers = tables["generations"].partition_by("number", maintain_order=True)
    for n, answer in enumerate(answers, 1):
        rows = result[f"generations {n}"]
        assert [row["continuation"] for row in rows] == answer["continuation"].to_list()
        assert {row["prompt"] for row in rows} == set(answer["prompt"])
    assert [row["change"] for row in result["changes 1"]] == changes(tables["damage"])
    assert [row["loss"] for row in result["changes 1"]][:3] == values(tables["damage"], "loss")[:3]
    out = shutil.copytree(studied[0], tmp_path / "out")
    with_page = json.loads(succeed(cli(*command, "-o", out)))
    assert with_page.pop("page") == str(out / "index.html")
    assert {**with_page, "seconds": 0} == {**result, "seconds": 0}


def test_the_loss_is_that_of_a_model_saved_with_the_truncated_table(checkpoint, cli, text, tmp_path):
    """The first window of the text, by stock transformers; a table of rank 8 by numpy's SVD."""
    folder = checkpoint("llama")
    options = ("--truncate", "25%", "--text", text, "--from-start", "--length", "16", "--windows", "1")
    succeed(cli("damage", folder, *options, "-o", tmp_path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(models.TEXT)["input_ids"][:16]])  # <s> first
    left, spectrum, right = np.linalg.svd(models.stock_tables(folder)["input"], full_matrices=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tables = {"undamaged": (left * spectrum) @ right, "truncate 8": (left[:, :8] * spectrum[:8]) @ right[:8]}
    frame = read_tables(tmp_path)["damage"]
    losses = {}
    for change, rows in tables.items():
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(torch.from_numpy(rows))
            logits = model(ids).logits[0, :-1].double()
        losses[change] = float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
        assert values(frame, "loss", change=change) == [pytest.approx(losses[change], rel=1e-5)]
    assert losses["undamaged"] != pytest.approx(losses["truncate 8"], rel=1e-3)
    error = math.sqrt((spectrum[8:] ** 2).sum() / (spectrum**2).sum())
    assert values(frame, "relative error") == [pytest.approx(error, rel=1e-9)]


def test_every_registered_kind_is_an_option(checkpoint, cli, text):
    page = " ".join(succeed(cli("damage", "--help")).replace("│", " ").split())
    for kind in PERTURBATIONS.values():
        assert f"--{kind.name} STR... {kind.about} " in page
    assert "--[KEYWORD]" not in page
    strengths = {"dimensions": "8", "standard deviations": "0.5", "factor": "2", "bits": "4", "": "on"}
    options = [word for kind in PERTURBATIONS.values() for word in (f"--{kind.name}", strengths[kind.unit])]
    command = ("damage", checkpoint("gpt2"), *options, "--draws", "1", "--text", text, *READ, "--json")
    rows = json.loads(succeed(cli(*command)))["changes 1"]
    assert [row["change"].partition(" ")[0] for row in rows] == ["undamaged", *PERTURBATIONS]


# ---- options -------------------------------------------------------------------------------------------------------


def test_options_choose_what_is_changed_and_read(checkpoint, cli, text, tmp_path):
    (tmp_path / "other.txt").write_text(models.TEXT[::-1])
    options = (
        "--change", "truncate:75%+noise:0.1", "rotate", "--project", "8,16", "--rescaled", "--side", "input", "both",
        "--text", text, tmp_path / "other.txt", "generated", "--length", "12", "--windows", "2", "--seed", "5",
        "--draws", "1", "--token-errors", "--batch", "1", "--dtype", "float32", "--device", "cpu",
    )  # fmt: skip
    own = [tmp_path / "out" / name / "mine.txt" for name in ("state", "tables", "tables/points")]
    for path in own:  # files of the user, which are not touched
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    succeed(cli("damage", checkpoint("qwen2"), *options, "-o", tmp_path / "out"))
    assert [path.read_text() for path in own] == ["mine"] * 3
    tables = read_tables(tmp_path / "out")
    assert tables.keys() == TABLES - {"generations"} | {"token_errors"}
    frame = tables["damage"]
    expected = [
        "project 8",
        "project 16",
        "project-rescaled 8",
        "project-rescaled 16",
        "truncate 24 + noise 0.1",
        "rotate",
    ]
    assert changes(frame) == ["undamaged", *expected]
    assert set(frame["side"]) == {"input", "both"}
    assert set(frame["seed"]) == {None, 5}
    texts = ["keeper.txt", "other.txt", "generated"]
    assert (set(frame["text"]), set(frame["table"])) == ({*texts, None}, {"input", "output", None})
    assert set(frame.filter(pl.col("metric") == "KL")["n_tokens"]) == {24}
    assert len(tables["token_errors"]) == (6 + 2 * 6) * 512
    study = read_facts(tmp_path / "out")["studies"]["damage"]["facts"]
    assert (study["texts"], study["sides"], study["seed"]) == (texts, ["input", "both"], 5)
    assert (study["window_length"], study["n_changes"], study["dtype"]) == (12, 12, "float32")


# ---- a terminal ----------------------------------------------------------------------------------------------------


def shown(writing: GenerationProgress) -> list[list[str]]:
    """The words of every line of what a terminal shows while a model writes."""
    page = io.StringIO()
    Console(file=page, width=100).print(progress_table(writing))
    return [words for line in page.getvalue().splitlines() if (words := line.split()) and "─" not in line]


def test_answers_are_shown_beside_those_of_the_undamaged_model():
    long = "Once upon a time there was a lighthouse"
    first = shown(GenerationProgress("undamaged", 1, 9, None, [long], ["[red] world"], None))
    assert first == [["undamaged", "·", "1", "of", "9"], ["prompt", "undamaged"], [*long.split(), "[red]", "world"]]
    later = shown(GenerationProgress("project 8", 3, 9, 150.0, [long, "Bye"], ["one", "two"], ["three", "four"]))
    assert " ".join(later[0]) == "project 8 · 3 of 9 · about 2 min left"
    assert later[1:] == [
        ["prompt", "undamaged", "project", "8"],
        [*long.split(), "three", "one"],
        ["Bye", "four", "two"],
    ]


def test_on_a_terminal_the_answers_of_every_change_are_left_to_read(checkpoint, cli, text, tmp_path):
    """Output and errors go to a terminal, the text comes by a pipe: the announcement first, the tables last."""
    command = ("damage", checkpoint("llama"), "--truncate", "16,8", "--text", "-", *READ, *ASK, "-o", tmp_path / "out")
    master, slave = pty.openpty()
    terminal = os.ttyname(slave)
    variables = {"TERM": "xterm", "LINES": "60"}
    process = cli.start(*command, stdin=str(text), stdout=terminal, stderr=terminal, env=variables)
    seen = os.read(master, 1 << 16)
    os.close(slave)  # the command has opened it
    while chunk := read_some(master):
        seen += chunk
    os.close(master)
    assert process.end().returncode == 0, seen.decode()
    screen = left_on_screen(seen.decode())
    # three answers of six tokens, both prompts at once
    assert "2 changes and the unchanged model, 48 tokens each, 18 steps of generation on cpu (float32)" in screen
    for title in ("undamaged · 1 of 3", "truncate 16 · 2 of 3 · about", "truncate 8 · 3 of 3 · about"):
        assert screen.count(title) == 1
    tables = read_tables(tmp_path / "out")
    words = [re.search("[A-Za-z]{2,}", row) for row in tables["generations"]["continuation"]]
    assert any(words)
    assert all(word is None or word[0] in screen for word in words)
    assert screen.rindex("breaking") > screen.rindex("3 of 3")
    assert set(tables["damage"]["text"]) == {None, "standard input"}


def left_on_screen(seen: str) -> str:
    """What a terminal of endless height still shows after lines were erased and written again."""
    lines, row = [""], 0
    for control, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", seen):
        if control == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif control == "\x1b[2K":
            lines[row] = ""
        elif re.fullmatch(r"\x1b\[\d*A", control):
            row -= int(control[2:-1] or 1)
        lines[row] += text
    return "\n".join(lines)


def read_some(master: int) -> bytes:
    """What there is to read; nothing once the other end is closed, which Linux tells by an error."""
    try:
        return os.read(master, 1 << 16)
    except OSError:
        return b""


# ---- what is reused --------------------------------------------------------------------------------------------


def test_the_same_command_again_computes_nothing(checkpoint, cli, text, studied, tmp_path):
    out = shutil.copytree(studied[0], tmp_path / "out")
    first = stamps(out)
    succeed(cli("damage", checkpoint("llama"), *SOME, "--text", text, *READ, *ASK, "-o", out))
    assert stamps(out) == first
    same(out, studied[0])
    torn = next(out.glob("tables/points/project-*.damage.parquet"))
    torn.write_bytes(torn.read_bytes()[:100])
    (out / "tables" / "damage.json").unlink()  # a table without provenance is not finished
    succeed(cli("damage", checkpoint("llama"), *SOME, "--text", text, *READ, *ASK, "-o", out))
    changed = {name.rpartition(".")[0] for name, stamp in stamps(out).items() if stamp != first.get(name)}
    assert changed == {"tables/damage", torn.relative_to(out).as_posix().removesuffix(".parquet")}
    same(out, studied[0])


def test_a_report_has_the_study_and_another_model_takes_nothing_from_it(checkpoint, cli, text, tmp_path):
    out, read = tmp_path / "out", ("--text", text, "--length", "16")
    folder = checkpoint("llama", max_position_embeddings=128, layers=1)
    damage = ("--damage.change", "truncate:50%", "noise:1", "--damage.draws", "1")
    studies = ("--studies", "damage", "embedding", *damage, "--embedding.knn-sample", "50")
    assert "index.html" in succeed(cli("report", folder, *studies, *read, "--windows", "1", "-o", out))
    assert set(read_facts(out)["studies"]) == {"embedding", "damage"}
    frame = read_tables(out)["damage"]
    assert changes(frame) == ["undamaged", "truncate 16", "noise 1"]
    assert set(frame.filter(pl.col("metric") == "loss")["text"]) == {"keeper.txt"}
    anchors = re.compile(r'<section id="([^"]+)"')
    sections = anchors.findall((out / "index.html").read_text(encoding="utf-8"))
    command = ("damage", checkpoint("gpt2"), "--truncate", "8", *read, "--windows", "1", "-o")
    for folder in (out, tmp_path / "alone"):
        succeed(cli(*command, folder))
    assert set(read_facts(out)["studies"]) == {"damage"}
    assert_frame_equal(read_tables(out)["damage"], read_tables(tmp_path / "alone")["damage"], check_exact=True)
    assert set(anchors.findall((out / "index.html").read_text(encoding="utf-8"))) < set(sections)


# ---- kill -9 and Ctrl-C --------------------------------------------------------------------------------------------

LONG = (
    "--truncate", "28,16,4", "--noise", "0.1", "--draws", "2", "--text-draws", "2", "--prompt",
    "The keeper counted", "--new-tokens", "4", "--decoding", "sample",
)  # fmt: skip


def test_kill_9_then_ctrl_c_then_the_same_command_to_its_end(checkpoint, cli, digest, text, tmp_path):
    folder, out = checkpoint("gpt2"), tmp_path / "killed"
    command = ("damage", folder, *LONG, "--text", text, *READ, "-o")
    before = digest(folder)
    finished: dict[str, int] = {}
    for count, number in ((2, signal.SIGKILL), (4, signal.SIGINT)):
        points = out / "tables" / "points" / "*.damage.json"
        ended = cli.interrupt(*command, out, after=points, count=count, by=number)
        if number == signal.SIGINT:
            assert (ended.returncode, ended.stdout) == (130, "")
            assert "kept" in ended.stderr.splitlines()[-1]
        else:
            assert ended.returncode == -signal.SIGKILL
        kept = {name: stamp for name, stamp in stamps(out).items() if name.endswith((".json", ".parquet"))}
        assert kept.items() >= finished.items()  # what was finished before is not written again
        assert len([name for name in kept if name.endswith(".damage.json")]) == count
        assert not (out / "report.json").exists()
        finished = {
            name: kept[name] for name in kept if name.removesuffix("parquet").removesuffix("json") + "json" in kept
        }
    succeed(cli(*command, out))
    now = stamps(out)
    assert {name: now[name] for name in finished} == finished
    succeed(cli(*command, tmp_path / "uninterrupted"))
    same(out, tmp_path / "uninterrupted")
    assert {path.name for path in out.iterdir() if path.name[0] != "."} == {"tables", "index.html", "report.json"}
    facts = [without_times(read_facts(o)) for o in (out, tmp_path / "uninterrupted")]
    assert facts[0] == facts[1]
    assert digest(folder) == before
