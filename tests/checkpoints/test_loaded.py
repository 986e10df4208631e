"""A model in memory as a checkpoint: the same tables as on disk, and nothing of the model changed by any call."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel

from dimscope.activations.first_norm import first_norm
from dimscope.activations.passes import run_pass
from dimscope.activations.sites import find_sites
from dimscope.checkpoints.budget import parameter_budget
from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.checkpoints.loaded import as_checkpoint, checkpoint_of
from dimscope.checkpoints.model import Placement, load_model, place, randomly_initialised, require_causal
from dimscope.checkpoints.vocabulary import read_vocabulary, require_tokenizer
from dimscope.errors import InvalidArgument, TokenizerMissing, UnsupportedCheckpoint
from dimscope.evaluation.evaluate import baseline, evaluate
from dimscope.evaluation.generation import Decoding, generate
from dimscope.evaluation.prompts import prepare_prompt
from dimscope.evaluation.throughput import throughput
from dimscope.interventions.insertion import perturbed
from dimscope.interventions.maps import LinearMap
from dimscope.studies.provenance import fingerprint
from dimscope.texts.texts import Text
from dimscope.texts.windows import middle_windows


def load(folder: Any) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # untied, tied
def test_it_has_the_tables_the_budget_and_the_vocabulary_of_the_files(checkpoint, family):
    folder = checkpoint(family)
    model, tokenizer = load(folder)
    opened, loaded = open_checkpoint(folder), checkpoint_of(model, tokenizer)
    assert loaded.tied == opened.tied
    for table, own in ((opened.input_table, loaded.input_table), (opened.output_table, loaded.output_table)):
        if table is None:
            assert own is None
        else:
            rows = loaded.reader.read_rows(own.name, 3, 9)
            assert torch.equal(rows, opened.reader.read_rows(table.name, 3, 9))
            rows.zero_()  # a copy
            assert loaded.reader.read_rows(own.name, 3, 9).any()
    assert parameter_budget(loaded)["n_parameters"].sum() == parameter_budget(opened)["n_parameters"].sum()
    n_rows = loaded.input_table.shape[0]
    assert read_vocabulary(loaded.source, n_rows).tokens == read_vocabulary(opened.source, n_rows).tokens
    assert repr(loaded) == repr(opened).replace(repr(opened.name), repr(loaded.name))


def test_it_is_loaded_as_the_very_same_object_and_never_moved(checkpoint):
    model, tokenizer = load(checkpoint("llama"))
    loaded = checkpoint_of(model.to(torch.bfloat16), tokenizer, name="mine")
    assert loaded.name == "mine"
    assert place(loaded) == place(loaded, dtype="bfloat16", device="cpu") == Placement("bfloat16", "cpu")
    assert load_model(loaded, place(loaded)) is load_model(loaded) is model
    assert require_tokenizer(loaded.source) is tokenizer
    with pytest.raises(InvalidArgument, match=r"^`dtype` float32: the model in memory is bfloat16"):
        place(loaded, dtype="float32")
    with pytest.raises(InvalidArgument, match=r"^`dtype` float32: "):
        load_model(loaded, Placement("float32", "cpu"))
    with pytest.raises(InvalidArgument, match=r"^`device` cuda: the model in memory is on cpu"):
        place(loaded, device="cuda")
    with pytest.raises(UnsupportedCheckpoint, match=r"its weights are torch\.float64"):
        place(checkpoint_of(model.double()))


def test_a_randomly_initialised_model_of_its_class_leaves_its_config_alone(checkpoint):
    folder = checkpoint("llama")
    loaded, opened = checkpoint_of(load(folder)[0]), open_checkpoint(folder)
    before = copy.deepcopy(loaded.config.to_dict())
    one, other = (randomly_initialised(c, Placement("float32", "cpu"), seed=3) for c in (loaded, opened))
    assert type(one) is type(load_model(loaded))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert loaded.config.to_dict() == before


def test_without_a_tokenizer_rows_are_numbered_and_texts_refused(checkpoint):
    loaded = checkpoint_of(load(checkpoint("llama"))[0])
    assert read_vocabulary(loaded.source, 3).tokens[2].label == "#2"
    with pytest.raises(TokenizerMissing, match=r"came without a tokenizer \(pass the tokenizer\), and texts"):
        require_tokenizer(loaded.source)


def test_the_fingerprint_follows_weights_config_and_vocabulary(checkpoint):
    model, tokenizer = load(checkpoint("gpt2"))
    loaded = checkpoint_of(model, tokenizer)
    first = fingerprint(loaded)
    assert fingerprint(checkpoint_of(load(checkpoint("gpt2"))[0], tokenizer)) == first
    assert fingerprint(checkpoint_of(model)) != first
    with torch.no_grad():
        model.transformer.h[0].ln_1.bias[0] += 1
    second = fingerprint(loaded)
    model.config.layer_norm_epsilon *= 2
    assert len({str(first), str(second), str(fingerprint(loaded))}) == 3


def test_what_is_no_checkpoint_is_refused_in_one_line(checkpoint):
    config = open_checkpoint(checkpoint("gpt2")).config
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedCheckpoint, match=r"transformer\.wte\.weight is not in memory"):
        checkpoint_of(meta)
    model, tokenizer = load(checkpoint("gpt2"))
    for source in (3, None, [1], torch.nn.Linear(2, 2)):
        with pytest.raises(InvalidArgument, match=f"not {type(source).__name__}$"):
            as_checkpoint(source)
    with pytest.raises(InvalidArgument, match=r"^`tokenizer` goes with a loaded"):
        as_checkpoint("builtin", tokenizer)
    with pytest.raises(InvalidArgument, match=r"^`revision` is for opening"):
        as_checkpoint(model, revision="main")
    with pytest.raises(UnsupportedCheckpoint, match="does not predict the next token"):
        require_causal(checkpoint_of(BertModel.from_pretrained(checkpoint("bert"))))


def test_a_checkpoint_comes_from_whatever_the_user_has(checkpoint):
    folder = checkpoint("llama")
    model, tokenizer = load(folder)
    opened = as_checkpoint(str(folder))
    assert as_checkpoint(opened) is opened
    assert as_checkpoint(folder, allow_pickle=False).name == opened.name
    assert as_checkpoint(model, tokenizer).source.model is model


def state_of(model: Any) -> dict[str, Any]:
    """Everything of a model that a call could change."""
    return {
        "tensors": {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "parameters": [id(p) for p in model.parameters()],
        "gradients": [(p.requires_grad, p.grad) for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "config": copy.deepcopy(model.config.to_dict()),
        "generation": (id(model.generation_config), copy.deepcopy(model.generation_config.to_dict())),
    }


def test_what_is_made_of_a_model_prints_short(checkpoint):
    model, tokenizer = load(checkpoint("llama"))
    loaded = checkpoint_of(model, tokenizer)
    windows = middle_windows(Text("page", lambda: iter([models.TEXT]), {}, None), tokenizer, length=16, count=2)
    collection = run_pass(model, find_sites(model), windows)
    shown = [
        loaded, loaded.skeleton, loaded.reader, loaded.source, read_vocabulary(loaded.source, 512), windows[0],
        collection, collection.reservoir.sample(), baseline(model, windows), find_sites(model),
        open_checkpoint(checkpoint("llama")).reader,
    ]  # fmt: skip
    assert all(len(repr(value)) < 1500 and repr(value).count("\n") < 10 for value in shown)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nothing_of_a_loaded_model_is_changed_bit_for_bit(checkpoint, family):
    model, tokenizer = load(checkpoint(family))
    model.train()
    model.get_decoder().eval()
    next(model.get_decoder().children()).train()  # a mixture that must come back
    before = state_of(model)
    loaded = checkpoint_of(model, tokenizer)
    running = load_model(loaded, place(loaded))
    windows = middle_windows(Text("page", lambda: iter([models.TEXT]), {}, None), tokenizer, length=16, count=2)
    run_pass(running, find_sites(running), windows)
    first_norm(running)
    base = baseline(running, windows)
    dim = loaded.input_table.shape[1]
    for materialise in (False, True):
        with perturbed(running, LinearMap(torch.eye(dim)), "both", materialise=materialise):
            assert evaluate(running, base).kl.value < 1e-5
    generate(running, tokenizer, [prepare_prompt(tokenizer, "the")], Decoding("sample", 4))
    throughput({"model": running}, read=4, written=2)
    fingerprint(loaded)
    after = state_of(model)
    tensors = before.pop("tensors")
    assert all(torch.equal(t, tensors[name]) for name, t in after.pop("tensors").items())
    assert after == before
