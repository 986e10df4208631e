"""Every site hands on what transformers itself calls its hidden states."""

from __future__ import annotations

import pytest
import torch
import transformers
from causal_models import (
    BLOCKS,
    CASES,
    LAYERS,
    NORMS,
    OTHERS,
    built,
    catch,
    family_of,
    hooks,
    some_ids,
    stock,
)

from dimscope.activations.forward import run_batch, watched
from dimscope.activations.sites import Site, find_sites
from dimscope.checkpoints.model import input_device
from dimscope.errors import UnsupportedCheckpoint


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in CASES), ("gpt2", torch.bfloat16), ("llama", torch.float16)],
)
def test_hidden_states_are_those_of_transformers_bit_for_bit(model_of, case, dtype):
    model, ids, family = model_of(case, dtype), some_ids(), family_of(case)
    with_norm = CASES[case][1].get("do_layer_norm_before") is not False
    last = f"block {LAYERS}" + (", before final norm" if with_norm else "")
    names = ["embeddings", "block 1", last] + ["after final norm"] * with_norm
    assert [(site.layer, site.name) for site in find_sites(model)] == list(enumerate(names))
    caught, expected = catch(model, ids), stock(model, ids).hidden_states
    assert list(caught) == list(range(len(names)))  # in the order of the stream
    assert len(expected) == LAYERS + 1
    for layer in range(LAYERS):
        assert caught[layer].dtype == dtype
        assert torch.equal(caught[layer], expected[layer])
    with torch.no_grad():
        final = model.get_submodule(NORMS.get(family, "model.norm"))(caught[LAYERS]) if with_norm else caught[LAYERS]
        assert torch.equal(caught[len(names) - 1], final)
        if "word_embed_proj_dim" in CASES[case][1]:
            final = model.model.decoder.project_out(final)
    assert torch.equal(final, expected[-1])
    assert not with_norm or not torch.equal(caught[LAYERS], caught[LAYERS + 1])


@pytest.mark.parametrize("case", CASES)
def test_the_sites_are_the_modules_of_the_model(model_of, case):
    model, family = model_of(case), family_of(case)
    blocks = list(model.get_submodule(BLOCKS.get(family, "model.layers")))
    sites = find_sites(model)
    assert [s.module for s in sites[: LAYERS + 1]] == [blocks[0], *blocks]
    assert [s.takes_input for s in sites] == [True] + [False] * (len(sites) - 1)
    if len(sites) > LAYERS + 1:
        assert sites[-1].module is model.get_submodule(NORMS.get(family, "model.norm"))


@pytest.mark.parametrize("case", OTHERS)
def test_other_families_too(model_of, case):
    model, ids = model_of(case), some_ids()
    sites = find_sites(model)
    assert [s.name for s in sites] == ["embeddings", "block 1", "block 2, before final norm", "after final norm"]
    caught, expected = catch(model, ids), stock(model, ids).hidden_states
    for layer, other in ((0, 0), (1, 1), (3, 2)):
        assert torch.equal(caught[layer], expected[other])
    with torch.no_grad():
        assert torch.equal(sites[-1].module(caught[2]), caught[3])


@pytest.mark.parametrize("case", [*CASES, *(c for c in OTHERS if c != "MptForCausalLM")])
def test_right_padding_changes_nothing_before_it(model_of, case):
    model, ids = model_of(case), some_ids(3, 12)
    lengths = torch.tensor([12, 5, 9])
    mask = torch.arange(12) < lengths[:, None]
    with torch.no_grad():  # whatever stands in the padding, it is large
        model.get_input_embeddings().weight[0] = 1e4
    logits = torch.full((36, model.get_output_embeddings().weight.shape[0]), torch.nan)
    caught = catch(model, ids.where(mask, 0), mask=mask, logits=lambda rows, block: logits.index_copy_(0, rows, block))
    logits = logits.view(3, 12, -1)
    for w, length in enumerate(lengths.tolist()):
        alone = ids[w : w + 1, :length]
        for layer, hidden in catch(model, alone).items():
            # The kernels sum over other shapes: some units in the last place of the largest number.
            torch.testing.assert_close(caught[layer][w, :length], hidden[0], rtol=1e-4, atol=2e-5)
        found, expected = (
            logits[w, :length, 1:],
            stock(model, alone).logits[0, :, 1:],
        )  # that of token 0 is large as well
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_norm_of_the_embeddings_is_not_taken_for_the_final_one():
    """BART's decoder has the one and not the other; BLOOM has both."""
    sizes = {
        "encoder_layers": LAYERS,  # what its config calls num_hidden_layers
        "decoder_layers": LAYERS,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
    }
    model, ids = built("BartForCausalLM", transformers.BartConfig(vocab_size=300, d_model=32, **sizes)), some_ids()
    assert [s.name for s in find_sites(model)] == ["embeddings", "block 1", "block 2"]
    caught, expected = catch(model, ids), stock(model, ids).hidden_states
    assert all(torch.equal(caught[layer], expected[layer]) for layer in range(3))


def test_nothing_is_tracked_for_gradients(model_of):
    model, caught = model_of("llama"), []
    with watched(find_sites(model), lambda site, hidden: caught.append(hidden)):
        out = model(input_ids=some_ids())
    assert out.logits.requires_grad
    assert len(caught) == LAYERS + 2
    assert not any(hidden.requires_grad for hidden in caught)


def test_only_the_chosen_sites_are_handed_on(model_of):
    model, seen = model_of("gpt2"), []
    sites = find_sites(model)
    run_batch(
        model, some_ids(), sites=[sites[3], sites[1]], consume=lambda site, hidden: seen.append((site, hidden.shape))
    )
    assert seen == [(sites[1], (3, 11, 32)), (sites[3], (3, 11, 32))]


@pytest.mark.parametrize("layer", [None, 0, 1, 3])
def test_the_hooks_are_gone_afterwards_after_an_exception_too(model_of, layer):
    model, before = model_of("qwen3"), hooks(model_of("qwen3"))

    def consume(site: Site, hidden: torch.Tensor) -> None:
        assert hooks(model) > before
        if site.layer == layer:
            raise KeyboardInterrupt

    def run() -> None:
        run_batch(model, some_ids(), sites=find_sites(model), consume=consume)

    if layer is None:
        run()
    else:
        with pytest.raises(KeyboardInterrupt):
            run()
    assert hooks(model) == before


def test_a_model_whose_blocks_are_no_list_is_refused():
    config = transformers.XLMConfig(vocab_size=60, emb_dim=16, n_layers=2, n_heads=2, causal=True)
    model = built("XLMWithLMHeadModel", config)
    with pytest.raises(UnsupportedCheckpoint, match=r"^XLMModel: its blocks are no modules but parts that take turns"):
        find_sites(model)


def test_token_ids_go_where_the_embeddings_are(model_of):
    assert input_device(model_of("gpt2")) == torch.device("cpu")
    assert input_device(model_of("gpt2").to("meta")) == torch.device("meta")
