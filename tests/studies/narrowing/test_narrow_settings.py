"""What narrowing refuses: settings out of range, and settings that do not fit the model, its texts or the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest

from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.errors import InvalidArgument
from dimscope.studies.narrowing import run
from dimscope.studies.narrowing.run import narrow_in_memory, narrow_to_folder
from dimscope.studies.narrowing.settings import NarrowSettings
from dimscope.studies.narrowing.study import NARROWING
from dimscope.studies.study import run_study
from dimscope.texts.texts import text_from_string

TEXT: Any = text_from_string(models.TEXT)  # a text takes the place of a source
CUT: dict[str, Any] = {"widths": (16,), "bases": ("random",), "evaluate": False}


def settings(**values: Any) -> NarrowSettings:
    return NarrowSettings(**{"texts": (TEXT,), "length": 16, "windows": 2, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bases": ("widest",)}, "`bases` must be normalised, .*, got 'widest'"),
        ({"windows": 0}, "`windows` must be 1 or more, got 0"), ({"length": 1}, "`length` must be 2 or more"),
        ({"seed": -1}, "`seed` must be"), ({"texts": ()}, "`texts` takes"), ({"dtype": "int8"}, "`dtype` must be auto, float32"),
        ({"heal_steps": -1}, "`heal_steps` must be 0 or more, got -1"),
        ({"learn_steps": 0}, "`learn_steps` must be 1 or more, got 0"),
        ({"lora": 4}, "`lora` needs `heal_steps`"), ({"lora": 4, "heal_steps": 0}, "`lora` needs `heal_steps`"),
        ({"lora": 0, "heal_steps": 5}, "`lora` must be 1 or more"),
    ],
)  # fmt: skip
def test_settings_out_of_range_raise_at_once(values, message):
    with pytest.raises(InvalidArgument, match=message):
        NarrowSettings(**values)


@pytest.mark.parametrize(
    ("family", "arguments", "values", "message"),
    [
        ("llama", {}, {"widths": (16, 24)}, "one of `widths`"),
        ("llama", {}, {"widths": (16,), "bases": ("raw", "random")}, "one of `bases`"),
        ("llama", {}, {"widths": (33,)}, "from 1 to 32.* got 33"),
        ("llama", {}, {"widths": (16,), "length": 65}, "`length` must be at most 64"),
        ("llama", {}, {"widths": (16,), "texts": ("no-such.txt",)}, "no-such.txt"),
        ("llama", {}, {"widths": (16,), "texts": (text_from_string("A", "short.txt"),)}, "short.txt.* at least"),
        ("phi", {}, {"widths": (16,), "export_as": "llama"}, "`export_as` llama.*phi"),
        ("phi", {"tied": True}, {"widths": (16,), "tied": True}, "`tied`.*mean"),
    ],
)
def test_what_does_not_fit_the_model_or_the_text(checkpoint, family, arguments, values, message):
    with pytest.raises(InvalidArgument, match=message):
        narrow_in_memory(open_checkpoint(checkpoint(family, **arguments)), settings(**values))


@pytest.mark.parametrize(
    ("arguments", "values", "message"),
    [
        ({}, {"widths": (16, 30)}, "28 or 32"),
        ({}, {"prompts": ("Hello " * 80,)}, "'Hello.* 64"),
        ({}, {"tied": True}, "`tied`.*two tables"),
        ({}, {"texts": (text_from_string("A", "short.txt"),)}, "short.txt.* at least"),
        ({"num_attention_heads": 32, "head_dim": 4}, {}, "no width below its 32"),
    ],
)
def test_what_cannot_be_planned(checkpoint, arguments, values, message):
    with pytest.raises(InvalidArgument, match=message):
        run_study(NARROWING, open_checkpoint(checkpoint("llama", **arguments)), settings(**values))


def test_an_untied_phi_is_what_a_tied_one_becomes(checkpoint):
    result = narrow_in_memory(open_checkpoint(checkpoint("phi", tied=True)), settings(**CUT))
    assert not result.facts.tied
    assert result.model.get_output_embeddings().weight is not result.model.get_input_embeddings().weight


# ---- the folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "message"), [("", "not empty"), ("notes.txt", "is a file"), ("notes.txt/n", "is a file")]
)
@pytest.mark.parametrize("bases", [("random",), ("learned",)])
def test_a_folder_that_holds_something_is_refused(checkpoint, digest, tmp_path, out, message, bases):
    (tmp_path / "notes.txt").write_text("mine")
    before = digest(tmp_path)
    with pytest.raises(InvalidArgument, match=message):
        narrow_to_folder(open_checkpoint(checkpoint("llama")), tmp_path / out, settings(**{**CUT, "bases": bases}))
    assert digest(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_write_leaves_no_folder_and_the_next_one_clears_what_a_kill_left(
    checkpoint, tmp_path, monkeypatch
):
    dense, out, write = open_checkpoint(checkpoint("llama")), tmp_path / "small", run.write_narrowing

    def interrupt(narrowing: Any, folder: Path, weights: Any) -> None:
        write(narrowing, folder, weights)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "write_narrowing", interrupt)
    with pytest.raises(KeyboardInterrupt):
        narrow_to_folder(dense, out, settings(**CUT))
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / ".small.partial").mkdir()
    (tmp_path / ".small.partial" / "half.safetensors").write_bytes(b"half")
    out.mkdir()  # an empty folder is filled
    narrow_to_folder(dense, out, settings(**CUT))
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert not (out / "half.safetensors").exists()
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {p.name for p in out.iterdir()}


def test_without_a_tokenizer_a_basis_of_the_table_is_cut_and_the_seed_decides_it(checkpoint, tmp_path):
    dense = open_checkpoint(checkpoint("llama", tokenizer=None))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        narrow_to_folder(dense, tmp_path / name, settings(**CUT, seed=seed))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert "KL |" not in (tmp_path / "a" / "README.md").read_text()
