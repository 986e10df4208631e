"""`dimscope pool`: one vector for each sentence, and the study of these vectors."""

from __future__ import annotations

import json

import models
import numpy as np
import polars as pl
import pytest
import torch
import transformers

pytestmark = pytest.mark.slow  # whole commands or studies


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "keeper.txt"
    path.write_text(models.TEXT)
    return path


def test_sentences_become_vectors_and_these_are_studied(checkpoint, cli, text, tmp_path):
    out = tmp_path / "pooled"
    printed = cli("pool", checkpoint("bert"), "--text", text, "--pooling", "cls", "--out", out, "--json")
    assert printed.returncode == 0, printed.stderr
    facts, frame = json.loads(printed.stdout), pl.read_parquet(out / "vectors.parquet")
    assert (facts["pooling"], facts["rows"]) == ("cls", len(frame))
    labels = frame["label"].to_list()
    assert labels[0] == "The lighthouse keeper counted the ships before breakfast."
    assert all(label[-1] in '.?"' for label in labels)
    model = transformers.AutoModel.from_pretrained(checkpoint("bert")).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint("bert"))
    with torch.no_grad():
        expected = model(torch.tensor([tokenizer(labels[3])["input_ids"]])).last_hidden_state[0, 0]
    np.testing.assert_allclose(frame["vector"][3].to_numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)
    study = cli("embedding", out / "vectors.parquet", "-o", tmp_path / "study")
    assert study.returncode == 0, study.stderr
    tokens = pl.read_parquet(tmp_path / "study" / "tables" / "tokens.parquet")
    assert tokens["label"].to_list() == labels


def test_lines_are_units_too_and_their_number_is_bounded(checkpoint, cli, tmp_path):
    path, out = tmp_path / "lines.txt", tmp_path / "out"
    path.write_text("".join(f"line {i}\n\n" for i in range(100)))
    arguments = ("--text", path, "--unit", "line", "--count", "10", "--out", out)
    assert cli("pool", checkpoint("gpt2"), *arguments).returncode == 0
    assert pl.read_parquet(out / "vectors.parquet")["label"].to_list() == [f"line {i}" for i in range(0, 100, 10)]


@pytest.mark.parametrize(
    ("options", "word"),
    [(("--count", "1"), "--count"), (("--text", "nowhere.txt"), "nowhere.txt"), (("--pooling", "max"), "--pooling")],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(checkpoint, refuses, text, options, word):
    options = options if "--text" in options else ("--text", text, *options)
    refuses(checkpoint("bert"), word, command="pool", options=options)


def test_without_a_folder_there_is_nowhere_to_write(checkpoint, cli, refused, text):
    refused(cli("pool", checkpoint("bert"), "--text", text), "--out")
