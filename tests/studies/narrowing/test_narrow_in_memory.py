"""A model that is narrowed in memory: nothing on disk, the dense model unchanged, an ordinary transformers model as the result."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch

from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.checkpoints.loaded import checkpoint_of, weight_bytes
from dimscope.errors import InvalidArgument
from dimscope.studies.damage.settings import DamageSettings
from dimscope.studies.damage.study import DAMAGE
from dimscope.studies.narrowing.facts import ShownCandidate, narrowing_facts
from dimscope.studies.narrowing.run import NarrowResult, narrow_in_memory, narrow_to_folder
from dimscope.studies.narrowing.settings import NarrowSettings
from dimscope.studies.narrowing.study import NARROWING
from dimscope.studies.study import Monitor, run_study
from dimscope.texts.texts import text_from_string

pytestmark = pytest.mark.slow  # whole commands or studies

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT: Any = text_from_string(models.TEXT)  # a text takes the place of a source
READ: dict[str, Any] = {"texts": (TEXT,), "windows": 2, "length": 16}
IDS = torch.arange(4, 20)[None]


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer is not None
    return model, tokenizer


def weights_digest(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for data in weight_bytes(model):
        digest.update(data)
    return digest.hexdigest()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen2", False), ("llama", None), ("gpt_neox", None)])
def test_at_full_width_the_narrow_model_predicts_what_the_dense_one_predicts(checkpoint, family, tied):
    model, tokenizer = load(checkpoint(family))
    # A tie holds at any gain only up to rounding; gains of a new model are all alike, so that it is exact.
    settings = NarrowSettings(widths=(32,), tied=tied, **READ)
    result = narrow_in_memory(checkpoint_of(model, tokenizer), settings)
    torch.testing.assert_close(logits(result.model), logits(model), atol=1e-4, rtol=1e-3)
    shared = result.model.get_output_embeddings().weight is result.model.get_input_embeddings().weight
    assert shared is bool(tied)


@pytest.mark.parametrize("heal_steps", [0, 2])
def test_a_model_in_memory_stays_as_it_is_and_nothing_is_written(checkpoint, tmp_path, monkeypatch, heal_steps):
    model, tokenizer = load(checkpoint("qwen2", dtype="bfloat16"))
    model.train()
    monkeypatch.chdir(tmp_path)
    before, config = weights_digest(model), model.config.to_dict()
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    settings = NarrowSettings(widths=(16,), bases=("learned",), learn_steps=2, heal_steps=heal_steps, **READ)
    result = narrow_in_memory(checkpoint_of(model, tokenizer), settings)
    assert weights_digest(model) == before
    assert model.config.to_dict() == config
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == gradients
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert list(tmp_path.iterdir()) == []
    assert (result.model.dtype, result.model.config.hidden_size) == (torch.bfloat16, 16)
    assert result.account.narrow_parameters == sum(p.numel() for p in result.model.parameters())
    assert result.training is not None
    assert (
        result.training["stage"].unique(maintain_order=True).to_list()
        == ["basis", "norms", "weights"][: 3 if heal_steps else 1]
    )


def test_stock_transformers_loads_what_it_saves(checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(checkpoint("qwen2"))
    assert model.generation_config is not None
    model.generation_config.max_new_tokens = 7
    settings = NarrowSettings(widths=(16,), evaluate=False, **READ)
    small = narrow_in_memory(checkpoint_of(model, tokenizer), settings).model
    small.save_pretrained(tmp_path / "small")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(small))
    assert loaded.generation_config.max_new_tokens == 7


def assert_shown_in_a_notebook(result: NarrowResult) -> None:
    """Check the table of `_repr_html_`: the account first, then every measured number."""
    table = re.findall(r"<th>([^<]+)</th><td>([^<]+)</td><td>([^<]+)</td>", result._repr_html_())
    account, measured = result.account, result.measured
    assert measured is not None
    assert table[0] == ("parameters", f"{account.dense_parameters:,}", f"{account.narrow_parameters:,}")
    assert table[1] == ("bytes of weights", f"{account.dense_bytes:,}", f"{account.narrow_bytes:,}")
    assert [name for name, *_ in table[2:]] == measured["metric"].to_list()[2:]
    assert "16 of 32 dimensions" in result._repr_html_()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_memory_and_in_a_folder_it_is_the_same_model(checkpoint: Callable[..., Path], tmp_path, dtype):
    opened = open_checkpoint(checkpoint("qwen2", dtype=dtype))
    settings = NarrowSettings(widths=(16,), heal_steps=2, **READ)
    result = narrow_in_memory(opened, settings)
    written = narrow_to_folder(opened, tmp_path / "small", settings)
    loaded, _ = load(tmp_path / "small")
    assert loaded.dtype == result.model.dtype
    assert weights_digest(loaded) == weights_digest(result.model)
    assert result.account == written.account
    judged = {name: frame.filter(~frame["metric"].str.contains("second")) for name, frame in
              (("memory", result.measured), ("folder", written.tables["measured"]))}  # fmt: skip
    assert judged["memory"].equals(judged["folder"])
    assert len(repr(result).splitlines()) < 30
    assert_shown_in_a_notebook(result)


def test_a_model_in_memory_is_written_with_its_tokenizer(checkpoint, tmp_path):
    model, tokenizer = load(checkpoint("llama"))
    settings = NarrowSettings(widths=(16,), bases=("random",), evaluate=False)
    narrow_to_folder(checkpoint_of(model, tokenizer), tmp_path / "small", settings)
    loaded, own = load(tmp_path / "small")
    assert loaded.config.hidden_size == 16
    assert own("The keeper")["input_ids"] == tokenizer("The keeper")["input_ids"]


def test_several_widths_are_for_a_plan(checkpoint):
    with pytest.raises(InvalidArgument, match="`widths`"):
        narrow_in_memory(open_checkpoint(checkpoint("llama")), NarrowSettings(widths=(16, 24)))


def test_windows_that_a_short_text_shrinks_are_a_warning_of_the_result_the_report_and_the_page(checkpoint, tmp_path):
    short: Any = text_from_string(models.TEXT[:150], "short.txt")
    opened, line = (
        open_checkpoint(checkpoint("llama")),
        r"short.txt has \d+ tokens: windows are \d+ tokens long, not 64",
    )
    lines: list[str] = []
    cut = NarrowSettings(texts=(short,), widths=(16,), bases=("random",), windows=1)
    result = narrow_in_memory(opened, cut, Monitor(lines.append))
    [warning] = result.facts.warnings
    assert re.fullmatch(line, warning)
    assert lines[0] == warning
    assert warning in repr(result)
    assert warning in result._repr_html_()
    for study, settings in ((NARROWING, cut), (DAMAGE, DamageSettings(changes=("rotate",), texts=(short,)))):
        report = run_study(study, opened, settings)
        [warning] = report.facts.warnings
        assert re.fullmatch(line, warning)
        assert warning in report.page(tmp_path / study.name).read_text()


def test_a_plan_of_a_model_in_memory_writes_nothing_and_leaves_it_as_it_is(checkpoint, tmp_path, monkeypatch):
    model, tokenizer = load(checkpoint("qwen2", max_position_embeddings=128))
    monkeypatch.chdir(tmp_path)
    before = weights_digest(model)
    settings = NarrowSettings(widths=(16,), bases=("raw",), heal_steps=2, prompts=("The",), **READ)
    result = run_study(NARROWING, checkpoint_of(model, tokenizer), settings)
    assert result.tables["plan"]["method"].to_list() == ["dense", "narrow", "drop layers", "quantise", "narrow, healed"]
    assert result.tables["narrow_texts"].height == 1
    assert set(result.figures()) == {"narrowing-size", "narrowing-speed"}
    assert narrowing_facts(result.facts).shown == ShownCandidate("raw", 16)
    assert weights_digest(model) == before
    assert list(tmp_path.iterdir()) == []
