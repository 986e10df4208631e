"""What `dimscope layers` refuses: one line, exit code 2, nothing written.

`main` is called in this process, so that a refusal costs no start of Python. What the library refuses for any command is
tested beside it: texts in tests/texts, models in tests/checkpoints, hidden states that are no numbers in tests/activations.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import damage
import models
import pytest
import torch

from dimscope.cli.app import main
from dimscope.studies.layers.run import TABLES

pytestmark = pytest.mark.slow  # whole commands

SMALL = ("--length", "16", "--windows", "2")
BARE = ("--shuffles", "0", "--shuffles-across", "0", "--no-random-weights")


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return `refuse(*arguments, names=())`: check that `layers` refuses in one line with these words, and return it."""

    def run(*arguments: object, names: tuple[object, ...] = ()) -> str:
        assert main(["layers", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert out == ""
        assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], err
        assert all(str(name) in lines[-1] for name in names), lines[-1]
        return lines[-1]

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file with the text on which the tests' tokenizers were trained."""
    path = tmp_path / "keeper.txt"
    path.write_text(models.TEXT, encoding="utf-8")
    return path


# ---- options -------------------------------------------------------------------------------------------------------

UNPARSED = {
    "a window of one token": (["--length", "1"], ["--length", "2 or more", "1"]),
    "no windows": (["--windows", "0"], ["--windows", "0"]),
    "windows that are no number": (["--windows", "x"], ["--windows", "x"]),
    "a threshold of nothing": (["--thresholds", "0"], ["--thresholds", "0.0"]),
    "a threshold of everything": (["--thresholds", "95,100"], ["--thresholds", "1.0"]),
    "a threshold of words": (["--thresholds", "most"], ["--thresholds", "'most'"]),
    "a threshold that is no number": (["--thresholds", "nan"], ["--thresholds", "nan"]),
    "a shard beyond the last": (["--shard", "3/2"], ["--shard", "part 3 of 2"]),
    "a shard before the first": (["--shard", "0/2"], ["--shard", "part 0 of 2"]),
    "a shard without its number": (["--shard", "2"], ["--shard", "'2'"]),
    "no windows at once": (["--batch", "0"], ["--batch", "0"]),
    "a tiny reservoir": (["--reservoir", "3"], ["--reservoir", "64", "3"]),
    "a negative seed": (["--seed=-1"], ["--seed", "-1"]),
    "a negative number of shuffles": (["--shuffles=-1"], ["--shuffles", "-1"]),
    "a negative layer to show": (["--show-layer=-1"], ["--show-layer", "-1"]),
    "an unknown dtype": (["--dtype", "int8"], ["int8", "--dtype"]),
    "an unknown preset": (["--preset", "book"], ["--preset"]),
    "an option without its value": (["--windows"], ["--windows"]),
    "no text": (["--text"], ["--text"]),  # as of an unset variable: it does not mean the built-in ones
    "no model to compare": (["--compare"], ["--compare"]),
}


@pytest.mark.parametrize("case", UNPARSED)
def test_options_out_of_range_are_refused_before_a_model_is_opened(refuse, monkeypatch, case):
    monkeypatch.setattr("dimscope.cli.options.Common.open", lambda *arguments: pytest.fail("a model was opened"))
    options, names = UNPARSED[case]
    refuse("builtin", *options, names=names)


UNFIT = {
    "a window longer than the context": (["--length", "65"], ["--length", "65", "64"]),
    "more windows than there are": (["--windows", "9999"], ["9999", "--windows"]),
    "an unknown layer": (["--layers", "0,99"], ["99", "0 (embeddings)", "3 (after final norm)"]),
    "layers that are no list": (["--layers", "first"], ["--layers", "'first'"]),
    "an unknown device": (["--device", "abacus"], ["--device abacus"]),
    "a compared model that does not exist": (["--compare", "./nowhere"], ["nowhere", "no such folder"]),
    "a text without a name": (["--text", ""], ["--text"]),
    "a shard without a folder": (["--shard", "1/2"], ["--shard", "--out"]),
}


@pytest.mark.parametrize("case", UNFIT)
def test_options_that_do_not_fit_the_model_or_the_text(checkpoint, refuse, text, case):
    options, names = UNFIT[case]
    texts = () if "--text" in options else ("--text", text)
    refuse(checkpoint("qwen2"), *texts, *options, names=names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(checkpoint, refuse, text):
    refuse(checkpoint("qwen2"), "--text", text, "--device", "cuda", names=("--device cuda", "cpu"))


@pytest.mark.parametrize("windows", ["2", "all"])
@pytest.mark.parametrize(
    ("name", "content", "names"),
    [("latin.txt", "Das Café am Hafen. ".encode("latin-1") * 40, ["not UTF-8", "E9"]), ("short.txt", b"A", ["at least 2"])],
)  # fmt: skip
def test_a_second_text_that_cannot_be_read_is_refused_before_the_first_is_studied(
    checkpoint, refuse, text, tmp_path, windows, name, content, names
):
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    texts = ("--text", text, tmp_path / name)
    refuse(checkpoint("qwen2"), *texts, "--length", "16", "--windows", windows, "-o", out, names=(name, *names))
    assert not out.exists()


def test_results_go_to_a_folder_not_to_a_file(checkpoint, refuse, text, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.write_text("mine")
    for out in (occupied, occupied / "below"):
        refuse(checkpoint("qwen2"), "-o", out, names=("occupied", "folder"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tables").write_text("a file where the tables go")
    names = ("tables", "cannot be written")
    refuse(checkpoint("qwen2"), "--text", text, *SMALL, *BARE, "-o", tmp_path / "out", names=names)
    assert occupied.read_text() == "mine"


# ---- models --------------------------------------------------------------------------------------------------------


def poison(folder: Path, tensor: str, value: float = float("nan")) -> Path:
    """Overwrite one tensor of a single-file checkpoint."""
    damage.edit_tensors(folder / "model.safetensors", lambda t: {**t, tensor: torch.full_like(t[tensor], value)})
    return folder


@pytest.mark.parametrize(
    ("family", "tensor", "value"),
    [
        ("qwen2", "model.layers.0.mlp.down_proj.weight", float("inf")),
        ("qwen2", "model.norm.weight", float("nan")),
        ("llama", "lm_head.weight", float("nan")),
    ],
)
def test_weights_of_nan_and_inf_are_named(checkpoint, editable, refuse, digest, text, tmp_path, family, tensor, value):
    folder, out = poison(editable(checkpoint(family)), tensor, value), tmp_path / "out"
    before = digest(folder)
    refuse(folder, "--text", text, *SMALL, "-o", out, names=(tensor, "NaN or Inf"))
    assert not out.exists()
    assert digest(folder) == before


def test_states_that_overflow_are_named_by_layer(checkpoint, editable, refuse, text, tmp_path):
    folder = poison(editable(checkpoint("qwen2")), "model.layers.0.mlp.down_proj.weight", 6e4)
    poison(folder, "model.layers.0.mlp.up_proj.weight", 100.0)
    poison(folder, "model.layers.0.mlp.gate_proj.weight", 100.0)
    names = ("layer 1 (block 1)", "hidden states", "window", "float32")
    refuse(folder, "--text", text, *SMALL, "--dtype", "float16", names=names)


def test_a_compared_model_of_nan_costs_nothing_of_what_is_finished(
    checkpoint, editable, refuse, digest, text, tmp_path
):
    broken, out = poison(editable(checkpoint("qwen2")), "model.norm.weight"), tmp_path / "out"
    command = (checkpoint("gpt2"), "--text", text, *SMALL, "--shuffles", "1", "-o", out)
    refuse(*command, "--compare", broken, names=("model.norm.weight",))
    assert not (out / "index.html").exists()
    before = digest(out / "tables")
    assert main(["layers", *map(str, command)]) == 0
    assert before.items() <= digest(out / "tables").items()
    assert len(before) > 2 * len(TABLES)  # with the provenance of each


def test_models_that_cannot_read_the_text_are_refused_compared_ones_too(checkpoint, refuse, text, tmp_path):
    bare, sound = checkpoint("qwen2", tokenizer=None), checkpoint("gpt2")
    gguf = damage.write_gguf(tmp_path / "a.gguf", checkpoint("llama"))
    for model, word in ((bare, "tokenizer"), (gguf, "GGUF")):
        refuse(model, "--text", text, names=(model.name, word))
        refuse(sound, "--text", text, "--compare", checkpoint("llama"), model, names=(model.name, word))


def test_tokens_beyond_the_table(checkpoint, refuse, text):
    folder = checkpoint("llama", vocab_size=300, tokenizer_size=512)
    refuse(folder, "--text", text, *SMALL, *BARE, names=("tokenizer", "300"))


def test_quantised_and_pickled_weights(checkpoint, editable, refuse, text):
    refuse(damage.quantize(editable(checkpoint("llama")), "gptq"), "--text", text, names=("gptq", "quantised"))
    pickled = damage.to_pickle(editable(checkpoint("llama"), "pickled"))
    refuse(pickled, "--text", text, names=("--allow-pickle",))
    assert main(["layers", str(pickled), "--text", str(text), *SMALL, *BARE, "--allow-pickle"]) == 0
