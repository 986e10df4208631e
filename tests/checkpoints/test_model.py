"""Checkpoints as models that run: the weights that stock transformers loads, or random ones of the same making."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import damage
import models
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer
from transformers.integrations import accelerate as placing

from dimscope.activations.collection import Collection
from dimscope.activations.forward import run_batch
from dimscope.activations.passes import PassSettings, run_pass
from dimscope.activations.sites import find_sites
from dimscope.checkpoints import model as module
from dimscope.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dimscope.checkpoints.model import (
    DTYPES,
    Placement,
    input_device,
    is_out_of_memory,
    load_model,
    out_of_memory,
    pick_device,
    place,
    randomly_initialised,
    require_causal,
)
from dimscope.errors import CorruptCheckpoint, InvalidArgument, MissingExtra, UnsupportedCheckpoint
from dimscope.texts.texts import Text
from dimscope.texts.windows import Window, middle_windows

CPU = Placement("float32", "cpu")
CAUSAL = [family for family, spec in models.FAMILIES.items() if spec.output is not None]
PAGE = Text("page", lambda: iter([models.TEXT]), {}, None)


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def opened(checkpoint) -> Callable[..., Checkpoint]:
    """Return `opened(family, **arguments)`: an opened checkpoint."""
    return lambda family, **arguments: open_checkpoint(checkpoint(family, **arguments))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype and torch.equal(t, other[n]) for n, t in one.items()
    )


# ---- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, "float32") for family in CAUSAL), ("llama", "bfloat16"), ("gpt2", "float16")]
)
def test_a_loaded_model_is_that_of_stock_transformers(opened, checkpoint, digest, family, dtype):
    folder = checkpoint(family)
    before = digest(folder)
    model = load_model(opened(family), Placement(dtype, "cpu"))
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    assert type(model) is type(stock)
    assert same_weights(weights(model), weights(stock))
    assert {p.dtype for p in model.parameters()} == {DTYPES[dtype]}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert not any(m.training for m in model.modules())
    assert digest(folder) == before


@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_any_stored_dtype_is_loaded_as_any_other(opened, stored, dtype):
    checkpoint = opened("qwen2", dtype=stored)
    model = load_model(checkpoint, Placement(dtype, "cpu"))
    rows = checkpoint.reader.read_rows(checkpoint.input_table.name, 0, 512)
    assert torch.equal(model.get_input_embeddings().weight, rows.to(DTYPES[dtype]))


@pytest.mark.parametrize("layout", ["gpt2", "gpt_neo", "gpt_neox", "opt", "opt-125m", "llama"])
def test_the_layouts_of_the_hub_load_too(checkpoint, editable, layout):
    family = layout.removesuffix("-125m")
    folder = models.as_on_hub(editable(checkpoint(family)), layout)
    model = load_model(open_checkpoint(folder), CPU)
    assert same_weights(weights(model), weights(load_model(open_checkpoint(checkpoint(family)), CPU)))


def test_shards_and_pickle_load_too(checkpoint, editable, opened):
    whole = weights(load_model(opened("llama"), CPU))
    assert same_weights(weights(load_model(opened("llama", sharded=True), CPU)), whole)
    folder = editable(checkpoint("llama"))
    damage.to_pickle(folder)
    assert same_weights(weights(load_model(open_checkpoint(folder, allow_pickle=True), CPU)), whole)


def test_the_model_of_the_package_loads():
    model = load_model(open_checkpoint("builtin"), CPU)
    assert [s.layer for s in find_sites(model)] == list(range(model.config.num_hidden_layers + 2))


def test_loading_leaves_the_generators_and_the_config_alone(opened):
    checkpoint = opened("gpt2")
    config, states = checkpoint.config.to_dict(), generators()
    load_model(checkpoint, Placement("bfloat16", "cpu"))
    assert same_generators(generators(), states)
    assert checkpoint.config.to_dict() == config


# ---- dtype and device ----------------------------------------------------------------------------------------------


def test_auto_is_float32_on_a_cpu_where_that_fits(opened, monkeypatch):
    for stored in ("float32", "bfloat16", "float16"):
        assert place(opened("qwen2", dtype=stored), device="cpu") == CPU
    monkeypatch.setattr(module, "LARGEST_SHARE", 0)  # as if it did not
    for stored in ("float32", "bfloat16", "float16"):
        assert place(opened("qwen2", dtype=stored), device="cpu") == Placement(stored, "cpu")
    assert place(opened("qwen2", dtype="float64"), device="cpu") == CPU


def test_auto_is_as_stored_on_other_devices(opened):
    for stored in ("float32", "bfloat16", "float16"):
        assert place(opened("qwen2", dtype=stored), device="map") == Placement(stored, "map")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_that_was_asked_for_is_taken(opened, dtype):
    for device in ("cpu", "map"):
        assert place(opened("gpt2"), dtype=dtype, device=device) == Placement(dtype, device)


def test_the_device_that_is_there():
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device("auto") == expected
    assert (pick_device("cpu"), pick_device("map")) == ("cpu", "map")


@pytest.mark.parametrize("dtype", ["", "fp16", "float64", "torch.float32"])
def test_an_unknown_dtype_is_one_line(opened, dtype):
    with pytest.raises(
        InvalidArgument, match=f"^`dtype` must be one of auto, float32, bfloat16, float16, got '{dtype}'$"
    ):
        place(opened("gpt2"), dtype=dtype)


@pytest.mark.parametrize("device", ["", "gpu", "cuda:99", "CPU", "meta"])
def test_a_device_that_is_not_there_is_one_line(opened, device):
    message = f"^`device` {device}: there is no such device here; take cpu, cuda, mps or map$"
    with pytest.raises(InvalidArgument, match=message):
        place(opened("gpt2"), device=device)


def test_map_needs_accelerate(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtra, match=r"^this needs the package accelerate: pip install 'dimscope\[map\]'$"):
        place(opened("gpt2"), device="map")


# ---- refusals ------------------------------------------------------------------------------------------------------

VERBS = {"load": load_model, "twin": randomly_initialised}


@pytest.mark.parametrize("verb", VERBS)
def test_gguf_is_read_and_not_run(checkpoint, tmp_path, verb):
    path = damage.write_gguf(tmp_path / "model.gguf", checkpoint("llama"))
    with pytest.raises(UnsupportedCheckpoint, match=r"GGUF weights are read, not run; use the original checkpoint$"):
        VERBS[verb](open_checkpoint(path), CPU)


def test_an_encoder_is_loaded_and_is_no_causal_language_model(opened, checkpoint):
    encoder = opened("bert")
    model = load_model(encoder, CPU)
    stock = transformers.AutoModel.from_pretrained(checkpoint("bert"))
    assert same_weights(weights(model), weights(stock))
    with pytest.raises(
        UnsupportedCheckpoint, match=r"bert-\w+: BertModel does not predict the next token, which this needs$"
    ):
        require_causal(encoder)


def test_an_encoder_with_a_decoder_is_none_either(tmp_path):
    config = transformers.T5Config(vocab_size=60, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedCheckpoint, match="T5ForConditionalGeneration does not predict the next token"):
        require_causal(open_checkpoint(tmp_path))


MISSING = {
    "gpt2": "transformer.h.1.mlp.c_fc.weight",
    "llama": "model.layers.1.mlp.up_proj.weight",
    "opt": "model.decoder.final_layer_norm.weight",
}


@pytest.mark.parametrize("family", MISSING)
def test_a_missing_weight_is_named_and_not_made_up(checkpoint, editable, family):
    folder, name = editable(checkpoint(family)), MISSING[family]
    damage.edit_tensors(folder / "model.safetensors", lambda held: {n: t for n, t in held.items() if n != name})
    with pytest.raises(CorruptCheckpoint, match=f"{folder.name}: the weights hold no {name}$"):
        load_model(open_checkpoint(folder), CPU)


def test_a_weight_of_another_shape_is_refused(checkpoint, editable):
    folder = editable(checkpoint("llama"))
    damage.edit_tensors(
        folder / "model.safetensors", lambda held: held | {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 32)}
    )
    with pytest.raises(CorruptCheckpoint, match=f"^{folder}: the weights cannot be loaded "):
        load_model(open_checkpoint(folder), CPU)


def test_weights_in_a_file_of_another_name_are_loaded(checkpoint, editable, opened):
    """Stock transformers finds model.safetensors only; every command reads the same file."""
    folder = editable(checkpoint("llama"))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert same_weights(weights(load_model(open_checkpoint(folder), CPU)), weights(load_model(opened("llama"), CPU)))


@pytest.mark.parametrize("verb", VERBS)
def test_weights_that_do_not_fit_into_memory_are_refused_before_they_are_read(opened, monkeypatch, verb):
    checkpoint = opened("qwen2")
    numbers = sum(info.n_elements for info in checkpoint.tensors.values())
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        monkeypatch.setattr(module, "available_memory", lambda size=size: size * numbers - 1)
        message = (
            rf"^{checkpoint.name}: its weights take [\d.]+ kB in {dtype}, and [\d.]+ kB of memory are free; "
            "take `dtype` bfloat16, or `device` map to spread the model$"
        )
        with pytest.raises(InvalidArgument, match=message):
            VERBS[verb](checkpoint, Placement(dtype, "cpu"))
        monkeypatch.setattr(module, "available_memory", lambda size=size: size * numbers)
        VERBS[verb](checkpoint, Placement(dtype, "cpu"))


def test_a_model_that_is_spread_may_be_larger_than_memory(opened, monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: 1)
    assert not load_model(opened("qwen2"), Placement("float32", "map")).training


def test_memory_that_runs_out_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    for error in (MemoryError(), torch.OutOfMemoryError("x"), raised.value, RuntimeError("MPS backend out of memory")):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert str(out_of_memory("2 x 24 tokens at once")).startswith(
        "2 x 24 tokens at once: out of memory; take a smaller"
    )


# ---- random twins --------------------------------------------------------------------------------------------------


def generators() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(legacy=True), random.getstate()


def same_generators(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    same = torch.equal(one[0], other[0]) and one[2] == other[2]
    return same and all(np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, "float32") for family in CAUSAL), ("llama", "bfloat16"), ("gpt2", "float16")]
)
def test_a_twin_is_the_same_model_with_other_weights(opened, family, dtype):
    checkpoint, placement = opened(family), Placement(dtype, "cpu")
    model, twin = load_model(checkpoint, placement), randomly_initialised(checkpoint, placement, seed=7)
    assert type(twin) is type(model)
    one, other = ({k: v for k, v in m.config.to_dict().items() if k != "dtype"} for m in (model, twin))
    assert {k: v for k, v in one.items() if not k.startswith("_")} == {
        k: v for k, v in other.items() if not k.startswith("_")
    }
    ours, theirs = weights(twin), weights(model)
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert {p.dtype for p in twin.parameters()} == {DTYPES[dtype]}
    assert not any(m.training for m in twin.modules())
    table, other_table = (m.get_input_embeddings().weight.detach().float() for m in (twin, model))
    assert abs(float(torch.corrcoef(torch.stack([table.flatten(), other_table.flatten()]))[0, 1])) < 0.05
    tied = twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    assert tied == checkpoint.tied


def test_a_twin_has_the_scale_that_training_starts_from(opened):
    twin = randomly_initialised(opened("gpt2"), CPU)
    assert float(twin.transformer.wte.weight.detach().std()) == pytest.approx(twin.config.initializer_range, rel=0.05)
    assert torch.equal(twin.transformer.ln_f.weight, torch.ones(32))


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_a_twin_is_the_same_for_the_same_seed(opened, dtype):
    placement = Placement(dtype, "cpu")
    first = weights(randomly_initialised(opened("llama"), placement, seed=3))
    torch.rand(7)
    assert same_weights(weights(randomly_initialised(opened("llama"), placement, seed=3)), first)
    other = weights(randomly_initialised(opened("llama"), placement, seed=4))
    assert not torch.equal(other["model.embed_tokens.weight"], first["model.embed_tokens.weight"])


def test_a_twin_leaves_the_generators_alone(opened):
    states = generators()
    randomly_initialised(opened("llama"), CPU, seed=5)
    assert same_generators(generators(), states)


def test_a_twin_leaves_the_generators_of_other_devices_alone(opened, monkeypatch):
    """`torch.manual_seed` seeds all of them, and `fork_rng(devices=[])` puts back that of the CPU only."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    randomly_initialised(opened("llama"), CPU, seed=5)
    assert seeded == []


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_a_twin_leaves_the_checkpoint_and_the_default_dtype_alone(opened, dtype):
    checkpoint = opened("llama", dtype="float16")
    before, files = copy.deepcopy(checkpoint.config.to_dict()), dict(checkpoint.tensors)
    randomly_initialised(checkpoint, Placement(dtype, "cpu"))
    assert checkpoint.config.to_dict() == before
    assert dict(checkpoint.tensors) == files
    assert torch.get_default_dtype() == torch.float32


