"""A learned basis: the weights it trains with, its gradient and what comes back, against ways of their own; its temperature."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowings import learn, narrowing_of
from strong_models import random_windows, strengthen
from transformers import AutoModelForCausalLM

from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.checkpoints.families import LAYOUTS
from dimscope.checkpoints.model import Placement
from dimscope.narrowing import training
from dimscope.narrowing.assembly import narrow_model
from dimscope.narrowing.bases import make_basis, orthonormal
from dimscope.narrowing.calibration import final_temperature
from dimscope.narrowing.projection import Narrowing
from dimscope.narrowing.training import LONGEST_NORM, Schedule, mean_kl
from dimscope.narrowing.training_state import Point, best_point
from dimscope.studies.narrowing.session import table_summary

pytestmark = pytest.mark.slow  # trains

D, K = 32, 16
PLACEMENT = Placement("float32", "cpu")
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama tied": ("llama", {"tied": True}, {"tied": True}),
    "llama untied": ("llama", {"tied": True}, {"tied": False}),
    "gemma": ("gemma", {}, {}),
    "gemma tied": ("gemma", {}, {"tied": True}),
    "phi": ("phi", {}, {}),
    "gpt_neox": ("gpt_neox", {}, {}),
    "gpt_neox tied": ("gpt_neox", {"tied": True}, {}),
    "qwen2": ("qwen2", {}, {"tied": True}),
    "qwen2 as llama": ("qwen2", {}, {"export": "llama"}),
    "qwen3": ("qwen3", {}, {}),
}
"""By name: a family, how its checkpoint is made, and how it is cut."""


TRAINING, HELD_OUT = random_windows(12, 1), random_windows(5, 2)


def random_basis(centred: bool, k: int = K, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return orthonormal(torch.randn(D, k - centred, dtype=torch.float64, generator=generator), centred)


@pytest.fixture
def dense(checkpoint, editable) -> Callable[..., tuple[Path, Any]]:
    """Return `dense(family, change=None, **arguments)`: a checkpoint on disk, and its model.

    Matrices are made large, so that blocks write as much as the table and logits are far from even; gains and biases
    are not what a fresh model has. `change` may spoil the model further.
    """

    def make(family: str, change: Callable[[Any], None] | None = None, **arguments: Any) -> tuple[Path, Any]:
        folder = editable(checkpoint(family, **arguments), f"{family}-dense")
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        strengthen(model, generator)
        if change is not None:
            with torch.no_grad():
                change(model)
        model.save_pretrained(folder)
        return folder, model.eval()

    return make


@pytest.fixture
def made(dense) -> Callable[[str], tuple[Narrowing, Any]]:
    """Return `made(kind)`: a cut of that kind to a random basis, with a gain of its own for some norm, and the dense model."""

    def make(kind: str) -> tuple[Narrowing, Any]:
        family, arguments, options = KINDS[kind]
        folder, model = dense(family, **arguments)
        layout = LAYOUTS[family]
        first = next(name for name, _ in model.named_parameters() if layout.part(name) == "gain")
        basis = random_basis(layout.centred)
        gains = {first: torch.tensor(1.1), f"{layout.final_norm}.weight": torch.tensor(1.3)}
        return narrowing_of(open_checkpoint(folder), basis, gains, **options), model

    return make


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.stack([w.ids for w in HELD_OUT])).logits.double()


def check_orthonormal(cut: Narrowing) -> None:
    basis, centred, k = cut.basis, cut.layout.centred, cut.basis.shape[1]
    expected = torch.eye(k, dtype=torch.float64) - centred / k
    torch.testing.assert_close(basis.T @ basis, expected, rtol=0, atol=1e-10)
    if centred:
        assert float(basis.sum(dim=0).abs().max()) < 1e-10
        assert float(basis.sum(dim=1).abs().max()) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_with_the_very_model_of_the_cut(made, kind):
    """At a rate of nothing what comes back is the cut, but for the signs of columns, which no model feels."""
    cut, model = made(kind)
    before = narrow_model(cut, PLACEMENT)
    same, points = learn(model, cut, TRAINING, HELD_OUT, Schedule(1, 0.0, 1, batch=2))
    kl = mean_kl(before, model, HELD_OUT, 2)
    assert kl > 0.1
    assert points[0].held_out == pytest.approx(kl, rel=2e-5)
    assert points[1].held_out == points[0].held_out
    exact = logits(before)
    assert float((logits(narrow_model(same, PLACEMENT)) - exact).abs().max()) < 2e-5 * float(exact.abs().max())
    torch.testing.assert_close(same.basis @ same.basis.T, cut.basis @ cut.basis.T, rtol=0, atol=1e-5)
    for norm, gain in cut.gains.items():
        torch.testing.assert_close(same.gains[norm], gain.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_back_is_the_model_that_the_points_tell_of(made, kind):
    cut, model = made(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    told: list[Point] = []
    learned, points = learn(model, cut, TRAINING, HELD_OUT, Schedule(8, 5e-3, 3, batch=4), announce=told.append)
    assert told == points
    assert [p.step for p in points] == [0, 3, 6, 8]
    best = best_point(points)
    assert best.held_out < 0.99 * points[0].held_out
    narrow = narrow_model(learned, PLACEMENT)
    assert mean_kl(narrow, model, HELD_OUT, 4) == pytest.approx(best.held_out, rel=2e-5)
    check_orthonormal(learned)
    assert float((learned.basis - cut.basis).abs().max()) > 1e-3
    assert learned.origins == cut.origins
    assert learned.config.to_dict() == cut.config.to_dict()
    for name, parameter in model.named_parameters():  # nothing is done to the dense model
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def by_hand(model: Any, basis: torch.Tensor, gains: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a narrow Llama, written out, in float64."""
    dense = {name: p.detach().double() for name, p in model.named_parameters()}
    found = {
        "model.embed_tokens.weight": dense["model.embed_tokens.weight"] @ basis,
        "lm_head.weight": dense["lm_head.weight"] * dense["model.norm.weight"] @ basis,
    }
    for i in range(2):
        block = f"model.layers.{i}."
        for norm, readers, writer in [
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        ]:
            gain = dense[f"{block}{norm}.weight"]
            found |= {f"{block}{r}.weight": dense[f"{block}{r}.weight"] * gain @ basis for r in readers}
            found[f"{block}{writer}.weight"] = basis.T @ dense[f"{block}{writer}.weight"]
    return found | {name: gain.expand(basis.shape[1]) for name, gain in gains.items()}


