"""The layers study of a model in memory: its tables are those of the folder, and the model stays as it was."""

import pytest
import torch
from models import TEXT
from polars.testing import assert_frame_equal
from transformers import AutoModelForCausalLM, AutoTokenizer

import dimscope

pytestmark = pytest.mark.slow  # whole studies

OPTIONS = {"windows": 3, "length": 16, "shuffles": 1, "device": "cpu"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_parameter_stays_bit_for_bit_and_no_hook_is_left(checkpoint, tmp_path, monkeypatch, family):
    folder = checkpoint(family, seed=7)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.train()  # of GPT-2 with dropout
    model.get_input_embeddings().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    random_state = torch.get_rng_state()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = dimscope.layers(model, tokenizer, text=TEXT, **OPTIONS)
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert gradients == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not [name for name, module in model.named_modules() for hooks in HOOKS if getattr(module, hooks)]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not list((tmp_path / "here").iterdir())
    on_disk = dimscope.layers(folder, text=TEXT, **OPTIONS)
    for name, frame in result.tables.items():
        columns = [column for column in ("model", "other_model") if column in frame.columns]
        assert_frame_equal(frame.drop(columns), on_disk.tables[name].drop(columns), rel_tol=1e-6, abs_tol=1e-6)
    counts = result.summary().frames["dimensions 1"]["95%"].to_list()
    assert next(trace for trace in result.figure("profile").data if trace.name == "real").y.tolist() == counts
