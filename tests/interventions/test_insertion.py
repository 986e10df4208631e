"""A perturbation in a running model: on the fly as with a changed table, one side or both, and gone without a trace."""

import pytest
import torch
from models import FAMILIES
from transformers import AutoModelForCausalLM

from dimscope.interventions.insertion import perturbed
from dimscope.interventions.perturbations import make_map
from dimscope.interventions.table_summary import TableSummary
from dimscope.vectors.moments import moments

CAUSAL = [name for name, family in FAMILIES.items() if family.output]
MAPS = [
    ("truncate", 12),
    ("truncate-centred", 12),
    ("project-rescaled", 20),
    ("rotate", 0),
    ("noise", 0.5),
    ("quantise", 3),
]
IDS = torch.arange(5, 29).view(2, 12)


@pytest.fixture(scope="module")
def model_of(checkpoint):
    """Return `model_of(family, **arguments)`: a fresh model of a tiny checkpoint, in evaluation mode."""

    def load(family, dtype=torch.float32, **arguments):
        return AutoModelForCausalLM.from_pretrained(checkpoint(family, **arguments), dtype=dtype).eval()

    return load


def map_of(model, name, strength, seed=1):
    rows = model.get_input_embeddings().weight.detach()
    return make_map(name, TableSummary(moments([rows], dtype=torch.float64)), strength, seed)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("side", ["input", "output", "both"])
@pytest.mark.parametrize("family", CAUSAL)
def test_on_the_fly_and_with_a_changed_table_the_model_says_the_same(model_of, family, side):
    """To rounding in float32: the same products in another order, and logits of order 1 to 10."""
    model = model_of(family)
    base = logits(model)
    for name, strength in MAPS:
        change = map_of(model, name, strength)
        with perturbed(model, change, side):
            quick = logits(model)
        with perturbed(model, change, side, materialise=True):
            slow = logits(model)
        if name == "truncate-centred" and side != "input":
            # the shift of an output table adds the same to all logits of a position
            quick, slow = (x - x.mean(dim=-1, keepdim=True) for x in (quick, slow))
        torch.testing.assert_close(quick, slow, atol=2e-4 * float(slow.abs().max()), rtol=1e-3)
        assert not torch.allclose(quick, base, atol=1e-4)
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_changed_input_is_what_a_model_saved_with_that_table_says(model_of, family):
    """An independent way in: an untied copy whose embedding weights are overwritten."""
    model, copy = model_of(family), model_of(family)
    change = map_of(model, "project", 20)
    embedding = copy.get_input_embeddings()
    rows = embedding.weight.detach().double() @ change.matrix
    embedding.weight = torch.nn.Parameter(rows.float())
    with perturbed(model, change):
        found = logits(model)
    expected = logits(copy)
    torch.testing.assert_close(found, expected, atol=2e-4 * float(expected.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("materialise", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma"])
def test_nothing_is_left_after_success_an_exception_or_ctrl_c(model_of, family, materialise):
    model = model_of(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, base, hooked = dict(model.named_parameters()), logits(model), hooks(model)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for error in (None, RuntimeError, KeyboardInterrupt):
        try:
            with perturbed(model, map_of(model, "truncate", 8), "both", materialise=materialise):
                logits(model)
                if error is not None:
                    raise error
        except (RuntimeError, KeyboardInterrupt):
            pass
        assert hooks(model) == hooked
        assert dict(model.named_parameters()).keys() == parameters.keys()
        assert all(value is parameters[name] for name, value in model.named_parameters())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("materialise", [False, True])
def test_a_tied_head_keeps_its_table_when_only_the_input_is_changed(model_of, materialise):
    model = model_of("qwen2")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    hidden = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.get_output_embeddings()(hidden)
        with perturbed(model, map_of(model, "truncate", 4), materialise=materialise):
            assert torch.equal(model.get_output_embeddings()(hidden), before)
            assert not torch.equal(
                model.get_input_embeddings()(IDS),
                torch.nn.functional.embedding(IDS, model.get_output_embeddings().weight),
            )
        with perturbed(model, map_of(model, "truncate", 4), "output", materialise=materialise):
            assert not torch.allclose(model.get_output_embeddings()(hidden), before, atol=1e-4)


@pytest.mark.parametrize("name", ["truncate", "noise"])
def test_bfloat16_differs_by_no_more_than_its_rounding(model_of, name):
    model = model_of("llama", dtype=torch.bfloat16)
    change = map_of(model, name, 12 if name == "truncate" else 0.5)
    with torch.no_grad(), perturbed(model, change):
        quick = model.get_input_embeddings()(IDS)
    with torch.no_grad(), perturbed(model, change, materialise=True):
        slow = model.get_input_embeddings()(IDS)
    assert quick.dtype == torch.bfloat16
    torch.testing.assert_close(quick, slow, rtol=2**-7, atol=1e-4)


def test_perturbations_compose(model_of):
    model = model_of("llama")
    one, two = map_of(model, "scale", 0.5), map_of(model, "truncate", 8)
    with torch.no_grad(), perturbed(model, two):
        expected = model.get_input_embeddings()(IDS) * 0.5
    with torch.no_grad(), perturbed(model, one, materialise=True), perturbed(model, two):
        torch.testing.assert_close(model.get_input_embeddings()(IDS), expected)
