"""Checkpoints as people have them: odd files and names. The file beats the config, and every command reads the same weights."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import damage
import models
import polars as pl
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow  # whole commands or studies

SHORT = ("--windows", "2", "--length", "16")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def facts(cli: Any, *arguments: object, notes: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a command that succeeds and whose standard error names what it found; return what it prints as JSON."""
    result = cli(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    for note in notes:
        assert note in result.stderr
    return json.loads(result.stdout)


def losses(cli: Any, folder: Path, text: Path, notes: tuple[str, ...] = ()) -> list[float]:
    """Return the loss of the undamaged model on each window of a text."""
    with tempfile.TemporaryDirectory() as out:
        facts(cli, "damage", folder, "--text", text, *SHORT, "--change", "truncate:50%", "-o", out, notes=notes)
        windows = pl.read_parquet(Path(out) / "tables" / "windows.parquet")
    return windows.filter(kind="undamaged")["loss"].to_list()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "keeper.txt"
    path.write_text(models.TEXT)
    return path


# ---- ties ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_own_head(checkpoint, editable) -> Path:
    """Return a checkpoint whose output table differs from the input table in one row, although the config ties them."""
    folder = editable(checkpoint("qwen2"))
    tensors = tensors_of(folder)
    head = tensors["model.embed_tokens.weight"].clone()
    head[300] += 1.0
    save(folder, tensors | {"lm_head.weight": head})
    return folder


def test_a_trained_head_beside_a_config_that_ties_it_is_kept(with_own_head, cli, tmp_path, text):
    stock = transformers.AutoModelForCausalLM.from_pretrained(with_own_head)
    note = "lm_head.weight"
    found = facts(cli, "inspect", with_own_head, notes=(note,))
    assert (found["n_parameters"], found["tied"]) == (stock.num_parameters(), False)
    table = transformers.AutoModelForCausalLM.from_pretrained(with_own_head).lm_head.weight
    values = facts(cli, "spectrum", with_own_head, "--side", "output", notes=(note,))["spectrum"]
    expected = torch.linalg.svdvals(table.detach().double())
    rows = [r["singular_value"] for r in values if r["preprocess"] == "uncentred" and r["rows"] == "all"]
    torch.testing.assert_close(torch.tensor(rows, dtype=torch.float64), expected, rtol=1e-5, atol=1e-6)
    out = tmp_path / "narrow"
    command = ("narrow", with_own_head, "--width", stock.config.hidden_size, "--basis", "embedding", "--no-evaluate")
    assert cli(*command, "-o", out).returncode == 0
    ids = torch.arange(3, 15)[None]
    narrow = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert not narrow.config.tie_word_embeddings
    with torch.no_grad():  # at full width nothing is lost
        torch.testing.assert_close(narrow(ids).logits, stock(ids).logits, rtol=1e-3, atol=1e-4)


def test_a_head_that_repeats_the_table_stays_tied(checkpoint, editable, cli):
    folder = editable(checkpoint("qwen2"))
    tensors = tensors_of(folder)
    save(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    before, after = (facts(cli, "inspect", path) for path in (checkpoint("qwen2"), folder))
    assert (after["n_parameters"], after["tied"]) == (before["n_parameters"], True)


# ---- several saves in one folder -----------------------------------------------------------------------------------


def test_a_single_file_beats_an_old_index_for_every_command(checkpoint, editable, cli, text, tmp_path):
    folder = editable(checkpoint("qwen2"))
    tensors = tensors_of(folder)
    damage.write_shards(folder, {name: t / 2 for name, t in tensors.items()})
    save(folder, tensors)
    notes = ("model.safetensors.index.json", "model-00001-of-")
    norms = [r["norm"] for r in facts(cli, "tokens", folder, "--limit", "9", notes=notes)["tokens"]]
    assert norms == [r["norm"] for r in facts(cli, "tokens", checkpoint("qwen2"))["tokens"]]
    sound = losses(cli, checkpoint("qwen2"), text)
    assert losses(cli, folder, text, notes) == sound
    out = tmp_path / "narrow"
    options = ("--width", "24", "--basis", "embedding", "--no-evaluate", "-o")
    for path, target in ((folder, out), (checkpoint("qwen2"), tmp_path / "expected")):
        assert cli("narrow", path, *options, target).returncode == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "expected" / "model.safetensors").read_bytes()


def test_shards_beside_their_index_are_named_where_it_does_not_name_them(checkpoint, editable, cli):
    folder = editable(checkpoint("llama", sharded=True))
    stale = folder / "model-00001-of-00099.safetensors"
    save_file({"model.embed_tokens.weight": torch.zeros(512, 32)}, stale)
    found = facts(cli, "inspect", folder, notes=(stale.name,))
    assert found["n_parameters"] == facts(cli, "inspect", checkpoint("llama"))["n_parameters"]


def test_a_single_pickle_beats_old_shards(checkpoint, editable, cli):
    folder = editable(checkpoint("llama"))
    tensors = tensors_of(folder)
    damage.to_pickle(folder)
    torch.save({name: t / 2 for name, t in tensors.items()}, folder / "pytorch_model-00001-of-00001.bin")
    found = facts(cli, "tokens", folder, "--allow-pickle", notes=("pytorch_model-00001-of-00001.bin",))
    assert found["tokens"] == facts(cli, "tokens", checkpoint("llama"))["tokens"]


# ---- prefixes ------------------------------------------------------------------------------------------------------

PREFIXES = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "distributed": lambda name: f"module.{name}",
    "compiled and distributed": lambda name: f"module._orig_mod.{name}",
    "peft": lambda name: f"base_model.model.{name}",
    "fsdp": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module.").replace(
        "model.", "_fsdp_wrapped_module.model.", 1
    ),
    "checkpointed": lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "of somebody's own": lambda name: f"net.student.{name}",
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_taken_off(checkpoint, editable, cli, text, prefix):
    folder = editable(checkpoint("qwen2"))
    save(folder, {PREFIXES[prefix](name): t for name, t in tensors_of(folder).items()})
    found = facts(cli, "inspect", folder, notes=("taken off the names",))
    expected = facts(cli, "inspect", checkpoint("qwen2"))
    assert {k: v for k, v in found.items() if k != "model"} == {k: v for k, v in expected.items() if k != "model"}
    if prefix == "fsdp":
        assert losses(cli, folder, text) == losses(cli, checkpoint("qwen2"), text)


