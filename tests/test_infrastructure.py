"""The tests' own tools: stock transformers reads every checkpoint, and the hub's own client accepts the hub."""

from __future__ import annotations

import json
import re
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
from safetensors import SafetensorError, safe_open

IDS = torch.arange(5, 17).unsqueeze(0)


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    transformers.utils.logging.disable_progress_bar()


def load(folder: Path, **arguments):
    family = models.FAMILIES.get(models.read_json(folder / "config.json")["model_type"])
    auto = transformers.AutoModel if family and family.output is None else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, **arguments)


def logits(folder: Path, **arguments) -> torch.Tensor:
    with torch.no_grad():
        return load(folder, **arguments)(input_ids=IDS)[0].float()


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_loads_completely_and_its_forward_pass_is_finite(checkpoint, family):
    folder = checkpoint(family)
    model, report = load(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert logits(folder).isfinite().all()
    spec = models.FAMILIES[family]
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert torch.equal(file.get_tensor(spec.embedding), model.get_input_embeddings().weight)
    assert models.embedding_key(folder) == spec.embedding
    assert (spec.output in names) == (spec.output is not None and not spec.tied)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_familys_tokenizer_round_trips_and_has_the_tables_size(checkpoint, family):
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint(family))
    assert len(tokenizer) == 512
    text = "the keeper counted ships"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


@pytest.mark.parametrize("family", [family for family, spec in models.FAMILIES.items() if spec.output is not None])
@pytest.mark.parametrize("tied", [True, False])
def test_tables_are_tied_or_not_as_asked(tmp_path, family, tied):
    folder = models.build_checkpoint(tmp_path, family, tied=tied, tokenizer=None)
    tables = models.stock_tables(folder)
    assert tables["input"].shape == tables["output"].shape == (512, 32)
    assert np.array_equal(tables["input"], tables["output"]) == tied


@pytest.mark.parametrize("kind", models.TOKENIZERS)
def test_each_kind_of_tokenizer_goes_with_a_model(checkpoint, kind):
    folder = checkpoint("gpt2", tokenizer=kind, tokenizer_size=480)
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == 480


def test_sentencepiece_falls_back_to_bytes(checkpoint):
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint("llama"))
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    tokens = tokenizer.tokenize("ship 船")
    assert tokens[-3:] == ["<0xE8>", "<0x88>", "<0xB9>"]
    assert tokenizer.decode(tokenizer("ship 船")["input_ids"], skip_special_tokens=True) == "ship 船"


def test_sharded_checkpoint_is_whole(checkpoint):
    folder = checkpoint("llama", sharded=True)
    shards = damage.weight_files(folder)
    assert len(shards) >= 3
    index = models.read_json(folder / damage.INDEX)
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert torch.equal(logits(folder), logits(checkpoint("llama")))


def test_seed_and_dtype_decide_the_weights(tmp_path):
    first = models.build_checkpoint(tmp_path / "first", "qwen2", dtype="bfloat16")
    again = models.build_checkpoint(tmp_path / "again", "qwen2", dtype="bfloat16")
    other = models.build_checkpoint(tmp_path / "other", "qwen2", dtype="bfloat16", seed=1)
    assert load(first).dtype == torch.bfloat16
    files = ("model.safetensors", "tokenizer.json")
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert (first / files[0]).read_bytes() != (other / files[0]).read_bytes()


def test_building_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    models.build_checkpoint(tmp_path, "gpt2")
    assert torch.equal(torch.rand(3), expected)


def test_config_arguments_reach_the_model(tmp_path):
    folder = models.build_checkpoint(tmp_path, "opt", word_embed_proj_dim=16, tokenizer=None)
    assert models.stock_tables(folder)["input"].shape == (512, 16)
    assert logits(folder).isfinite().all()


@pytest.mark.parametrize("layout", models.HUB_LAYOUTS)
def test_files_as_on_the_hub_are_the_same_model(checkpoint, editable, layout):
    folder = checkpoint("opt" if layout.startswith("opt") else layout)
    held = models.as_on_hub(editable(folder), layout)
    _, report = load(held, output_loading_info=True)
    assert not report["missing_keys"] | report["mismatched_keys"]
    assert torch.equal(logits(folder), logits(held))


