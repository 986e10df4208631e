"""Every site hands on what transformers itself calls its hidden states, and logits by blocks are the model's own."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
import transformers

from dimscope.activations import output_head as module
from dimscope.activations.first_norm import first_norm
from dimscope.activations.forward import input_device, run_batch, watched
from dimscope.activations.layer_selection import select_sites
from dimscope.activations.sites import Site, find_sites
from dimscope.errors import InvalidArgument, NonFiniteActivations, UnsupportedCheckpoint

LAYERS = 2
NO_NORM = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}  # as OPT-350m

# case: family, arguments of build_checkpoint
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family, spec in models.FAMILIES.items() if spec.output is not None},
    "opt narrow": ("opt", {"word_embed_proj_dim": 16}),
    "opt-350m": ("opt", NO_NORM),
    "opt without final norm": ("opt", {"do_layer_norm_before": False}),
}

BLOCKS = {
    "gpt2": "transformer.h",
    "gpt_neo": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}
NORMS = {
    "gpt2": "transformer.ln_f", "gpt_neo": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm", "phi": "model.final_layernorm",
}  # fmt: skip

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip

# Families whose logits are more than a product, or whose decoder is laid out in another way; with a scale that matters.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "CohereForCausalLM": ("CohereConfig", {"logit_scale": 0.3}),
    "GraniteForCausalLM": ("GraniteConfig", {"logits_scaling": 7.0, "embedding_multiplier": 3.0}),
    "Gemma2ForCausalLM": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 0.2}),
    "BloomForCausalLM": ("BloomConfig", {"n_head": 4, "n_layer": LAYERS}),  # a norm of the embeddings
    "GPTJForCausalLM": ("GPTJConfig", {"n_head": 4, "n_layer": LAYERS, "rotary_dim": 4}),  # a head with a bias
    "MptForCausalLM": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": LAYERS}),
    "FalconForCausalLM": ("FalconConfig", {}),
    "MixtralForCausalLM": ("MixtralConfig", {"num_local_experts": 4}),
}


def family_of(case: str) -> str:
    return CASES[case][0]


def built(model_class: str, config: Any) -> Any:
    """Return a model with random weights, biases of the head too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config).eval()
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            torch.nn.init.normal_(bias)
    return model


@pytest.fixture
def model_of(checkpoint) -> Callable[..., Any]:
    """Return `model_of(case, dtype=torch.float32)`: a model of stock transformers, of the test's own."""
    transformers.utils.logging.disable_progress_bar()

    def load(case: str, dtype: torch.dtype = torch.float32) -> Any:
        if case in OTHERS:
            config_class, extra = OTHERS[case]
            return built(case, getattr(transformers, config_class)(**{**SIZES, **extra})).to(dtype)
        family, arguments = CASES[case]
        folder = checkpoint(family, **arguments)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    return load


def some_ids(b: int = 3, t: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (b, t), generator=torch.Generator().manual_seed(seed))


def catch(model: Any, ids: torch.Tensor, **options: Any) -> dict[int, torch.Tensor]:
    """Return the hidden states of all sites by layer, each handed on once."""
    caught: dict[int, torch.Tensor] = {}

    def consume(site: Site, hidden: torch.Tensor) -> None:
        assert site.layer not in caught
        caught[site.layer] = hidden.clone()

    run_batch(model, ids, sites=find_sites(model), consume=consume, **options)
    return caught


def stock(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return model(ids, output_hidden_states=True, use_cache=False, **options)


# ---- hidden states -------------------------------------------------------------------------------------------------


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


def hooks(model: Any) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, name)) for m in model.modules() for name in names)


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
    with pytest.raises(UnsupportedCheckpoint, match=r"^XLMWithLMHeadModel: its blocks are not one list, so layers"):
        find_sites(model)


def test_token_ids_go_where_the_embeddings_are(model_of):
    assert input_device(model_of("gpt2")) == torch.device("cpu")
    assert input_device(model_of("gpt2").to("meta")) == torch.device("meta")


