"""Models of other kinds than plain causal ones, through the command line: their layers, and what they lose by damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import models
import polars as pl
import pytest
import stock
import torch
import torch.nn.functional as F
import transformers

pytestmark = pytest.mark.slow  # whole commands or studies

NORM = "after final norm"

# type: its kind in the sweep, the last site, and what standard error says
KINDS = {
    "lfm2": ("causal", NORM, ""),  # its final norm is called embedding_norm
    "gemma4_text": ("causal", NORM, ""),  # a norm of per-layer embeddings lies beside the final one
    "gemma3n_text": ("causal", NORM, ""),  # four copies of the stream
    "qwen2_5_vl": ("multimodal", NORM, ""),
    "llava": ("multimodal", NORM, ""),
    "modernbert": ("encoder", NORM, "without predictions"),
    "roberta": ("encoder", "block 2", "without predictions"),
    "t5": ("encoder-decoder", NORM, "layers are those of the encoder"),
}


@pytest.fixture(scope="module")
def folder_of(checkpoint, tmp_path_factory):
    """Return `folder_of(type)`: a tiny model of that type with a tokenizer of 512 tokens."""

    def build(model_type: str) -> Path:
        kind = KINDS[model_type][0]
        case = next(c for c in stock.find_cases() if (c.kind, c.model_type) == (kind, model_type))
        model, folder = stock.build(case), tmp_path_factory.mktemp(model_type) / model_type
        model.resize_token_embeddings(512)
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (file := checkpoint("llama") / name).exists():
                shutil.copyfile(file, folder / name)
        return folder

    return build


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "keeper.txt"
    path.write_text(models.TEXT)
    return path


@pytest.mark.parametrize("model_type", KINDS)
def test_the_layers_of_every_kind_are_studied(folder_of, cli, text, tmp_path, model_type):
    options = ("--windows", "2", "--length", "24", "--shuffles", "0", "--no-random-weights")
    result = cli("layers", folder_of(model_type), "--text", text, *options, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    _, last, said = KINDS[model_type]
    assert said in result.stderr
    sites = (
        pl.read_parquet(tmp_path / "out" / "tables" / "layers.parquet")
        .sort("layer")["site"]
        .unique(maintain_order=True)
    )
    assert sites[0] == "embeddings"
    assert sites[-1] == last
    assert "block 1" in sites.to_list()


def test_damage_of_a_multimodal_model_is_measured_on_its_text_decoder(folder_of, cli, text, tmp_path):
    folder = folder_of("qwen2_5_vl")
    options = ("--windows", "1", "--length", "24", "--from-start", "--change", "truncate:50%")
    result = cli("damage", folder, "--text", text, *options, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    windows = pl.read_parquet(tmp_path / "out" / "tables" / "windows.parquet").filter(kind="undamaged")
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(folder)(models.TEXT)["input_ids"][:24]])
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    expected = float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    assert windows["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_what_predicts_nothing_is_refused_where_predictions_are_needed(folder_of, refuses):
    for model_type in ("t5", "roberta"):
        refuses(folder_of(model_type), "does not predict the next token", command="damage")
    refuses(folder_of("qwen2_5_vl"), "images or sounds", command="narrow", options=("--width", "16"))
