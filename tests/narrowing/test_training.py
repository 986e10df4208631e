"""The distance between two models and its gradients against plain autograd, and the loop that trains, on planted goals."""

import math
import resource
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowings import minimise
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

from dimscope.activations import output_head
from dimscope.errors import InvalidArgument
from dimscope.narrowing import training, training_state
from dimscope.narrowing.training import Objective, Schedule, kl_divergence, mean_kl
from dimscope.narrowing.training_state import Point, best_point
from dimscope.texts.windows import Window

IDS = torch.randint(3, 400, (3, 14), generator=torch.Generator().manual_seed(0))
V = 512
BLOCKS = {"one": (64 << 20, 256), "five by memory": (4 * V * 9 + 7, 256), "three by rows": (64 << 20, 16)}
# A Granite scales its logits, a Gemma 2 caps them; neither is narrowed, but the distance is that of any two models.
TRANSFORMED = {
    "granite": GraniteConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=0.25,
    ),
    "gemma2": Gemma2Config(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def kept_at_every_look(monkeypatch):
    """Writing small states would take a large share of such short runs, and most looks would not be kept."""
    monkeypatch.setattr(training, "WRITING_PAUSE", 0)


def window(ids: torch.Tensor, index: int = 0) -> Window:
    ones = torch.ones(len(ids), dtype=torch.int64)
    return Window(index, ids, ones.cumsum(0), ones, 0)


def shaken(model: Any, seed: int, size: float) -> Any:
    """Return the model with random changes, in place: matrices as they are made give hardly any logits, and no KL."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def pair(checkpoint) -> Callable[..., tuple[Any, Any]]:
    """Return `pair(family, **arguments)`: a student and its teacher, which differ in every weight, as float32 models."""

    def make(family: str, **arguments: Any) -> tuple[Any, Any]:
        if family in TRANSFORMED:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model: Any = AutoModelForCausalLM.from_config(TRANSFORMED[family])
        else:
            model = AutoModelForCausalLM.from_pretrained(checkpoint(family, **arguments))
        teacher = shaken(model, 1, 0.15)
        return shaken(deepcopy(teacher), 2, 0.05), teacher

    return make


def naive(student: Any, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the KL by torch itself, from all logits of both models at once, as the models hand them out."""
    with torch.no_grad():
        log_p = teacher(input_ids=ids).logits.flatten(0, 1).log_softmax(dim=1)
    log_q = student(input_ids=ids).logits.flatten(0, 1).log_softmax(dim=1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


# ---- the distance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("llama", False), ("llama", True), ("gemma", True), ("phi", False), ("gpt_neox", False), ("qwen2", True),
        ("granite", False), ("gemma2", True),
    ],
)  # fmt: skip
def test_the_distance_and_its_gradients_are_those_of_all_logits_at_once(pair, monkeypatch, family, tied, blocks):
    monkeypatch.setattr(output_head, "BLOCK_BYTES", BLOCKS[blocks][0])
    monkeypatch.setattr(output_head, "BLOCK_ROWS", BLOCKS[blocks][1])
    sizes = [len(rows) for rows in output_head.position_blocks(torch.arange(IDS.numel()), V)]
    assert sizes == {"one": [42], "five by memory": [9] * 4 + [6], "three by rows": [16, 16, 10]}[blocks]
    student, teacher = pair(family, tied=tied)
    loss = naive(student, teacher, IDS)
    loss.backward()
    expected = {name: p.grad for name, p in student.named_parameters()}
    assert float(loss.detach()) > 0.02
    assert all(g is not None and bool(g.abs().max() > 0) for name, g in expected.items() if "k_proj.bias" not in name)
    student.zero_grad()
    assert kl_divergence(student, teacher, IDS) == pytest.approx(float(loss.detach()), rel=1e-5)
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, p in student.named_parameters():
        # float32 sums in another order; the bias of keys has no gradient but for that
        torch.testing.assert_close(p.grad, expected[name], rtol=2e-4, atol=2e-6 * largest, msg=name)
    assert all(p.grad is None for p in teacher.parameters())


def test_without_gradients_none_are_left_and_the_value_is_the_same(pair):
    student, teacher = pair("phi")
    with torch.no_grad():
        alone = kl_divergence(student, teacher, IDS)
    assert all(p.grad is None for p in (*student.parameters(), *teacher.parameters()))
    assert alone == kl_divergence(student, teacher, IDS)


def test_gradients_add_up_over_calls_as_those_of_torch_do(pair):
    student, teacher = pair("llama")
    for _ in range(2):
        naive(student, teacher, IDS).backward()
    expected = [p.grad for p in student.parameters()]
    student.zero_grad()
    for _ in range(2):
        kl_divergence(student, teacher, IDS)
    for p, gradient in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=2e-4, atol=1e-6)