def test_hub_layouts_carry_what_the_hub_carries(checkpoint, editable):
    with safe_open(models.as_on_hub(editable(checkpoint("gpt2"))) / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.get_slice("h.0.attn.bias").get_shape() == [1, 1, 64, 64]
        assert [file.get_slice(f"h.{n}.attn.bias").get_dtype() for n in range(2)] == ["F32", "U8"]
    assert {"wte.weight", "h.1.attn.masked_bias"} <= names
    assert not any(name.startswith("transformer.") or "lm_head" in name for name in names)
    with safe_open(models.as_on_hub(editable(checkpoint("gpt_neox"))) / "model.safetensors", "pt") as file:
        stem = "gpt_neox.layers.0.attention"
        assert {f"{stem}.bias", f"{stem}.masked_bias", f"{stem}.rotary_emb.inv_freq"} <= set(file.keys())
    with safe_open(models.as_on_hub(editable(checkpoint("bert"))) / "model.safetensors", "pt") as file:
        assert {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"} <= set(file.keys())


def test_table_checkpoint_holds_the_given_rows(tmp_path):
    rows = torch.randn(1000, 128, generator=torch.Generator().manual_seed(0))
    by_tensor = models.write_table_checkpoint(tmp_path / "a", 1000, 128, "float32", rows=rows)
    by_function = models.write_table_checkpoint(tmp_path / "b", 1000, 128, "float32", rows=lambda i, j: rows[i:j])
    by_array = models.write_table_checkpoint(
        tmp_path / "c", 1000, 128, "float32", rows=rows.numpy(), output_rows=2 * rows, tied=False
    )
    for folder in (by_tensor, by_function, by_array):
        assert np.array_equal(models.stock_tables(folder)["input"], rows.double().numpy())
        assert logits(folder).isfinite().all()
    assert np.array_equal(models.stock_tables(by_array)["output"], 2 * rows.double().numpy())
    _, report = load(by_tensor, output_loading_info=True)
    assert not any(report.values())


MEASURE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch, transformers.models.qwen2.modeling_qwen2
from pathlib import Path
from models import write_table_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_table_checkpoint(Path(sys.argv[2]), 151_936, 896)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_big_table_is_streamed(tmp_path, run_python):
    answer = run_python("-c", MEASURE, Path(models.__file__).parent, tmp_path / "big")
    assert answer.returncode == 0, answer.stderr
    # the table has 272 MB (544 in float32); a block of 8,192 rows has 29 MB in float32 and exists about three times
    assert float(answer.stdout) < 200
    with safe_open(tmp_path / "big" / "model.safetensors", "pt") as file:
        table = file.get_slice("model.embed_tokens.weight")
        assert (table.get_shape(), table.get_dtype()) == ([151_936, 896], "BF16")
        assert table[151_900:].float().std().item() == pytest.approx(0.02, rel=0.02)  # 32,256 values: 5 sigma


def test_the_real_qwen2_tokenizer_goes_with_a_table(tmp_path, shared_data):
    folder = models.write_table_checkpoint(
        tmp_path, 151_936, 8, tokenizer_dir=shared_data / "tokenizers" / "qwen2", holes=True
    )
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == 151_646


def test_holes_cost_no_disk(tmp_path):
    folder = models.write_table_checkpoint(
        tmp_path, 2000, 1024, layers=80, intermediate_size=28_672, tied=False, holes=True
    )
    size = (folder / "model.safetensors").stat()
    assert size.st_size > 14e9
    assert size.st_blocks * 512 < 20e6
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.get_slice("lm_head.weight")[:4].abs().sum() > 0


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        damage.truncate,
        damage.flip_header_bytes,
        damage.claim_header_length,
        lambda path: damage.edit_header(path, lambda h: h["model.embed_tokens.weight"].update(shape=[512, 33])),
    ],
    ids=["truncated", "header bytes", "header length", "shape"],
)
def test_broken_safetensors_do_not_open(checkpoint, editable, spoil):
    folder = editable(checkpoint("qwen2"))
    path = spoil(folder / "model.safetensors")
    with pytest.raises(SafetensorError):
        safe_open(path, "pt").__enter__()


