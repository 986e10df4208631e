"""A narrowed checkpoint is a standard one: exact at full width, exact where nothing was in what is cut away, and stock."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowings import narrowing_of
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from dimscope.checkpoints import writer as writing
from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.checkpoints.families import LAYOUTS
from dimscope.checkpoints.model import Placement
from dimscope.checkpoints.writer import PlannedTensor, write_safetensors
from dimscope.errors import InvalidArgument
from dimscope.narrowing.assembly import narrow_model, write_narrowing
from dimscope.narrowing.bases import orthonormal as orthonormal_basis
from dimscope.narrowing.target import check_width, resolve_target

FAMILIES = sorted(LAYOUTS)
IDS = torch.randint(3, 400, (2, 24), generator=torch.Generator().manual_seed(0))


def orthonormal(d: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, dtype=torch.float64, generator=generator))[0]


def basis_for(family: str, d: int, k: int, seed: int = 0) -> torch.Tensor:
    """Return a random basis: orthonormal, or what takes the mean out for families with LayerNorm."""
    generator = torch.Generator().manual_seed(seed)
    centred = LAYOUTS[family].centred
    return orthonormal_basis(torch.randn(d, k - centred, dtype=torch.float64, generator=generator), centred)


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
    account = write_narrowing(narrowing_of(open_checkpoint(folder), basis, **options), out)
    return AutoModelForCausalLM.from_pretrained(out).eval(), account


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotation_at_full_width_changes_nothing(dense, tmp_path, family, tied):
    folder, model = dense(family, tied=tied)
    turned, account = cut(folder, tmp_path / "out", basis_for(family, 32, 32))
    exact = logits(model)
    # float32 products in another order: a few units in the last place of the largest logit
    assert float((logits(turned) - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    assert account.untied == tied


@pytest.mark.parametrize("k", [16, 24])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt_neox"])
def test_a_widened_model_narrowed_again_is_what_it_was(dense, tmp_path, family, k):
    """Full width cannot show a slip in the norms' gain, epsilon or the table's scale: this does."""
    d = 40 if family != "llama" else 32 + k % 16 or 48
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    layout, shrink = LAYOUTS[family], math.sqrt(k / d)
    folder, small = dense(family, hidden_size=k, tied=False, **{layout.eps: 0.01}, **heads)
    basis = basis_for(family, d, k)
    wide = tmp_path / "wide"
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size = d
    setattr(config, layout.eps, 0.01 * k / d)
    model = AutoModelForCausalLM.from_config(config)
    held = {name: p.detach().double() for name, p in small.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    shifts = {n: torch.randn(d, dtype=torch.float64, generator=generator) for n in held if layout.part(n) == "shift"}

    def widened(name: str) -> torch.Tensor:
        part, norm = layout.part(name), layout.norm_before(name)
        value = held[name]
        if part == "table":
            # A mean of any size in every row: a LayerNorm does not see it.
            mean = torch.randn(len(value), 1, dtype=torch.float64, generator=generator) * layout.centred
            return value @ basis.T * (shrink if layout.scaled_table else 1) + mean
        if part in ("reader", "head"):  # the gain goes into them, and a scalar stays in the norm
            assert norm is not None
            return (value * (held[f"{norm}.weight"] + layout.gain_offset)) @ basis.T * shrink / scalar(norm)
        if part == "reader bias" and layout.centred:
            weight = name.replace(".bias", ".weight")
            return value + held[weight] @ held[f"{norm}.bias"] - widened(weight) @ shifts[f"{norm}.bias"]
        if part == "writer":
            return basis @ value
        if part == "gain":
            return torch.full((d,), scalar(name.removesuffix(".weight")) - layout.gain_offset, dtype=torch.float64)
        return shifts.get(name, value)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(widened(name))
    model.save_pretrained(wide)
    narrow, _ = cut(wide, tmp_path / "narrow", basis)
    exact = logits(small)
    assert float((logits(narrow) - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    assert getattr(narrow.config, layout.eps) == pytest.approx(0.01)


@pytest.mark.parametrize("attention_bias", [True, False])
def test_a_neox_as_a_phi_is_narrowed_as_that_phi_is(dense, tmp_path, attention_bias):
    folder, model = dense("gpt_neox", attention_bias=attention_bias, rotary_pct=0.25)
    turn, basis = basis_for("phi", 32, 32, 1), basis_for("phi", 32, 20, 2)
    phi, account = cut(folder, tmp_path / "phi", turn)
    exact = logits(model)
    assert phi.config.model_type == "phi"
    assert float((logits(phi) - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    assert account.narrow_parameters == sum(p.numel() for p in phi.parameters())
    twice, _ = cut(tmp_path / "phi", tmp_path / "twice", basis)
    once, _ = cut(folder, tmp_path / "once", turn @ basis)
    assert float((logits(once) - logits(twice)).abs().max()) < 1e-5 * float(logits(once).abs().max())


@pytest.mark.parametrize("tied", [True, False])
def test_a_qwen2_is_a_llama_with_biases(dense, tmp_path, tied):
    folder, model = dense("qwen2", tied=tied)
    llama, _ = cut(folder, tmp_path / "llama", orthonormal(32, 32), export="llama")
    exact = logits(model)
    assert llama.config.model_type == "llama"
    assert float((logits(llama) - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    own, _ = cut(folder, tmp_path / "own", orthonormal(32, 16))
    other, _ = cut(folder, tmp_path / "other", orthonormal(32, 16), export="llama")
    assert float((logits(own) - logits(other)).abs().max()) < 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("family", ["qwen2", "gemma", "llama"])
def test_a_model_kept_tied_is_exact_at_full_width_and_loses_only_what_its_gain_turns_out(dense, tmp_path, family):
    folder, model = dense(family, tied=True)
    checkpoint, layout = open_checkpoint(folder), LAYOUTS[family]
    final = model.get_parameter("model.norm.weight").detach().double() + layout.gain_offset
    exact = logits(model)
    for k in (32, 20):
        out, basis = tmp_path / str(k), orthonormal(32, k)
        narrow, account = cut(folder, out, basis, tied=True)
        assert "lm_head.weight" not in load_file(out / "model.safetensors")
        assert account.untied is False
        assert account.narrow_parameters == sum(p.numel() for p in narrow.parameters())
        if k == 32:
            assert float((logits(narrow) - exact).abs().max()) < 1e-5 * float(exact.abs().max())
            continue
        # The heads: E P diag(c) with the tie, and E diag(g) P, of which the part in the span is the same.
        table = checkpoint.reader.read_rows("model.embed_tokens.weight", 0, 512).double()
        own = narrow.get_output_embeddings().weight.detach().double()
        gain = narrow.get_parameter("model.norm.weight").detach().double() + layout.gain_offset
        turn = torch.linalg.pinv(table @ basis * (math.sqrt(32 / k) if layout.scaled_table else 1)) @ own
        torch.testing.assert_close(turn @ turn.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-5)
        inside = table @ basis @ basis.T @ (final[:, None] * basis) @ turn * math.sqrt(32 / k)
        torch.testing.assert_close(own * gain, inside, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_memory_it_is_what_is_on_disk(dense, tmp_path, family):
    folder, _ = dense(family)
    basis = basis_for(family, 32, 16)
    written, _ = cut(folder, tmp_path / "out", basis)
    held = narrow_model(narrowing_of(open_checkpoint(folder), basis), Placement("float32", "cpu"))
    assert torch.equal(logits(written), logits(held))


def scalar(norm: str) -> float:
    """Return a positive number of its own for each norm."""
    return 0.5 + (sum(norm.encode()) % 17) / 10


@pytest.mark.slow
def test_stock_transformers_loads_every_family_bit_for_bit_and_generates_with_its_cache(dense, tmp_path, forked_python):
    expected = {}
    for family in FAMILIES:
        narrow, account = cut(dense(family)[0], tmp_path / family, basis_for(family, 32, 16))
        expected[family] = {"logits": logits(narrow), "parameters": account.narrow_parameters}
    torch.save({"ids": IDS, "expected": expected}, tmp_path / "expected.pt")
    code = f"""
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "dimscope"]:
    del sys.modules[name]