def test_a_model_is_at_no_distance_from_itself_and_the_distance_has_a_direction(pair):
    student, teacher = pair("llama")
    with torch.no_grad():
        assert kl_divergence(teacher, deepcopy(teacher), IDS) == 0
        there, back = kl_divergence(student, teacher, IDS), kl_divergence(teacher, student, IDS)
        assert there == pytest.approx(float(naive(student, teacher, IDS)), rel=1e-5)
        assert back == pytest.approx(float(naive(teacher, student, IDS)), rel=1e-5)
    assert abs(there - back) > 1e-3 * there


def test_in_bfloat16_the_distance_stays_near_and_gradients_are_float32(pair):
    student, teacher = pair("llama")
    exact = kl_divergence(student, teacher, IDS)
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    student.zero_grad()
    dtypes = []
    hook = student.get_output_embeddings().register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    low = kl_divergence(student, teacher, IDS, low=torch.bfloat16)
    hook.remove()
    assert dtypes == [torch.bfloat16]  # the head too, which takes the most time
    found = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert low != exact  # or nothing was computed in it
    assert low == pytest.approx(exact, rel=0.05)  # its 8 bits are 0.4 %, of each product
    assert found.dtype == torch.float32
    assert float(torch.nn.functional.cosine_similarity(expected, found, dim=0)) > 0.99


def test_the_mean_over_windows_weighs_a_short_last_batch_right(pair):
    student, teacher = pair("llama")
    windows = [window(ids) for ids in torch.randint(3, 400, (5, 9), generator=torch.Generator().manual_seed(3))]
    each = [float(naive(student, teacher, w.ids[None]).detach()) for w in windows]
    groups = [sum(each[:4]) / 4, each[4]]
    assert abs(sum(groups) / 2 - sum(each) / 5) > 1e-3 * each[0]  # what a mean of means would give is told apart
    for batch in (1, 2, 4, 5, 8):
        assert mean_kl(student, teacher, windows, batch) == pytest.approx(sum(each) / 5, rel=1e-5)
    assert all(p.grad is None for p in student.parameters())