def test_a_twin_is_of_its_own(opened):
    checkpoint = opened("llama")
    one, other = randomly_initialised(checkpoint, CPU), randomly_initialised(checkpoint, CPU)
    with torch.no_grad():
        one.model.norm.weight.fill_(5)
    one.config.rms_norm_eps = 1.0
    assert torch.equal(other.model.norm.weight, torch.ones(32))
    assert other.config.rms_norm_eps == checkpoint.config.rms_norm_eps != 1.0


def test_a_twin_runs(opened, checkpoint):
    for dtype in DTYPES:
        twin = randomly_initialised(opened("gpt2"), Placement(dtype, "cpu"))
        found = passed(twin, windows_of(checkpoint("gpt2")))
        assert found.complete


# ---- spread over devices -------------------------------------------------------------------------------------------


def windows_of(folder: Path) -> list[Window]:
    return middle_windows(PAGE, AutoTokenizer.from_pretrained(folder), length=20, count=5)


def passed(model: Any, windows: list[Window]) -> Collection:
    """Return what a small pass collects."""
    return run_pass(model, find_sites(model), windows, PassSettings(batch=2, reservoir=15))


def hidden_states(model: Any, windows: list[Window]) -> dict[int, torch.Tensor]:
    caught: dict[int, torch.Tensor] = {}
    ids = torch.stack([w.ids for w in windows])
    run_batch(
        model,
        ids,
        sites=find_sites(model),
        consume=lambda site, hidden: caught.update({site.layer: hidden.clone()}),
        logits=lambda rows, block: caught.update({-1 - int(rows[0]): block.clone()}),
    )
    return caught


