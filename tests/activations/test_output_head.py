"""Logits of final hidden states: those of the model, whatever the family does to them, and those of the table as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from dimscope.activations.forward import final_states
from dimscope.activations.output_head import OutputHead, output_head
from dimscope.errors import UnsupportedCheckpoint

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.arange(10, 22).view(2, 6)


def built(name: str, **extra: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **extra))


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("Llama", {}), ("Cohere", {"logit_scale": 0.3}), ("Granite", {"logits_scaling": 7.0}),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 0.2}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_scaled_and_capped_families_have_their_own_logits(name, extra):
    model = built(name, **extra)
    head, states = output_head(model), final_states(model, IDS)
    expected = model.eval()(IDS).logits.detach()
    torch.testing.assert_close(head.logits(states), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(head.transform(states @ head.weight.T), expected, rtol=1e-5, atol=1e-6)
    plain = torch.allclose(states @ head.weight.T, expected, atol=1e-3 * float(expected.abs().max()))
    assert plain == (name == "Llama")  # the transforms of the others matter


@torch.no_grad()
def test_a_frozen_head_keeps_the_table_and_the_bias_that_it_had():
    model = built("Phi")
    torch.nn.init.normal_(model.lm_head.bias)
    states, head = final_states(model, IDS), output_head(model)
    frozen, before = head.frozen(), head.logits(states)
    model.lm_head.register_forward_hook(lambda module, args, out: out + 1)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(50, 16))
    assert torch.equal(frozen.logits(states), before)
    assert frozen.weight.data_ptr() != head.weight.data_ptr()  # the live head follows
    torch.testing.assert_close(head.logits(states), (model.lm_head.bias + 1).expand_as(before))


def test_a_frozen_head_holds_no_copy():
    model = built("Llama")
    assert output_head(model).frozen().weight is model.lm_head.weight


def test_a_table_that_is_not_in_memory_cannot_be_frozen():
    with pytest.raises(UnsupportedCheckpoint, match=r"^the output table is offloaded from memory"):
        OutputHead(built("Llama").to("meta").lm_head).frozen()


def test_a_model_without_an_output_table_is_refused():
    with pytest.raises(UnsupportedCheckpoint, match=r"^LlamaModel has no output table$"):
        output_head(built("Llama").model)
