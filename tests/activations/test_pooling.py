"""Pooled vectors are those of stock transformers run on each text alone, whatever the batch."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from dimscope.activations.pooling import pool_texts
from dimscope.checkpoints.pooling_config import PoolingConfig, read_pooling
from dimscope.checkpoints.sources import LocalFolder
from dimscope.errors import CorruptCheckpoint, UnsupportedCheckpoint

TEXTS = [
    "the sea",
    "a road has one direction; a field has two",
    "ice",
    "she laughed at them both and put the kettle on",
] * 10


@torch.no_grad()
def alone(model: Any, tokenizer: Any, text: str, pooling: str) -> torch.Tensor:
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    stack = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    states = stack.eval()(input_ids=ids).last_hidden_state[0]
    return {"mean": states.mean(dim=0), "cls": states[0], "last": states[-1]}[pooling]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_vectors_are_those_of_each_text_alone(checkpoint, family, pooling):
    folder = checkpoint(family)
    model = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = pool_texts(model.train(), tokenizer, TEXTS, PoolingConfig(pooling))
    expected = torch.stack([alone(model, tokenizer, text, pooling) for text in TEXTS])
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)
    unit = pool_texts(model, tokenizer, TEXTS, PoolingConfig(pooling, normalise=True))
    torch.testing.assert_close(unit, expected / expected.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_texts_are_cut_at_the_limit_of_the_model(checkpoint):
    folder = checkpoint("bert")
    model, tokenizer = (c.from_pretrained(folder) for c in (transformers.AutoModel, transformers.AutoTokenizer))
    cut = tokenizer(TEXTS[1], truncation=True, max_length=6)["input_ids"]
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([cut])).last_hidden_state[0].mean(dim=0)
    row = pool_texts(model, tokenizer, [TEXTS[1]], PoolingConfig("mean", max_length=6))[0]
    torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def modules(folder, *names: str) -> None:
    parts = [
        {"type": f"sentence_transformers.models.{n}", "path": f"{i}_{n}" if i else ""} for i, n in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(parts))


def test_the_files_of_sentence_transformers_are_read(tmp_path):
    source = LocalFolder(tmp_path, "mine")
    assert read_pooling(source) == PoolingConfig()
    modules(tmp_path, "Transformer", "Pooling", "Normalize")
    (tmp_path / "1_Pooling").mkdir()
    config = tmp_path / "1_Pooling" / "config.json"
    config.write_text(
        '{"word_embedding_dimension": 8, "pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 128}')
    assert read_pooling(source) == PoolingConfig("cls", normalise=True, max_length=128)
    config.write_text('{"embedding_dimension": 8, "pooling_mode": "lasttoken"}')
    assert read_pooling(source).pooling == "last"
    for content in (
        '{"pooling_mode_max_tokens": true}',
        '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}',
    ):
        config.write_text(content)
        with pytest.raises(UnsupportedCheckpoint, match=r"^mine: it pools by .*; pooling is one of mean, cls, last$"):
            read_pooling(source)
    config.write_text("{")
    with pytest.raises(CorruptCheckpoint, match=r"1_Pooling/config.json is not valid JSON"):
        read_pooling(source)
    modules(tmp_path, "Transformer", "Pooling", "Dense")
    with pytest.raises(UnsupportedCheckpoint, match="a Dense module"):
        read_pooling(source)
