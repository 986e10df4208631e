"""A pass that was interrupted, split or run in other batches gives the sums of one pass, and leaves the model alone."""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import TEXT
from test_collection import alike, facts
from transformers import AutoTokenizer

from dimscope.activations.collection import Collection, load_collection
from dimscope.activations.layer_selection import select_sites
from dimscope.activations.passes import PassSettings, run_pass
from dimscope.activations.sites import find_sites
from dimscope.errors import InvalidArgument, NonFiniteActivations
from dimscope.texts.texts import Text
from dimscope.texts.windows import Window, middle_windows, shuffle_within, stream_windows

PAGE = Text("page", lambda: iter([TEXT]), {}, None)
ONE = PassSettings(batch=2, reservoir=40)
FAMILIES = ("gpt2", "llama")


class Stopped(Exception):
    """What a test raises in the middle of a pass."""


@pytest.fixture
def model_of(checkpoint) -> Callable[..., Any]:
    """Return `model_of(family, **arguments)`: a model of stock transformers, of the test's own."""
    transformers.utils.logging.disable_progress_bar()

    def load(family: str, **arguments: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family), **arguments).eval()

    return load


@pytest.fixture
def windows_of(checkpoint) -> Callable[..., list[Window]]:
    """Return `windows_of(family, count=9, length=24)`: windows of the page by the family's tokenizer."""

    def read(family: str, count: int = 9, length: int = 24) -> list[Window]:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint(family))
        return middle_windows(PAGE, tokenizer, length=length, count=count)

    return read


def run(
    model: Any, windows: Sequence[Window] | Iterator[Window], settings: PassSettings = ONE, **more: Any
) -> Collection:
    return run_pass(model, find_sites(model), windows, settings, **more)


def stopping(after: int) -> Callable[[Sequence[Window]], None]:
    """Return a progress that raises with the batch of this number, counted from 1."""
    left = [after]

    def progress(windows: Sequence[Window]) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Stopped

    return progress


def lengths_of(windows: Sequence[Window], lengths: Sequence[int]) -> list[Window]:
    cut = zip(windows, lengths, strict=False)
    return [replace(w, **{name: getattr(w, name)[:n] for name in ("ids", "ends", "n_bytes")}) for w, n in cut]


def hooks(model: Any) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, name)) for m in model.modules() for name in names)


