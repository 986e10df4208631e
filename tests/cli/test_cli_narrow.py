"""`dimscope narrow` from the command to the checkpoint: what it writes, prints and resumes, and what it refuses."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dimscope.cli.app import main

pytestmark = pytest.mark.slow  # whole commands or studies

READ = ("--length", 16, "--windows", 2)
LEARNED = ("--basis", "learned", "--learn-steps", 4, "--heal-steps", 5)
Json = dict[str, Any]


class Narrowed(NamedTuple):
    """What a command printed as JSON, the folder that it wrote, and the folder of the dense model."""

    result: Json
    folder: Path
    dense: Path

    @property
    def card(self) -> str:
        return (self.folder / "README.md").read_text()

    @property
    def config(self) -> Json:
        return models.read_json(self.folder / "config.json")

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")

    def metric(self, name: str = "KL") -> float:
        return next(row["narrow"] for row in self.result["measured"] if row["metric"] == name)


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> Path:
    """A text whose windows differ, so that there is something to train on."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(models.TEXT)
    return path


@pytest.fixture(scope="module")
def narrows(cli, prose, tmp_path_factory) -> Callable[..., Narrowed]:
    """Return `narrows(folder, *arguments)`: a narrowing into a new folder that succeeds."""

    def run(dense: Path, *arguments: object) -> Narrowed:
        out = tmp_path_factory.mktemp("narrow") / "out"
        ran = cli("narrow", dense, "--text", prose, *READ, *arguments, "-o", out, "--json")
        assert ran.returncode == 0, ran.stderr[-1000:]
        assert [path.name for path in out.parent.iterdir()] == ["out"]  # no hidden folder beside it
        return Narrowed(json.loads(ran.stdout), out, dense)

    return run


@pytest.fixture(scope="module")
def learned(checkpoint, narrows) -> Narrowed:
    """A model of three layers at half its width, with a learned basis, healed."""
    return narrows(checkpoint("qwen2", hidden_size=64, layers=3), "--width", 32, *LEARNED)


# ---- what is written and printed -----------------------------------------------------------------------------------