# ---- the first norm ------------------------------------------------------------------------------------------------

FIRST_NORMS = {
    "gpt2": "transformer.h.0.ln_1", "gpt_neo": "transformer.h.0.ln_1", "gpt_neox": "gpt_neox.layers.0.input_layernorm",
    "opt": "model.decoder.layers.0.self_attn_layer_norm", "opt narrow": "model.decoder.layers.0.self_attn_layer_norm",
    "opt-350m": None, "opt without final norm": None,  # the norm is behind the attention
    "BloomForCausalLM": "transformer.h.0.input_layernorm",  # not that of the embeddings
    "GPTJForCausalLM": "transformer.h.0.ln_1", "MptForCausalLM": "transformer.blocks.0.norm_1",
    "FalconForCausalLM": "transformer.h.0.input_layernorm",
}  # fmt: skip


@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_the_first_norm_is_that_before_the_attention_of_the_first_block(model_of, case):
    model, before = model_of(case), hooks(model_of(case))
    name = FIRST_NORMS.get(case, "model.layers.0.input_layernorm")
    found = first_norm(model)
    assert found is (None if name is None else model.get_submodule(name))
    assert hooks(model) == before
    if found is not None:  # and it reads the stream as it enters the block, bit for bit
        read: list[torch.Tensor] = []
        found.register_forward_pre_hook(lambda module, args: read.append(args[0].clone()))
        assert torch.equal(catch(model, some_ids())[0], read[0])


