"""`dimscope narrow` from the command to the checkpoint: whole or not at all, its card as measured, its refusals one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow  # whole commands or studies

WIDE = {"hidden_size": 64, "layers": 3}
READ = ("--length", 16, "--windows", 4)
FEW = ("--length", 16, "--windows", 2)
LEARNED = ("--basis", "learned", "--learn-steps", 6, "--heal-steps", 6)

# In a fresh process, which knows nothing of dimscope: what is in a folder, and what it says.
STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokens = AutoTokenizer.from_pretrained(folder)("The keeper counted the ships", return_tensors="pt")
    made = model.generate(**tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    told = {
        "type": model.config.model_type, "width": model.config.hidden_size, "class": type(model).__name__,
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "parameters": sum(p.numel() for p in model.parameters()), "new": made[0, tokens["input_ids"].shape[1]:].tolist(),
        "logits": model(**tokens).logits[0, -1].tolist(), "dimscope": "dimscope" in sys.modules,
        "wrong": [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]],
    }
    print(json.dumps(told))
"""


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The keeper counted the ships. On a foggy morning there were none, although bells rang. " * 40)
    return path


@pytest.fixture
def prose(tmp_path) -> Path:
    """A text whose windows differ, so that there is something to train on."""
    path = tmp_path / "prose.txt"
    path.write_text(models.TEXT)
    return path


@pytest.fixture
def stock(run_python) -> Callable[..., list[dict[str, Any]]]:
    """Return `stock(*folders)`: what stock transformers makes of each, in a fresh process."""

    def load(*folders: Path) -> list[dict[str, Any]]:
        ran = run_python("-c", STOCK, *folders)
        assert ran.returncode == 0, ran.stderr[-1000:]
        return [json.loads(line) for line in ran.stdout.splitlines()]

    return load


