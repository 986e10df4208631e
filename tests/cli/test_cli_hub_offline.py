"""Models of the hub without a connection: what ran once runs again, what is missing is named, damaged files are named."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import conftest
import damage
import forks
import models
import pytest

pytestmark = pytest.mark.slow  # whole commands or studies

READ = ("--length", "16", "--windows", "2")
TABLE_COMMANDS = {
    "inspect": (),
    "tokens": (),
    "pairs": (),
    "correlate": ("--ids", "0:20"),
    "spectrum": (),
    "neighbors": (" the",),
    "embedding": ("--knn-sample", "50"),
    "report": ("--embedding.knn-sample", "50"),
}
MODEL_COMMANDS = {
    "layers": ("--shuffles", "0", "--no-random-weights", "--no-logits"),
    "damage": ("--truncate", "50%"),
    "narrow": ("--width", "16", "--no-evaluate"),
}


@pytest.fixture(scope="module")
def offline(tmp_path_factory, hub_endpoint, hub_home) -> Iterator[forks.Forked]:
    """Return `cli` with HF_HUB_OFFLINE=1, which huggingface_hub reads when it is imported."""
    variables = {**conftest.clean_variables(hub_endpoint, hub_home), "HF_HUB_OFFLINE": "1"}
    server = forks.ForkServer(tmp_path_factory.mktemp("offline"), variables)
    yield forks.Forked(server, ("-m", "dimscope"))
    server.stop()


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "keeper.txt"
    path.write_text(models.TEXT, encoding="utf-8")
    return path


def succeed(result: forks.Result[str]) -> str:
    assert result.returncode == 0, result.stderr[-600:]
    return result.stdout


def ranges(hub_home: Path, name: str) -> list[Path]:
    """Return the byte ranges in the cache."""
    folder = hub_home / "dimscope" / name.replace("/", "--")
    return sorted(path for path in folder.rglob("*-*") if path.is_file() and path.name[-1].isdigit())


@pytest.fixture
def fetched(checkpoint, hub, cli) -> Callable[..., str]:
    """Return `fetched(name, command, *options)`: run a command online, end the hub, and return the commit."""

    def fetch(name: str, command: str, *options: object, **form: object) -> str:
        commit = hub.add(name, checkpoint("llama", **form))
        succeed(cli(command, name, *options))
        hub.stop()
        return commit.sha

    return fetch


def test_after_a_spectrum_every_command_about_the_table_runs_offline(fetched, cli, offline, refused, tmp_path, text):
    commit = fetched("owner/table", "spectrum", tie_word_embeddings=True)
    for command, options in TABLE_COMMANDS.items():
        out = ("-o", tmp_path / command) if command in ("embedding", "report") else ("--json",)
        succeed(offline(command, "owner/table", *options, *out))
    for revision in ("main", commit, commit[:7]):
        said = json.loads(succeed(offline("inspect", "owner/table", "--revision", revision, "--json")))
        assert said["revision"] == commit
    assert json.loads(succeed(cli("inspect", "owner/table", "--json")))["revision"] == commit  # the hub is gone
    lines = [
        refused(offline("layers", "owner/table", "--text", text, *READ), "owner/table", ".safetensors"),
        refused(offline("inspect", "owner/table", "--revision", "v9"), "owner/table", "v9"),
        refused(cli("layers", "owner/table", "--text", text, *READ), "owner/table", ".safetensors", "reached"),
        refused(offline("inspect", "owner/other"), "owner/other"),
    ]
    assert all("run `dimscope download owner/" in line for line in lines)


def test_the_table_that_a_study_did_not_read_is_missing_offline(fetched, offline, refused):
    # Longer than the part of a file that one look at its header brings.
    fetched("owner/untied", "spectrum", hidden_size=64, tie_word_embeddings=False)
    succeed(offline("tokens", "owner/untied"))
    line = refused(offline("tokens", "owner/untied", "--side", "output"), "a part of model.safetensors")
    assert "run `dimscope download owner/untied` once online" in line


def test_after_a_damage_every_command_runs_offline(fetched, offline, tmp_path, text):
    options = (*MODEL_COMMANDS["damage"], "--text", text, *READ)
    fetched("owner/whole", "damage", *options, sharded=True)
    for command, options in TABLE_COMMANDS.items():
        out = ("-o", tmp_path / command) if command in ("embedding", "report") else ("--json",)
        succeed(offline(command, "owner/whole", *options, *out))
    for command, options in MODEL_COMMANDS.items():
        succeed(offline(command, "owner/whole", *options, "--text", text, *READ, "-o", tmp_path / command))


def test_download_is_enough_for_every_command_and_for_transformers(
    checkpoint, editable, hub, cli, offline, refused, tmp_path, text
):
    folder = editable(checkpoint("llama"), "both")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    commit = hub.add("owner/down", folder, revision="v1")
    printed = json.loads(succeed(cli("download", "owner/down", "--revision", "v1", "--json")))
    assert (printed["revision"], hub.bytes_sent("pytorch_model.bin")) == (commit.sha, 0)
    copied = tmp_path / "copied"
    succeed(cli("download", "owner/down", "--revision", "v1", "-o", copied))
    hub.stop()
    reference = ("--revision", "v1")
    whole = succeed(offline("layers", "owner/down", *reference, *MODEL_COMMANDS["layers"], "--text", text, *READ))
    assert "owner/down" in whole
    assert json.loads(succeed(offline("download", "owner/down", *reference, "--json"))) == printed
    program = "import transformers; transformers.AutoModelForCausalLM.from_pretrained('owner/down', revision='v1')"
    succeed(forks.Forked(offline.server)("-c", program))
    here = json.loads(succeed(offline("tokens", copied, "--json")))
    assert here["tokens"] == json.loads(succeed(offline("tokens", folder, "--json")))["tokens"]
    assert not (copied / "pytorch_model.bin").exists()
    refused(offline("download", copied), str(copied), "on this machine")


def test_a_cache_behind_symbolic_links_and_one_of_other_programs(
    checkpoint, hub, hub_home, forked_python, cli, offline
):
    real = hub_home.with_name("real")
    shutil.rmtree(real, ignore_errors=True)
    (real / "hub").mkdir(parents=True)
    hub_home.symlink_to(real)
    try:
        commit = hub.add("owner/linked", checkpoint("qwen2"))
        succeed(forked_python("-c", "import huggingface_hub; huggingface_hub.snapshot_download('owner/linked')"))
        hub.stop()
        moved = real.with_name("moved")
        shutil.rmtree(moved, ignore_errors=True)
        (real / "hub").rename(moved)
        (real / "hub").symlink_to(moved)
        for revision in ("main", commit.sha, commit.sha[:8]):
            said = json.loads(succeed(offline("inspect", "owner/linked", "--revision", revision, "--json")))
            assert (said["revision"], said["hidden_size"]) == (commit.sha, 32)
        succeed(offline("tokens", "owner/linked"))
    finally:
        hub_home.unlink()


def test_a_cache_of_other_programs_without_weights_is_called_incomplete(
    checkpoint, hub, forked_python, offline, refused
):
    hub.add("owner/part", checkpoint("qwen2"))
    program = "import huggingface_hub; huggingface_hub.hf_hub_download('owner/part', '{}')"
    succeed(forked_python("-c", program.format("tokenizer.json")))
    refused(offline("tokens", "owner/part"), "owner/part", "config.json", "dimscope download owner/part")
    succeed(forked_python("-c", program.format("config.json")))
    refused(offline("tokens", "owner/part"), "owner/part", "weights", "dimscope download owner/part")


def test_what_other_programs_left_out_is_not_missed(
    checkpoint, editable, hub, cli, forked_python, offline, tmp_path, text
):
    folder = editable(checkpoint("llama"), "more")
    for name in ("notes.txt", "spiece.model", "vocab.txt"):
        (folder / name).write_text("nothing that the tokenizer reads")
    hub.add("owner/more", folder)
    succeed(cli("inspect", "owner/more"))  # brings the list of all files
    program = (
        "import transformers; transformers.AutoModelForCausalLM.from_pretrained('owner/more'); "
        "transformers.AutoTokenizer.from_pretrained('owner/more')"
    )
    succeed(forked_python("-c", program))
    hub.stop()
    succeed(offline("layers", "owner/more", *MODEL_COMMANDS["layers"], "--text", text, *READ, "-o", tmp_path / "out"))


def test_a_wrong_byte_in_the_cache_is_named_with_its_file(checkpoint, hub, hub_home, cli, refused, tmp_path, text):
    hub.add("owner/wrong", checkpoint("llama"))
    hub.spoilt = ("model.safetensors", 20, b"\xff")  # in the header, which travels as a range without a hash
    line = refused(cli("spectrum", "owner/wrong"), "owner/wrong", "delete")
    [header] = ranges(hub_home, "owner/wrong")
    assert str(header) in line
    hub.spoilt = None
    assert refused(cli("spectrum", "owner/wrong")) == line
    header.unlink()
    succeed(cli("spectrum", "owner/wrong"))
    options = ("--text", text, *READ, *MODEL_COMMANDS["damage"])
    hub.spoilt = ("model.safetensors", 9000, b"\xff\xff")  # a whole file has a hash
    refused(cli("damage", "owner/wrong", *options), "model.safetensors", "arrived damaged")
    hub.spoilt = None
    succeed(cli("damage", "owner/wrong", *options))
    [config] = (hub_home / "hub").glob("models--owner--wrong/snapshots/*/config.json")
    config.resolve().write_bytes(config.read_bytes().replace(b"{", b"}", 1))
    refused(cli("spectrum", "owner/wrong"), "config.json", "delete", config.resolve())
    config.resolve().unlink()
    succeed(cli("spectrum", "owner/wrong"))
    tokenizer = config.with_name("tokenizer.json").resolve()
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b"{", b"}", 1))
    refused(cli("spectrum", "owner/wrong"), "delete", tokenizer)


def test_wrong_bytes_in_a_table_are_named_with_their_file(checkpoint, hub, hub_home, cli, refused):
    folder = checkpoint("llama", hidden_size=64, tie_word_embeddings=True)
    hub.add("owner/table", folder)
    length = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    hub.spoilt = ("model.safetensors", 8 + length + 400, b"\xff" * 4)  # NaN
    line = refused(cli("spectrum", "owner/table"), "owner/table", "NaN", "delete")
    [table] = [path for path in ranges(hub_home, "owner/table") if not path.name.endswith(".0-100000")]
    assert str(table) in line
    hub.spoilt = None
    table.unlink()
    succeed(cli("spectrum", "owner/table"))


def test_a_hub_that_does_not_answer_is_not_waited_for(checkpoint, hub, forked_python, refused):
    hub.add("owner/slow", checkpoint("llama"))
    program = (
        "import runpy, sys; from huggingface_hub import constants; constants.HF_HUB_ETAG_TIMEOUT = 0.5\n"
        "sys.argv = ['dimscope', 'spectrum', '{}']; runpy.run_module('dimscope', run_name='__main__')"
    )
    succeed(forked_python("-c", program.format("owner/slow")))
    hub.delay = 2
    succeed(forked_python("-c", program.format("owner/slow")))
    refused(forked_python("-c", program.format("owner/other")), "owner/other", "timed out")


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"range_shift": 1}, "instead of bytes 0-"),
        ({"range_excess": 1}, "more of model.safetensors"),
        ({"range_excess": -1}, "broke off"),
        ({"promised": 1}, "broke off"),
    ],
    ids=lambda fault: "-".join(fault) if isinstance(fault, dict) else "",
)
def test_a_range_that_is_not_the_requested_one_is_one_line(
    checkpoint, hub, hub_home, forked_python, refused, fault, named
):
    hub.add("owner/range", checkpoint("llama"))
    for name, value in fault.items():
        setattr(hub, name, value)
    program = (
        "import runpy, sys; from huggingface_hub import constants; constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.5\n"
        "sys.argv = ['dimscope', 'tokens', 'owner/range']; runpy.run_module('dimscope', run_name='__main__')"
    )
    start = time.monotonic()
    refused(forked_python("-c", program), "owner/range", named)
    assert time.monotonic() - start < 20  # seconds; the hub keeps the connection open
    assert ranges(hub_home, "owner/range") == []


def test_an_answer_that_no_hub_gives_is_one_line(checkpoint, hub, hub_home, cli, refused):
    commit = hub.add("owner/odd", checkpoint("llama"))
    files, sha = commit.blobs, commit.sha
    commit.__dict__["sha"] = "../../../odd"
    refused(cli("inspect", "owner/odd"), "owner/odd", "../../../odd", "commit", "HF_ENDPOINT")
    commit.__dict__.update(sha=sha, blobs={**files, "../../odd": files["config.json"]})
    refused(cli("inspect", "owner/odd"), "owner/odd", "../../odd")
    assert not [path for path in hub_home.rglob("*odd*") if path.is_file()]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HF_ENDPOINT", "localhost:8000"),
        ("HF_ENDPOINT", "http://"),
        ("HF_ENDPOINT", "http://a b"),
        ("HF_ENDPOINT", "http://localhost:99999"),
        ("HF_ENDPOINT", ""),
        ("HF_TOKEN", "hf_ä"),
        ("HF_TOKEN", "hf_a\x01b"),
        ("HTTPS_PROXY", "http://me:secret@["),
        ("HTTP_PROXY", "http://me:secret@proxy:port"),
        ("http_proxy", "http://me:secret@:3128"),
        ("ALL_PROXY", "foo://me:secret@proxy:1"),
        ("ALL_PROXY", "socks5://me:secret@proxy:1"),
        ("SSL_CERT_FILE", "/nowhere.pem"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(cli, refused, variable, value):
    line = refused(cli("inspect", "owner/any", env={variable: value}), variable)
    assert "secret" not in line
    assert "hf_" not in line


def test_a_token_file_that_cannot_be_used_is_named(hub, hub_home, cli, refused):
    hub_home.mkdir()
    for token in ("hf_\xe9".encode(), b"hf_\xff"):
        (hub_home / "token").write_bytes(token)
        assert "hf_" not in refused(cli("inspect", "owner/any"), hub_home / "token")


def test_a_variable_without_which_packages_cannot_be_imported_is_named(run_cli, refused, checkpoint):
    for variable, value in (("HF_ENDPOINT", "http://["), ("HF_HUB_DOWNLOAD_TIMEOUT", "long")):
        refused(run_cli("inspect", checkpoint("llama"), env={variable: value}), variable)


def test_no_permission_in_the_cache_and_no_access_are_called_so(checkpoint, hub, hub_home, cli, refused):
    hub.add("owner/kept", checkpoint("llama"))
    refused(cli("inspect", "owner/kept", env={"HF_TOKEN": "hf_wrong"}), "owner/kept", "401", "HF_TOKEN")
    hub_home.mkdir()
    (hub_home / "hub").write_text("a file where the folder of the cache should be")
    refused(cli("inspect", "owner/kept"), hub_home, "cannot be written")


def test_two_processes_share_one_download(checkpoint, hub, hub_home, cli):
    hub.add("owner/shared", checkpoint("llama"))
    running = [cli.start("spectrum", "owner/shared", "--json") for _ in range(2)]
    assert len({succeed(program.end()) for program in running}) == 1
    asked = [request.range for request in hub.asked("model.safetensors") if request.origin == "cdn"]
    assert len(asked) == len(set(asked)) == len(ranges(hub_home, "owner/shared"))


def test_gguf_runs_offline(checkpoint, hub, cli, offline, tmp_path):
    (tmp_path / "gguf").mkdir()
    damage.write_gguf(tmp_path / "gguf" / "model.gguf", checkpoint("llama"), "Q8_0")
    hub.add("owner/packed", tmp_path / "gguf")
    succeed(cli("spectrum", "owner/packed"))
    hub.stop()
    succeed(offline("tokens", "owner/packed"))