# ---- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sums_do_not_depend_on_the_batches(model_of, windows_of, family):
    model, windows = model_of(family), windows_of(family)
    whole = run(model, windows, replace(ONE, batch=1))
    assert whole.complete
    assert (whole.n_batches, whole.n_windows, whole.n_tokens) == (9, 9, 9 * 24)
    for size in (2, 4, 100):
        found = run(model, windows, replace(ONE, batch=size))
        assert found.n_batches == -(-9 // size)
        alike(found, whole, share=2e-5)  # the kernels sum over other shapes in float32


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_of_different_lengths_may_be_in_one_batch(model_of, windows_of, family):
    model = model_of(family)
    windows = lengths_of(windows_of(family), [24, 2, 9, 17, 24, 3, 11, 5, 20])
    whole = run(model, windows, replace(ONE, batch=1))
    for size in (2, 9):
        alike(run(model, windows, replace(ONE, batch=size)), whole, share=2e-5)


def test_windows_are_read_as_they_are_needed_and_progress_hears_of_each_batch(model_of, windows_of):
    model, pulled, heard = model_of("llama"), [], []

    def given() -> Iterator[Window]:
        for window in windows_of("llama"):
            pulled.append(window.index)
            yield window

    def progress(windows: Sequence[Window]) -> None:
        heard.append([w.index for w in windows])
        assert pulled == [i for group in heard for i in group]

    run(model, given(), progress=progress)
    assert heard == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


def test_a_streamed_text_is_a_pass_too(model_of, checkpoint):
    model, tokenizer = model_of("llama"), AutoTokenizer.from_pretrained(checkpoint("llama"))
    windows = list(stream_windows(PAGE, tokenizer, length=50))
    found = run(model, stream_windows(PAGE, tokenizer, length=50))
    assert facts(found) == facts(run(model, windows))
    assert found.n_tokens == 50 * len(windows)


def test_without_windows_there_is_nothing(model_of, tmp_path):
    found = run(model_of("llama"), [], state=tmp_path / "state")
    assert (found.complete, found.n_tokens, found.n_windows) == (True, 0, 0)
    assert facts(load_collection(tmp_path / "state")) == facts(found)


def test_without_logits_the_hidden_states_are_the_same(model_of, windows_of):
    model, windows = model_of("gpt2"), windows_of("gpt2")
    found, whole = run(model, windows, replace(ONE, logits=False)), run(model, windows)
    assert int(found.predictions.counts.sum()) == 0
    ignored = ("counts", "sums", "n_bytes")
    assert {k: v for k, v in facts(found).items() if k not in ignored} == {
        k: v for k, v in facts(whole).items() if k not in ignored
    }


def test_only_the_chosen_sites_are_kept(model_of, windows_of):
    model, windows = model_of("llama"), windows_of("llama")
    found = run_pass(model, select_sites(find_sites(model), "1,norm"), windows, ONE)
    assert list(found.sites) == list(found.reservoir.rows) == [1, 3]
    whole = facts(run(model, windows))
    assert all(whole[key] == value for key, value in facts(found).items())


# ---- interrupted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "after"), [("gpt2", 1), ("llama", 4), ("llama", 5)])
def test_a_pass_that_was_stopped_goes_on_to_the_same_sums_bit_for_bit(model_of, windows_of, tmp_path, family, after):
    model, windows, state = model_of(family), windows_of(family), tmp_path / "deep" / "state.safetensors"
    often = replace(ONE, checkpoint_every=0)
    with pytest.raises(Stopped):
        run(model, windows, often, state=state, progress=stopping(after))
    assert state.exists() == (after > 1)  # progress comes before the checkpoint of its batch
    if after > 1:
        held = load_collection(state)
        assert 1 <= held.n_batches < after
        assert not held.complete
    heard: list[int] = []
    found = run(model, windows, often, state=state, progress=lambda group: heard.append(len(group)))
    assert facts(found) == facts(run(model, windows))
    assert facts(load_collection(state)) == facts(found)
    assert sum(heard) == 9  # what was done before is progress as well
    assert [p.name for p in state.parent.iterdir()] == [state.name]


def test_a_pass_may_be_stopped_again_and_again(model_of, windows_of, tmp_path):
    model, windows, state = model_of("gpt2"), windows_of("gpt2"), tmp_path / "state"
    often, seen = replace(ONE, batch=1, checkpoint_every=0), []
    for after in range(2, 10):
        with pytest.raises(Stopped):
            run(model, windows, often, state=state, progress=stopping(after))
        seen.append(load_collection(state).n_batches)
    assert seen == sorted(seen)
    assert facts(run(model, windows, often, state=state)) == facts(run(model, windows, replace(ONE, batch=1)))


def test_what_was_done_is_not_run_again(model_of, windows_of, tmp_path):
    model, windows, state = model_of("llama"), windows_of("llama"), tmp_path / "state"
    with pytest.raises(Stopped):
        run(model, windows, replace(ONE, checkpoint_every=0), state=state, progress=stopping(4))
    done = load_collection(state).n_batches
    batches: list[int] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: batches.append(len(kwargs["input_ids"])), with_kwargs=True)
    run(model, windows, state=state)
    assert batches == [2, 2, 2, 2, 1][done:]


def test_a_finished_pass_is_only_read(model_of, windows_of, tmp_path):
    model, state = model_of("llama"), tmp_path / "state"
    whole = run(model, windows_of("llama"), state=state)
    written = state.read_bytes()

    def never() -> Iterator[Window]:
        raise AssertionError("a window was read")
        yield

    def silent(windows: Sequence[Window]) -> None:
        raise AssertionError("progress was called")

    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    found = run(model, never(), state=state, progress=silent)
    assert facts(found) == facts(whole)
    assert state.read_bytes() == written


def test_checkpoints_are_no_more_often_than_asked(model_of, windows_of, tmp_path):
    model, windows, state = model_of("llama"), windows_of("llama"), tmp_path / "state"
    with pytest.raises(Stopped):
        run(model, windows, replace(ONE, checkpoint_every=3600), state=state, progress=stopping(5))
    assert not state.exists()
    run(model, windows, replace(ONE, checkpoint_every=3600), state=state)
    assert load_collection(state).complete


# ---- split ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "n"), [("gpt2", 2), ("llama", 7)])
def test_shards_merge_into_the_whole(model_of, windows_of, tmp_path, family, n):
    model, windows = model_of(family), windows_of(family)
    whole, states = run(model, windows), [tmp_path / f"{i}" for i in range(n)]
    for i in range(n):
        part = run(model, windows, replace(ONE, shard=(i, n)), state=states[i])
        assert part.complete
        assert part.n_windows == sum(len(windows[b : b + 2]) for b in range(2 * i, 9, 2 * n))
    first, *rest = map(load_collection, states)
    for part in rest:
        first.merge(part)
    alike(first, whole)
    assert first.complete
    assert first.n_batches == whole.n_batches


