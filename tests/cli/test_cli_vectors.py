"""N x d vectors instead of a model: the commands about tables and the report, and what each refuses."""

import json

import numpy as np
import polars as pl
import pytest


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 2)) @ rng.normal(size=(2, 16)) + 0.01 * rng.normal(size=(300, 16))
    path = tmp_path_factory.mktemp("vectors") / "vectors.parquet"
    pl.DataFrame({"vector": rows.tolist(), "label": [f"word{i}" for i in range(300)]}).write_parquet(path)
    return path


def test_the_report_of_a_file_of_vectors(cli, vectors, tmp_path):
    result = cli("report", vectors, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert (report["vectors"], report["n_rows"], report["dim"]) == ("vectors.parquet", 300, 16)
    assert "left out (parameter budget" in report["studies"]["embedding"]["warnings"][0]
    assert "word7" in pl.read_parquet(tmp_path / "out" / "tables" / "tokens.parquet")["label"]
    assert (tmp_path / "out" / "index.html").exists()


def test_the_embedding_command_answers_in_a_sentence(cli, vectors):
    result = cli("embedding", vectors, "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["vectors"] == "vectors.parquet"
    assert answer["answer"].startswith("The participation ratio of all 300 rows of the vectors, centred, is 1.")
    assert "model" not in answer


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("neighbors", "word5", "-k", "1"), "Nearest to 'word5': 'word"),
        (("pairs", "--radius", "1e-9"), "No pair of rows within 1e-09; the closest are"),
        (("correlate", "--ids", "0:40", "--at-least", "0.999999"), "No two of 40 rows have a correlation of 0.999999"),
        (("spectrum",), "of 16 dimensions after centring, far fewer than the"),
        (("tokens",), "300 rows: 300 vectors."),
    ],
)
def test_commands_about_tables_take_vectors(cli, vectors, arguments, words):
    command, *options = arguments
    result = cli(command, vectors, *options, env={"COLUMNS": "200"})
    assert result.returncode == 0, result.stderr
    assert words in result.stdout.splitlines()[0]


@pytest.mark.parametrize("command", ["layers", "damage"])
def test_studies_that_run_a_model_refuse_vectors(cli, refused, vectors, tmp_path, command):
    refused(cli(command, vectors, "-o", tmp_path / "out"), command, "runs a model", "vectors.parquet holds vectors")
    assert not (tmp_path / "out").exists()


def test_a_report_with_such_a_study_writes_nothing(cli, refused, vectors, tmp_path):
    refused(cli("report", vectors, "--studies", "embedding", "layers", "-o", tmp_path / "out"), "layers runs a model")
    assert not (tmp_path / "out").exists()


def test_vectors_have_one_side_and_their_own_labels(cli, refused, vectors):
    refused(cli("embedding", vectors, "--side", "output"), "--side", "vectors.parquet is one table")
    refused(cli("neighbors", vectors, "word999"), "no row of vectors.parquet has the label 'word999'")
    refused(cli("embedding", vectors.with_name("missing.npy")), "missing.npy", "no such file")
