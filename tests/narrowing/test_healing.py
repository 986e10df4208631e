"""Healing brings a narrow model nearer to the dense one, stage by stage, and leaves it as it was where nothing helps."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowings import healed_model, narrowing_of
from strong_models import random_windows, strengthen
from transformers import AutoModelForCausalLM

from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.checkpoints.families import LAYOUTS
from dimscope.checkpoints.model import Placement
from dimscope.narrowing import training
from dimscope.narrowing.assembly import narrow_model, write_narrowing
from dimscope.narrowing.bases import orthonormal
from dimscope.narrowing.healing import heal_rate
from dimscope.narrowing.projection import Narrowing
from dimscope.narrowing.training import Schedule, mean_kl
from dimscope.narrowing.training_state import Point, best_point

# peft asks transformers by a name that is to go; neither is ours.
pytestmark = [
    pytest.mark.slow,  # trains
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

D, K = 32, 16
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "gemma tied": ("gemma", {}, {"tied": True}),
    "phi": ("phi", {}, {}),
    "qwen2 as llama": ("qwen2", {}, {"export": "llama"}),
}
"""By name: a family, how its checkpoint is made, and how it is cut."""
SCHEDULE = Schedule(20, 3e-3, 4, batch=4)  # four steps of the norms, and sixteen of the weights


@pytest.fixture(autouse=True)
def kept_at_every_look(monkeypatch):
    """Writing small states would take a large share of such short runs, and most looks would not be kept."""
    monkeypatch.setattr(training, "WRITING_PAUSE", 0)


TRAINING, HELD_OUT = random_windows(12, 1), random_windows(5, 2)


@pytest.fixture
def made(checkpoint, editable) -> Callable[[str], tuple[Narrowing, Any]]:
    """Return `made(kind)`: a cut to a random basis and the dense model, whose large matrices make a large KL."""

    def make(kind: str) -> tuple[Narrowing, Any]:
        family, arguments, options = KINDS[kind]
        folder = editable(checkpoint(family, **arguments), f"{family}-dense")
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        strengthen(model, generator)
        model.save_pretrained(folder)
        centred = LAYOUTS[family].centred
        basis = orthonormal(torch.randn(D, K - centred, dtype=torch.float64, generator=generator), centred)
        return narrowing_of(open_checkpoint(folder), basis, **options), model.eval()

    return make


def student_of(cut: Narrowing) -> Any:
    return narrow_model(cut, Placement("float32", "cpu"))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


class Watch:
    """Keeps the weights of a model as they are at every look, and which of them have a gradient then."""

    def __init__(self, model: Any) -> None:
        self.model, self.points, self.held = model, list[Point](), list[dict[str, torch.Tensor]]()
        self.graded: list[set[str]] = []

    def __call__(self, point: Point) -> None:
        self.points.append(point)
        self.held.append(weights(self.model))
        self.graded.append({name for name, p in self.model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_healed_model_is_nearer_and_is_what_its_points_tell_of(made, kind, lora):
    cut, dense = made(kind)
    student, whole = student_of(cut), weights(dense)
    before = weights(student)
    start = mean_kl(student, dense, HELD_OUT, 4)
    schedule = Schedule(20, heal_rate(K, lora), 4, batch=4)
    healed = healed_model(student, dense, TRAINING, HELD_OUT, schedule, lora=lora)
    assert healed.before == pytest.approx(start, rel=1e-6)
    assert healed.after < 0.99 * start
    assert healed.after == best_point(healed.weights).held_out < best_point(healed.norms).held_out
    assert healed.model is student
    assert mean_kl(student, dense, HELD_OUT, 4) == pytest.approx(healed.after, rel=1e-5)
    assert [p.step for p in healed.norms] == [0, 4]
    assert [p.step for p in healed.weights] == [0, 4, 8, 12, 16]
    assert healed.weights[0].held_out == pytest.approx(best_point(healed.norms).held_out, rel=1e-6)
    assert healed.trained.keys() == before.keys()
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, healed.trained[name])
        assert parameter.dtype == torch.float32
    assert not changed(whole, weights(dense))
    assert all(p.grad is None for p in dense.parameters())


def test_what_is_trained_can_be_written_and_read_as_any_model(made, tmp_path):
    cut, dense = made("gemma tied")
    healed = healed_model(student_of(cut), dense, TRAINING, HELD_OUT, SCHEDULE)
    write_narrowing(cut, tmp_path, healed.trained)
    read = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not changed(weights(healed.model), weights(read))
    assert mean_kl(read, dense, HELD_OUT, 4) == pytest.approx(healed.after, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_norms_come_first_and_alone(made, kind):
    cut, dense = made(kind)
    student = student_of(cut)
    watch = Watch(student)
    healed = healed_model(student, dense, TRAINING, HELD_OUT, SCHEDULE, announce=watch)
    assert watch.points == [*healed.norms, *healed.weights]
    norms = {name for name in watch.held[0] if "norm" in name}
    assert len(norms) == (6 if kind == "phi" else 5)
    n = len(healed.norms)
    assert changed(watch.held[0], watch.held[n - 1]) == norms
    assert watch.graded[n - 1] == norms  # those of the others would take the memory of the model
    assert not changed(watch.held[n - 1], watch.held[n])  # the weights begin where the norms are best
    # Then all of them; keys feel no bias.
    stay = watch.held[0].keys() - changed(watch.held[n], watch.held[-1])
    assert all("k_proj.bias" in name for name in stay)


def test_with_one_step_only_the_norms_are_trained(made):
    cut, dense = made("phi")
    student = student_of(cut)
    before = weights(student)
    healed = healed_model(student, dense, TRAINING, HELD_OUT, Schedule(1, 1e-2, 20, batch=4))
    assert [p.step for p in healed.norms] == [0, 1]
    assert healed.weights == []
    assert healed.steps == 1
    assert healed.after == healed.norms[1].held_out < healed.before
    assert changed(before, dict(healed.trained)) == {name for name in before if "norm" in name}


@pytest.mark.parametrize("lora", [None, 4])
def test_where_nothing_helps_nothing_is_trained_and_every_bit_stays(made, lora):
    """A model at no distance from itself can only lose, though Adam makes steps even of the last bits of a gradient."""
    _, dense = made("llama")
    student, before = deepcopy(dense), weights(dense)
    watch = Watch(student)
    healed = healed_model(student, dense, TRAINING, HELD_OUT, SCHEDULE, lora=lora, announce=watch)
    assert healed.before == healed.after == 0
    assert max(p.held_out for p in watch.points) > 1e-5  # it was tried
    assert healed.trained == {}
    assert not changed(before, weights(student))
    assert healed.model is student


def test_weights_that_training_ruins_leave_what_the_norms_gained(made):
    cut, dense = made("llama")
    student = student_of(cut)
    before = weights(student)
    healed = healed_model(student, dense, TRAINING, HELD_OUT, Schedule(20, 50.0, 4, batch=4))
    assert healed.after == healed.weights[0].held_out == best_point(healed.norms).held_out < healed.before
    assert changed(before, dict(healed.trained)) == {name for name in before if "norm" in name}
    assert mean_kl(student, dense, HELD_OUT, 4) == pytest.approx(healed.after, rel=1e-5)


# ---- low-rank changes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_lora_adds_matrices_of_its_rank_to_the_linear_maps_and_to_nothing_else(made, kind):
    cut, dense = made(kind)
    student = student_of(cut)
    before = weights(student)
    modules = [name for name, _ in student.named_modules()]
    healed = healed_model(student, dense, TRAINING, HELD_OUT, Schedule(20, heal_rate(K, 2), 4, batch=4), lora=2)
    after = weights(student)
    linear = {
        f"{name}.weight"
        for name, m in student.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"  # which peft leaves out
    }
    assert changed(before, after) == linear | {name for name in before if "norm" in name}
    assert [name for name, _ in student.named_modules()] == modules  # nothing of peft is left in it
    assert not any("lora" in name or "base_layer" in name for name in healed.trained)
    assert type(student) is type(student_of(cut))
    for name in linear:
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert values[1] > 1e-4 * values[0]
        assert values[2] < 1e-4 * values[0]  # float32 sums


def test_lora_depends_on_its_seed_alone(made):
    cut, dense = made("llama")

    def run(seed: int) -> dict[str, torch.Tensor]:
        schedule = Schedule(10, heal_rate(K, 2), 4, batch=12, seed=seed)
        return dict(healed_model(student_of(cut), dense, TRAINING, HELD_OUT, schedule, lora=2).trained)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(0)
    assert torch.equal(torch.get_rng_state(), state)  # that of the process is left alone
    torch.manual_seed(2)
    assert not changed(first, run(0))
    # All windows are seen at each step, so another order is no other text: what differs is where it begins.
    other = run(1)
    name = "model.layers.0.mlp.down_proj.weight"
    assert float((first[name] - other[name]).norm()) > 0.1 * float(
        (first[name] - weights(student_of(cut))[name]).norm()
    )


# ---- low precision, and interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, 4])
def test_computing_in_bfloat16_ends_near_what_float32_ends_at(made, lora):
    cut, dense = made("llama")
    schedule = Schedule(20, heal_rate(K, lora), 4, batch=4)
    exact, low = (
        healed_model(student_of(cut), dense, TRAINING, HELD_OUT, schedule, lora=lora, low=dtype)
        for dtype in (None, torch.bfloat16)
    )
    assert low.before == exact.before  # what is held out is always judged in float32
    assert low.after != exact.after
    gained = exact.before - exact.after
    assert gained > 0
    assert low.after == pytest.approx(exact.after, abs=0.1 * gained)
    assert {p.dtype for p in low.trained.values()} == {torch.float32}


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("look", [1, 2, 4])
def test_interrupted_in_any_stage_it_goes_on_to_the_same_weights(made, tmp_path, look, lora):
    cut, dense = made("llama")
    schedule = Schedule(10, heal_rate(K, lora), 2, batch=4)
    seen: list[Point] = []

    def stop(point: Point) -> None:
        seen.append(point)
        if len(seen) == look + 1:
            raise KeyboardInterrupt

    whole = healed_model(student_of(cut), dense, TRAINING, HELD_OUT, schedule, lora=lora)
    assert whole.trained

    def run(folder: Path, **options: Any) -> Any:
        return healed_model(student_of(cut), dense, TRAINING, HELD_OUT, schedule, lora=lora, store=folder, **options)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, announce=stop)
    again = run(tmp_path)
    assert (again.norms, again.weights) == (whole.norms, whole.weights)
    assert not changed(dict(whole.trained), dict(again.trained))
    told: list[Point] = []
    finished = run(tmp_path, announce=told.append)
    assert told == []  # nothing is left to do
    assert not changed(dict(whole.trained), dict(finished.trained))


def test_the_rate_of_weights_falls_as_one_over_the_width_and_that_of_lora_does_not():
    assert [heal_rate(width, None) for width in (64, 256, 512, 1024)] == pytest.approx([1e-3, 1e-3, 5e-4, 2.5e-4])
    assert {heal_rate(width, 8) for width in (64, 1024)} == {2e-3}
