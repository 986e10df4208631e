"""Every command on a sound model: a table for readers, JSON alone on standard output, Parquet that says the same."""

from __future__ import annotations

import json
import os

import damage
import models
import numpy as np
import polars as pl
import pytest

pytestmark = pytest.mark.slow  # whole commands or studies

COMMANDS = {
    "inspect": ((), {"roles", "tensors"}),
    "tokens": ((), {"tokens"}),
    "pairs": (("--radius", "0.05"), {"groups", "pairs"}),
    "correlate": (("--ids", "0:20", "--at-least", "0.5"), {"blocks", "correlation"}),
    "spectrum": ((), {"dimensions", "spectrum"}),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_table_json_and_parquet_of_a_command_agree(checkpoint, cli, digest, tmp_path, command):
    folder, (options, names) = checkpoint("llama"), COMMANDS[command]
    before = digest(folder)
    read = cli(command, folder, *options, "--limit", "3")
    assert (read.returncode, read.stderr) == (0, "")
    assert str(folder) in read.stdout.replace("\n", "")
    result = cli(command, folder, *options, "--json", "-o", tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, "")
    printed = json.loads(result.stdout)
    assert printed["model"] == str(folder)
    assert names <= printed.keys()
    written = {path.stem: pl.read_parquet(path) for path in (tmp_path / "out").glob("*.parquet")}
    assert written.keys() == names
    for name, frame in written.items():
        assert len(frame) == len(printed[name])
        assert not frame.is_empty() or command == "pairs"
        assert all(row.keys() == set(frame.columns) for row in printed[name])
    provenance = models.read_json(tmp_path / "out" / "provenance.json")
    assert provenance["model"] == str(folder)
    assert {"dimscope", "torch", "polars"} <= provenance["versions"].keys()
    assert digest(folder) == before


def test_inspect_counts_every_parameter_of_both_tables(checkpoint, cli):
    printed = json.loads(cli("inspect", checkpoint("llama"), "--json").stdout)
    assert (printed["tied"], printed["vocab_size"], printed["hidden_size"]) == (False, 512, 32)
    assert printed["architecture"] == "LlamaForCausalLM"
    assert printed["n_parameters"] == sum(row["n_parameters"] for row in printed["tensors"])
    assert printed["embedding_share"] == pytest.approx(2 * 512 * 32 / printed["n_parameters"])
    assert sum(row["share"] for row in printed["roles"]) == pytest.approx(1)


@pytest.mark.parametrize("side", ["input", "output"])
def test_vectors_in_parquet_are_the_table(checkpoint, cli, tmp_path, side):
    folder = checkpoint("llama")
    result = cli("tokens", folder, "--vectors", "--out", tmp_path, "--side", side)
    assert result.returncode == 0, result.stderr
    frame = pl.read_parquet(tmp_path / "tokens.parquet")
    assert frame.schema["vector"] == pl.Array(pl.Float32, 32)
    table = models.stock_tables(folder)[side]
    np.testing.assert_array_equal(frame["vector"].to_numpy(), table.astype(np.float32))
    np.testing.assert_allclose(frame["norm"].to_numpy(), np.linalg.norm(table, axis=1), rtol=1e-6)
    assert frame["id"].to_list() == list(range(512))
    assert "vector" not in result.stdout


def test_tied_models_have_one_table_on_both_sides(checkpoint, cli):
    norms = [json.loads(cli("tokens", checkpoint("qwen2"), "--side", s, "--json").stdout) for s in ("input", "output")]
    assert norms[0]["tokens"] == norms[1]["tokens"]


def test_pairs_are_all_pairs_within_the_radius(checkpoint, editable, cli):
    folder = editable(checkpoint("qwen2"))
    table = models.stock_tables(folder)["input"]
    damage.set_rows(folder, [40, 41, 500], table[7])
    table[[40, 41, 500]] = table[7]
    printed = json.loads(cli("pairs", folder, "--radius", "0.1", "--json").stdout)
    distances = np.linalg.norm(table[:, None] - table[None], axis=2)
    expected = {(i, j) for i, j in zip(*np.nonzero(distances <= 0.1), strict=True) if i < j}
    assert {(pair["first"], pair["second"]) for pair in printed["pairs"]} == expected
    assert printed["radius"] == 0.1
    assert {7, 40, 41, 500} <= {row["id"] for row in printed["groups"]}
    nothing = json.loads(cli("pairs", folder, "--radius", "0", "--json").stdout)
    assert {(p["first"], p["second"]) for p in nothing["pairs"]} == {
        (7, 40),
        (7, 41),
        (7, 500),
        (40, 41),
        (40, 500),
        (41, 500),
    }
    groups = json.loads(cli("tokens", folder, "--duplicates", "--json").stdout)["tokens"]
    assert [row["id"] for row in groups] == [7, 40, 41, 500]


def test_correlate_is_numpys_correlation(checkpoint, cli):
    folder = checkpoint("gpt_neox")
    printed = json.loads(cli("correlate", folder, "--ids", "100:130", "--json").stdout)
    matrix = np.array([row["r"] for row in printed["correlation"]])
    np.testing.assert_allclose(matrix, np.corrcoef(models.stock_tables(folder)["input"][100:130]), atol=1e-5)
    assert [row["id"] for row in printed["correlation"]] == list(range(100, 130))
    whole = json.loads(cli("correlate", folder, "--ids", "510:", "--json").stdout)
    assert [row["id"] for row in whole["correlation"]] == [510, 511]
    one = json.loads(cli("correlate", folder, "--ids", "5:6", "--json").stdout)
    assert np.allclose(one["correlation"][0]["r"], [1])


def test_spectrum_is_numpys_svd(checkpoint, cli):
    folder = checkpoint("opt")
    printed = json.loads(cli("spectrum", folder, "--json").stdout)["spectrum"]
    table = models.stock_tables(folder)["input"]
    for preprocess, matrix in (("uncentred", table), ("centred", table - table.mean(axis=0))):
        rows = [row for row in printed if row["preprocess"] == preprocess and row["rows"] == "all"]
        values = [row["singular_value"] for row in rows]
        np.testing.assert_allclose(values, np.linalg.svd(matrix, compute_uv=False), rtol=1e-5)


def test_every_side_product_of_a_narrow_table_is_there(checkpoint, cli, tmp_path):
    folder = checkpoint("qwen2", hidden_size=8)  # fewer dimensions than the components that are shown
    for command, options in (("neighbors", ("#5",)), ("tokens", ()), ("spectrum", ()), ("pairs", ())):
        result = cli(command, folder, *options, "--json")
        assert result.returncode == 0, result.stderr[-300:]
    report = cli("report", folder, "-o", tmp_path)
    assert report.returncode == 0, report.stderr[-300:]


def test_a_vocabulary_smaller_than_the_width(checkpoint, cli, tmp_path):
    folder = checkpoint("qwen2", vocab_size=20, tokenizer=None)
    for command, options in (
        ("neighbors", ("#5", "-k", "50")),
        ("tokens", ()),
        ("spectrum", ()),
        ("correlate", ("--ids", ":")),
    ):
        result = cli(command, folder, *options, "--json")
        assert result.returncode == 0, result.stderr[-300:]
    report = cli("report", folder, "-o", tmp_path)
    assert report.returncode == 0, report.stderr[-300:]


def test_a_folder_wins_over_a_hub_id_of_the_same_name(checkpoint, cli, refused, editable, tmp_path):
    editable(checkpoint("qwen2"), "owner/name")
    local = cli("inspect", "owner/name", "--json", cwd=tmp_path)
    assert local.returncode == 0, found.stderr
    assert json.loads(local.stdout)["revision"] is None
    (tmp_path / "elsewhere").mkdir()
    refused(cli("inspect", "owner/name", cwd=tmp_path / "elsewhere"), "owner/name", "hub")


def test_output_survives_an_encoding_that_lacks_the_signs(checkpoint, cli):
    result = cli("tokens", checkpoint("gpt2"), "--limit", "400", env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr[-300:]
    assert "\\u2423" in result.stdout  # the sign of a space


# ---- neighbours ----------------------------------------------------------------------------------------------------


def nearest(result, query: str) -> list[dict]:
    """The rows of one query in what `neighbors --json` printed."""
    assert (result.returncode, result.stderr) == (0, "")
    return [row for row in json.loads(result.stdout)["neighbors"] if row["query"] == query]


def cosines(folder, vector):
    table = models.stock_tables(folder)["input"]
    return table @ vector / np.linalg.norm(table, axis=1) / np.linalg.norm(vector)


def test_neighbours_of_texts_ids_phrases_and_expressions(checkpoint, cli):
    folder = checkpoint("gpt2")
    table = models.stock_tables(folder)["input"]
    tokens = json.loads(cli("tokens", folder, "--json").stdout)["tokens"]
    by_label = {row["label"]: row["id"] for row in tokens}
    the = by_label["␣the"]
    queries = [" the", f"#{the}", "#300 #301", "#300 - #301 + #302", "the - #5"]
    printed = cli("neighbors", folder, *queries, "-k", "5", "--json")
    vectors = {" the": table[the], f"#{the}": table[the], "#300 - #301 + #302": table[300] - table[301] + table[302]}
    vectors["the - #5"] = table[the] - table[5]
    for query, vector in vectors.items():
        own = {the} if "the" in query or query == f"#{the}" else set()
        own |= {int(word[1:]) for word in query.split() if word.startswith("#")}
        order = [i for i in np.argsort(-cosines(folder, vector), kind="stable") if i not in own][:5]
        rows = [row for row in nearest(printed, query) if row["space"].startswith("all 32")]
        assert [row["id"] for row in rows] == order
        np.testing.assert_allclose([row["cosine"] for row in rows], cosines(folder, vector)[order], atol=1e-5)
        assert len([row for row in nearest(printed, query) if "10 components" in row["space"]]) == 5
    assert {row["rank"] for row in nearest(printed, " the")} == {1, 2, 3, 4, 5}


def test_other_metrics_and_the_sum_of_a_phrase(checkpoint, cli):
    folder = checkpoint("gpt2")
    table = models.stock_tables(folder)["input"]
    options = ("--components", "0", "-k", "4", "--json")
    near = nearest(cli("neighbors", folder, "#300 + #301", "--metric", "euclidean", *options), "#300 + #301")
    distances = np.linalg.norm(table - table[300] - table[301], axis=1)
    assert [row["id"] for row in near] == [i for i in np.argsort(distances) if i not in (300, 301)][:4]
    np.testing.assert_allclose([row["distance"] for row in near], distances[[row["id"] for row in near]], rtol=1e-4)
    centred = nearest(cli("neighbors", folder, "#300", "--metric", "centred cosine", *options), "#300")
    moved = table - table.mean(axis=0)
    scores = moved @ moved[300] / np.linalg.norm(moved, axis=1) / np.linalg.norm(moved[300])
    assert [row["id"] for row in centred] == [i for i in np.argsort(-scores) if i != 300][:4]
    phrase = " the ships before breakfast"
    for combine in ("mean", "sum"):
        assert len(nearest(cli("neighbors", folder, phrase, "--combine", combine, *options), phrase)) == 4


def test_queries_name_no_paths_and_hide_no_facts(checkpoint, cli, tmp_path):
    folder = checkpoint("gpt2")
    queries = ["../escaped", "/", " /", "model", "a" * 300, "metric"]
    result = cli("neighbors", folder, *queries, "-k", "2", "--json", "-o", tmp_path / "in" / "out")
    assert result.returncode == 0, result.stderr[-300:]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert os.listdir(tmp_path / "in") == ["out"]
    assert not [path for path in (tmp_path / "in" / "out").iterdir() if path.is_dir()]
    rows = pl.concat(pl.read_parquet(path) for path in (tmp_path / "in" / "out").glob("*.parquet"))
    assert set(rows["query"]) == set(queries)
    printed = json.loads(result.stdout)
    assert (printed["model"], printed["metric"]) == (str(folder), "cosine")
    assert [len(nearest(result, query)) for query in queries] == [4] * len(queries)


# ---- GGUF ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
def test_gguf_as_a_file_and_as_a_folder(checkpoint, cli, tmp_path, quantization):
    source = checkpoint("llama")
    path = damage.write_gguf(tmp_path / "model.gguf", source, quantization)
    printed = json.loads(cli("inspect", path, "--json").stdout)
    stock = json.loads(cli("inspect", source, "--json").stdout)
    assert printed["n_parameters"] == stock["n_parameters"]
    assert printed["embedding_share"] == stock["embedding_share"]
    assert {r["role"]: r["n_parameters"] for r in printed["roles"]} == {
        r["role"]: r["n_parameters"] for r in stock["roles"]
    }
    result = cli("tokens", tmp_path, "--vectors", "-o", tmp_path / "out", "--side", "output")
    assert result.returncode == 0, result.stderr
    vectors = pl.read_parquet(tmp_path / "out" / "tokens.parquet")["vector"].to_numpy()
    tolerance = {"F32": 0, "Q8_0": 2e-3}[quantization]
    np.testing.assert_allclose(vectors, models.stock_tables(source)["output"], atol=tolerance, rtol=0)


def test_gguf_beside_a_config_and_a_tokenizer_as_hub_repositories_hold_it(checkpoint, editable, cli):
    folder = editable(checkpoint("llama"))
    damage.write_gguf(folder / "model-f16.gguf", folder, "F16")
    damage.remove_weights(folder)
    result = cli("tokens", folder, "--json")
    assert result.returncode == 0, result.stderr[-300:]
    assert [t["label"] for t in json.loads(result.stdout)["tokens"]][300] != "#300"


def test_damaged_gguf_and_two_of_them(checkpoint, refuses, tmp_path):
    folder = tmp_path / "gguf"
    folder.mkdir()
    path = damage.write_gguf(folder / "a.gguf", checkpoint("llama"), "Q8_0")
    whole = path.read_bytes()
    for keep in (0, 20, len(whole) // 2):
        path.write_bytes(whole[:keep])
        refuses(folder, folder, "a.gguf", command="inspect")
    path.write_bytes(whole)
    (folder / "b.gguf").write_bytes(whole)
    refuses(folder, folder, "2 GGUF files")
