"""Weights and code that could harm: refused in one line unless a flag names the risk, and never run without it."""

from __future__ import annotations

import json

import damage
import models
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # whole commands or studies


def test_pickles_are_refused_unless_allowed(checkpoint, editable, refuses, cli, digest):
    stock = json.loads(cli("tokens", checkpoint("gpt2"), "--json").stdout)
    folder = damage.to_pickle(editable(checkpoint("gpt2")))
    refuses(folder, folder, "pytorch_model.bin", "--allow-pickle")
    refuses(folder, folder, "--allow-pickle", command="report")
    before = digest(folder)
    allowed = cli("tokens", folder, "--allow-pickle", "--json")
    assert allowed.returncode == 0, allowed.stderr
    assert json.loads(allowed.stdout)["tokens"] == stock["tokens"]
    assert digest(folder) == before


def test_safetensors_beside_a_pickle_are_taken_and_the_pickle_is_not_opened(checkpoint, editable, cli, tmp_path):
    folder = editable(checkpoint("gpt2"), "both")
    weights = (folder / "model.safetensors").read_bytes()
    damage.to_hostile_pickle(folder, tmp_path / "ran")
    (folder / "model.safetensors").write_bytes(weights)
    for flags in ((), ("--allow-pickle",)):
        assert cli("inspect", folder, *flags).returncode == 0
    assert not (tmp_path / "ran").exists()


def test_old_and_odd_pickles_can_be_read_when_allowed(checkpoint, editable, cli):
    stock = json.loads(cli("spectrum", checkpoint("gpt2"), "--json").stdout)["spectrum"]
    folder = editable(checkpoint("gpt2"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=False)  # as every file of before torch 1.6
    old = cli("spectrum", folder, "--allow-pickle", "--json")
    assert old.returncode == 0, old.stderr
    assert json.loads(old.stdout)["spectrum"] == stock
    torch.save({**weights, "step": 7, "note": "trained"}, path)
    odd = cli("inspect", folder, "--allow-pickle", "--json")
    assert odd.returncode == 0, odd.stderr
    torch.save(list(weights.values()), path)
    nameless = cli("inspect", folder, "--allow-pickle")
    assert nameless.returncode == 2, nameless.stderr


def test_a_damaged_pickle_is_one_line(checkpoint, editable, refuses):
    folder = damage.to_pickle(editable(checkpoint("gpt2")))
    damage.truncate(folder / "pytorch_model.bin")
    refuses(folder, folder, "pytorch_model.bin", options=("--allow-pickle",))
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle at all")
    refuses(folder, folder, "pytorch_model.bin", options=("--allow-pickle",))


def test_a_hostile_pickle_never_runs_not_even_when_pickles_are_allowed(checkpoint, editable, refuses, tmp_path):
    marker = tmp_path / "ran"
    folder = damage.to_hostile_pickle(editable(checkpoint("gpt2")), marker)
    refuses(folder, folder, "--allow-pickle")
    refuses(folder, folder, "pytorch_model.bin", options=("--allow-pickle",))
    assert not marker.exists()


def test_remote_code_is_refused_and_runs_only_when_it_is_trusted(checkpoint, editable, refuses, cli, tmp_path):
    marker = tmp_path / "ran"
    folder = damage.to_remote_code(editable(checkpoint("llama")), marker)
    for command in ("inspect", "tokens", "report"):
        refuses(folder, folder, "--trust-remote-code", command=command)
    assert not marker.exists()
    trusted = cli(
        "inspect", folder, "--trust-remote-code", "--json", env={"HF_MODULES_CACHE": str(tmp_path / "modules")}
    )
    assert trusted.returncode == 0, trusted.stderr
    assert json.loads(trusted.stdout)["architecture"] == "StrangerForCausalLM"
    assert marker.exists()


def test_code_beside_a_known_architecture_is_not_needed_and_not_run(checkpoint, editable, cli, tmp_path):
    marker = tmp_path / "ran"
    folder = damage.to_remote_code(editable(checkpoint("llama")), marker)
    damage.change_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    for flags in ((), ("--trust-remote-code",)):
        assert cli("inspect", folder, *flags).returncode == 0
    assert not marker.exists()


def test_a_tokenizers_own_code_is_never_run_and_nobody_is_asked(checkpoint, editable, cli, tmp_path):
    marker = tmp_path / "ran"
    folder = editable(checkpoint("llama"))
    (folder / "tokenization_stranger.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class StrangerTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    settings = models.read_json(folder / "tokenizer_config.json")
    settings |= {
        "tokenizer_class": "StrangerTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_stranger.StrangerTokenizer"]},
    }
    models.write_json(folder / "tokenizer_config.json", settings)
    result = cli("tokens", folder, "--json")
    assert not marker.exists()
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["tokens"]) == 512