def test_its_first_step_is_that_of_adam_along_the_gradient_by_hand(made):
    """All weights of a Llama as functions of basis and gains, in float64, and torch's own KL: another way to the gradient."""
    cut, model = made("llama")
    schedule = Schedule(1, 0.05, 1, batch=len(TRAINING))
    # Held-out text is that of training, so that the one step is better than none, and kept.
    learned, points = learn(model, cut, TRAINING, TRAINING, schedule)
    assert points[1].held_out < points[0].held_out

    raw = cut.basis.clone().requires_grad_()
    usual = torch.tensor(cut.usual_gain, dtype=torch.float64)
    norms = [name for name, _ in model.named_parameters() if "norm" in name]
    gains = {name: cut.gains.get(name, usual).double().clone().requires_grad_() for name in norms}
    narrow, wide = narrow_model(cut, PLACEMENT).double(), deepcopy(model).double()
    weights = by_hand(model, orthonormal(raw, False), gains)
    assert weights.keys() == dict(narrow.named_parameters()).keys()
    ids = torch.stack([w.ids for w in TRAINING])
    log_q = torch.func.functional_call(narrow, weights, kwargs={"input_ids": ids}).logits.flatten(0, 1).log_softmax(1)
    with torch.no_grad():
        log_p = wide(input_ids=ids).logits.flatten(0, 1).log_softmax(1)
    loss = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert points[1].training == pytest.approx(float(loss.detach()), rel=1e-5)
    leaves = [raw, *gains.values()]
    gradients = torch.autograd.grad(loss, leaves)
    length = torch.stack([g.norm() for g in gradients]).norm()
    rate = schedule.rate_at(0)
    with torch.no_grad():
        for leaf, gradient in zip(leaves, gradients, strict=True):
            clipped = gradient * min(1.0, LONGEST_NORM / float(length))
            leaf -= rate * clipped / (clipped.abs() + 1e-8)
        basis = orthonormal(raw, False)
    for name, gain in gains.items():
        torch.testing.assert_close(learned.gains[name], gain.detach(), rtol=1e-5, atol=0)
    # A number of the gradient near 0 may have another sign in float32: a few steps of some 0.005 to the other side.
    moved = basis @ basis.T - cut.basis @ cut.basis.T
    off = learned.basis @ learned.basis.T - basis @ basis.T
    assert float(off.norm()) < 0.02 * float(moved.norm())


def test_a_basis_is_found_where_the_stream_truly_lies_in_few_dimensions(dense):
    """Planted: whatever is written into the stream lies in 8 of its 32 dimensions, of which a random basis of 16 has half."""
    span = random_basis(False, 8, seed=9)
    inside = (span @ span.T).float()

    def planted(model: Any) -> None:
        for name, parameter in model.named_parameters():
            part = LAYOUTS["llama"].part(name)
            if part == "table":
                parameter.copy_(parameter @ inside)
            elif part == "writer":
                parameter.copy_(inside @ parameter)

    folder, model = dense("llama", planted)
    opened = open_checkpoint(folder)
    basis = make_basis("random", table_summary(opened), K, centred=False, seed=1)
    learned, points = learn(
        model, narrowing_of(opened, basis), random_windows(40, 3), HELD_OUT, Schedule(60, 5e-2, 20, batch=4)
    )
    assert best_point(points).held_out < 0.5 * points[0].held_out
    # The span itself loses nothing, whatever is beside it: this is what was to be found, and it is nearer now.
    beside = torch.linalg.qr(torch.cat([span, basis], dim=1))[0][:, :K]
    assert mean_kl(narrow_model(narrowing_of(opened, beside), PLACEMENT), model, HELD_OUT, 4) < 1e-5
    near, far = (float((b.T @ span).square().sum()) / 8 for b in (learned.basis, basis))
    assert far < 0.6
    assert near > 0.85