def test_shards_in_memory_merge_into_the_whole(model_of, windows_of):
    model, windows = model_of("gpt2"), windows_of("gpt2")
    one, other = (run(model, windows, replace(ONE, shard=(i, 2))) for i in range(2))
    one.merge(other)
    alike(one, run(model, windows))


def test_a_shard_that_was_stopped_goes_on(model_of, windows_of, tmp_path):
    model, windows, state = model_of("gpt2"), windows_of("gpt2"), tmp_path / "state"
    for i in range(2):
        shard = replace(ONE, batch=1, shard=(i, 2), checkpoint_every=0)
        with pytest.raises(Stopped):
            run(model, windows, shard, state=state, progress=stopping(3))
        assert 1 <= load_collection(state).n_batches < 3
        assert facts(run(model, windows, shard, state=state)) == facts(run(model, windows, shard))
        state.unlink()


# ---- the reservoir -------------------------------------------------------------------------------------------------


def test_the_same_places_under_shuffles_batches_shards_and_interruptions(model_of, windows_of, tmp_path):
    model, windows, state = model_of("llama"), windows_of("llama"), tmp_path / "state"
    settings = replace(ONE, reservoir=25, seed=5)
    whole = run(model, windows, settings).reservoir
    places = set(whole.ends.tolist())
    assert len(places) == len(whole.keys) == 25
    assert {len(torch.cat(rows)) for rows in whole.rows.values()} == {25}
    others = [
        run(model, [shuffle_within(w, 1, 2) for w in windows], settings),
        run(model, windows, replace(settings, batch=1)),
        run(model, windows, replace(settings, batch=9)),
        run(model_of("llama", dtype=torch.bfloat16), windows, settings),
    ]
    one, other = (run(model, windows, replace(settings, shard=(i, 2)), state=tmp_path / f"{i}") for i in range(2))
    one, other = load_collection(tmp_path / "0"), load_collection(tmp_path / "1")
    one.merge(other)
    with pytest.raises(Stopped):
        run(model, windows, replace(settings, checkpoint_every=0), state=state, progress=stopping(3))
    others += [one, run(model, windows, settings, state=state)]
    for found in others:
        assert set(found.reservoir.ends.tolist()) == places
    assert set(run(model, windows, replace(settings, seed=6)).reservoir.ends.tolist()) != places
    firsts = {int(w.ends[0]) for w in windows}
    assert not firsts & places


def test_a_reservoir_larger_than_the_text_holds_all_places_but_the_first(model_of, windows_of):
    windows = windows_of("gpt2")
    found = run(model_of("gpt2"), windows, replace(ONE, reservoir=10_000)).reservoir.sample()
    assert found.ends.tolist() == [end for w in windows for end in w.ends[1:].tolist()]


# ---- the model is left as it was -----------------------------------------------------------------------------------