def check_equal(model: Any, other: Any, windows: list[Window]) -> None:
    """Compare hidden states, logits and the sums of a pass bit for bit."""
    one, two = hidden_states(model, windows), hidden_states(other, windows)
    assert one.keys() == two.keys()
    assert all(torch.equal(t, two[layer]) for layer, t in one.items())
    found, expected = passed(model, windows), passed(other, windows)
    for layer, sums in expected.sites.items():
        assert torch.equal(found.sites[layer].unit_total, sums.unit_total)
        assert torch.equal(torch.cat(found.reservoir.rows[layer]), torch.cat(expected.reservoir.rows[layer]))
    assert torch.equal(found.predictions.sums, expected.predictions.sums)
    assert torch.equal(found.predictions.counts, expected.predictions.counts)
    assert found.predictions.vocab_size == expected.predictions.vocab_size
    assert torch.equal(found.seen, expected.seen)


OFFLOADS = {
    "to the CPU": lambda model, folder: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "to the disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=torch.device("cpu")),
}


@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "phi"])  # tied, untied, tied, with a bias in its head
def test_a_model_whose_weights_are_elsewhere_gives_the_same(opened, checkpoint, tmp_path, family, how):
    model, windows = load_model(opened(family), CPU), windows_of(checkpoint(family))
    OFFLOADS[how](model, tmp_path / "weights")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert input_device(model) == torch.device("cpu")
    check_equal(model, load_model(opened(family), CPU), windows)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def with_memory(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    """Let accelerate plan for a machine whose only memory is so many bytes; the rest goes to the disk."""
    for name in ("get_max_memory", "get_balanced_memory"):
        monkeypatch.setattr(placing, name, lambda *args, **options: {"cpu": n_bytes})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "share", "places"),
    [
        ("gpt2", 0.9, {"cpu", "disk"}),
        ("llama", 0.9, {"cpu", "disk"}),
        ("qwen2", 0.9, {"cpu", "disk"}),
        ("gpt2", 0.01, {"disk"}),
        ("llama", 0.01, {"disk"}),
        ("qwen2", 10, None),
    ],
)
def test_map_spreads_a_model_and_gives_the_same(opened, checkpoint, monkeypatch, family, share, places, dtype):
    given, windows = opened(family), windows_of(checkpoint(family))
    n_bytes = sum(info.n_elements for info in given.tensors.values()) * DTYPES[dtype].itemsize
    with_memory(monkeypatch, int(share * n_bytes))
    model = load_model(given, Placement(dtype, "map"))
    assert places is None or set(model.hf_device_map.values()) == places
    assert not model.training
    check_equal(model, load_model(given, Placement(dtype, "cpu")), windows)


