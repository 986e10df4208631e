"""The tests' own tools: stock transformers reads every checkpoint, and the hub's own client accepts the hub."""

from __future__ import annotations

import hashlib
import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import damage
import models
import numpy as np
import pytest
import torch
import transformers
from hub_server import HubServer
from jaxtyping import TypeCheckError
from safetensors import safe_open

from dimscope.geometry.correlation import correlation_matrix

IDS = torch.arange(5, 17).unsqueeze(0)


def load(folder: Path, **arguments):
    family = models.FAMILIES.get(models.read_json(folder / "config.json")["model_type"])
    auto = transformers.AutoModel if family and family.output is None else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, **arguments)


def logits(folder: Path, **arguments) -> torch.Tensor:
    with torch.no_grad():
        return load(folder, **arguments)(input_ids=IDS)[0].float()


def names_in(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_loads_completely_with_its_tokenizer(checkpoint, family):
    folder, spec = checkpoint(family), models.FAMILIES[family]
    model, report = load(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert logits(folder).isfinite().all()
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor(spec.embedding), model.get_input_embeddings().weight)
    has_own_output = spec.output is not None and not spec.tied
    assert (spec.output in names_in(folder / "model.safetensors")) == has_own_output
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the keeper counted ships"
    assert len(tokenizer) == 512
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_arguments_decide_ties_shards_weights_and_leave_the_random_state(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    tied = models.build_checkpoint(tmp_path / "tied", "llama", tied=True, sharded=True)
    untied = models.build_checkpoint(tmp_path / "untied", "llama", tied=False)
    half = models.build_checkpoint(tmp_path / "half", "llama", dtype="bfloat16", tokenizer_size=480)
    again = models.build_checkpoint(tmp_path / "again", "llama", dtype="bfloat16", tokenizer_size=480)
    other = models.build_checkpoint(tmp_path / "other", "llama", dtype="bfloat16", seed=1, tokenizer=None)
    assert torch.equal(torch.rand(3), expected)

    tables = [models.stock_tables(folder) for folder in (tied, untied)]
    assert [np.array_equal(pair["input"], pair["output"]) for pair in tables] == [True, False]
    shards = damage.weight_files(tied)
    assert len(shards) >= 3
    assert set(models.read_json(tied / damage.INDEX)["weight_map"].values()) == {shard.name for shard in shards}
    assert load(half).dtype == torch.bfloat16
    assert len(transformers.AutoTokenizer.from_pretrained(half)) == 480
    weights = [(folder / "model.safetensors").read_bytes() for folder in (half, again, other)]
    assert weights[0] == weights[1] != weights[2]
    assert not (other / "tokenizer.json").exists()


def test_sentencepiece_falls_back_to_bytes(checkpoint):
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint("llama"))
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert tokenizer.tokenize("ship 船")[-3:] == ["<0xE8>", "<0x88>", "<0xB9>"]


@pytest.mark.slow
def test_tokenizers_are_the_same_in_every_process(run_python):
    # the library's own WordPiece trainer gives another vocabulary in each process
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import models, hashlib
print([hashlib.sha256(kind.train(512).to_str().encode()).hexdigest() for kind in models.TOKENIZERS.values()])
"""
    here = [hashlib.sha256(kind.train(512).to_str().encode()).hexdigest() for kind in models.TOKENIZERS.values()]
    answer = run_python("-c", code, Path(models.__file__).parent)
    assert answer.stdout.strip() == str(here), answer.stderr


@pytest.mark.parametrize("layout", models.HUB_LAYOUTS)
def test_files_as_on_the_hub_are_the_same_model(checkpoint, editable, layout):
    folder = checkpoint("opt" if layout.startswith("opt") else layout)
    rewritten = models.as_on_hub(editable(folder), layout)
    _, report = load(rewritten, output_loading_info=True)
    assert not report["missing_keys"] | report["mismatched_keys"]
    assert torch.equal(logits(folder), logits(rewritten))
    before, after = (names_in(path / "model.safetensors") for path in (folder, rewritten))
    extra = {
        "gpt2": {"wte.weight", "h.0.attn.bias", "h.1.attn.masked_bias"},
        "gpt_neo": {"transformer.h.0.attn.attention.bias"},
        "gpt_neox": {"gpt_neox.layers.0.attention.rotary_emb.inv_freq"},
        "opt": {"decoder.embed_tokens.weight"},
        "opt-125m": {"lm_head.weight"},
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq"},
        "bert": {"bert.embeddings.LayerNorm.gamma", "cls.predictions.bias"},
    }[layout]
    assert extra <= after - before


def test_table_checkpoint_contains_the_rows_and_its_holes_cost_no_disk(tmp_path):
    rows = torch.randn(1000, 128, generator=torch.Generator().manual_seed(0))
    by_function = models.write_table_checkpoint(tmp_path / "a", 1000, 128, "float32", rows=lambda i, j: rows[i:j])
    by_array = models.write_table_checkpoint(
        tmp_path / "b", 1000, 128, "float32", rows=rows.numpy(), output_rows=2 * rows, tied=False
    )
    for folder in (by_function, by_array):
        assert np.array_equal(models.stock_tables(folder)["input"], rows.double().numpy())
    assert np.array_equal(models.stock_tables(by_array)["output"], 2 * rows.double().numpy())
    _, report = load(by_function, output_loading_info=True)
    assert not any(report.values())
    giant = models.write_table_checkpoint(
        tmp_path / "giant", 2000, 1024, layers=80, intermediate_size=28_672, tied=False, holes=True
    )
    size = (giant / "model.safetensors").stat()
    assert size.st_size > 14e9
    assert size.st_blocks * 512 < 20e6


# ---- damage: a hostile file that does nothing would make the tests of its refusal empty -----------------------------


@pytest.mark.slow
def test_hostile_files_do_run_where_they_are_trusted(checkpoint, editable, tmp_path, forked_python):
    folder = damage.to_pickle(editable(checkpoint("gpt2"), "pickle"))
    assert torch.equal(logits(folder), logits(checkpoint("gpt2")))
    pickled, imported = tmp_path / "pickled", tmp_path / "imported"
    hostile = damage.to_hostile_pickle(editable(checkpoint("gpt2"), "hostile"), pickled)
    torch.load(hostile / "pytorch_model.bin", weights_only=False)
    assert pickled.exists()
    folder = damage.to_remote_code(editable(checkpoint("llama")), imported)
    code = "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)"
    answer = forked_python("-c", code, folder)  # in a process whose HF_HOME takes the copied modules
    assert answer.returncode == 0, answer.stderr
    assert imported.exists()


def test_gguf_is_a_model_for_the_stock_reader(checkpoint, tmp_path):
    damage.write_gguf(tmp_path / "model.gguf", checkpoint("llama"))
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
        torch.testing.assert_close(model(input_ids=IDS)[0], logits(checkpoint("llama")), rtol=0, atol=1e-6)


# ---- the hub -------------------------------------------------------------------------------------------------------

PREAMBLE = """
import json
from huggingface_hub import *
def name_of(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "fine"
"""


def ask(forked_python, code: str, token: str | None = None):
    """Run code in a process whose client asks `hub`, and return what it prints as JSON."""
    answer = forked_python("-c", PREAMBLE + code, env={"HF_TOKEN": token} if token else {})
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.slow
def test_files_are_downloaded_once_with_exact_byte_counts_and_cut_connections_are_counted(
    hub, hub_home, checkpoint, forked_python
):
    folder = checkpoint("llama")
    commit = hub.add("someone/tiny", folder)
    code = """
names = ("config.json", "config.json", "model.safetensors")
config, again, weights = (hf_hub_download("someone/tiny", name) for name in names)
print(json.dumps([config, weights]))
"""
    paths = [Path(path) for path in ask(forked_python, code)]
    sizes = [path.stat().st_size for path in paths]
    assert [path.read_bytes() for path in paths] == [(folder / path.name).read_bytes() for path in paths]
    assert paths[0].parent.name == commit.sha
    assert [hub.bytes_sent("/config.json"), hub.bytes_sent("/model.safetensors")] == sizes
    assert hub.bytes_sent() == sum(sizes)
    seen = [(r.method, r.origin, r.status) for r in hub.asked("/model.safetensors")]
    assert seen == [("HEAD", "hub", 302), ("GET", "cdn", 200)]
    assert [r.status for r in hub.asked("/config.json", "GET")] == [200]

    hub.requests.clear()
    hub.abort_bodies(after=50_000, times=1)
    shutil.rmtree(hub_home)
    ask(forked_python, code)
    # the client writes pieces of 10 MB: what it had of the first one is lost, and it asks from the start again
    gets = hub.asked("/model.safetensors", "GET")
    assert [(r.status, r.range, r.bytes_sent) for r in gets] == [(200, None, 50_000), (200, None, sizes[1])]


@pytest.mark.slow
def test_the_api_describes_repositories(hub, checkpoint, forked_python, tmp_path):
    folder = checkpoint("llama")
    commit = hub.add("someone/tiny", folder)
    older = hub.add("someone/tiny", checkpoint("gpt2"), revision="v1")
    (nested := tmp_path / "nested" / "below").mkdir(parents=True)
    (nested / "note.txt").write_text("hello")
    hub.add("single", tmp_path / "nested")
    code = """
api = HfApi()
info, old = api.model_info("someone/tiny", files_metadata=True), api.model_info("someone/tiny", revision="v1")
header = api.parse_safetensors_file_metadata("someone/tiny", "model.safetensors")
print(json.dumps({
    "sha": info.sha,
    "old": old.sha,
    "sizes": {file.rfilename: file.size for file in info.siblings},
    "tree": [(entry.path, entry.size) for entry in api.list_repo_tree("someone/tiny", recursive=True)],
    "shallow": [type(entry).__name__ for entry in api.list_repo_tree("single")],
    "deep": [entry.path for entry in api.list_repo_tree("single", recursive=True)],
    "paths": [entry.path for entry in api.get_paths_info("someone/tiny", ["config.json", "nothing"])],
    "refs": {ref.name: ref.target_commit for ref in api.list_repo_refs("someone/tiny").branches},
    "files": sorted(api.list_repo_files("someone/tiny")),
    "table": header.tensors["model.embed_tokens.weight"].shape,
    "exists": api.file_exists("someone/tiny", "nothing"),
}))
"""
    answer = ask(forked_python, code)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert dict(answer.pop("tree")) == sizes
    assert answer == {
        "sha": commit.sha,
        "old": older.sha,
        "sizes": sizes,
        "shallow": ["RepoFolder"],
        "deep": ["below", "below/note.txt"],
        "paths": ["config.json"],
        "refs": {"main": commit.sha, "v1": older.sha},
        "files": sorted(sizes),
        "table": [512, 32],
        "exists": False,
    }
    # the header was read with one range request that the hub redirected to storage
    ranged = [(r.origin, r.status, r.range, r.bytes_sent) for r in hub.asked("/model.safetensors", "GET")]
    length = min(100_001, sizes["model.safetensors"])
    assert ranged == [("hub", 302, "bytes=0-100000", 0), ("cdn", 206, "bytes=0-100000", length)]


@pytest.mark.slow
def test_transformers_reads_config_tokenizer_and_model(hub, checkpoint, forked_python):
    hub.add("someone/tiny", checkpoint("llama", sharded=True))
    hub.alias("old-name", "someone/tiny")
    code = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
config, tokenizer = AutoConfig.from_pretrained("old-name"), AutoTokenizer.from_pretrained("old-name")
model = AutoModelForCausalLM.from_pretrained("someone/tiny")
print(json.dumps([config.vocab_size, len(tokenizer), sum(p.numel() for p in model.parameters())]))
"""
    answer = ask(forked_python, code)
    assert answer == [512, 512, load(checkpoint("llama")).num_parameters()]
    unknown = {r.path for r in hub.asked() if r.status == 404 and "/resolve/" not in r.path and "/tree/" not in r.path}
    assert not unknown, "routes that the hub does not speak yet"


@pytest.mark.slow
def test_what_is_missing_or_private_is_named_as_the_hub_names_it(hub, checkpoint, forked_python):
    hub.add("someone/tiny", checkpoint("gpt2"))
    hub.add("someone/secret", checkpoint("gpt2"), private=True, token="hf_owner")
    code = """
download, api = hf_hub_download, HfApi()
print(json.dumps([
    name_of(lambda: download("someone/tiny", "nothing.json")),
    name_of(lambda: list(api.list_repo_tree("someone/tiny", "nowhere"))),
    name_of(lambda: download("someone/tiny", "config.json", revision="v9")),
    name_of(lambda: api.model_info("someone/tiny", revision="v9")),
    name_of(lambda: download("someone/nobody", "config.json")),
    name_of(lambda: download("someone/secret", "config.json")),
    name_of(lambda: api.model_info("someone/nobody", token="hf_owner")),
    name_of(lambda: download("someone/secret", "config.json", token="hf_owner")),
]))
"""
    entry, revision, repository = ("RemoteEntryNotFoundError", "RevisionNotFoundError", "RepositoryNotFoundError")
    answer = ask(forked_python, code)
    assert answer == [entry] * 2 + [revision] * 2 + [repository] * 3 + ["fine"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "expected", "status"),
    [
        (None, "GatedRepoError", 401),
        ("hf_stranger", "GatedRepoError", 403),
        ("hf_expired", "HfHubHTTPError", 401),
        ("hf_reader", "fine", None),
    ],
)
def test_gated_files_need_the_token_of_a_reader(hub, checkpoint, forked_python, token, expected, status):
    hub.add("someone/gated", checkpoint("gpt2"), gated=True, token="hf_reader")
    hub.tokens.add("hf_stranger")
    code = """
print(json.dumps([name_of(lambda: hf_hub_download("someone/gated", f)) for f in ("config.json", "model.safetensors")]))
"""
    assert ask(forked_python, code, token) == [expected] * 2
    heads = {r.status for r in hub.asked(method="HEAD")}
    assert heads == ({status} if status else {200, 302})
    if expected == "fine":
        assert {r.authorization for r in hub.asked() if r.origin == "cdn"} == {None}


def fetch(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def test_ranges_are_served_to_the_byte_and_impossible_ones_refused(hub, checkpoint):
    hub.add("someone/tiny", checkpoint("gpt2"))
    for name in ("config.json", "model.safetensors"):
        content, url = (checkpoint("gpt2") / name).read_bytes(), f"{hub.url}/someone/tiny/resolve/main/{name}"
        size = len(content)
        for wanted, start, stop in (("0-7", 0, 8), ("100-", 100, size), ("-20", size - 20, size)):
            hub.requests.clear()
            status, headers, body = fetch(url, Range=f"bytes={wanted}")
            assert (status, body) == (206, content[start:stop])
            assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
            assert hub.bytes_sent() == stop - start
        status, headers, _ = fetch(url, Range=f"bytes={size}-")
        assert (status, headers["Content-Range"]) == (416, f"bytes */{size}")
    assert fetch(f"{hub.url}/someone/tiny/resolve/main/..%2F..%2Fetc%2Fpasswd")[0] == 404
    assert fetch(f"{hub.url}/someone/tiny/blob/main/config.json")[0] == 404
    assert fetch(f"{hub.storage_url}/cdn/{'0' * 40}/config.json")[0] == 403


def test_a_broken_or_stopped_hub_fails_as_a_network_does_and_by_default_there_is_none(checkpoint, forked_python):
    with HubServer() as hub:
        hub.add("someone/tiny", checkpoint("gpt2"))
        url = f"{hub.url}/someone/tiny/resolve/main/config.json"
        assert fetch(url)[0] == 200
        hub.broken_status = 503
        assert fetch(url)[0] == 503
    with pytest.raises(urllib.error.URLError, match="refused"):
        fetch(url)
    answer = forked_python("-c", "from huggingface_hub import *; HfApi().model_info('openai-community/gpt2')")
    assert answer.returncode == 1
    assert "ConnectError" in answer.stderr


# ---- what every worker must do ---------------------------------------------------------------------------------------


def test_annotations_are_executed(pytestconfig):
    if not pytestconfig.getoption("jaxtyping_packages"):
        pytest.skip("shapes are checked by `make test COVERAGE=1`")
    with pytest.raises(TypeCheckError):
        correlation_matrix(torch.zeros(3))


def test_a_checkpoint_is_built_once_and_whole(checkpoint):
    first = checkpoint("gpt2", hidden_size=16, seed=3)
    assert checkpoint("gpt2", seed=3, hidden_size=16) == first != checkpoint("gpt2", hidden_size=16, seed=4)
    assert (first / "model.safetensors").is_file()
    assert not list(first.parent.glob(f"{first.name}.draft"))