def test_a_budget_is_never_that_of_a_part(checkpoint, editable, cli, refused, text):
    folder = editable(checkpoint("qwen2"))
    kept = {name: t for name, t in tensors_of(folder).items() if "layers.1." not in name}
    save(folder, kept)
    expected = facts(cli, "inspect", checkpoint("qwen2"))
    n = len(expected["tensors"])
    found = facts(cli, "inspect", folder, notes=(f"fill {len(kept)} of the {n} parameters", "are unfilled"))
    for key in ("n_parameters", "embedding_share"):
        assert found[key] == expected[key]
    refused(cli("layers", folder, "--text", text, *SHORT), "model.layers.1.")


def test_an_encoder_without_the_pooler_of_its_class_runs(checkpoint, editable, cli, text):
    folder = editable(checkpoint("bert"))
    kept = {name: t for name, t in tensors_of(folder).items() if "pooler" not in name}
    save(folder, kept)
    assert len(kept) == len(tensors_of(checkpoint("bert"))) - 2
    one, other = (_layers(cli, path, text) for path in (folder, checkpoint("bert")))
    assert one == other


def _layers(cli: Any, folder: Path, text: Path) -> list[dict[str, Any]]:
    """Return the dimensions of every layer."""
    found = facts(cli, "layers", folder, "--text", text, *SHORT, "--shuffles", "0", "--no-random-weights")
    return next(rows for name, rows in found.items() if name.startswith("dimensions"))


# ---- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(checkpoint, editable) -> Path:
    """Return a checkpoint with an adapter beside its weights."""
    from peft import LoraConfig, get_peft_model

    folder = editable(checkpoint("qwen2"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is deprecated
        get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_an_adapter_beside_the_weights_is_applied_by_no_command(adapted, checkpoint, cli, text, tmp_path):
    notes = ("adapter_config.json", "not applied")
    found, expected = (facts(cli, "inspect", adapted, notes=notes), facts(cli, "inspect", checkpoint("qwen2")))
    assert found["n_parameters"] == expected["n_parameters"]
    sound = losses(cli, checkpoint("qwen2"), text)
    assert losses(cli, adapted, text, notes) == sound
    command = ("--width", "24", "--basis", "embedding", "--no-evaluate", "-o")
    for path, out in ((adapted, tmp_path / "one"), (checkpoint("qwen2"), tmp_path / "other")):
        assert cli("narrow", path, *command, out).returncode == 0
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


def test_an_adapter_alone_and_unmerged_weights_are_refused_with_the_way_out(adapted, editable, refuses):
    tensors = tensors_of(adapted)
    save(adapted, tensors | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 32)})
    refuses(adapted, "lora_A", "merge", command="inspect")
    for name in ("model.safetensors", "config.json"):
        (adapted / name).unlink()
    refuses(adapted, "LoRA adapter for", "merge_and_unload", command="inspect")


def test_a_folder_of_checkpoints_names_the_latest(checkpoint, tmp_path, refuses, cli):
    for step in (500, 1000):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / f"checkpoint-{step}").symlink_to(checkpoint("llama"), target_is_directory=True)
    refuses(tmp_path / "run", "checkpoint-1000", command="inspect")


# ---- tables without a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, {"model_type": "model2vec", "architectures": ["StaticModel"]}])
def test_a_static_table_with_a_tokenizer_is_studied_by_its_tokens(checkpoint, editable, cli, refused, text, config):
    folder = editable(checkpoint("bert"))
    table = tensors_of(folder)["embeddings.word_embeddings.weight"]
    save(folder, {"embeddings": table} | ({"weights": torch.ones(len(table))} if config else {}))
    (folder / "config.json").unlink()
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    stock = checkpoint("bert")
    for command in ("tokens", "spectrum"):
        found, expected = (facts(cli, command, path) for path in (folder, stock))
        name = {"tokens": "tokens", "spectrum": "spectrum"}[command]
        assert found[name] == expected[name]
    refused(cli("layers", folder, "--text", text), "no model that could run")


def test_tokens_that_share_the_rows_of_a_static_table(checkpoint, editable, cli):
    folder = editable(checkpoint("bert"))
    table = tensors_of(folder)["embeddings.word_embeddings.weight"]
    mapping = torch.arange(len(table)) // 2
    save(folder, {"embeddings": table[:256], "mapping": mapping})
    (folder / "config.json").unlink()
    found = facts(cli, "tokens", folder, notes=(f"{len(table)} tokens share the 256 rows",))["tokens"]
    norms = torch.tensor([row["norm"] for row in found])
    torch.testing.assert_close(norms, table[mapping].norm(dim=1), rtol=1e-5, atol=1e-6)
    assert facts(cli, "inspect", folder)["n_parameters"] == 256 * table.shape[1]
