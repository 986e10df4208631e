"""Every family: the tables that stock transformers holds, found in the files as saved today and as the hub holds them."""

from __future__ import annotations

from pathlib import Path

import models
import numpy as np
import polars as pl
import pytest
import torch
import transformers

from dimscope.checkpoints.budget import embedding_share, parameter_budget
from dimscope.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dimscope.vectors.embedding import open_table

ROLES = {
    "token-type embedding",
    "input embedding", "output embedding", "position embedding", "attention", "mlp", "norm", "other", "buffer", "tied copy", "not loaded",
}  # fmt: skip

# name: family, arguments of build_checkpoint, layout of the hub's files (None: as save_pretrained writes them)
CASES: dict[str, tuple[str, dict, str | None]] = {
    **{family: (family, {}, None) for family in models.FAMILIES},
    "opt narrow": ("opt", {"word_embed_proj_dim": 16}, None),
    "llama sharded": ("llama", {"sharded": True}, None),
    "qwen2 sharded": ("qwen2", {"sharded": True, "dtype": "bfloat16"}, None),
    "qwen2 untied": ("qwen2", {"tied": False}, None),
    "gpt_neox tied": ("gpt_neox", {"tied": True}, None),
    "gpt2 half precision": ("gpt2", {"dtype": "float16"}, None),
    "gpt2 on the hub": ("gpt2", {}, "gpt2"),
    "gpt_neo on the hub": ("gpt_neo", {}, "gpt_neo"),
    "gpt_neox on the hub": ("gpt_neox", {}, "gpt_neox"),
    "opt-350m on the hub": ("opt", {"word_embed_proj_dim": 16}, "opt"),
    "opt-125m on the hub": ("opt", {}, "opt-125m"),
    "llama on the hub": ("llama", {}, "llama"),
    "bert on the hub": ("bert", {"tied": True}, "bert"),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Return `folder_of(case)`: the checkpoint of a case, each written once."""
    root, written = tmp_path_factory.mktemp("families"), {}
    transformers.utils.logging.disable_progress_bar()

    def write(case: str) -> Path:
        if case not in written:
            family, arguments, layout = CASES[case]
            folder = models.build_checkpoint(root / str(len(written)), family, **arguments)
            written[case] = models.as_on_hub(folder, layout) if layout else folder
        return written[case]

    return write


def stock_model(folder: Path) -> torch.nn.Module:
    """The model of stock transformers, of the class that the config names."""
    name = models.read_json(folder / "config.json")["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder)


def rows_of(checkpoint: Checkpoint, side: str) -> np.ndarray:
    return open_table(checkpoint, side).load()[1].double().numpy()


@pytest.mark.parametrize("case", CASES)
def test_tables_are_those_of_stock_transformers(folder_of, case):
    folder = folder_of(case)
    checkpoint, model = open_checkpoint(folder), stock_model(folder)
    table = model.get_input_embeddings().weight.detach().double().numpy()
    np.testing.assert_array_equal(rows_of(checkpoint, "input"), table)
    assert checkpoint.input_table.shape == table.shape
    head = model.get_output_embeddings()
    if head is None:
        assert checkpoint.output_table is None
        return
    np.testing.assert_array_equal(rows_of(checkpoint, "output"), head.weight.detach().double().numpy())
    tied = head.weight is model.get_input_embeddings().weight
    assert checkpoint.tied == tied
    assert (checkpoint.output_table is None) == tied


@pytest.mark.parametrize("case", CASES)
def test_the_budget_counts_what_stock_transformers_counts(folder_of, case):
    folder = folder_of(case)
    checkpoint, model = open_checkpoint(folder), stock_model(folder)
    budget = parameter_budget(checkpoint)
    assert budget["n_parameters"].sum() == sum(p.numel() for p in model.parameters())
    assert budget["name"].to_list() == list(checkpoint.tensors)
    assert set(budget["role"]) <= ROLES
    tables = {
        id(e.weight): e.weight.numel() for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e
    }
    share = sum(tables.values()) / sum(p.numel() for p in model.parameters())
    assert embedding_share(budget) == pytest.approx(share)
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0 < on_disk - budget["n_bytes"].sum() < 40_000  # the rest are the headers


@pytest.mark.parametrize("case", CASES)
def test_roles_and_blocks(folder_of, case):
    checkpoint = open_checkpoint(folder_of(case))
    budget = parameter_budget(checkpoint)
    counts = dict(budget.group_by("role").len().iter_rows())
    assert counts["input embedding"] == 1
    assert counts.get("output embedding", 0) == (checkpoint.output_table is not None)
    inside = budget.filter(budget["block"].is_not_null())
    assert set(inside["block"]) == {0, 1}
    assert {"attention", "mlp"} <= set(inside["role"])
    assert not {"other", "input embedding", "position embedding"} & set(inside["role"])
    for role in ("attention", "mlp"):  # both blocks have the same parts
        per_block = inside.filter(inside["role"] == role).group_by("block").agg(pl.sum("n_parameters"))["n_parameters"]
        assert per_block[0] == per_block[1] > 0
    learned = CASES[case][0] in ("gpt2", "gpt_neo", "opt", "bert")
    assert ("position embedding" in counts) == learned
    assert ("norm" in counts) == (CASES[case][0] != "olmo")  # OLMo's norms have no parameters


BUFFERS = {
    "gpt2 on the hub": {"h.0.attn.bias", "h.0.attn.masked_bias", "h.1.attn.bias", "h.1.attn.masked_bias"},
    "gpt_neo on the hub": {f"transformer.h.{b}.attn.attention.{n}" for b in (0, 1) for n in ("bias", "masked_bias")},
    "gpt_neox on the hub": {
        f"gpt_neox.layers.{b}.attention.{n}" for b in (0, 1) for n in ("bias", "masked_bias", "rotary_emb.inv_freq")
    },
    "llama on the hub": {f"model.layers.{b}.self_attn.rotary_emb.inv_freq" for b in (0, 1)},
    "bert on the hub": {"bert.embeddings.position_ids"},
}


@pytest.mark.parametrize("case", BUFFERS)
def test_buffers_are_no_parameters(folder_of, case):
    budget = parameter_budget(open_checkpoint(folder_of(case)))
    buffers = budget.filter(budget["role"] == "buffer")
    assert set(buffers["name"]) >= BUFFERS[case]
    assert buffers["n_parameters"].sum() == 0
    assert (buffers["n_bytes"] > 0).all()


def test_what_the_model_does_not_load_is_shown_and_not_counted(folder_of):
    budget = parameter_budget(open_checkpoint(folder_of("bert on the hub")))
    unloaded = budget.filter(pl.col("name").str.contains("pooler|seq_relationship"))
    assert len(unloaded) == 4
    assert unloaded["n_parameters"].sum() == 0
    assert unloaded["n_bytes"].sum() == 4 * 1122


def test_a_tied_head_that_the_file_repeats_is_counted_once(folder_of):
    budget = parameter_budget(open_checkpoint(folder_of("opt-125m on the hub")))
    head = budget.row(by_predicate=pl.col("name") == "lm_head.weight", named=True)
    assert (head["role"], head["n_parameters"]) == ("tied copy", 0)


@pytest.mark.parametrize("case", ["gpt2 on the hub", "llama sharded", "qwen2 sharded", "gpt2 half precision"])
def test_row_slices_are_read_lazily_and_equal_the_table(folder_of, case, monkeypatch):
    from dimscope.checkpoints import sources

    folder = folder_of(case)
    checkpoint = open_checkpoint(folder)
    info = checkpoint.input_table
    table = stock_model(folder).get_input_embeddings().weight.detach()
    read, original = [], sources.read_range
    monkeypatch.setattr(sources, "read_range", lambda path, a, b: read.append(b - a) or original(path, a, b))
    width = info.n_bytes // info.shape[0]
    for start, stop in ((0, 1), (3, 9), (500, 512), (0, 512), (7, 7)):
        read.clear()
        rows = checkpoint.reader.read_rows(info.name, start, stop)
        assert rows.dtype == table.dtype
        assert torch.equal(rows, table[start:stop])
        assert read == [(stop - start) * width]
    ids = torch.tensor([511, 0, 17, 17, 300])
    assert torch.equal(open_table(checkpoint).rows(ids), table[ids].float())


def test_opening_reads_headers_only(tmp_path):
    """A checkpoint of 1 TB of holes opens at once, and so does its budget."""
    folder = models.write_table_checkpoint(tmp_path, 1000, 64, layers=64, intermediate_size=40_000_000, holes=True)
    assert (folder / "model.safetensors").stat().st_size > 9e11
    budget = parameter_budget(open_checkpoint(folder))
    assert budget["n_parameters"].sum() > 4e11


def test_the_share_of_qwen_2_5_0_5b(tmp_path):
    config = transformers.Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in transformers.Qwen2ForCausalLM(config).named_parameters()}
    models.write_safetensors(
        tmp_path / "model.safetensors", {n: models.Stream(s, torch.bfloat16, None) for n, s in shapes.items()}
    )
    budget = parameter_budget(open_checkpoint(tmp_path))
    assert budget["n_parameters"].sum() == 494_032_768
    assert embedding_share(budget) == 136_134_656 / 494_032_768
    assert str(embedding_share(budget)).startswith("0.275557948")