def test_the_folder_is_a_checkpoint_that_stock_transformers_loads_and_the_counts_are_those_of_its_files(learned):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(learned.folder, output_loading_info=True)
    assert not [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    assert (model.config.model_type, model.config.hidden_size) == ("qwen2", 32)
    assert sum(p.numel() for p in model.parameters()) == learned.result["parameters_after"]
    tokens = AutoTokenizer.from_pretrained(learned.folder)("The keeper counted the ships", return_tensors="pt")
    text = model.generate(**tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert text.shape[1] == tokens["input_ids"].shape[1] + 5
    counts = {"after": learned.weights, "before": load_file(learned.dense / "model.safetensors")}
    for name, weights in counts.items():
        assert learned.result[f"parameters_{name}"] == sum(t.numel() for t in weights.values())
        assert learned.result[f"bytes_{name}"] == sum(t.nbytes for t in weights.values())


def test_training_is_reported_stage_by_stage_and_on_the_card(learned):
    points: dict[str, list[Json]] = {}
    for point in learned.result["training"]:
        points.setdefault(point["stage"], []).append(point)
    assert list(points) == ["basis", "norms", "weights"]
    assert [[p["step"] for p in points[stage]] for stage in points] == [[0, 4], [0, 1], [0, 4]]
    assert all((p["training_kl"] is None) == (p["step"] == 0) for stage in points.values() for p in stage)
    assert points["weights"][-1]["held_out_kl"] < points["basis"][0]["held_out_kl"]
    assert points["norms"][0]["held_out_kl"] == pytest.approx(points["basis"][-1]["held_out_kl"], rel=1e-3)
    assert learned.result["healed"] == "better on held-out text"
    assert "Directions kept: learned" in learned.card
    assert "learned in 4 steps" in learned.card
    assert re.search(r"Healed .* in 5 steps, the norms first, then all weights", learned.card)
    assert re.search(r"Trained on \d+ windows of 16 tokens of prose.txt", learned.card)
    assert f"dimscope narrow {learned.dense} --text" in learned.card


def test_the_numbers_of_the_card_are_those_of_the_json(learned):
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in learned.card.splitlines() if line[:1] == "|"]
    rows = {name: (dense, narrow) for name, dense, narrow in cells[2:]}
    result = learned.result
    for name, key in (("parameters in the files", "parameters"), ("bytes of weights", "bytes")):
        assert rows.pop(name) == (f"{result[f'{key}_before']:,}", f"{result[f'{key}_after']:,}")
    measured = {row["metric"]: row for row in result["measured"]}
    sizes = (measured.pop("parameters")["narrow"], measured.pop("bytes")["narrow"])
    assert sizes == (result["parameters_after"], result["bytes_after"])
    assert rows == {
        name: (f"{r['dense']:.4g}", f"{r['narrow']:.4g} ({r['low']:.4g} to {r['high']:.4g})")
        for name, r in measured.items()
    }
    assert all(r["low"] <= r["narrow"] <= r["high"] for r in measured.values())
    assert {"loss", "KL"} < set(rows)
    assert measured["KL"]["dense"] == 0 < measured["KL"]["narrow"]


def test_a_cut_that_makes_nothing_smaller_is_a_warning(checkpoint, narrows):
    # A tied table of 512 rows outweighs what a width of 28 for 32 saves.
    larger = narrows(checkpoint("qwen2"), "--width", 28, "--basis", "random", "--untied", "--no-evaluate")
    assert "not smaller" in larger.result["warning"]
    assert "Not smaller" in larger.card


@pytest.mark.parametrize("lora", [(), ("--lora", 2)], ids=["weights", "low-rank"])
def test_healed_weights_are_written_and_the_card_names_what_was_trained(checkpoint, narrows, lora):
    if lora:
        pytest.importorskip("peft")
    cut = ("--width", 16, "--basis", "random")
    healed, plain = (narrows(checkpoint("llama"), *cut, *more) for more in (("--heal-steps", 20, *lora), ()))
    assert healed.result["healed"] == "better on held-out text"
    assert healed.metric() < 0.99 * plain.metric()
    assert ("low-rank updates (rank 2)" in healed.card) == bool(lora)
    assert ("then all weights" in healed.card) == (not lora)
    assert healed.weights.keys() == plain.weights.keys()


@pytest.mark.parametrize(("family", "options"), [("gemma", {"dtype": "bfloat16"}), ("gpt_neox", {})])
def test_verifying_reports_that_a_rotation_changes_nothing_and_writes_nothing(
    checkpoint, cli, prose, tmp_path, family, options
):
    command = ("narrow", checkpoint(family, **options), "--verify", "--text", prose, *READ, "--json")
    result = json.loads(cli(*command, cwd=tmp_path).stdout)
    assert result["rotation_at_full_width"] == "exact to rounding"
    assert 0 < result["largest_difference_of_a_logit"] < 1e-4 * result["largest_logit"]
    assert (result["same_first_choice"], result["positions"]) == (1, 16)
    assert not list(tmp_path.iterdir())


# ---- one table or two ----------------------------------------------------------------------------------------------


def test_a_tied_model_stays_tied_at_a_cost_that_is_reported_and_untied_it_loses_less(checkpoint, editable, narrows):
    folder = editable(checkpoint("qwen2"), "uneven")  # a gain for each dimension, so that a tie is not exact
    weights = load_file(folder / "model.safetensors") | {"model.norm.weight": torch.linspace(0.1, 4, 32)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tied, untied, same = (narrows(folder, "--width", 16, *option) for option in ((), ("--untied",), ("--tied",)))
    assert (tied.result["tables"], untied.result["tables"]) == ("one, tied", "two")
    assert (tied.config["tie_word_embeddings"], untied.config["tie_word_embeddings"]) == (True, False)
    assert "lm_head.weight" not in tied.weights
    assert all(torch.equal(same.weights[name], tensor) for name, tensor in tied.weights.items())
    assert tied.result["tie_costs_kl"] > 0
    assert f"{tied.result['tie_costs_kl']:+.4f} nats of KL" in tied.card
    assert "tie_costs_kl" not in untied.result
    assert tied.metric() > untied.metric()
    tables = [untied.weights[name] for name in ("lm_head.weight", "model.embed_tokens.weight")]
    assert tables[0].shape == tables[1].shape == (512, 16)
    assert not torch.equal(*tables)
    assert untied.result["parameters_after"] == tied.result["parameters_after"] + 512 * 16
    assert f"two, of {512 * 16:,} parameters each" in untied.card
    # Nothing was trained here, and the card names no training.
    assert "Calibrated on 2 windows of 16 tokens of prose.txt" in tied.card
    assert not re.search("learned in|Healed|healing|Trained", tied.card)
    assert not {"training", "healed"} & tied.result.keys()


# ---- other families ------------------------------------------------------------------------------------------------


def test_a_qwen2_is_written_as_a_llama(checkpoint, narrows):
    small = narrows(checkpoint("qwen2"), "--width", 16, "--export-as", "llama", "--no-evaluate")
    assert (small.config["model_type"], small.config["hidden_size"]) == ("llama", 16)
    assert "measured" not in small.result
    assert "Written as llama" in small.card


def test_a_gpt_neox_is_calibrated_cut_evaluated_and_written_as_a_phi(checkpoint, narrows):
    from transformers import AutoModelForCausalLM

    kl = {}
    for width in (12, 32):
        small = narrows(checkpoint("gpt_neox"), "--width", width)
        model = AutoModelForCausalLM.from_pretrained(small.folder)
        assert (model.config.model_type, model.config.hidden_size) == ("phi", width)
        assert "Written as phi" in small.card
        assert small.result["tables"] == "two"
        assert "table for reading" not in small.card
        kl[width] = small.metric()
    assert kl[12] > 1e-6 > kl[32]  # at full width it is the model that it was


# ---- kill -9 -------------------------------------------------------------------------------------------------------


def mark(state: Path, value: float) -> None:
    """Change the training KL of the last point of a kept state, which decides nothing: a run that has it read the state."""
    with safe_open(state, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    points = json.loads(metadata["points"])
    points[-1]["training"] = value
    save_file(tensors, state, metadata=metadata | {"points": json.dumps(points)})


def test_kill_9_while_healing_leaves_nothing_that_looks_complete_and_the_same_command_resumes(
    checkpoint, cli, prose, tmp_path
):
    def arguments(name: str) -> tuple[object, ...]:
        cut = ("--width", 16, "--basis", "random", "--heal-steps", 40, "--no-evaluate", "--text", prose, *READ)
        return ("narrow", checkpoint("qwen2"), *cut, "-o", tmp_path / name, "--json")

    training = tmp_path / ".narrow.training" / "healing"
    states = [training / stage / "training.safetensors" for stage in ("norms", "weights")]
    stages = training / "*" / "training.safetensors"
    ended = cli.interrupt(*arguments("narrow"), after=stages, count=2, by=signal.SIGKILL)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "narrow").exists()
    assert not list(tmp_path.rglob("config.json"))
    assert {p.name for p in tmp_path.rglob("*.safetensors")} == {"training.safetensors"}
    for state in states:
        mark(state, 123.0)
    for name in ("narrow", "reference"):
        ran = cli(*arguments(name))
        assert ran.returncode == 0, ran.stderr
        values = [point["training_kl"] for point in json.loads(ran.stdout)["training"]]
        assert values.count(123.0) == (2 if name == "narrow" else 0)  # both stages were resumed
        assert values[-1] != 123.0  # and the second was not finished
    resumed, reference = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("narrow", "reference"))
    assert resumed == reference
    assert {path.name for path in tmp_path.iterdir()} == {"narrow", "reference"}


# ---- refusals; those of the library are tested with its settings ---------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["--width", "--plan", "--verify"]),
        (("--width",), ["--width"]),
        (("--width", "16"), ["-o DIR"]),
        (("--width", "16", "24"), ["one --width", "--plan"]),
        (("--width", "16", "--basis", "raw", "random"), ["one --basis", "--plan"]),
        (("--width", "16", "--basis", "widest"), ["--basis", "widest", "normalised"]),
        (("--width", "16", "--export-as", "mistral"), ["--export-as", "mistral"]),
        (("--width", "16", "--prompt", "Hello"), ["--prompt", "--plan"]),
        (("--width", "16", "--lora", "4"), ["--lora", "--heal-steps"]),
        (("--plan", "--verify"), ["--plan", "--verify"]),
        (("--verify", "--prompt", "Hello"), ["--prompt", "--plan"]),
        (("--verify", "--width", "16"), ["--verify", "--width"]),
    ],
)
def test_options_that_do_not_go_together_are_one_line_before_a_model_is_opened(capsys, arguments, words):
    assert main(["narrow", "nowhere", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", ("--width", 30), ["28 or 32"]),
        ("gpt2", ("--width", 16), ["gpt2", "whole heads"]),
        ("llama", ("--verify", "--export-as", "phi"), ["--export-as phi", "llama"]),
        ("llama", ("--plan", "--width", 16, 30), ["28 or 32"]),
        ("qwen2", ("--plan", "--width", 33), ["from 1 to 32", "33"]),
    ],
)
def test_what_cannot_be_narrowed_is_one_line_and_nothing_is_written(checkpoint, refuses, prose, family, options, words):
    refuses(checkpoint(family), *words, command="narrow", options=("--text", prose, *READ, *options))


def test_a_folder_that_holds_something_is_refused_and_left_as_it_is(checkpoint, cli, refused, digest, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    before = digest(tmp_path)
    for options, out, words in (
        (("--width", 16), tmp_path, "not empty"),
        (("--plan",), tmp_path / "notes.txt", "is a file"),
    ):
        refused(cli("narrow", checkpoint("llama"), *options, "-o", out), words)
    assert digest(tmp_path) == before