def test_an_interrupted_learning_goes_on_to_the_same_cut(made, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "WRITING_PAUSE", 0)  # of the time: a state is written at every look
    cut, model = made("phi")
    schedule = Schedule(6, 5e-3, 2, batch=4)
    whole, expected = learn(model, cut, TRAINING, HELD_OUT, schedule)

    def stop(point: Point) -> None:
        if point.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(model, cut, TRAINING, HELD_OUT, schedule, store=tmp_path, announce=stop)
    told: list[Point] = []
    again, points = learn(model, cut, TRAINING, HELD_OUT, schedule, store=tmp_path, announce=told.append)
    assert [p.step for p in told] == [4, 6]
    assert points == expected
    assert torch.equal(again.basis, whole.basis)
    assert again.gains.keys() == whole.gains.keys()
    assert all(torch.equal(gain, whole.gains[name]) for name, gain in again.gains.items())


def test_where_training_only_hurts_the_cut_is_what_it_was(made):
    cut, model = made("llama")
    same, points = learn(model, cut, TRAINING, HELD_OUT, Schedule(2, 100.0, 1, batch=4))
    assert best_point(points) is points[0]
    assert len(points) == 3
    kl = mean_kl(narrow_model(same, PLACEMENT), model, HELD_OUT, 4)
    assert kl == pytest.approx(mean_kl(narrow_model(cut, PLACEMENT), model, HELD_OUT, 4), rel=2e-5)


# ---- the temperature of the final norm ------------------------------------------------------------------------------


def warmed(model: Any, layout: Any, factor: float) -> Any:
    """Return a copy whose logits, without the bias of the head, are that many times as large."""
    other = deepcopy(model)
    with torch.no_grad():
        for kind in ("weight", "bias") if layout.centred else ("weight",):
            norm = other.get_parameter(f"{layout.final_norm}.{kind}")
            offset = layout.gain_offset if kind == "weight" else 0.0
            norm.copy_((norm + offset) * factor - offset)
    return other


@pytest.mark.parametrize("planted", [1.7, 0.2, 6.0, 1.0])
@pytest.mark.parametrize("family", ["llama", "gemma", "phi", "gpt_neox"])
def test_a_temperature_that_was_planted_is_found(dense, family, planted):
    _, model = dense(family)
    factor = final_temperature(warmed(model, LAYOUTS[family], 1 / planted), model, HELD_OUT, 2)
    assert factor == pytest.approx(planted, rel=1e-3)


@pytest.mark.parametrize("config", [{"logits_scaling": 0.25}, {"final_logit_softcapping": 3.0}])
def test_a_temperature_is_found_behind_scaled_and_capped_logits(config):
    """No family that is narrowed so far does this to its logits; the next one may."""
    from transformers import Gemma2Config, GraniteConfig

    kind = GraniteConfig if "logits_scaling" in config else Gemma2Config
    size = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(
            kind(**size, num_attention_heads=4, num_key_value_heads=2, **config)
        )
    strengthen(model, torch.Generator().manual_seed(0))
    layout = LAYOUTS["gemma" if kind is Gemma2Config else "llama"]
    factor = final_temperature(warmed(model.eval(), layout, 1 / 1.7), model, HELD_OUT, 2)
    assert factor == pytest.approx(1.7, rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma tied", "phi", "qwen2 as llama"])
def test_the_temperature_is_where_the_kl_is_least(made, kind):
    """The KL by torch in float64, from the logits of a narrow model whose gain was changed for each number of a grid."""
    cut, model = made(kind)
    student = narrow_model(cut, PLACEMENT)
    found = final_temperature(student, model, HELD_OUT, 2)
    head: Any = student.get_output_embeddings()
    bias = 0.0 if head.bias is None else head.bias.detach().double()
    assert (head.bias is not None) == (kind == "phi")
    z, log_p = logits(student) - bias, logits(model).log_softmax(dim=-1)

    def kl(factor: float) -> float:
        log_q = (factor * z + bias).log_softmax(dim=-1)
        return float(torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum"))

    assert abs(found - 1) > 0.05  # or there was nothing to find
    grid = [found * (1 + i / 500) for i in range(-100, 101)]
    assert min(grid, key=kl) == pytest.approx(found, rel=1e-12)
    # As a gain of the cut it does what it promises.
    final = f"{cut.layout.final_norm}.weight"
    better = narrow_model(replace(cut, gains={**cut.gains, final: cut.gains[final] * found}), PLACEMENT)
    n = sum(len(w.ids) for w in HELD_OUT)
    assert mean_kl(better, model, HELD_OUT, 2) == pytest.approx(kl(found) / n, rel=1e-4)
    assert kl(found) < kl(1.0)