POST_NORM: dict[str, tuple[str, dict[str, Any]]] = {
    "Olmo2ForCausalLM": ("Olmo2Config", SIZES),  # norms of the queries and keys, and behind the attention
    "Exaone4ForCausalLM": ("Exaone4Config", {**SIZES, "sliding_window": None, "layer_types": ["full_attention"] * LAYERS}),
    "BartForCausalLM": ("BartConfig", {
        "vocab_size": 300, "d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
        "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", POST_NORM)
def test_a_block_that_reads_its_input_as_it_is_has_no_first_norm(case):
    config_class, arguments = POST_NORM[case]
    model = built(case, getattr(transformers, config_class)(**arguments))
    block = find_sites(model)[0].module
    assert any("norm" in type(m).__name__.lower() for m in block.modules())
    assert first_norm(model) is None


def test_the_first_norm_of_a_block_with_several_that_read_its_input_is_that_of_the_attention(model_of):
    """GPT-NeoX and the large Falcons read the stream twice, side by side."""
    model = model_of("gpt_neox")
    assert model.config.use_parallel_residual
    assert first_norm(model) is model.gpt_neox.layers[0].input_layernorm
    config = transformers.FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2)
    falcon = built("FalconForCausalLM", config)
    assert first_norm(falcon) is falcon.transformer.h[0].ln_attn


def test_the_hooks_of_the_first_norm_are_gone_after_an_exception(model_of):
    model = model_of("llama")

    def failing(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    model.model.layers[1].register_forward_pre_hook(failing)
    before = hooks(model)
    with pytest.raises(KeyboardInterrupt):
        first_norm(model)
    assert hooks(model) == before


# ---- choosing ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sites(checkpoint) -> list[Site]:
    """Return the sites of a model of six blocks: layers 0 to 7."""
    folder = checkpoint("llama", layers=6)
    return find_sites(transformers.AutoModelForCausalLM.from_pretrained(folder))


@pytest.fixture
def sites_without_norm(model_of) -> list[Site]:
    return find_sites(model_of("opt-350m"))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, range(8)),
        ("0", [0]),
        ("emb", [0]),
        ("norm", [7]),
        ("7", [7]),
        ("2:5", [2, 3, 4]),
        ("0:8", range(8)),
        ("norm,emb", [0, 7]),
        ("0,4:7,norm", [0, 4, 5, 6, 7]),
        (" 3 , 1 ,emb", [0, 1, 3]),
        ("3,3,2:4", [2, 3]),
        ("4:4,2", [2]),
        ("05", [5]),
    ],
)
def test_a_list_names_sites(sites, layers, expected):
    chosen = select_sites(sites, layers)
    assert chosen == [sites[layer] for layer in expected]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("", r"^`layers` must be a list such as 0,4:8,norm, got '' in it"),
        ("1,,2", r"^`layers` must be a list such as 0,4:8,norm, got '' in it"),
        ("one", r"^`layers` must be a list such as 0,4:8,norm, got 'one' in it"),
        ("-1", r"^`layers` must be a list such as 0,4:8,norm, got '-1' in it"),
        ("1-3", r"^`layers` must be a list such as 0,4:8,norm, got '1-3' in it"),
        ("2:", r"^`layers` must be a list such as 0,4:8,norm, got '2:' in it"),
        ("1:6:2", r"^`layers` must be a list such as 0,4:8,norm, got '1:6:2' in it"),
        ("emb:norm", r"^`layers` must be a list such as 0,4:8,norm, got 'emb:norm' in it"),
        ("1.5", r"^`layers` must be a list such as 0,4:8,norm, got '1\.5' in it"),
        ("8", r"there is no layer 8: this model has 0 \(embeddings\) to 7 \(after final norm\)$"),
        ("0,12,9", r"there is no layer 9: this model has 0 \(embeddings\) to 7 \(after final norm\)$"),
        ("6:10", r"there is no layer 8: this model has 0 \(embeddings\) to 7 \(after final norm\)$"),
        ("4:4", r"^`layers` 4:4 selects no layer; the end of a range is excluded"),
        ("5:2", r"^`layers` 5:2 selects no layer; the end of a range is excluded"),
    ],
)
def test_what_is_no_list_of_layers_gets_one_line(sites, layers, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        select_sites(sites, layers)


def test_a_model_without_a_final_norm_has_no_such_site(sites_without_norm):
    assert select_sites(sites_without_norm, "0:3") == sites_without_norm
    with pytest.raises(
        InvalidArgument, match=r"^there is no layer 3: this model has 0 \(embeddings\) to 2 \(block 2\)$"
    ):
        select_sites(sites_without_norm, "norm")


def test_a_range_far_beyond_the_model_is_refused_without_being_spelled_out(sites):
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument, match="there is no layer 8"):
            select_sites(sites, "0:500000")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# ---- logits --------------------------------------------------------------------------------------------------------


def logits_of(model: Any, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, list[int]]:
    """Return the logits of all positions put together from their blocks, and the sizes of these."""
    blocks: list[tuple[torch.Tensor, torch.Tensor]] = []
    run_batch(model, ids, logits=lambda rows, block: blocks.append((rows, block.clone())), **options)
    rows = torch.cat([rows for rows, _ in blocks])
    assert sorted(rows.tolist()) == list(range(ids.numel()))
    assert all(block.dtype == torch.float32 for _, block in blocks)
    found = torch.empty(ids.numel(), blocks[0][1].shape[1])
    found[rows] = torch.cat([block for _, block in blocks])
    return found.view(*ids.shape, -1), [len(block) for _, block in blocks]


def shares(case: str, dtype: torch.dtype) -> float:
    """Return by how much products over other shapes may differ, as a share of the largest logit: two units of the dtype."""
    return 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6