# ---- the schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [40, 1000])
def test_the_rate_rises_over_the_first_steps_and_falls_along_a_cosine_to_nothing(steps):
    schedule = Schedule(steps, 0.3, 10)
    rates = [schedule.rate_at(i) for i in range(steps)]
    assert rates[0] == pytest.approx(0.03)
    assert rates[4] == pytest.approx(0.15 * math.cos(math.pi * 2 / steps) ** 2)  # (1 + cos 2a) / 2 = cos^2 a
    assert rates[steps // 2] == pytest.approx(0.15)
    assert rates[-1] == pytest.approx(0.3 * math.sin(math.pi / (2 * steps)) ** 2)
    assert rates[-1] < 0.3 * 2e-3
    top = rates.index(max(rates))
    assert 7 <= top <= 9
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def recorded(n: int, schedule: Schedule, steps: int) -> list[list[int]]:
    return list(islice(training._order(n, schedule), steps))


@pytest.mark.parametrize(("n", "batch"), [(7, 3), (4, 4), (3, 8), (1, 2), (10, 1)])
def test_every_window_is_seen_once_before_any_comes_again(n, batch):
    schedule = Schedule(100, 0.1, 1, batch=batch, seed=5)
    steps = recorded(n, schedule, 40)
    assert {len(step) for step in steps} == {batch}
    flat = [i for step in steps for i in step]
    rounds = [flat[i : i + n] for i in range(0, len(flat) - n + 1, n)]
    assert all(sorted(r) == list(range(n)) for r in rounds)
    assert steps == recorded(n, schedule, 40)
    if n > 4:
        assert steps != recorded(n, replace(schedule, seed=6), 40)
        assert rounds[0] != rounds[1]


# ---- the loop -------------------------------------------------------------------------------------------------------

TEXT = [window(torch.tensor([2 * i, 2 * i + 1]), i) for i in range(6)]


class Scripted:
    """A goal with one number x, a given gradient of each step, and a given answer of each look at held-out text."""

    def __init__(self, gradients: Callable[[int], float], looks: Sequence[float] | None = None) -> None:
        self.x = torch.zeros(1, requires_grad=True)
        self.gradients, self.looks = gradients, looks
        self.seen: list[torch.Tensor] = []
        self.held: list[float] = []  # x at every look

    def backward(self, ids: torch.Tensor) -> float:
        self.x.grad = torch.tensor([self.gradients(len(self.seen))])
        self.seen.append(ids)
        return float(len(self.seen) - 1)

    def look(self) -> float:
        self.held.append(float(self.x.detach()))
        return self.held[-1] if self.looks is None else self.looks[len(self.held) - 1]

    @property
    def goal(self) -> Objective:
        return Objective([self.x], self.backward, self.look)


@pytest.mark.parametrize("gradient", [lambda i: 1.0, lambda i: 1.0 if i % 2 else 1e6], ids=["even", "with outbursts"])
def test_each_step_is_as_long_as_its_rate_says_and_no_gradient_is_longer_than_one(gradient):
    """Adam under one gradient over and over moves by exactly the rate; outbursts that are clipped to 1 are that gradient."""
    schedule = Schedule(30, 0.1, 1, batch=2, patience=100)
    planted = Scripted(gradient)
    minimise(planted.goal, TEXT, schedule)
    way = [0.0]
    for step in range(30):
        way.append(way[-1] - schedule.rate_at(step))
    assert planted.held == pytest.approx(way, rel=1e-4)
    assert float(planted.x.detach()) == planted.held[-1]  # ever lower, so the last is the best


def test_steps_see_the_windows_in_order_and_points_tell_the_mean_loss_since_the_one_before():
    schedule = Schedule(10, 0.1, 4, batch=4, seed=3)
    planted = Scripted(lambda i: 1.0)
    told: list[Point] = []
    points = minimise(planted.goal, TEXT, schedule, announce=told.append)
    order = recorded(len(TEXT), schedule, 10)
    assert [ids.tolist() for ids in planted.seen] == [[TEXT[i].ids.tolist() for i in step] for step in order]
    # The loss of step i is i: of 0 to 3, of 4 to 7, and of 8 and 9, which is the end and looked at too.
    assert [(p.step, p.training) for p in points] == [(0, None), (4, 1.5), (8, 5.5), (10, 8.5)]
    assert [p.held_out for p in points] == planted.held
    assert told == points


def test_a_quadratic_is_brought_to_its_minimum():
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, generator=generator, requires_grad=True) for n in (3, 5)]
    target = [torch.randn(n, generator=generator) for n in (3, 5)]

    def loss() -> torch.Tensor:
        parts = [(x - y).square() @ torch.arange(1.0, 1 + len(x)) for x, y in zip(leaves, target, strict=True)]
        return parts[0] + parts[1]

    def backward(ids: torch.Tensor) -> float:
        loss().backward()
        return float(loss().detach())

    points = minimise(Objective(leaves, backward, lambda: float(loss().detach())), TEXT, Schedule(300, 0.1, 50))
    assert points[0].held_out > 1
    assert points[-1].held_out < 1e-6
    for x, y in zip(leaves, target, strict=True):
        torch.testing.assert_close(x.detach(), y, rtol=0, atol=1e-3)
    assert best_point(points).held_out == float(loss().detach())


@pytest.mark.parametrize(
    ("looks", "best"),
    [
        ([3.0, 1.0, 2.0, 0.5, 2.0, 4.0], 3),
        ([3.0, 1.0, 2.0, 1.0, 2.0, 1.5], 1),  # of equals the first
        ([1.0, 1.5, 2.0, 3.0, 4.0, 5.0], 0),  # training only hurts
        ([3.0, math.nan, 2.0, math.nan, 2.5, math.inf], 2),
        ([math.nan, math.nan, 7.0, -math.inf, 8.0, math.nan], 2),  # a KL below all numbers is none either
        ([math.nan] * 6, 0),
    ],
)
def test_what_is_left_is_the_best_that_was_looked_at_and_never_what_is_no_number(looks, best):
    planted = Scripted(lambda i: 1.0, looks)
    planted.x = torch.full((1,), 0.1, requires_grad=True)
    points = minimise(planted.goal, TEXT, Schedule(10, 0.1, 2, patience=100))
    assert len(set(planted.held)) == 6
    assert float(planted.x.detach()) == planted.held[best]
    assert points.index(best_point(points)) == best
    assert planted.held[0] == float(torch.tensor(0.1))  # the way it began is looked at before any step


@pytest.mark.parametrize(
    ("looks", "last"),
    [
        ([2.0, 1.0, *[3.0] * 20], 4),  # the best, and three after it
        ([1.0, *[3.0] * 20], 3),
        ([1.0, *[1.0] * 20], 3),  # as good is not better
        ([2.0, *[math.nan] * 20], 3),
        ([9.0, 8.0, 9.0, 9.0, 7.0, *[9.0] * 20], 7),
    ],
)
def test_it_stops_after_so_many_looks_without_a_new_best(looks, last):
    planted = Scripted(lambda i: 1.0, looks)
    points = minimise(planted.goal, TEXT, Schedule(200, 0.1, 5, patience=3))
    assert len(points) == last + 1
    assert len(planted.seen) == points[-1].step == 5 * last