def test_a_missing_shard_and_a_lying_index_are_noticed_by_the_stock_reader(checkpoint, editable):
    name = damage.drop_shard(folder := editable(checkpoint("llama", sharded=True), "dropped"))
    assert not (folder / name).exists()
    with pytest.raises(OSError, match=re.escape(name)):
        load(folder)
    tensor, shard = damage.lie_in_index(folder := editable(checkpoint("llama", sharded=True), "lying"))
    with safe_open(folder / shard, "pt") as file:
        assert tensor not in file.keys()  # noqa: SIM118 (safe_open is no mapping)
    outside = damage.point_index_outside(folder := editable(checkpoint("llama", sharded=True), "outside"))
    assert models.read_json(folder / damage.INDEX)["weight_map"]["model.embed_tokens.weight"] == outside


def test_config_and_rows_can_be_spoilt(checkpoint, editable):
    folder = editable(checkpoint("llama", sharded=True))
    damage.set_rows(folder, [3, 5], float("nan"))
    damage.set_rows(folder, [7], np.full(32, np.inf))
    damage.set_rows(folder, [1], 0.0, "lm_head.weight")
    tables = models.stock_tables(folder)
    assert np.flatnonzero(~np.isfinite(tables["input"]).all(axis=1)).tolist() == [3, 5, 7]
    assert np.flatnonzero(~tables["output"].any(axis=1)).tolist() == [1]
    damage.change_config(folder, vocab_size=600, eos_token_id=None)
    config = models.read_json(folder / "config.json")
    assert (config["vocab_size"], "eos_token_id" in config) == (600, False)
    damage.break_json(folder / "config.json")
    with pytest.raises(json.JSONDecodeError):
        models.read_json(folder / "config.json")
    damage.remove_tokenizer(folder)
    damage.remove_weights(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "generation_config.json"]