sys.modules["dimscope"] = None  # an import of it fails
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
folder = Path({str(tmp_path)!r})
stored = torch.load(folder / "expected.pt")
ids = stored["ids"]
for family, own in stored["expected"].items():
    model, info = AutoModelForCausalLM.from_pretrained(folder / family, output_loading_info=True)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, own["logits"]), family
    texts = [model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0) for cache in (True, False)]
    assert torch.equal(*texts) and texts[0].shape[1] > ids.shape[1], family
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert sum(p.numel() for p in model.parameters()) == own["parameters"], family
"""
    ran = forked_python("-c", code)
    assert ran.returncode == 0, ran.stderr[-2000:]


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
    planned = PlannedTensor("a", (4, 2), torch.float32)
    with pytest.raises(ValueError, match="16 bytes where 32 were planned"):
        write_safetensors(tmp_path, [(planned, iter([torch.zeros(2, 2)]))], [planned])
    with pytest.raises(ValueError, match="b is written where a was planned"):
        write_safetensors(tmp_path, [(PlannedTensor("b", (4, 2), torch.float32), iter([]))], [planned])


def test_widths_that_a_family_cannot_have_are_refused_with_the_nearest(checkpoint):
    targets = {family: resolve_target(open_checkpoint(checkpoint(family))) for family in ("llama", "qwen2", "phi")}
    as_llama = resolve_target(open_checkpoint(checkpoint("qwen2")), export="llama")
    for target, width in ((targets["qwen2"], 17), (targets["llama"], 16), (targets["phi"], 17)):
        check_width(target, width)
    for target, width, reason in (
        (targets["llama"], 17, "the nearest are 16 or 20"), (targets["llama"], 3, r"the nearest are 4$"),
        (as_llama, 17, "the nearest are 16 or 20"), (targets["phi"], 1, "from 2 to 32"), (targets["qwen2"], 0, "from 1 to 32"),
        (targets["qwen2"], 33, "from 1 to 32"), (targets["qwen2"], -1, "from 1 to 32"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=reason):
            check_width(target, width)


def test_what_a_family_is_not_written_as_is_refused(checkpoint):
    basis = orthonormal(32, 16)
    for family, export, reason in [
        ("qwen2", "phi", "a qwen2 model is written as llama"),
        ("llama", "phi", "as a llama only"),
    ]:
        with pytest.raises(InvalidArgument, match=reason):
            narrowing_of(open_checkpoint(checkpoint(family)), basis, export=export)
    with pytest.raises(InvalidArgument, match="sliding windows"):
        narrowing_of(
            open_checkpoint(checkpoint("qwen2", use_sliding_window=True, max_window_layers=0)), basis, export="llama"
        )
    with pytest.raises(InvalidArgument, match="has two tables"):
        narrowing_of(open_checkpoint(checkpoint("llama")), basis, tied=True)
