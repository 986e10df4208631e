"""The model and the texts that ship inside the package."""

import json
import math
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dimscope

HOME = Path(str(files("dimscope.builtin")))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(HOME / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(HOME / "model")


@torch.no_grad()
def loss(model, tokenizer, text: str) -> float:
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : model.config.max_position_embeddings]
    return float(model(ids, labels=ids).loss)


def test_stock_transformers_loads_it_within_the_promised_size(model, tokenizer):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(p.numel() for p in model.parameters()) <= 8_000_000
    assert (HOME / "model/model.safetensors").stat().st_size <= 16_000_000
    assert len(tokenizer) >= 4096
    assert model.config.vocab_size > len(tokenizer)  # the table is padded, as large models' are
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_every_text_survives_the_tokenizer(tokenizer):
    for name in ("prose.txt", "page.html"):
        text = (HOME / "texts" / name).read_text(encoding="utf-8")
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text


def test_it_has_learned_prose_and_html(model, tokenizer):
    """Real text is far more likely than the same words shuffled, and than any token being equally likely."""
    for name in ("prose.txt", "page.html"):
        text = (HOME / "texts" / name).read_text(encoding="utf-8")[:1500]
        words = text.split(" ")
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
        shuffled = " ".join(words[i] for i in order)
        real = loss(model, tokenizer, text)
        assert real < 0.6 * math.log(model.config.vocab_size)
        assert real < loss(model, tokenizer, shuffled) - 0.5


def test_the_texts_name_no_path_of_the_machine_that_rendered_them():
    page = (HOME / "texts/page.html").read_text(encoding="utf-8")
    assert "file:Lib/textwrap.py" in page
    assert "/lib/python3" not in page


def test_the_corpus_did_not_hold_the_held_out_texts():
    results = json.loads(Path("training/results.json").read_text())
    assert max(results["data"]["held_out"].values()) < 0.01


def test_alice_reads_as_the_model_card_says(model, tokenizer, shared_data):
    """The held-out bits per byte of the card, on the part of the text that a test can afford."""
    card = json.loads(Path("training/results.json").read_text())["evaluation"]
    stated = next(v["bits_per_byte"] for k, v in card.items() if k.startswith("Alice"))
    text = (shared_data / "text/alice.txt").read_bytes().decode("utf-8-sig")
    part = text[20_000:24_000]
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(part, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        pieces = [ids[:, i : i + 511] for i in range(0, ids.shape[1] - 1, 511)]
        nll = sum(float(model(p, labels=p).loss) * (p.shape[1] - 1) for p in pieces)
    bits = nll / math.log(2) / len(part.encode())
    assert bits == pytest.approx(stated, abs=0.25)  # one chapter differs from the whole


def test_untrained_rows_are_found_in_it():
    """Rows beyond the tokenizer and impossible bytes were never a target or an input: the study must say so."""
    from dimscope.studies.embedding.row_tables import tokens_table
    from dimscope.studies.embedding.source import open_source

    tokens = tokens_table(open_source(dimscope.open("builtin")))
    beyond = tokens.filter(category="beyond")
    assert len(beyond) > 0
    assert beyond["untrained"].mean() > 0.9
    assert tokens.filter(category="ordinary")["untrained"].mean() < 0.1