# ---- on disk --------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """As if the machine went off."""


class Noisy:
    """A goal whose gradients depend on the windows, with two leaves; it is interrupted before a step, if asked to be."""

    def __init__(self, until: int | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.leaves = [torch.randn(n, generator=generator, requires_grad=True) for n in ((4, 3), (3,))]
        self.begun = [x.detach().clone() for x in self.leaves]
        self.until, self.steps = until, 0

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        x, angles = ids.float(), torch.arange(1.0, 5)
        rows = (x[:, :1] * angles).sin() + (x[:, 1:] * angles).cos()
        return (rows @ self.leaves[0] - self.leaves[1]).square().mean() + 0.1 * self.leaves[1].cos().sum()

    def backward(self, ids: torch.Tensor) -> float:
        if self.steps == self.until:
            raise Interrupted
        self.steps += 1
        loss = self.loss(ids)
        loss.backward()
        return float(loss.detach())

    def look(self) -> float:
        with torch.no_grad():
            return abs(float(self.loss(torch.stack([w.ids for w in TEXT[:3]]))) - 0.6)  # the best lies on the way

    def run(self, schedule: Schedule, **options: Any) -> list[Point]:
        return minimise(Objective(self.leaves, self.backward, self.look), TEXT, schedule, **options)


SCHEDULE = Schedule(23, 0.3, 4, patience=100, batch=4, seed=2)


@pytest.fixture(scope="module")
def whole() -> tuple[list[Point], list[torch.Tensor]]:
    """Return the points and leaves of a run that nothing interrupts."""
    goal = Noisy()
    points = goal.run(SCHEDULE)
    assert best_point(points).step == 8
    return points, [x.detach() for x in goal.leaves]


def same(goal: Noisy, points: Sequence[Point], whole: tuple[list[Point], list[torch.Tensor]]) -> bool:
    return list(points) == whole[0] and all(map(torch.equal, goal.leaves, whole[1]))


@pytest.mark.parametrize("until", [0, 3, 4, 9, 20, 22])
def test_interrupted_at_a_step_and_run_again_it_comes_to_the_same_numbers(tmp_path, whole, until):
    with pytest.raises(Interrupted):
        Noisy(until).run(SCHEDULE, store=tmp_path / "run", recipe="a")
    again = Noisy()
    points = again.run(SCHEDULE, store=tmp_path / "run", recipe="a")
    assert same(again, points, whole)
    assert again.steps == 23 - until // 4 * 4  # it goes on from the last look


def test_interrupted_again_and_again_it_comes_to_the_same_numbers(tmp_path, whole):
    for _ in range(4):
        with pytest.raises(Interrupted):
            Noisy(5).run(SCHEDULE, store=tmp_path, recipe="a")
    again = Noisy()
    assert same(again, again.run(SCHEDULE, store=tmp_path, recipe="a"), whole)
    assert again.steps == 23 - 16


@pytest.mark.parametrize("look", [0, 1, 3, 6])
def test_interrupted_at_a_look_and_run_again_it_comes_to_the_same_numbers(tmp_path, whole, look):
    seen: list[Point] = []

    def stop(point: Point) -> None:
        seen.append(point)
        if len(seen) == look + 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        Noisy().run(SCHEDULE, store=tmp_path, recipe="a", announce=stop)
    again = Noisy()
    assert same(again, again.run(SCHEDULE, store=tmp_path, recipe="a"), whole)


def test_a_run_that_ended_is_not_run_again(tmp_path, whole):
    Noisy().run(SCHEDULE, store=tmp_path, recipe="a")
    again = Noisy()
    assert same(again, again.run(SCHEDULE, store=tmp_path, recipe="a"), whole)
    assert again.steps == 0
    assert [p.name for p in tmp_path.iterdir()] == [training_state.FILE]


def test_states_are_written_only_as_often_as_there_is_time_for_and_what_follows_them_is_done_again(
    tmp_path, monkeypatch, whole
):
    monkeypatch.setattr(training, "WRITING_PAUSE", 1e9)
    first = Noisy()
    with pytest.raises(Interrupted):
        Noisy(14).run(SCHEDULE, store=tmp_path, recipe="a")
    assert same(first, first.run(SCHEDULE, store=tmp_path, recipe="a"), whole)
    assert first.steps == 23 - 4  # only the first look was kept
    again = Noisy()
    assert same(again, again.run(SCHEDULE, store=tmp_path, recipe="a"), whole)
    assert again.steps == 0  # the end always is


def test_a_run_that_lost_patience_is_not_run_on(tmp_path):
    schedule = Schedule(200, 0.1, 5, patience=2)
    looks = [2.0, 1.0, 3.0, 3.0]
    first, again = (Scripted(lambda i: 1.0, looks) for _ in range(2))
    points = minimise(first.goal, TEXT, schedule, store=tmp_path)
    assert minimise(again.goal, TEXT, schedule, store=tmp_path) == points
    assert (len(first.seen), len(again.seen), len(again.held)) == (15, 0, 0)
    assert torch.equal(first.x, again.x)
    assert float(again.x.detach()) == first.held[1]


@pytest.mark.parametrize(
    ("recipe", "schedule"),
    [
        ("b", SCHEDULE), ("", SCHEDULE), ("a", replace(SCHEDULE, rate=0.31)), ("a", replace(SCHEDULE, seed=3)),
        ("a", replace(SCHEDULE, steps=24)), ("a", replace(SCHEDULE, batch=3)), ("a", replace(SCHEDULE, every=5)),
    ],
)  # fmt: skip
def test_the_state_of_another_recipe_is_not_gone_on_from(tmp_path, recipe, schedule):
    with pytest.raises(Interrupted):
        Noisy(9).run(SCHEDULE, store=tmp_path, recipe="a")
    fresh, other = Noisy(), Noisy()
    expected = fresh.run(schedule)
    assert same(other, other.run(schedule, store=tmp_path, recipe=recipe), (expected, fresh.leaves))
    assert other.steps == schedule.steps


@pytest.mark.parametrize("damage", ["empty", "cut", "other", "bare"])
def test_a_damaged_state_is_not_gone_on_from_and_is_replaced(tmp_path, whole, damage):
    with pytest.raises(Interrupted):
        Noisy(9).run(SCHEDULE, store=tmp_path, recipe="a")
    state = tmp_path / training_state.FILE
    data = state.read_bytes()
    if damage == "bare":  # tensors of another program, and no word of where they come from
        save_file({"x": torch.zeros(3)}, state)
    else:
        state.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "other": b"not tensors at all" * 9}[damage])
    again = Noisy()
    assert same(again, again.run(SCHEDULE, store=tmp_path, recipe="a"), whole)
    assert again.steps == 23
    last = Noisy()
    assert same(last, last.run(SCHEDULE, store=tmp_path, recipe="a"), whole)
    assert last.steps == 0


