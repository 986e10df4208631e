"""What `dimscope damage` refuses: one line, exit code 2, nothing written. The library's refusals are tested with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import models
import pytest
import torch

pytestmark = pytest.mark.slow  # whole commands or studies


@pytest.fixture
def sound(tmp_path) -> Path:
    """A text that can be read."""
    path = tmp_path / "sound.txt"
    path.write_text(models.TEXT)
    return path


@pytest.fixture
def declines(refuses, sound) -> Callable[..., str]:
    """Return `declines(folder, *named, options=...)`: refused on a sound text, the model as before, nothing written."""
    sound_ones = {"--text": sound, "--length": "16", "--windows": "2"}

    def check(folder: Path, *named: object, options: tuple[Any, ...] = ("--truncate", "8")) -> str:
        begin = [word for option, value in sound_ones.items() if option not in options for word in (option, value)]
        return refuses(folder, *named, command="damage", options=(*begin, *options))

    return check


# ---- changes -------------------------------------------------------------------------------------------------------

CHANGES = {
    "a negative number after a space": (["--truncate", "-1"], ["from 0 to 32", "got -1"]),
    "one of several": (["--truncate", "8,16,40"], ["from 0 to 32", "got 40"]),
    "a comma too many": (["--truncate", "8,"], ["truncate", "dimensions"]),
    "no strength": (["--truncate"], ["--truncate", "requires an argument"]),
    "a strength where there is none": (["--rotate", "5"], ["rotate has no strength", "rotate:on"]),
    "a typing error": (["--truncat", "8"], ["--truncat", "--truncate"]),
    "rescaled without a projection": (["--truncate", "8", "--rescaled"], ["--rescaled", "--project"]),
    "a chain with an unknown kind": (["--change", "truncate:8+blur:3"], ["'blur'", "truncate"]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changes_that_cannot_be_made(checkpoint, declines, case):
    options, named = CHANGES[case]
    declines(checkpoint("llama"), *named, options=tuple(options))


# ---- options -------------------------------------------------------------------------------------------------------

OPTIONS = {
    "no draws": (["--draws", "0"], ["--draws", "1 or more", "0"]),
    "more windows from the start than there are": (["--from-start", "--windows", "9999"], ["9999", "--windows"]),
    "a window longer than the context": (["--length", "65"], ["--length", "65", "64"]),
    "an unknown side": (["--side", "left"], ["--side", "input", "output", "both"]),
    "an unknown preset": (["--preset", "book"], ["--preset", "notebook"]),
    "a prompt longer than the context": (
        ["--prompt", "Hello", "word " * 50, "--new-tokens", "4"],
        ["'word word", "64", "--new-tokens"],
    ),
    "a system prompt for a plain prompt": (
        ["--prompt", "Hello", "--system", "Be kind.", "--plain"],
        ["--system", "--chat"],
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_do_not_fit(checkpoint, declines, case):
    options, named = OPTIONS[case]
    declines(checkpoint("llama"), *named, options=("--truncate", "8", *options))


def test_an_empty_prompt_that_the_tokenizer_puts_nothing_before(checkpoint, declines):
    declines(checkpoint("gpt2"), "prompt is empty", options=("--truncate", "8", "--prompt", "Hello", ""))


def test_a_template_that_takes_no_system_prompt(checkpoint, editable, declines):
    folder = editable(checkpoint("llama"))
    settings = models.read_json(folder / "tokenizer_config.json")
    begin = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    template = begin + "{{ messages[0].content }}"
    models.write_json(folder / "tokenizer_config.json", {**settings, "chat_template": template})
    declines(folder, "chat template", "no system here", options=("--prompt", "Hello", "--system", "Be kind."))


def test_results_go_to_a_folder_not_to_a_file(checkpoint, cli, refused, sound, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.write_text("mine")
    for out in (occupied, occupied / "below"):
        refused(cli("damage", checkpoint("llama"), "--text", sound, "-o", out), "occupied", "folder")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tables").write_text("a file where the tables go")
    command = (
        "damage",
        checkpoint("llama"),
        "--truncate",
        "8",
        "--text",
        sound,
        "--length",
        "16",
        "-o",
        tmp_path / "out",
    )
    refused(cli(*command), "tables", "cannot be written")
    assert occupied.read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(checkpoint, declines):
    declines(checkpoint("llama"), "--device", "cuda", options=("--device", "cuda"))


# ---- texts ---------------------------------------------------------------------------------------------------------

TEXTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "empty.txt": (lambda path: path.write_text(""), ["no text"]),
    "short.txt": (lambda path: path.write_text("A"), ["at least 2"]),
    "program.bin": (lambda path: path.write_bytes(bytes(range(256)) * 8), ["binary"]),
    "missing.txt": (lambda path: None, ["no such file"]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_cannot_be_read(checkpoint, refuses, sound, tmp_path, name):
    write, named = TEXTS[name]
    write(tmp_path / name)
    options = ("--truncate", "8", "--text", sound, tmp_path / name, "--length", "16")
    refuses(checkpoint("llama"), name, *named, command="damage", options=options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--text",), ["--text"]),
        (("--text", "builtin:poems"), ["builtin:poems", "builtin:prose"]),
        (("--text", "generated", "nowhere.txt", "--length", "16"), ["nowhere.txt", "no such file"]),
    ],
)
def test_texts_that_are_none(checkpoint, refuses, options, named):
    refuses(checkpoint("llama"), *named, command="damage", options=("--truncate", "8", *options))


# ---- models --------------------------------------------------------------------------------------------------------


def test_models_without_a_tokenizer_or_without_a_next_token(checkpoint, declines, cli, refused, tmp_path):
    for folder, named in ((checkpoint("llama", tokenizer=None), "tokenizer"), (checkpoint("bert"), "next token")):
        declines(folder, folder, named)
    path = damage.write_gguf(tmp_path / "a.gguf", checkpoint("llama"))
    refused(cli("damage", path, "-o", tmp_path / "out"), "a.gguf", "GGUF")
    refused(cli("damage", tmp_path / "nowhere", "-o", tmp_path / "out"), "nowhere", "no such folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["input", "output"])
def test_rows_of_nan_are_named(checkpoint, editable, cli, refused, digest, sound, tmp_path, side):
    folder = editable(checkpoint("llama"))
    key = models.embedding_key(folder) if side == "input" else "lm_head.weight"
    damage.set_rows(folder, [7, 300], float("nan"), key)
    before, out = digest(folder), tmp_path / "out"
    command = ("damage", folder, "--truncate", "8", "--side", side, "--text", sound, "--length", "16", "-o", out)
    refused(cli(*command), folder, "2 of 512 rows", key, "7, 300")
    assert not out.exists()
    assert digest(folder) == before


def test_a_tokenizer_with_more_tokens_than_the_table_has_rows(checkpoint, declines):
    folder = checkpoint("llama", vocab_size=300, tokenizer_size=512)
    declines(folder, "300 rows", "do not belong together")


def test_weights_that_are_not_those_of_the_config(checkpoint, editable, cli, refused, sound, tmp_path):
    folder, out = editable(checkpoint("qwen2")), tmp_path / "out"
    name = "model.layers.1.mlp.down_proj.weight"
    damage.edit_tensors(folder / "model.safetensors", lambda t: {key: t[key] for key in t if key != name})
    command = ("damage", folder, "--truncate", "8", "-o", out, "--text")
    refused(cli(*command, sound, "--length", "16"), "weights", name)
    refused(cli(*command, "generated", "--length", "1"), "--length")  # before weights are read
    assert not out.exists()


def test_pickle_and_remote_code_run_only_where_that_is_allowed(checkpoint, editable, declines, cli, sound, tmp_path):
    marker = tmp_path / "it-ran"
    stranger = damage.to_remote_code(editable(checkpoint("llama"), "stranger"), marker)
    pickled = damage.to_pickle(editable(checkpoint("llama"), "pickled"))
    command = ("--truncate", "8", "--text", sound, "--length", "16", "--windows", "2")
    for folder, flag in ((pickled, "--allow-pickle"), (stranger, "--trust-remote-code")):
        declines(folder, flag)
        assert not marker.exists()
        result = cli("damage", folder, *command, flag)
        assert result.returncode == 0
    assert marker.exists()