def test_map_spreads_the_layout_of_the_hub_too(checkpoint, editable, monkeypatch):
    folder = models.as_on_hub(editable(checkpoint("gpt2")))
    with_memory(monkeypatch, 1000)
    model = load_model(open_checkpoint(folder), Placement("float32", "map"))
    check_equal(model, load_model(open_checkpoint(folder), CPU), windows_of(folder))


def test_map_spreads_experts_too(tmp_path, monkeypatch):
    """transformers merges the experts of a file as it loads them, and needs a folder for those that stay on the disk."""
    config = transformers.MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    with_memory(monkeypatch, 1000)
    model = load_model(open_checkpoint(tmp_path), Placement("float32", "map"))
    ids = [torch.randint(3, 300, (20,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    windows = [Window(i, t, torch.arange(20) + 20 * i, torch.ones(20, dtype=torch.int64), 0) for i, t in enumerate(ids)]
    check_equal(model, load_model(open_checkpoint(tmp_path), CPU), windows)


def test_the_twin_of_a_spread_model_is_on_the_cpu(opened, checkpoint):
    twin = randomly_initialised(opened("gpt2"), Placement("float32", "map"))
    check_equal(twin, randomly_initialised(opened("gpt2"), CPU), windows_of(checkpoint("gpt2")))