@pytest.fixture
def narrows(cli, prose) -> Callable[..., dict[str, Any]]:
    """Return `narrows(folder, *arguments)`: the JSON of a narrowing that succeeds, calibrated and judged on prose."""

    def run(folder: Path, *arguments: object) -> dict[str, Any]:
        ran = cli("narrow", folder, "--text", prose, *FEW, *arguments, "--json")
        assert ran.returncode == 0, ran.stderr[-1000:]
        return json.loads(ran.stdout)

    return run


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def card_rows(card: str) -> dict[str, tuple[str, str]]:
    """The table of a model card: its two numbers by what they are."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]
    return {name: (dense, narrow) for name, dense, narrow in rows[2:]}


def measured(told: dict[str, Any], metric: str = "KL") -> float:
    return next(row["narrow"] for row in told["measured"] if row["metric"] == metric)


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
        "narrow", checkpoint("qwen2"), "--width", 28, "--basis", "random", "--untied", "--no-evaluate", "-o", tmp_path / "n", "--json"
    )  # fmt: skip
    assert "not smaller" in json.loads(ran.stdout)["warning"]
    assert "Not smaller" in (tmp_path / "n" / "README.md").read_text()


def test_without_text_nothing_is_run_and_nothing_is_judged(checkpoint, cli, tmp_path):
    folder = checkpoint("llama", tokenizer=None)
    ran = cli("narrow", folder, "--width", 16, "--basis", "embedding", "--no-evaluate", "-o", tmp_path / "n", "--json")
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
            "--no-evaluate",
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


def test_kill_9_leaves_no_folder_that_looks_complete(checkpoint, cli, killed, tmp_path):
    folder, out = checkpoint("llama", hidden_size=256, vocab_size=40_000, tokenizer=None), tmp_path / "narrow"
    arguments = (folder, "--width", 128, "--basis", "random", "--no-evaluate", "-o", out)
    partial = tmp_path / ".narrow.partial"
    killed(("narrow", *arguments), lambda: list(partial.glob("*.safetensors")))
    assert not out.exists()
    assert partial.exists()
    assert cli("narrow", *arguments).returncode == 0
    assert (out / "config.json").exists()
    assert not partial.exists()


# ---- trained -------------------------------------------------------------------------------------------------------


def test_a_learned_and_healed_checkpoint_tells_how_it_was_trained_and_loads_in_stock_transformers(
    checkpoint, narrows, stock, tmp_path
):
    folder, out = checkpoint("qwen2", **WIDE), tmp_path / "narrow"
    told = narrows(folder, "--width", 32, *LEARNED, "-o", out)
    points: dict[str, list[dict[str, Any]]] = {}
    for point in told["training"]:
        points.setdefault(point["stage"], []).append(point)
    assert list(points) == ["basis", "norms", "weights"]
    assert [[p["step"] for p in points[stage]] for stage in points] == [[0, 6], [0, 1], [0, 5]]
    assert all((p["training_kl"] is None) == (p["step"] == 0) for stage in points.values() for p in stage)
    assert points["weights"][-1]["held_out_kl"] < points["basis"][0]["held_out_kl"]
    assert points["norms"][0]["held_out_kl"] == pytest.approx(points["basis"][-1]["held_out_kl"], rel=1e-3)
    assert told["healed"] == "better on held-out text"
    card = (out / "README.md").read_text()
    assert "Directions kept: learned" in card
    assert "learned in 6 steps" in card
    assert re.search(r"Healed .* in 6 steps, the norms first, then all weights", card)
    assert re.search(r"Trained on \d+ windows of 16 tokens of prose.txt", card)
    [loaded] = stock(out)
    assert loaded["wrong"] == []
    assert (loaded["type"], loaded["width"], loaded["dimscope"]) == ("qwen2", 32, False)
    assert loaded["parameters"] == told["parameters_after"]
    assert len(loaded["new"]) == 5
    assert hidden(tmp_path) == []


def test_the_numbers_of_the_card_are_those_of_the_json_whatever_was_trained(checkpoint, narrows, tmp_path):
    told = narrows(checkpoint("qwen2"), "--width", 16, *LEARNED, "-o", tmp_path / "n")
    rows = card_rows((tmp_path / "n" / "README.md").read_text())
    counts = {
        "parameters in the files": (told["parameters_before"], told["parameters_after"]),
        "bytes of weights": (told["bytes_before"], told["bytes_after"]),
    }
    assert {name: rows.pop(name) for name in counts} == {n: (f"{a:,}", f"{b:,}") for n, (a, b) in counts.items()}
    judged = {row["metric"]: row for row in told["measured"]}
    assert (judged.pop("parameters")["narrow"], judged.pop("bytes")["narrow"]) == (
        told["parameters_after"], told["bytes_after"],
    )  # fmt: skip
    assert rows == {name: (f"{r['dense']:.4g}", f"{r['narrow']:.4g}") for name, r in judged.items()}
    assert {"loss", "KL"} < set(rows)


def test_a_card_of_what_was_not_trained_says_nothing_of_training(checkpoint, narrows, tmp_path):
    told = narrows(checkpoint("qwen2"), "--width", 16, "-o", tmp_path / "n")
    card = (tmp_path / "n" / "README.md").read_text()
    assert "Calibrated on 2 windows of 16 tokens of prose.txt" in card
    assert not re.search("learned in|Healed|healing|Trained", card)
    assert "training" not in told
    assert "healed" not in told


def test_the_same_command_trains_the_same_weights(checkpoint, narrows, tmp_path):
    for name in "ab":
        narrows(checkpoint("qwen2"), "--width", 16, *LEARNED, "-o", tmp_path / name)
    narrows(checkpoint("qwen2"), "--width", 16, *LEARNED, "--seed", 1, "-o", tmp_path / "c")
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c  # another order of training


def test_healed_weights_are_what_is_written(checkpoint, narrows, tmp_path):
    cut = ("--width", 16, "--basis", "random")
    judged = {
        name: measured(narrows(checkpoint("llama"), *cut, *heal, "-o", tmp_path / name))
        for name, heal in (("healed", ("--heal-steps", 40)), ("not", ("--heal-steps", 0)))
    }
    assert judged["healed"] < 0.95 * judged["not"]


@pytest.mark.parametrize("what", ["weights", "low-rank"])
def test_the_card_says_whether_weights_or_low_rank_changes_were_trained(checkpoint, narrows, stock, tmp_path, what):
    lora = ("--lora", 2) if what == "low-rank" else ()
    if lora:
        pytest.importorskip("peft")
    told = narrows(
        checkpoint("qwen2"), "--width", 16, "--basis", "random", "--heal-steps", 10, *lora, "-o", tmp_path / "n"
    )
    assert told["healed"] == "better on held-out text"
    card = (tmp_path / "n" / "README.md").read_text()
    assert ("low-rank updates (rank 2)" in card) == bool(lora)
    assert ("then all weights" in card) == (not lora)
    held = load_file(tmp_path / "n" / "model.safetensors")
    assert not [name for name in held if "lora" in name or "base_layer" in name]


def marked(state: Path, value: float) -> None:
    """Changes the training KL of the last point of a kept state, which decides nothing: who reads it has read the state."""
    with safe_open(state, "pt") as held:
        told, tensors = held.metadata(), {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    points = json.loads(told["points"])
    points[-1]["training"] = value
    save_file(tensors, state, metadata=told | {"points": json.dumps(points)})


def test_kill_9_while_healing_leaves_nothing_that_looks_complete_and_the_same_command_goes_on_to_the_same_weights(
    checkpoint, cli, killed, prose, tmp_path
):
    def arguments(name: str) -> tuple[object, ...]:
        cut = ("--width", 16, "--basis", "random", "--heal-steps", 75, "--no-evaluate", "--text", prose, *FEW)
        return ("narrow", checkpoint("qwen2"), *cut, "-o", tmp_path / name, "--json")

    states = [
        tmp_path / ".narrow.training" / "healing" / stage / "training.safetensors" for stage in ("norms", "weights")
    ]
    killed(arguments("narrow"), lambda: all(state.exists() for state in states))
    assert not (tmp_path / "narrow").exists()
    assert not list(tmp_path.rglob("config.json"))
    assert {p.name for p in tmp_path.rglob("*.safetensors")} == {"training.safetensors"}
    for state in states:
        marked(state, 123.0)
    for name in ("narrow", "reference"):
        ran = cli(*arguments(name))
        assert ran.returncode == 0, ran.stderr
        looks = [p["training_kl"] for p in json.loads(ran.stdout)["training"]]
        assert looks.count(123.0) == (2 if name == "narrow" else 0)  # it went on, in both stages
        assert looks[-1] != 123.0  # and was not done yet
    went_on, reference = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("narrow", "reference"))
    assert went_on == reference
    assert hidden(tmp_path) == []


# ---- one table or two ----------------------------------------------------------------------------------------------


@pytest.fixture
def uneven(checkpoint, editable) -> Path:
    """A tied model whose final norm has a gain of its own for each dimension, so that a tie is not exact."""
    folder = editable(checkpoint("qwen2"), "uneven")
    held = load_file(folder / "model.safetensors")
    save_file(
        held | {"model.norm.weight": torch.linspace(0.1, 4, 32)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def test_a_tied_model_stays_tied_and_is_told_what_that_costs(uneven, narrows, tmp_path):
    told = narrows(uneven, "--width", 16, "-o", tmp_path / "tied")
    two = narrows(uneven, "--width", 16, "--untied", "-o", tmp_path / "untied")
    held, both = (load_file(tmp_path / name / "model.safetensors") for name in ("tied", "untied"))
    assert "lm_head.weight" not in held
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"] is True
    assert told["tables"] == "one, tied"
    assert told["tie_costs_kl"] > 0
    assert measured(told) > measured(two)
    card = (tmp_path / "tied" / "README.md").read_text()
    assert f"{told['tie_costs_kl']:+.4f} nats of KL" in card
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False
    assert both["lm_head.weight"].shape == both["model.embed_tokens.weight"].shape == (512, 16)
    assert not torch.equal(both["lm_head.weight"], both["model.embed_tokens.weight"])
    assert two["tables"] == "two"
    assert "tie_costs_kl" not in two
    assert two["parameters_after"] == told["parameters_after"] + 512 * 16
    assert f"two, of {512 * 16:,} parameters each" in (tmp_path / "untied" / "README.md").read_text()


def test_told_to_keep_a_tie_that_is_there_nothing_changes(uneven, narrows, tmp_path):
    for name, tied in (("default", ()), ("told", ("--tied",))):
        narrows(uneven, "--width", 16, *tied, "-o", tmp_path / name)
    assert (tmp_path / "told" / "model.safetensors").read_bytes() == (
        tmp_path / "default" / "model.safetensors"
    ).read_bytes()


def test_an_untied_model_keeps_its_two_tables_without_a_word(checkpoint, narrows, tmp_path):
    told = narrows(checkpoint("llama"), "--width", 16, "-o", tmp_path / "n")
    assert told["tables"] == "two"
    assert "tie_costs_kl" not in told
    assert "table for reading" not in (tmp_path / "n" / "README.md").read_text()
    assert "lm_head.weight" in load_file(tmp_path / "n" / "model.safetensors")


def rough(folder: Path) -> Path:
    """Gives biases, gains and shifts values of their own, which a new model has not."""
    held, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    noise = {n: t + 0.1 * torch.randn(t.shape, generator=generator) if t.ndim == 1 else t for n, t in held.items()}
    save_file(noise, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- other families ------------------------------------------------------------------------------------------------


def test_a_qwen2_is_written_as_a_llama_and_a_gpt_neox_as_a_phi_that_say_the_same(
    checkpoint, editable, narrows, stock, tmp_path
):
    # At full width a cut is a rotation, which changes nothing: the other family must say what the dense model says.
    folders = [rough(editable(checkpoint(family), f"dense-{family}")) for family in ("qwen2", "gpt_neox")]
    outs = [tmp_path / "llama", tmp_path / "phi"]
    whole = ("--width", 32, "--basis", "random", "--no-evaluate")
    narrows(folders[0], *whole, "--untied", "--export-as", "llama", "-o", outs[0])
    narrows(folders[1], *whole, "-o", outs[1])
    narrows(folders[0], "--width", 16, "--export-as", "llama", "-o", tmp_path / "small-llama")
    narrows(folders[1], "--width", 15, "-o", tmp_path / "small-phi")
    found = stock(*folders, *outs, tmp_path / "small-llama", tmp_path / "small-phi")
    for dense, other, small, kind in zip(found[:2], found[2:4], found[4:], ("llama", "phi"), strict=True):
        assert other["wrong"] == small["wrong"] == []
        assert other["type"] == small["type"] == kind
        assert other["class"] == {"llama": "LlamaForCausalLM", "phi": "PhiForCausalLM"}[kind]
        assert other["tied"] is False
        assert small["tied"] is dense["tied"]
        torch.testing.assert_close(torch.tensor(other["logits"]), torch.tensor(dense["logits"]), atol=1e-5, rtol=1e-4)
        assert other["new"] == dense["new"]
        assert len(small["new"]) == 5
    assert [small["width"] for small in found[4:]] == [16, 15]
    for name, kind in (("llama", "llama"), ("phi", "phi")):
        assert f"Written as {kind}" in (tmp_path / name / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen2", ("--export-as", "llama")), ("gpt_neox", ()), ("gpt_neox", ("--export-as", "phi")), ("phi", ())],
)
def test_verifying_holds_for_what_is_written_as_another_family(checkpoint, narrows, tmp_path, family, options):
    told = narrows(checkpoint(family), "--verify", *options)
    assert told["rotation_at_full_width"] == "exact to rounding"
    assert 0 < told["largest_difference_of_a_logit"] < 1e-5 * told["largest_logit"]
    assert told["same_first_choice"] == 1
    assert told["positions"] == 16
    assert {p.name for p in tmp_path.iterdir()} <= {"prose.txt", "hf_home"}


@pytest.mark.parametrize("family", ["phi", "gpt_neox"])
def test_a_model_with_centred_norms_is_calibrated_cut_and_judged(checkpoint, narrows, tmp_path, family):
    from transformers import AutoModelForCausalLM

    folder, judged = checkpoint(family), {}
    for width in (12, 24, 32):
        told = narrows(folder, "--width", width, "-o", tmp_path / f"{width}")
        judged[width] = measured(told)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{width}")
        assert (model.config.model_type, model.config.hidden_size) == ("phi", width)
        assert sum(p.numel() for p in model.parameters()) == told["parameters_after"]
        assert "Directions kept: normalised" in (tmp_path / f"{width}" / "README.md").read_text()
    assert judged[12] > judged[24] > judged[32]
    assert judged[32] < 1e-6 < judged[24]


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "arguments", "words"),
    [
        ("llama", ("--width", 33), ["from 1 to 32", "got 33"]),
        ("llama", ("--width", 0), ["from 1 to 32"]),
        ("llama", ("--width", -8), ["from 1 to 32"]),
        ("llama", ("--width", 30), ["28 or 32"]),
        ("llama", ("--width", 3), ["nearest are 4"]),
        ("qwen2", ("--width", 30, "--export-as", "llama"), ["28 or 32"]),
        ("llama", (), ["--width", "--plan", "--verify"]),
        ("llama", ("--width",), ["--width"]),
        ("llama", ("--width", 16, 24), ["one --width", "--plan"]),
        ("llama", ("--width", 16, "--basis", "raw", "random"), ["one --basis", "--plan"]),
        ("llama", ("--width", 16, "--basis", "widest"), ["--basis", "widest", "normalised"]),
        ("gpt2", ("--width", 16), ["gpt2", "whole heads"]),
        ("olmo", ("--width", 16), ["olmo", "qwen2"]),
        ("phi", ("--width", 1), ["from 2 to 32"]),
        ("gpt_neox", ("--width", 1), ["from 2 to 32"]),
        ("llama", ("--width", 16, "--windows", 0), ["1 or more"]),
        ("llama", ("--width", 16, "--length", 65), ["at most 64"]),
        ("llama", ("--width", 16, "--text", "no-such.txt"), ["no-such.txt"]),
        ("llama", ("--width", 16, "--seed", -1), ["--seed"]),
        ("llama", ("--width", 16, "--lora", 4), ["--lora", "--heal-steps"]),
        ("llama", ("--width", 16, "--lora", 4, "--heal-steps", 0), ["--lora", "--heal-steps"]),
        ("llama", ("--width", 16, "--lora", 0, "--heal-steps", 5), ["--lora", "1 or more"]),
        ("llama", ("--width", 16, "--heal-steps", -1), ["--heal-steps", "0 or more", "-1"]),
        ("llama", ("--width", 16, "--basis", "learned", "--learn-steps", 0), ["--learn-steps", "1 or more", "0"]),
        ("llama", ("--width", 16, "--prompt", "Hello"), ["--prompt", "--plan"]),
        ("llama", ("--width", 16, "--export-as", "phi"), ["--export-as phi", "llama"]),
        ("qwen2", ("--width", 16, "--export-as", "phi"), ["--export-as phi", "qwen2"]),
        ("phi", ("--width", 16, "--export-as", "llama"), ["--export-as llama", "phi"]),
        ("qwen2", ("--width", 16, "--export-as", "mistral"), ["--export-as", "mistral"]),
        ("llama", ("--width", 16, "--tied"), ["--tied", "two tables"]),
        ("phi", ("--width", 16, "--tied"), ["--tied", "two tables"]),
        ("llama", ("--plan", "--verify"), ["--plan", "--verify"]),
        ("llama", ("--verify", "--prompt", "Hello"), ["--prompt", "--plan"]),
        ("llama", ("--verify", "--export-as", "phi"), ["--export-as phi", "llama"]),
    ],
)
def test_what_cannot_be_narrowed_is_one_line_and_nothing_is_written(
    checkpoint, cli, refused, prose, tmp_path, family, arguments, words
):
    text = () if "--text" in arguments else ("--text", prose)
    refused(cli("narrow", checkpoint(family), *text, *arguments, "-o", tmp_path / "n"), *words)
    assert [p.name for p in tmp_path.iterdir()] == ["prose.txt"]


def test_a_tied_phi_cannot_keep_its_tie(checkpoint, cli, refused, narrows, prose, tmp_path):
    folder = checkpoint("phi", tied=True)
    refused(
        cli("narrow", folder, "--width", 16, "--tied", "--text", prose, *FEW, "-o", tmp_path / "n"), "--tied", "mean"
    )
    assert not (tmp_path / "n").exists()
    assert narrows(folder, "--width", 16, "-o", tmp_path / "two")["tables"] == "two"


def test_a_folder_that_holds_something_and_no_folder_are_refused(checkpoint, cli, refused, digest, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = digest(tmp_path)
    for arguments, words in (
        (("-o", tmp_path / "full"), "not empty"), ((), "-o DIR"), (("-o", tmp_path / "full" / "notes.txt"), "is a file"),
        (("-o", tmp_path / "full" / "notes.txt" / "n"), "is a file"),
    ):  # fmt: skip
        for basis in (("--basis", "random", "--no-evaluate"), ("--basis", "learned")):
            refused(cli("narrow", checkpoint("llama"), "--width", 16, *basis, *arguments), words)
    assert digest(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_an_empty_folder_is_filled(checkpoint, cli, tmp_path):
    (tmp_path / "n").mkdir()
    ran = cli("narrow", checkpoint("llama"), "--width", 16, "--basis", "random", "--no-evaluate", "-o", tmp_path / "n")
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "n" / "model.safetensors").exists()


def test_a_short_text_is_refused(checkpoint, cli, refused, tmp_path):
    (tmp_path / "short.txt").write_text("A")
    ran = cli("narrow", checkpoint("llama"), "--width", 16, "--text", tmp_path / "short.txt", "-o", tmp_path / "n")
    refused(ran, "at least 2", "short.txt")
    assert {p.name for p in tmp_path.iterdir()} == {"short.txt"}