def everything(model: Any) -> dict[str, Any]:
    """Return copies of all that a pass could change."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "weights": {name: t.detach().clone() for name, t in [*tensors, *model.state_dict().items()]},
        "gradients": {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in model.named_modules()},
        "hooks": hooks(model),
        "config": copy.deepcopy(model.config.to_dict()),
        "grad mode": torch.is_grad_enabled(),
        "random": torch.get_rng_state(),
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in one["weights"].items():
        assert torch.equal(value.view(torch.uint8), other["weights"][name].view(torch.uint8)), name
    assert torch.equal(one["random"], other["random"])
    rest = [name for name in one if name not in ("weights", "random")]
    assert {name: one[name] for name in rest} == {name: other[name] for name in rest}


def with_mixed_modes(model: Any) -> Any:
    """Return the model with some modules in training mode, some not, and some weights that take no gradient."""
    model.train()
    for number, module in enumerate(model.modules()):
        module.training = number % 3 != 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    return model


@pytest.mark.parametrize(("family", "mode"), [("gpt2", "training"), ("llama", "mixed"), ("llama", "evaluation")])
def test_a_model_is_the_same_after_a_pass(model_of, windows_of, family, mode):
    model, windows = model_of(family), windows_of(family)
    model = with_mixed_modes(model) if mode == "mixed" else model.train(mode == "training")
    before, given = everything(model), copy.deepcopy(windows)
    run(model, windows)
    same(everything(model), before)
    for window, other in zip(windows, given, strict=True):
        assert all(torch.equal(getattr(window, n), getattr(other, n)) for n in ("ids", "ends", "n_bytes"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_the_same_after_a_pass_that_failed(model_of, windows_of, family):
    model, windows = with_mixed_modes(model_of(family)), windows_of(family)
    before = everything(model)
    with pytest.raises(Stopped):
        run(model, windows, progress=stopping(2))
    same(everything(model), before)
    with torch.no_grad():  # and one that fails inside the forward pass
        next(model.get_decoder().named_parameters())[1][int(windows[4].ids[7])] = float("nan")
    before = everything(model)
    with pytest.raises(NonFiniteActivations):
        run(model, windows)
    same(everything(model), before)


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_dropout_has_no_part(model_of, windows_of, family):
    rates = {
        "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
        "opt": {"dropout": 0.5, "attention_dropout": 0.5},
        "phi": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5},
    }[family]
    model, windows = model_of(family, **rates), windows_of("gpt2")
    expected = facts(run(model, windows))
    with torch.no_grad():
        ids = windows[0].ids[None]
        quiet, loud = model(ids).logits, model.train()(ids).logits
    assert not torch.allclose(quiet, loud, atol=1e-3)  # or the test would say nothing
    assert facts(run(model, windows)) == expected
    assert model.training


def test_the_weights_still_train_after_a_pass(model_of, windows_of):
    model, windows = model_of("gpt2").train(), windows_of("gpt2")
    run(model, windows)
    ids = windows[0].ids[None]
    model(ids, labels=ids).loss.backward()
    assert float(model.transformer.wte.weight.grad.abs().sum()) > 0


# ---- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_weights_that_are_no_numbers_are_named_by_layer_and_window(model_of, windows_of, tmp_path, batch):
    model, windows, state = model_of("llama"), windows_of("llama"), tmp_path / "state"
    spoiled = int(windows[5].ids[9])
    first = next(w.index for w in windows if spoiled in w.ids.tolist())
    assert first >= 2  # so that there is a checkpoint
    with torch.no_grad():
        model.model.embed_tokens.weight[spoiled, 0] = float("nan")
    of = f"window {first}" if batch == 1 else f"windows {first // 2 * 2} to {first // 2 * 2 + 1}"
    with pytest.raises(NonFiniteActivations, match=rf"at layer 0 \(embeddings\), {of}: the weights are damaged"):
        run(model, windows, replace(ONE, batch=batch, checkpoint_every=0), state=state)
    held = load_collection(state)  # of sound batches only
    assert held.n_batches <= first // batch
    assert all(np.isfinite(s.unit_total.numpy()).all() for s in held.sites.values() if s.unit_total is not None)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)  # fmt: skip
def test_a_batch_that_does_not_fit_is_one_line(model_of, windows_of, error):
    model = model_of("llama")

    def fail(module: Any, args: Any, result: torch.Tensor) -> None:
        if result.shape[1] == 24:
            raise error

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(
        InvalidArgument, match=r"^2 x 24 tokens at once: out of memory; take a smaller `length` or `batch`"
    ):
        run(model.train(), windows_of("llama"))
    handle.remove()
    assert hooks(model) == 0
    assert model.training


def test_any_other_error_is_shown_as_it_is(model_of, windows_of):
    windows = windows_of("llama")
    bad = [replace(windows[0], ids=windows[0].ids - 10_000)]
    with pytest.raises(IndexError):
        run(model_of("llama"), bad)


def test_ids_that_the_model_has_no_rows_for(model_of, windows_of):
    bad = [replace(windows_of("llama")[0], ids=windows_of("llama")[0].ids + 10_000)]
    with pytest.raises(InvalidArgument, match=r"the id 10\d\d\d, and the table of the model has \d+ rows"):
        run(model_of("llama"), bad)


def test_a_state_that_cannot_be_written_is_one_line(model_of, windows_of, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InvalidArgument, match="cannot be written"):
        run(model_of("llama"), windows_of("llama"), state=Path(tmp_path / "file" / "state"))


def test_a_full_disk_is_one_line_and_the_state_before_stays(model_of, windows_of, tmp_path):
    """A limit on the size of files stands for the full disk: the same call of the system fails in the same place."""
    model, windows, state = model_of("gpt2"), windows_of("gpt2"), tmp_path / "state"
    with pytest.raises(Stopped):
        run(model, windows, replace(ONE, checkpoint_every=0), state=state, progress=stopping(3))
    before, limits = state.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))  # Python ignores the signal, so that writes fail
    try:
        with pytest.raises(InvalidArgument, match=r"state cannot be written: "):
            run(model, windows, state=state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert state.read_bytes() == before
    assert facts(run(model, windows, state=state)) == facts(run(model, windows))