@pytest.mark.parametrize("missing", ["0.exp_avg_sq", "0.step", "1.now", "1.exp_avg", "0.best", "1.best"])
def test_a_state_that_lacks_a_tensor_is_not_gone_on_from(tmp_path, whole, missing):
    with pytest.raises(Interrupted):
        Noisy(9).run(SCHEDULE, store=tmp_path, recipe="a")
    with safe_open(tmp_path / training_state.FILE, "pt") as held:
        told, tensors = held.metadata(), {name: held.get_tensor(name) for name in held.keys() if name != missing}  # noqa: SIM118
    save_file(tensors, tmp_path / training_state.FILE, metadata=told)
    again = Noisy()
    assert same(again, again.run(SCHEDULE, store=tmp_path, recipe="a"), whole)
    assert again.steps == 23


def test_a_state_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "run").write_text("a file where a folder should be")
    with pytest.raises(InvalidArgument, match=r"run.*cannot be written"):
        Noisy().run(SCHEDULE, store=tmp_path / "run" / "norms")


def test_a_full_disk_is_told_in_one_line_and_the_state_before_it_stays(tmp_path, whole):
    """A limit on the size of files stands for the full disk: the same call of the system fails in the same place."""
    with pytest.raises(Interrupted):
        Noisy(9).run(SCHEDULE, store=tmp_path, recipe="a")
    before, limits = (tmp_path / training_state.FILE).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # Python ignores the signal, so that writes fail
    try:
        with pytest.raises(InvalidArgument, match="cannot be written"):
            Noisy().run(SCHEDULE, store=tmp_path, recipe="a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / training_state.FILE).read_bytes() == before
    again = Noisy()
    assert same(again, again.run(SCHEDULE, store=tmp_path, recipe="a"), whole)


def test_without_a_store_nothing_is_written(tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    goal = Noisy()
    assert same(goal, goal.run(SCHEDULE), whole)
    assert not list(Path().iterdir())
