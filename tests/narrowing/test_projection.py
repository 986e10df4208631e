"""A narrowed checkpoint is a standard one: exact at full width, exact where nothing was in what is cut away, and stock."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.errors import InvalidArgument, UnsupportedCheckpoint
from dimscope.narrowing import writing
from dimscope.narrowing.layouts import LAYOUTS, check_width, layout_of
from dimscope.narrowing.projection import plan_cut, write_cut
from dimscope.narrowing.writing import Planned, write_safetensors

FAMILIES = sorted(LAYOUTS)
IDS = torch.randint(3, 400, (2, 24), generator=torch.Generator().manual_seed(0))


def orthonormal(d: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, dtype=torch.float64, generator=generator))[0]


def spoilt(folder: Path, seed: int = 0) -> Any:
    """Return the model of a checkpoint with norm gains and biases that are not what a fresh model has, and save it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(noise)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def dense(checkpoint, editable) -> Callable[..., tuple[Path, Any]]:
    """Return `dense(family, **arguments)`: a checkpoint with non-trivial norms and biases, and its model."""

    def make(family: str, **arguments: Any) -> tuple[Path, Any]:
        biased = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
        folder = editable(checkpoint(family, **{**biased, **arguments}), f"{family}-dense")
        return folder, spoilt(folder)

    return make


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def cut(folder: Path, out: Path, basis: torch.Tensor, **options: Any) -> Any:
    out.mkdir()
    account = write_cut(plan_cut(open_checkpoint(folder), basis, **options), out)
    return AutoModelForCausalLM.from_pretrained(out).eval(), account


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotation_at_full_width_changes_nothing(dense, tmp_path, family, tied):
    folder, model = dense(family, tied=tied)
    turned, account = cut(folder, tmp_path / "out", orthonormal(32, 32))
    exact = logits(model)
    # float32 products in another order: a few units in the last place of the largest logit
    assert float((logits(turned) - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    assert account.untied == tied


@pytest.mark.parametrize("k", [16, 24])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_widened_model_narrowed_again_is_what_it_was(dense, tmp_path, family, k):
    """Full width cannot show a slip in the norms' gain, epsilon or the table's scale: this does."""
    d = 40 if family != "llama" else 32 + k % 16 or 48
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    folder, small = dense(family, hidden_size=k, tied=False, rms_norm_eps=0.01, **heads)
    basis, layout, shrink = orthonormal(d, k), LAYOUTS[family], math.sqrt(k / d)
    wide = tmp_path / "wide"
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.rms_norm_eps = d, config.rms_norm_eps * k / d
    model = AutoModelForCausalLM.from_config(config)
    held = {name: p.detach().double() for name, p in small.named_parameters()}
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            part, norm = layout.part(name)
            value = held[name]
            if part == "table":
                value = value @ basis.T * (shrink if layout.scaled_table else 1)
            elif norm is not None:  # readers and head: the gain goes into them, and a scalar stays in the norm
                value = (value * (held[norm] + layout.gain_offset)) @ basis.T * shrink / scalar(norm)
            elif part == "writer":
                value = basis @ value
            elif part == "gain":
                value = torch.full((d,), scalar(name) - layout.gain_offset)
            parameter.copy_(value)
            assert parameter.isfinite().all(), number
    model.save_pretrained(wide)
    narrow, _ = cut(wide, tmp_path / "narrow", basis)
    exact = logits(small)
    assert float((logits(narrow) - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    assert narrow.config.rms_norm_eps == pytest.approx(0.01)


def scalar(norm: str) -> float:
    """Return a positive number of its own for each norm."""
    return 0.5 + (sum(norm.encode()) % 17) / 10


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_loads_it_elsewhere_bit_for_bit_and_writes_with_its_cache(
    dense, tmp_path, run_python, family
):
    folder, _ = dense(family)
    narrow, account = cut(folder, tmp_path / "out", orthonormal(32, 16))
    torch.save({"ids": IDS, "logits": logits(narrow)}, tmp_path / "expected.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, output_loading_info=True)
held = torch.load({str(tmp_path / "expected.pt")!r})
with torch.no_grad():
    assert torch.equal(model(input_ids=held["ids"]).logits, held["logits"])
written = model.generate(held["ids"], max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0)
without = model.generate(held["ids"], max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)
assert torch.equal(written, without) and written.shape[1] > held["ids"].shape[1]
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert "dimscope" not in sys.modules
print(sum(p.numel() for p in model.parameters()))
"""
    ran = run_python("-c", code)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) == account.narrow_parameters


def test_the_files_hold_what_the_config_promises_and_no_code(dense, tmp_path):
    folder, _ = dense("qwen2")
    narrow, account = cut(folder, tmp_path / "out", orthonormal(32, 20))
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert set(held) == {name for name, _ in narrow.named_parameters()}
    assert sum(t.numel() for t in held.values()) == account.narrow_parameters
    assert sum(t.nbytes for t in held.values()) == account.narrow_bytes
    dense_held = load_file(folder / "model.safetensors")
    assert sum(t.numel() for t in dense_held.values()) == account.dense_parameters
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == 20
    assert config["head_dim"] == 8
    assert config["tie_word_embeddings"] is False
    assert "auto_map" not in config
    assert not list((tmp_path / "out").glob("*.py"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_stays_and_is_rounded_to_once(checkpoint, tmp_path, dtype):
    folder, basis = checkpoint("llama", dtype=dtype), orthonormal(32, 16)
    cut(folder, tmp_path / "out", basis)
    held, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {t.dtype for t in held.values()} == {getattr(torch, dtype)}
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(held[name], (basis.T @ before[name].double()).to(held[name].dtype))
    name = "model.embed_tokens.weight"
    assert torch.equal(held[name], (before[name].double() @ basis).to(held[name].dtype))


def test_large_checkpoints_are_written_in_shards_with_an_index(dense, tmp_path, monkeypatch):
    folder, _ = dense("llama")
    whole, account = cut(folder, tmp_path / "one", orthonormal(32, 16))
    monkeypatch.setattr(writing, "SHARD", account.narrow_bytes // 4)
    parts, _ = cut(folder, tmp_path / "many", orthonormal(32, 16))
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / writing.INDEX).read_text())
    assert index["metadata"]["total_size"] == account.narrow_bytes
    assert torch.equal(logits(whole), logits(parts))


def test_a_sharded_checkpoint_is_read_as_one(checkpoint, tmp_path):
    whole, _ = cut(checkpoint("llama"), tmp_path / "one", orthonormal(32, 16))
    parts, _ = cut(checkpoint("llama", sharded=True), tmp_path / "two", orthonormal(32, 16))
    assert torch.equal(logits(whole), logits(parts))


def test_blocks_that_are_not_what_was_planned_are_a_bug_that_is_seen(tmp_path):
    planned = Planned("a", (4, 2), torch.float32)
    with pytest.raises(ValueError, match="16 bytes where 32 were planned"):
        write_safetensors(tmp_path, [(planned, iter([torch.zeros(2, 2)]))], [planned])
    with pytest.raises(ValueError, match="b is given where a is"):
        write_safetensors(tmp_path, [(Planned("b", (4, 2), torch.float32), iter([]))], [planned])


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gpt2", "whole heads"), ("opt", "whole heads"), ("phi", "is known for"), ("olmo", "is known for")],
)
def test_families_that_are_not_narrowed_are_refused_with_the_reason(checkpoint, family, reason):
    with pytest.raises(UnsupportedCheckpoint, match=reason):
        layout_of(open_checkpoint(checkpoint(family)))


def test_widths_that_a_family_cannot_have_are_refused_with_the_nearest(checkpoint):
    llama, qwen = open_checkpoint(checkpoint("llama")), open_checkpoint(checkpoint("qwen2"))
    check_width(qwen, layout_of(qwen), 17)
    check_width(llama, layout_of(llama), 16)
    with pytest.raises(InvalidArgument, match="the nearest are 16 or 20"):
        check_width(llama, layout_of(llama), 17)
    with pytest.raises(InvalidArgument, match=r"the nearest are 4$"):
        check_width(llama, layout_of(llama), 3)
    for width in (0, 33, -1):
        with pytest.raises(InvalidArgument, match="goes from 1 to 32"):
            check_width(qwen, layout_of(qwen), width)
