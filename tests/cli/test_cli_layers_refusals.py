"""What `dimscope layers` refuses: texts, options, models and machines that do not fit. One line, exit code 2, nothing written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import models
import polars as pl
import pytest
import torch

pytestmark = pytest.mark.slow  # whole commands or studies

PROGRAM = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from dimscope.cli.app import main
sys.exit(main(sys.argv[1:]))
"""


def write_latin_1(path: Path) -> None:
    path.write_bytes("Das Café am Hafen. ".encode("latin-1") * 40)


def write_noise(path: Path) -> None:
    """As many zeros and other control characters as a compiled program has."""
    path.write_bytes(bytes(range(256)) * 8)


def write_two_columns(path: Path) -> None:
    pl.DataFrame({"body": [models.TEXT], "title": ["a title"]}).write_parquet(path)


TEXTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "empty.txt": (lambda path: path.write_text(""), ["no text"]),
    "blank.txt": (lambda path: path.write_text(" \n\t \n" * 99), ["white space"]),
    "short.txt": (lambda path: path.write_text("A"), ["at least 2"]),
    "program.bin": (write_noise, ["binary"]),
    "wide.txt": (lambda path: path.write_text(models.TEXT, encoding="utf-16"), ["UTF-16", "iconv"]),
    "latin.txt": (write_latin_1, ["not UTF-8", "E9", "offset 7", "iconv"]),
    "missing.txt": (lambda path: None, ["no such file"]),
    "folder": (lambda path: path.mkdir(), ["no text files"]),
    "torn.parquet": (lambda path: path.write_bytes(b"PAR1 and no more"), ["Parquet"]),
    "columns.parquet": (write_two_columns, ["'text'", "body, title"]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_cannot_be_read(checkpoint, refuses, tmp_path, name):
    write, named = TEXTS[name]
    write(tmp_path / name)
    (tmp_path / "sound.txt").write_text(models.TEXT)
    options = ("--text", tmp_path / "sound.txt", tmp_path / name, "--length", "16", "--windows")
    refuses(checkpoint("qwen2"), name, *named, command="layers", options=(*options, "2"))
    refuses(checkpoint("qwen2"), name, *named, command="layers", options=(*options, "all"))


SOURCES = {
    "a URL that nobody serves": ("ENDPOINT/a.txt?token=secret", ["/a.txt", "connection"]),
    "another scheme": ("ftp://127.0.0.1/a.txt", ["ftp://", "http://"]),
    "an unknown built-in text": ("builtin:poems", ["builtin:poems", "builtin:prose"]),
    "nothing": ("", ["--text"]),
}


@pytest.mark.parametrize("case", SOURCES)
def test_sources_that_are_no_file(checkpoint, refuses, closed_endpoint, case):
    source, named = SOURCES[case]
    options = ("--text", source.replace("ENDPOINT", closed_endpoint))
    assert "secret" not in refuses(checkpoint("qwen2"), *named, command="layers", options=options)


OPTIONS = {
    "a window longer than the context": (["--length", "65"], ["--length", "65", "64"]),
    "a window of one token": (["--length", "1"], ["--length", "2 or more", "1"]),
    "a window of no token": (["--length", "0"], ["--length", "0"]),
    "a negative window": (["--length=-5"], ["--length", "-5"]),
    "more windows than there are": (["--windows", "9999"], ["9999", "--windows"]),
    "no windows": (["--windows", "0"], ["--windows", "0"]),
    "a negative number of windows": (["--windows=-1"], ["--windows", "-1"]),
    "windows that are no number": (["--windows", "x"], ["--windows", "x"]),
    "an unknown layer": (["--layers", "0,99"], ["99", "0 (embeddings)", "3 (after final norm)"]),
    "a range beyond the model": (["--layers", "2:9"], ["layer 4"]),
    "an empty range": (["--layers", "2:2"], ["--layers 2:2"]),
    "layers that are no list": (["--layers", "first"], ["--layers", "'first'"]),
    "no layers": (["--layers", ""], ["--layers"]),
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
    "an unknown device": (["--device", "abacus"], ["--device abacus"]),
    "a device without memory": (["--device", "meta"], ["--device meta"]),
    "an unknown preset": (["--preset", "book"], ["--preset"]),
    "an option without its value": (["--windows"], ["--windows"]),
    "no model to compare": (["--compare"], ["--compare"]),
    "a compared model that does not exist": (["--compare", "./nowhere"], ["nowhere", "no such folder"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_do_not_fit(checkpoint, refuses, tmp_path, case):
    options, named = OPTIONS[case]
    (tmp_path / "a.txt").write_text(models.TEXT)
    refuses(checkpoint("qwen2"), *named, command="layers", options=("--text", tmp_path / "a.txt", *options))


def test_an_option_without_a_text_does_not_mean_the_built_in_ones(checkpoint, refuses):
    refuses(checkpoint("qwen2"), "--text", command="layers", options=("--text",))  # as of an unset variable


def test_a_shard_needs_a_folder_to_meet_the_others(checkpoint, cli, refused):
    refused(cli("layers", checkpoint("qwen2"), "--shard", "1/2"), "--shard", "--out")


def test_a_report_of_no_study(checkpoint, refuses):
    refuses(checkpoint("qwen2"), "--studies", command="report", options=("--studies",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(checkpoint, refuses):
    refuses(checkpoint("qwen2"), "--device cuda", "cpu", command="layers", options=("--device", "cuda"))


def test_results_go_to_a_folder_not_to_a_file(checkpoint, cli, refused, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.write_text("mine")
    for out in (occupied, occupied / "below"):
        refused(cli("layers", checkpoint("qwen2"), "-o", out), "occupied", "folder")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tables").write_text("a file where the tables go")
    refused(cli("layers", checkpoint("qwen2"), "--length", "16", "-o", tmp_path / "out"), "tables", "cannot be written")
    assert occupied.read_text() == "mine"


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(refuses, tmp_path) -> Callable[..., str]:
    """Return `reads(folder, *named, options=())`: a model that `layers` refuses to run on a sound text."""
    (tmp_path / "sound.txt").write_text(models.TEXT)
    begin = ("--text", tmp_path / "sound.txt", "--length", "16", "--windows", "2")

    def check(folder: Path, *named: object, options: tuple[Any, ...] = ()) -> str:
        return refuses(folder, *named, command="layers", options=(*begin, *options))

    return check


def poison(folder: Path, tensor: str, value: float = float("nan")) -> Path:
    """Overwrite one tensor of a single-file checkpoint."""
    damage.edit_tensors(folder / "model.safetensors", lambda t: {**t, tensor: torch.full_like(t[tensor], value)})
    return folder


@pytest.mark.parametrize(
    ("tensor", "value", "layer"),
    [
        ("model.embed_tokens.weight", float("nan"), "layer 0 (embeddings)"),
        ("model.layers.0.mlp.down_proj.weight", float("inf"), "layer 1 (block 1)"),
        ("model.layers.1.self_attn.v_proj.bias", float("nan"), "layer 2 (block 2, before final norm)"),
        ("model.norm.weight", float("nan"), "layer 3 (after final norm)"),
    ],
)
def test_nan_and_inf_in_the_hidden_states_are_found_where_they_begin(checkpoint, editable, reads, tensor, value, layer):
    reads(poison(editable(checkpoint("qwen2")), tensor, value), layer, "hidden states", "window")


def test_nan_in_the_output_table_is_found_in_the_logits(checkpoint, editable, reads, cli, tmp_path):
    folder = poison(editable(checkpoint("llama")), "lm_head.weight")
    reads(folder, "logits")
    result = cli("layers", folder, "--text", tmp_path / "sound.txt", "--windows", "2", "--no-logits")
    assert result.returncode == 0, result.stderr


def test_a_compared_model_of_nan_costs_nothing_of_what_is_finished(
    checkpoint, editable, cli, refused, digest, tmp_path
):
    (tmp_path / "a.txt").write_text(models.TEXT)
    broken, out = poison(editable(checkpoint("qwen2")), "model.norm.weight"), tmp_path / "out"
    command = (
        "layers",
        checkpoint("gpt2"),
        "--text",
        tmp_path / "a.txt",
        "--length",
        "16",
        "--windows",
        "2",
        "-o",
        out,
    )
    refused(cli(*command, "--compare", broken), "layer 3 (after final norm)")
    assert not (out / "index.html").exists()
    before = digest(out / "tables")
    assert cli(*command).returncode == 0
    after = digest(out / "tables")
    assert before.items() <= after.items()
    assert len(before) > 20


def test_weights_that_are_not_those_of_the_config(checkpoint, editable, reads):
    missing = editable(checkpoint("qwen2"), "missing")
    name = "model.layers.1.mlp.down_proj.weight"
    damage.edit_tensors(missing / "model.safetensors", lambda t: {key: t[key] for key in t if key != name})
    reads(missing, "missing", name)
    narrow = editable(checkpoint("qwen2"), "narrow")
    damage.edit_tensors(narrow / "model.safetensors", lambda t: {**t, name: torch.zeros(32, 63)})
    reads(narrow, "narrow", "weights")


def test_tokens_beyond_the_table(checkpoint, reads):
    for family in ("qwen2", "llama"):
        reads(checkpoint(family, vocab_size=300, tokenizer_size=512), "tokenizer", "300")


def test_models_that_are_no_causal_language_model_or_have_no_tokenizer(checkpoint, reads, tmp_path):
    bare = checkpoint("qwen2", tokenizer=None)
    for folder, named in ((checkpoint("bert"), "causal"), (bare, "tokenizer")):
        reads(folder, folder, named)
        reads(checkpoint("gpt2"), folder, named, options=("--compare", checkpoint("llama"), folder))


def test_weights_that_are_read_but_not_run(checkpoint, cli, refused, tmp_path):
    path = damage.write_gguf(tmp_path / "a.gguf", checkpoint("llama"))
    refused(cli("layers", path, "-o", tmp_path / "out"), "a.gguf", "GGUF")
    refused(cli("layers", checkpoint("gpt2"), "--compare", path, "-o", tmp_path / "out"), "a.gguf", "GGUF")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", damage.QUANTIZATIONS)
def test_quantised_weights(checkpoint, editable, reads, method):
    reads(damage.quantize(editable(checkpoint("llama")), method), "quantised")


def test_a_hub_that_cannot_be_reached(cli, refused, tmp_path):
    refused(cli("layers", "somebody/some-model", "-o", tmp_path / "out"), "somebody/some-model", "hub", "connection")
    assert not (tmp_path / "out").exists()


def test_pickle_and_remote_code_run_only_where_that_is_allowed(checkpoint, editable, reads, cli, tmp_path):
    pickled = damage.to_pickle(editable(checkpoint("llama"), "pickled"))
    reads(pickled, "--allow-pickle")
    command = ("--text", tmp_path / "sound.txt", "--length", "16", "--windows", "2", "--shuffles", "0")
    result = cli("layers", pickled, *command, "--allow-pickle")
    assert result.returncode == 0, result.stderr
    marker = tmp_path / "it-ran"
    stranger = damage.to_remote_code(editable(checkpoint("llama"), "stranger"), marker)
    reads(stranger, "--trust-remote-code")
    assert not marker.exists()
    result = cli("layers", stranger, *command, "--trust-remote-code")
    assert result.returncode == 0, result.stderr
    assert marker.exists()


# ---- memory --------------------------------------------------------------------------------------------------------


def with_memory(run_python: Callable[..., Any], limit: int, *arguments: object) -> Any:
    """Run a command that gets so many bytes of address space at most."""
    return run_python("-c", PROGRAM, limit, *arguments, env={"OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux")
def test_memory_that_runs_out_is_said_in_one_line(checkpoint, run_python, refused, tmp_path):
    # 2 x 16,384 tokens x 65,536 columns of the MLP are 8.6 GB in one piece; everything else fits into 3 GB many times.
    folder = checkpoint("gpt2", max_position_embeddings=16384, n_inner=65536, layers=1)
    (tmp_path / "long.txt").write_text(models.TEXT * 45)
    options = ("--text", tmp_path / "long.txt", "--length", "16384", "--windows", "2", "--batch", "2")
    result = with_memory(run_python, 3 << 30, "layers", folder, *options, "-o", tmp_path / "out")
    refused(result, "2 x 16384 tokens", "out of memory", "--batch")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux")
def test_a_range_of_layers_is_not_counted_out(checkpoint, run_python, refused, tmp_path):
    (tmp_path / "a.txt").write_text(models.TEXT)
    options = ("--text", tmp_path / "a.txt", "--length", "16", "--windows", "1", "--layers", "1:999999999999")
    refused(with_memory(run_python, 3 << 30, "layers", checkpoint("qwen2"), *options), "layer")
