"""Models on the hub through the command line: found, refused, resumed, cached; see test_cli_hub_transfers for bytes."""

from __future__ import annotations

import json

import damage
import models
import pytest

pytestmark = pytest.mark.slow  # whole commands or studies

TOKEN = "hf_a_token_of_the_tests"


def test_tokens_and_neighbours_of_a_model_on_the_hub_are_those_of_its_folder(checkpoint, hub, cli):
    folder = checkpoint("qwen2")
    commit = hub.add("owner/same", folder)
    here = json.loads(cli("tokens", folder, "--json").stdout)
    there = cli("tokens", "owner/same", "--json")
    assert there.returncode == 0, there.stderr
    assert json.loads(there.stdout)["tokens"] == here["tokens"]
    said = json.loads(cli("inspect", "owner/same", "--json").stdout)
    assert (said["model"], said["revision"]) == ("owner/same", commit.sha)
    near = cli("neighbors", "owner/same", " the", "-k", "3")
    assert (near.returncode, near.stderr) == (0, "")


def test_a_report_of_a_model_on_the_hub_names_its_commit(checkpoint, hub, cli, tmp_path):
    commit = hub.add("owner/reported", checkpoint("llama", sharded=True))
    result = cli("report", "owner/reported", "-o", tmp_path / "report")
    assert result.returncode == 0, result.stderr
    facts = models.read_json(tmp_path / "report" / "report.json")
    assert (facts["model"], facts["revision"]) == ("owner/reported", commit.sha)


def test_revisions_are_honoured(checkpoint, hub, cli, refused):
    hub.add("owner/revised", checkpoint("qwen2"))
    old = hub.add("owner/revised", checkpoint("qwen2", hidden_size=16), revision="v1")
    for revision in ("v1", old.sha):
        said = json.loads(cli("inspect", "owner/revised", "--revision", revision, "--json").stdout)
        assert (said["hidden_size"], said["revision"]) == (16, old.sha)
    assert json.loads(cli("inspect", "owner/revised", "--json").stdout)["hidden_size"] == 32
    refused(cli("inspect", "owner/revised", "--revision", "v9"), "owner/revised", "v9")


def test_old_names_of_one_word_are_followed(checkpoint, hub, cli):
    hub.add("openai-community/gpt2", checkpoint("gpt2"))
    hub.alias("gpt2", "openai-community/gpt2")
    result = cli("tokens", "gpt2", "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["tokens"]) == 512


def test_missing_and_private_repositories(checkpoint, hub, cli, refused, tmp_path):
    hub.add("owner/private", checkpoint("qwen2"), private=True, token=TOKEN)
    out = tmp_path / "out"
    for name in ("owner/no-such-model", "owner/private"):
        refused(cli("report", name, "-o", out), name, "HF_TOKEN")
    assert not out.exists()
    allowed = cli("inspect", "owner/private", env={"HF_TOKEN": TOKEN})
    assert allowed.returncode == 0, allowed.stderr
    refused(cli("inspect", "owner/private", env={"HF_TOKEN": "hf_wrong"}), "owner/private")


def test_gated_repositories_ask_for_the_token_and_then_for_access(checkpoint, hub, cli, refused, tmp_path):
    hub.add("owner/gated", checkpoint("qwen2"), gated=True, token=TOKEN)
    hub.tokens.add("hf_without_access")
    for environment in ({}, {"HF_TOKEN": "hf_without_access"}):
        result = cli("tokens", "owner/gated", "-o", tmp_path / "out", env=environment)
        refused(result, "owner/gated", "gated", "HF_TOKEN")
        assert TOKEN not in result.stderr
    assert not (tmp_path / "out").exists()
    allowed = cli("tokens", "owner/gated", "--limit", "1", env={"HF_TOKEN": TOKEN})
    assert allowed.returncode == 0, allowed.stderr
    stored = [request for request in hub.requests if request.origin == "cdn"]
    assert stored
    assert all(request.authorization is None for request in stored)


def test_a_repository_without_a_model_and_one_with_a_missing_shard(checkpoint, hub, cli, refused, editable):
    folder = editable(checkpoint("llama", sharded=True), "incomplete")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    hub.add("owner/incomplete", folder)
    refused(cli("inspect", "owner/incomplete"), "owner/incomplete", shard.name)
    bare = editable(checkpoint("qwen2"), "bare")
    (bare / "config.json").unlink()
    hub.add("owner/bare", bare)
    refused(cli("inspect", "owner/bare"), "owner/bare", "config.json")


def test_pickles_and_remote_code_on_the_hub_are_refused(checkpoint, hub, cli, refused, editable, tmp_path):
    marker = tmp_path / "ran"
    hub.add("owner/pickle", damage.to_hostile_pickle(editable(checkpoint("gpt2"), "pickle"), marker))
    hub.add("owner/stranger", damage.to_remote_code(editable(checkpoint("llama"), "stranger"), marker))
    refused(cli("inspect", "owner/pickle"), "owner/pickle", "--allow-pickle")
    assert hub.bytes_sent("pytorch_model.bin") == 0
    refused(cli("inspect", "owner/pickle", "--allow-pickle"), "owner/pickle", "pytorch_model.bin")
    refused(cli("inspect", "owner/stranger"), "owner/stranger", "--trust-remote-code")
    assert not marker.exists()
    trusted = cli("inspect", "owner/stranger", "--trust-remote-code", "--json")
    assert trusted.returncode == 0, trusted.stderr[-300:]
    assert marker.exists()


def test_gguf_on_the_hub(checkpoint, hub, cli, tmp_path):
    (tmp_path / "gguf").mkdir()
    damage.write_gguf(tmp_path / "gguf" / "model.gguf", checkpoint("llama"), "Q8_0")
    hub.add("owner/gguf", tmp_path / "gguf")
    result = cli("inspect", "owner/gguf", "--json")
    assert result.returncode == 0, result.stderr[-300:]
    assert json.loads(result.stdout)["vocab_size"] == 512


def test_a_model_in_the_cache_works_when_the_hub_is_gone(
    checkpoint, hub, hub_home, cli, forked_python, run_cli, refused
):
    commit = hub.add("owner/whole", checkpoint("llama", sharded=True))
    program = "import huggingface_hub; huggingface_hub.snapshot_download('owner/whole')"
    assert forked_python("-c", program).returncode == 0
    sent = hub.bytes_sent()
    online = cli("tokens", "owner/whole", "--json")
    assert online.returncode == 0, online.stderr
    assert hub.bytes_sent() - sent < 20_000  # the weights are here already
    hub.stop()
    offline = cli("tokens", "owner/whole", "--json")
    assert offline.returncode == 0, offline.stderr[-300:]
    assert json.loads(offline.stdout) == json.loads(online.stdout)
    assert json.loads(cli("inspect", "owner/whole", "--json").stdout)["revision"] == commit.sha
    refused(cli("inspect", "owner/never-seen"), "owner/never-seen", "hub")
    # this variable is read when the client is imported
    flagged = run_cli("inspect", "owner/whole", env={"HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "1"})
    assert flagged.returncode == 0, flagged.stderr[-300:]


def test_a_hub_that_answers_only_with_errors_is_one_line(checkpoint, hub, cli, refused, tmp_path):
    hub.add("owner/model", checkpoint("qwen2"))
    hub.broken_status = 503
    refused(cli("report", "owner/model", "-o", tmp_path / "out"), "owner/model", "503")
    assert not (tmp_path / "out").exists()
