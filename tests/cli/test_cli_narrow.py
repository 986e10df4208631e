"""`dimscope narrow` from the command to the checkpoint: whole or not at all, its card as measured, its refusals one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

WIDE = {"hidden_size": 64, "layers": 3}
READ = ("--length", 16, "--windows", 4)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The keeper counted the ships. On a foggy morning there were none, although bells rang. " * 40)
    return path


def test_a_narrow_checkpoint_has_weights_config_tokenizer_and_a_card_of_what_was_measured(
    checkpoint, cli, text, tmp_path
):
    folder, out = checkpoint("qwen2", **WIDE), tmp_path / "narrow"
    ran = cli("narrow", folder, "--width", 32, "--text", text, *READ, "-o", out, "--json")
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    held = load_file(out / "model.safetensors")
    assert told["parameters_after"] == sum(t.numel() for t in held.values())
    assert told["bytes_after"] == sum(t.nbytes for t in held.values())
    assert told["parameters_before"] == sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 32
    card = (out / "README.md").read_text()
    measured = {row["metric"]: row for row in told["measured"]}
    assert f"| {told['parameters_before']:,} | {told['parameters_after']:,} |" in card
    assert f"| KL | 0 | {measured['KL']['narrow']:.4g} |" in card
    assert measured["KL"]["narrow"] > 0
    assert measured["KL"]["dense"] == 0
    assert f"dimscope narrow {folder} --width 32" in card
    assert (out / "tokenizer.json").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_cut_that_makes_nothing_smaller_says_so(checkpoint, cli, tmp_path):
    # A tied table of 512 rows outweighs what a width of 28 for 32 saves.
    ran = cli(
        "narrow", checkpoint("qwen2"), "--width", 28, "--basis", "random", "--untied", "--no-judge", "-o", tmp_path / "n", "--json"
    )  # fmt: skip
    assert "not smaller" in json.loads(ran.stdout)["warning"]
    assert "Not smaller" in (tmp_path / "n" / "README.md").read_text()


def test_without_text_nothing_is_run_and_nothing_is_judged(checkpoint, cli, tmp_path):
    folder = checkpoint("llama", tokenizer=None)
    ran = cli("narrow", folder, "--width", 16, "--basis", "embedding", "--no-judge", "-o", tmp_path / "n", "--json")
    assert ran.returncode == 0, ran.stderr
    assert "measured" not in json.loads(ran.stdout)
    assert "KL |" not in (tmp_path / "n" / "README.md").read_text()


def test_the_same_seed_cuts_the_same_checkpoint(checkpoint, cli, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        cli(
            "narrow",
            checkpoint("llama"),
            "--width",
            16,
            "--basis",
            "random",
            "--no-judge",
            "--seed",
            seed,
            "-o",
            tmp_path / name,
        )
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verifying_says_that_a_rotation_changes_nothing_and_writes_nothing(checkpoint, cli, text, tmp_path, dtype):
    ran = cli("narrow", checkpoint("gemma", dtype=dtype), "--verify", "--text", text, "--length", 16, "--json")
    told = json.loads(ran.stdout)
    assert told["rotation_at_full_width"] == "exact to rounding"
    assert 0 < told["largest_difference_of_a_logit"] < 1e-4 * told["largest_logit"]
    assert told["same_first_choice"] == 1
    assert {p.name for p in tmp_path.iterdir()} <= {"text.txt", "hf_home"}


def test_kill_9_leaves_no_folder_that_looks_complete(checkpoint, cli, clean_environment, tmp_path):
    folder, out = checkpoint("llama", hidden_size=256, vocab_size=40_000, tokenizer=None), tmp_path / "narrow"
    arguments = (folder, "--width", 128, "--basis", "random", "--no-judge", "-o", out)
    process = subprocess.Popen(
        [sys.executable, "-m", "dimscope", "narrow", *map(str, arguments)],
        env=clean_environment,
        stderr=subprocess.PIPE,
    )
    partial = tmp_path / ".narrow.partial"
    deadline = time.monotonic() + 60
    while not list(partial.glob("*.safetensors")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    assert partial.exists()
    assert cli("narrow", *arguments).returncode == 0
    assert (out / "config.json").exists()
    assert not partial.exists()


@pytest.mark.parametrize(
    ("family", "arguments", "words"),
    [
        ("llama", ("--width", 33), ["from 1 to 32"]),
        ("llama", ("--width", 0), ["from 1 to 32"]),
        ("llama", ("--width", 30), ["28 or 32"]),
        ("llama", (), ["--width"]),
        ("gpt2", ("--width", 16), ["gpt2", "whole heads"]),
        ("olmo", ("--width", 16), ["olmo", "qwen2"]),
        ("phi", ("--width", 1), ["from 2 to 32"]),
        ("llama", ("--width", 16, "--windows", 0), ["at least 1"]),
        ("llama", ("--width", 16, "--length", 65), ["at most 64"]),
        ("llama", ("--width", 16, "--text", "no-such.txt"), ["no-such.txt"]),
        ("llama", ("--width", 16, "--seed", -1), ["--seed"]),
    ],
)
def test_what_cannot_be_narrowed_is_one_line_and_nothing_is_written(
    checkpoint, cli, tmp_path, family, arguments, words
):
    ran = cli("narrow", checkpoint(family), *arguments, "-o", tmp_path / "n")
    assert ran.returncode == 2
    [line] = ran.stderr.splitlines()
    assert all(word in line for word in words), line
    assert not (tmp_path / "n").exists()


def test_a_folder_that_holds_something_and_no_folder_are_refused(checkpoint, cli, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for arguments, words in (
        (("-o", tmp_path / "full"), "not empty"), ((), "-o DIR"), (("-o", tmp_path / "full" / "notes.txt"), "is a file"),
    ):  # fmt: skip
        ran = cli("narrow", checkpoint("llama"), "--width", 16, "--basis", "random", "--no-judge", *arguments)
        assert ran.returncode == 2
        assert words in ran.stderr
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_short_text_is_refused(checkpoint, cli, tmp_path):
    (tmp_path / "short.txt").write_text("Two words")
    ran = cli("narrow", checkpoint("llama"), "--width", 16, "--text", tmp_path / "short.txt", "-o", tmp_path / "n")
    assert ran.returncode == 2
    assert "fewer than one window" in ran.stderr