@pytest.mark.parametrize("method", damage.QUANTIZATIONS)
def test_quantised_weights_are_packed_and_declared(checkpoint, editable, method):
    folder = damage.quantize(editable(checkpoint("qwen2")), method)
    config = models.read_json(folder / "config.json")
    assert "quantization_config" in config or "quantization" in config
    with safe_open(folder / "model.safetensors", "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    packed = {"gptq": "I32", "bitsandbytes": "U8", "bitsandbytes_int8": "I8", "mlx": "U32"}[method]
    assert sum(kind == packed for kind in kinds.values()) >= 14
    assert kinds["model.embed_tokens.weight"] == ("U32" if method == "mlx" else "F32")


def test_pickles_load_and_the_hostile_one_leaves_its_mark(checkpoint, editable, tmp_path):
    folder = damage.to_pickle(editable(checkpoint("gpt2"), "pickle"))
    assert not damage.weight_files(folder)
    assert torch.equal(logits(folder), logits(checkpoint("gpt2")))
    marker = tmp_path / "marker"
    hostile = damage.to_hostile_pickle(editable(checkpoint("gpt2"), "hostile"), marker)
    assert not marker.exists()
    torch.load(hostile / "pytorch_model.bin", weights_only=False)
    assert marker.exists()


TRUSTING = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


def test_remote_code_is_asked_for_and_runs_only_then(checkpoint, editable, tmp_path, run_python):
    marker = tmp_path / "marker"
    folder = damage.to_remote_code(editable(checkpoint("llama")), marker)
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    assert not marker.exists()
    # in a subprocess, whose HF_HOME takes the copied modules
    answer = run_python("-c", TRUSTING, folder)
    assert answer.returncode == 0, answer.stderr
    assert marker.exists()


@pytest.mark.parametrize(
    ("quantization", "tolerance"), [("F32", 0.0), ("F16", 2**-15), ("BF16", 2**-12), ("Q8_0", 2**-11)]
)
def test_gguf_holds_the_table(checkpoint, tmp_path, quantization, tolerance):
    # entries stay below 2^-3: half a unit of 11 or 8 bits there, and for Q8_0 half of 2^-3 / 127
    import gguf

    path = damage.write_gguf(tmp_path / "model.gguf", checkpoint("llama"), quantization)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    expected = models.stock_tables(checkpoint("llama"))
    for name, side in (("token_embd.weight", "input"), ("output.weight", "output")):
        assert tensors[name].tensor_type.name == quantization
        assert list(tensors[name].shape) == [32, 512]
        values = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert np.abs(values - expected[side]).max() <= tolerance


def test_gguf_is_a_model_for_the_stock_reader(checkpoint, tmp_path):
    damage.write_gguf(tmp_path / "model.gguf", checkpoint("llama"))
    torch.testing.assert_close(logits_of_gguf(tmp_path), logits(checkpoint("llama")), rtol=0, atol=1e-6)


def logits_of_gguf(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
        return model(input_ids=IDS)[0]


# ---- the hub -------------------------------------------------------------------------------------------------------


def ask(run_python, code: str, env: dict[str, str]):
    """Run code in a subprocess and return what it prints as JSON."""
    answer = run_python(
        "-c", "import json\nfrom huggingface_hub import *\nfrom huggingface_hub.errors import *\n" + code, env=env
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def test_files_are_downloaded_once_with_exact_byte_counts(hub, checkpoint, run_python, tmp_path):
    folder = checkpoint("llama")
    commit = hub.add("someone/tiny", folder)
    code = """
names = ("config.json", "config.json", "model.safetensors")
config, again, weights = (hf_hub_download("someone/tiny", name) for name in names)
print(json.dumps([config, weights]))
"""
    config, weights = ask(run_python, code, hub.environment(tmp_path / "home"))
    assert Path(config).read_bytes() == (folder / "config.json").read_bytes()
    assert Path(weights).read_bytes() == (folder / "model.safetensors").read_bytes()
    assert Path(config).parent.name == commit.sha
    assert hub.bytes_sent("/config.json") == (folder / "config.json").stat().st_size
    assert hub.bytes_sent("/model.safetensors") == (folder / "model.safetensors").stat().st_size
    assert hub.bytes_sent() == hub.bytes_sent("/config.json") + hub.bytes_sent("/model.safetensors")
    assert [(r.method, r.origin, r.status) for r in hub.asked("/model.safetensors")] == [
        ("HEAD", "hub", 302),
        ("GET", "cdn", 200),
    ]
    assert [r.status for r in hub.asked("/config.json", "GET")] == [200]


def test_the_api_describes_repositories(hub, checkpoint, run_python, tmp_path):
    folder = checkpoint("llama")
    commit = hub.add("someone/tiny", folder)
    older = hub.add("someone/tiny", checkpoint("gpt2"), revision="v1")
    (nested := tmp_path / "nested" / "below").mkdir(parents=True)
    (nested / "note.txt").write_text("hello")
    hub.add("single", tmp_path / "nested")
    code = """
api = HfApi()
info, old = api.model_info("someone/tiny", files_metadata=True), api.model_info("someone/tiny", revision="v1")
tree = [(entry.path, entry.size) for entry in api.list_repo_tree("someone/tiny", recursive=True)]
shallow = [type(entry).__name__ for entry in api.list_repo_tree("single")]
deep = [entry.path for entry in api.list_repo_tree("single", recursive=True)]
paths = [entry.path for entry in api.get_paths_info("someone/tiny", ["config.json", "nothing"])]
header = api.parse_safetensors_file_metadata("someone/tiny", "model.safetensors")
refs = {ref.name: ref.target_commit for ref in api.list_repo_refs("someone/tiny").branches}
sizes = {file.rfilename: file.size for file in info.siblings}
print(json.dumps({
    "sha": info.sha, "old": old.sha, "gated": info.gated, "tags": info.tags, "sizes": sizes, "tree": tree,
    "shallow": shallow, "deep": deep, "paths": paths, "refs": refs,
    "files": sorted(api.list_repo_files("someone/tiny")),
    "table": header.tensors["model.embed_tokens.weight"].shape, "exists": api.file_exists("someone/tiny", "nothing"),
}))
"""
    said = ask(run_python, code, hub.environment(tmp_path / "home"))
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert (said["sha"], said["old"], said["gated"]) == (commit.sha, older.sha, False)
    assert said["sizes"] == dict(said["tree"]) == sizes
    assert said["files"] == sorted(sizes)
    assert (said["shallow"], said["deep"]) == (["RepoFolder"], ["below", "below/note.txt"])
    assert said["paths"] == ["config.json"]
    assert said["refs"] == {"main": commit.sha, "v1": older.sha}
    assert (said["table"], said["exists"]) == ([512, 32], False)
    # the header was read with one range request that the hub redirected to storage
    ranged = [(r.origin, r.status, r.range, r.bytes_sent) for r in hub.asked("/model.safetensors", "GET")]
    asked = min(100_001, sizes["model.safetensors"])
    assert ranged == [("hub", 302, "bytes=0-100000", 0), ("cdn", 206, "bytes=0-100000", asked)]


def test_transformers_reads_config_tokenizer_and_model(hub, checkpoint, run_python, tmp_path):
    hub.add("someone/tiny", checkpoint("llama", sharded=True))
    hub.alias("old-name", "someone/tiny")
    code = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
config, tokenizer = AutoConfig.from_pretrained("old-name"), AutoTokenizer.from_pretrained("old-name")
before = len(tokenizer)
model = AutoModelForCausalLM.from_pretrained("someone/tiny")
print(json.dumps([config.vocab_size, before, sum(p.numel() for p in model.parameters())]))
"""
    vocab_size, tokens, n_parameters = ask(run_python, code, hub.environment(tmp_path / "home"))
    assert (vocab_size, tokens) == (512, 512)
    assert n_parameters == load(checkpoint("llama")).num_parameters()
    unknown = {r.path for r in hub.asked() if r.status == 404 and "/resolve/" not in r.path and "/tree/" not in r.path}
    assert not unknown, "routes that the hub does not speak yet"


CATCH = """
def name_of(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "fine"
"""


def test_what_is_missing_is_named_as_the_hub_names_it(hub, checkpoint, run_python, tmp_path):
    hub.add("someone/tiny", checkpoint("gpt2"))
    hub.add("someone/secret", checkpoint("gpt2"), private=True, token="hf_owner")
    code = (
        CATCH
        + """
print(json.dumps([
    name_of(lambda: hf_hub_download("someone/tiny", "nothing.json")),
    name_of(lambda: hf_hub_download("someone/tiny", "config.json", revision="v9")),
    name_of(lambda: hf_hub_download("someone/nobody", "config.json")),
    name_of(lambda: hf_hub_download("someone/secret", "config.json")),
    name_of(lambda: hf_hub_download("someone/secret", "config.json", token="hf_owner")),
    name_of(lambda: HfApi().model_info("someone/nobody")),
    name_of(lambda: HfApi().model_info("someone/nobody", token="hf_owner")),
    name_of(lambda: HfApi().model_info("someone/tiny", revision="v9")),
    name_of(lambda: list(HfApi().list_repo_tree("someone/tiny", "nowhere"))),
]))
"""
    )
    assert ask(run_python, code, hub.environment(tmp_path / "home")) == [
        "RemoteEntryNotFoundError",
        "RevisionNotFoundError",
        "RepositoryNotFoundError",
        "RepositoryNotFoundError",
        "fine",
        "RepositoryNotFoundError",
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "RemoteEntryNotFoundError",
    ]


def test_gated_files_need_the_token_of_a_reader(hub, checkpoint, run_python, tmp_path):
    hub.add("someone/gated", checkpoint("gpt2"), gated=True, token="hf_reader")
    hub.tokens.add("hf_stranger")
    code = (
        CATCH
        + """
names = [name_of(lambda f=f: hf_hub_download("someone/gated", f)) for f in ("config.json", "model.safetensors")]
print(json.dumps([*names, HfApi().model_info("someone/gated").gated]))
"""
    )
    assert ask(run_python, code, hub.environment(tmp_path / "a")) == ["GatedRepoError", "GatedRepoError", "manual"]
    assert {r.status for r in hub.asked(method="HEAD")} == {401}
    hub.requests.clear()
    stranger = hub.environment(tmp_path / "b", token="hf_stranger")
    assert ask(run_python, code, stranger) == ["GatedRepoError", "GatedRepoError", "manual"]
    assert {r.status for r in hub.asked(method="HEAD")} == {403}
    hub.requests.clear()
    assert ask(run_python, code, hub.environment(tmp_path / "c", token="hf_reader")) == ["fine", "fine", "manual"]
    assert {r.authorization for r in hub.asked() if r.origin == "hub"} == {"Bearer hf_reader"}
    assert {r.authorization for r in hub.asked() if r.origin == "cdn"} == {None}
    wrong = hub.environment(tmp_path / "d", token="hf_expired")
    answer = run_python("-c", "from huggingface_hub import *; HfApi().model_info('someone/gated')", env=wrong)
    assert answer.returncode == 1
    assert "401" in answer.stderr


def test_a_cut_connection_is_noticed_and_counted(hub, checkpoint, run_python, tmp_path):
    folder = checkpoint("llama")
    hub.add("someone/tiny", folder)
    hub.abort_bodies(after=50_000, times=1)
    path = ask(
        run_python, 'print(json.dumps(hf_hub_download("someone/tiny", "model.safetensors")))', hub.environment(tmp_path)
    )
    size = (folder / "model.safetensors").stat().st_size
    assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()
    gets = hub.asked("/model.safetensors", "GET")
    # the client writes pieces of 10 MB: what it had of the first one is lost, and it asks from the start again
    assert [(r.status, r.range, r.bytes_sent) for r in gets] == [(200, None, 50_000), (200, None, size)]


def fetch(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def test_a_giant_is_served_by_the_byte(hub, tmp_path, run_python):
    rows = torch.arange(1000 * 64, dtype=torch.float32).view(1000, 64)
    folder = models.write_table_checkpoint(
        tmp_path / "giant", 1000, 64, "float32", rows=rows, layers=40, intermediate_size=1_000_000, holes=True
    )
    assert (folder / "model.safetensors").stat().st_size > 30e9
    hub.add("someone/giant", folder)
    code = """
header = HfApi().parse_safetensors_file_metadata("someone/giant", "model.safetensors")
print(json.dumps(header.tensors["model.embed_tokens.weight"].data_offsets))
"""
    start, stop = ask(run_python, code, hub.environment(tmp_path / "home"))
    assert hub.bytes_sent() == 100_001
    with (folder / "model.safetensors").open("rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
    url = f"{hub.url}/someone/giant/resolve/main/model.safetensors"
    _, _, body = fetch(url, Range=f"bytes={data + start}-{data + stop - 1}")
    assert np.array_equal(np.frombuffer(body, np.float32), rows.view(-1).numpy())
    assert hub.bytes_sent() == 100_001 + rows.numel() * 4


def test_tokenizers_are_the_same_in_every_process(run_python):
    code = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from models import TOKENIZERS
print([hashlib.sha256(kind.train(512).to_str().encode()).hexdigest() for kind in TOKENIZERS.values()])
"""
    answers = {run_python("-c", code, Path(models.__file__).parent).stdout for _ in range(3)}
    assert len(answers) == 1
    assert answers != {""}


@pytest.mark.parametrize(
    ("wanted", "span"), [("bytes=0-7", (0, 8)), ("bytes=100-", (100, None)), ("bytes=-20", (-20, None))]
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_ranges_are_served_to_the_byte(hub, checkpoint, wanted, span, name):
    content = (checkpoint("gpt2") / name).read_bytes()
    hub.add("someone/tiny", checkpoint("gpt2"))
    status, headers, body = fetch(f"{hub.url}/someone/tiny/resolve/main/{name}", Range=wanted)
    assert (status, body) == (206, content[slice(*span)])
    start = content.index(body) if span[0] else 0
    assert headers["Content-Range"] == f"bytes {start}-{start + len(body) - 1}/{len(content)}"
    assert hub.bytes_sent() == len(body)


def test_impossible_ranges_and_paths_are_refused(hub, checkpoint):
    hub.add("someone/tiny", checkpoint("gpt2"))
    size = (checkpoint("gpt2") / "config.json").stat().st_size
    status, headers, _ = fetch(f"{hub.url}/someone/tiny/resolve/main/config.json", Range=f"bytes={size}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{size}")
    assert fetch(f"{hub.url}/someone/tiny/resolve/main/..%2F..%2Fetc%2Fpasswd")[0] == 404
    assert fetch(f"{hub.url}/someone/tiny/blob/main/config.json")[0] == 404
    assert fetch(f"{hub.storage_url}/cdn/{'0' * 40}/config.json")[0] == 403


def test_a_broken_or_stopped_hub_fails_as_a_network_does(checkpoint):
    with HubServer() as hub:
        hub.add("someone/tiny", checkpoint("gpt2"))
        url = f"{hub.url}/someone/tiny/resolve/main/config.json"
        assert fetch(url)[0] == 200
        hub.broken_status = 503
        assert fetch(url)[0] == 503
    with pytest.raises(urllib.error.URLError, match="refused"):
        fetch(url)


def test_by_default_subprocesses_have_no_hub(run_python):
    answer = run_python("-c", "from huggingface_hub import *; HfApi().model_info('openai-community/gpt2')")
    assert answer.returncode == 1
    assert "ConnectError" in answer.stderr


def test_run_cli_runs_the_package(run_cli):
    answer = run_cli("--help")
    if "No module named dimscope" in answer.stderr or "dimscope.__main__" in answer.stderr:
        pytest.skip("the package is not there yet")
    assert answer.returncode == 0