@pytest.mark.parametrize(
    ("case", "rows", "dtype"),
    [
        *((case, 5, torch.float32) for case in [*CASES, *OTHERS]), ("gpt2", 1, torch.float32), ("llama", None, torch.float32),
        *((case, 5, torch.bfloat16) for case in ("llama", "CohereForCausalLM", "Gemma2ForCausalLM")),
    ],
)  # fmt: skip
def test_logits_by_blocks_are_those_of_the_model(model_of, monkeypatch, case, rows, dtype):
    model, ids = model_of(case, dtype), some_ids()
    expected = stock(model, ids).logits.float()
    if rows is not None:
        monkeypatch.setattr(module, "BLOCK_BYTES", rows * 4 * expected.shape[-1])
    found, sizes = logits_of(model, ids)
    assert sizes == ([33] if rows is None else [rows] * (33 // rows) + [33 % rows] * (33 % rows > 0))
    limit = shares(case, dtype) * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)


@pytest.mark.parametrize("case", ["CohereForCausalLM", "GraniteForCausalLM", "Gemma2ForCausalLM"])
def test_the_scales_and_caps_of_these_cases_matter(model_of, case):
    model, ids = model_of(case), some_ids()
    expected = stock(model, ids)
    with torch.no_grad():
        bare = model.get_output_embeddings()(expected.hidden_states[-1])
    assert float((bare - expected.logits).abs().max()) > 0.1 * float(expected.logits.abs().max())


def test_a_block_of_a_vocabulary_larger_than_the_limit_is_one_row(model_of, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    assert logits_of(model_of("gpt2"), some_ids())[1] == [1] * 33


def test_logits_that_are_not_the_head_applied_to_the_last_hidden_state_are_refused(model_of):
    model, blocks = model_of("CohereForCausalLM"), []
    model.config.logit_scale = 0.9  # the model itself goes on with the scale that it was built with
    message = r"^CohereForCausalLM: its logits are not its output embedding applied .*; pass `logits`=False$"
    with pytest.raises(UnsupportedCheckpoint, match=message):
        run_batch(model, some_ids(), logits=lambda rows, block: blocks.append(rows))
    assert blocks == []
    run_batch(model, some_ids())  # as that says


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [17, 299])
def test_logits_that_are_no_numbers_are_refused(model_of, value, row):
    model = model_of("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[row, 5] = value
    with pytest.raises(NonFiniteActivations, match=r"^NaN or Inf in the logits: .*try `dtype` float32$"):
        run_batch(model, some_ids(), logits=lambda rows, block: None)


@pytest.fixture
def overflowing() -> Iterator[Any]:
    """Return a model in float16 whose last block overflows where the token is 0, and nowhere else."""
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=1, n_head=4, n_positions=64, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = built("GPT2LMHeadModel", config).half()
    with torch.no_grad():
        model.transformer.wte.weight[0, 3] = 60_000
        model.transformer.h[0].mlp.c_proj.bias[3] = 10_000
    return model


def test_what_overflows_at_padding_alone_is_no_error(overflowing):
    ids, mask = some_ids(2, 8), torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
    caught: dict[int, torch.Tensor] = {}
    run_batch(
        overflowing, ids.where(mask, 0), mask=mask, sites=find_sites(overflowing),
        consume=lambda site, hidden: caught.update({site.layer: hidden.clone()}),
    )  # fmt: skip
    assert bool(torch.isfinite(caught[1][mask]).all())
    assert not bool(torch.isfinite(caught[1][~mask]).all())
    seen: dict[int, torch.Tensor] = {}
    run_batch(
        overflowing, ids.where(mask, 0), mask=mask,
        logits=lambda rows, block: seen.update(zip(rows.tolist(), block, strict=True)),
    )  # fmt: skip
    kept = [row for row, real in enumerate(mask.flatten().tolist()) if real]
    assert all(bool(torch.isfinite(seen[row]).all()) for row in kept)


def test_the_model_runs_without_its_cache_and_makes_logits_of_one_position_only(model_of):
    model, calls = model_of("llama"), []
    model.lm_head.register_forward_hook(lambda m, args, out: calls.append(tuple(out.shape)))
    model.model.register_forward_hook(lambda m, args, out: calls.append(out.past_key_values))
    run_batch(model, some_ids())
    assert calls == [None, (3, 1, 512)]
