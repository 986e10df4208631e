"""State files of another definition are not resumed: their work is done again."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from dimscope.activations import state as module
from dimscope.activations.collection import is_complete, load_collection
from dimscope.activations.passes import run_pass
from dimscope.activations.reservoir import Reservoir, load_reservoir, save_reservoir
from dimscope.activations.sites import find_sites
from dimscope.activations.state import load_state, save_state
from dimscope.texts.windows import Window


def test_a_state_is_read_back_unless_it_is_of_another_definition_or_has_none(tmp_path, monkeypatch):
    path = tmp_path / "state"
    assert load_state(path) is None
    save_state(path, {"x": torch.arange(3)})
    assert load_state(path)["x"].tolist() == [0, 1, 2]
    save_reservoir(Reservoir(4, 0), tmp_path / "sample")
    monkeypatch.setattr(module, "DEFINITION", "another")
    assert load_state(path) is load_reservoir(tmp_path / "sample") is None
    save_file({"x": torch.arange(3)}, path)  # as files were before they had a definition
    assert load_state(path) is None


def test_a_pass_of_another_definition_is_computed_again(tmp_path, checkpoint, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    ids = torch.arange(3, 15)
    windows = [Window(i, ids + i, ids.cumsum(0), torch.ones_like(ids), 0) for i in range(2)]
    state, batches = tmp_path / "state", []
    sites = find_sites(model)
    model.get_decoder().register_forward_hook(lambda *_: batches.append(1))
    run_pass(model, sites, windows, state=state)
    run_pass(model, sites, windows, state=state)
    assert (len(batches), is_complete(state)) == (2, True)
    monkeypatch.setattr(module, "DEFINITION", "another")
    assert (load_collection(state), is_complete(state)) == (None, False)
    run_pass(model, sites, windows, state=state)
    assert (len(batches), is_complete(state)) == (4, True)
