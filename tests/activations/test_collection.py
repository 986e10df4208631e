"""What is kept of a pass is what numpy computes in float64 from the hidden states that transformers itself returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from matrices import gaussian
from models import TEXT
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoTokenizer

from dimscope.activations import collection as module
from dimscope.activations.collection import (
    Collection,
    collect,
    empty_collection,
    load_collection,
    save_collection,
)
from dimscope.activations.predictions import Predictions
from dimscope.activations.reservoir import Reservoir
from dimscope.activations.site_sums import KINDS, Kind, SiteSums
from dimscope.activations.sites import find_sites
from dimscope.errors import NonFiniteActivations
from dimscope.texts.texts import Text
from dimscope.texts.windows import Window, middle_windows, shuffle_within
from dimscope.vectors.moments import Accumulator, Moments, combined

PAGE = Text("page", lambda: iter([TEXT]), {}, None)
PLANTED = 7  # a token whose vector has one huge coordinate, in the models that are asked for it
DIM = 32
LAST_BLOCK = {"gpt2": "transformer.h.1", "llama": "model.layers.1", "opt": "model.decoder.layers.1"}


@pytest.fixture
def opened(checkpoint) -> Callable[..., Any]:
    """Return `opened(family, planted=0, **arguments)`: a model of stock transformers, of the test's own."""
    transformers.utils.logging.disable_progress_bar()

    def load(family: str, planted: float = 0, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family, **arguments), dtype=dtype).eval()
        if planted:
            with torch.no_grad():
                model.get_input_embeddings().weight[PLANTED, 3] = planted
        return model

    return load


def made_windows(lengths: Sequence[int], planted: Sequence[Sequence[int]] = (), n_prefix: int = 0) -> list[Window]:
    """Return windows of random tokens, three bytes each, with the planted token at the given places of each."""
    generator, windows, begin = torch.Generator().manual_seed(1), [], 0
    for index, length in enumerate(lengths):
        ids = torch.randint(8, 500, (length,), generator=generator)
        ids[list(planted[index]) if index < len(planted) else []] = PLANTED
        n_bytes = torch.tensor([0] * n_prefix + [3] * (length - n_prefix))
        ends = begin + n_bytes.cumsum(0)
        windows.append(Window(index, ids, ends, n_bytes, n_prefix))
        begin = int(ends[-1])
    return windows


def collected(
    model: Any, windows: Sequence[Window], size: int = 4, *, reservoir: int = 30, seed: int = 0
) -> Collection:
    sites = find_sites(model)
    into = empty_collection(model, sites, reservoir, seed)
    for start in range(0, len(windows), size):
        collect(model, windows[start : start + size], sites, into)
    return into


def facts(of: Collection) -> dict[str, Any]:
    """Return all that a collection holds, by name, as plain lists: equal where it is equal bit for bit."""
    found: dict[str, Any] = {name: getattr(of, name) for name in ("unique", "n_tokens", "n_batches", "complete")}
    found |= {"seen": of.seen.tolist(), "size": of.reservoir.size, "seed": of.reservoir.seed}
    found |= {name: getattr(of.reservoir, name).tolist() for name in ("keys", "ends", "tokens", "windows")}
    for layer, rows in of.reservoir.rows.items():
        found[f"reservoir {layer}"] = torch.cat(rows).tolist()
    predictions = of.predictions
    found |= {"counts": predictions.counts.tolist(), "sums": predictions.by_window.stacked().tolist()}
    found |= {"vocab_size": predictions.vocab_size, "n_bytes": predictions.n_bytes}
    for layer, sums in of.sites.items():
        names = ("name", "dim", "unit_count", "n_massive", "largest")
        found |= {f"{layer} {name}": getattr(sums, name) for name in names}
        found[f"{layer} unit_total"] = None if sums.unit_total is None else sums.unit_total.tolist()
        for kind, part in sums.parts.items():
            held = part.result()
            numbers = (held.total, held.gram) if isinstance(held, Moments) else (held,)
            found[f"{layer} {kind}"] = [part.count, *(t.tolist() for t in numbers)]
    return found


# ---- the oracle ----------------------------------------------------------------------------------------------------


@dataclass
class Expected:
    """What one site should hold, from its rows in float64."""

    rows: dict[Kind, np.ndarray]
    n_massive: int
    largest: float

    @property
    def all_rows(self) -> np.ndarray:
        return np.concatenate(list(self.rows.values()))


def stock_hidden_states(model: Any, batch: Sequence[Window]) -> dict[int, torch.Tensor]:
    """Return transformers' own hidden states of one batch, and by one hook the output of the last block."""
    lengths = torch.tensor([len(w.ids) for w in batch])
    ids = torch.nn.utils.rnn.pad_sequence([w.ids for w in batch], batch_first=True)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    caught = []
    last = model.get_submodule(LAST_BLOCK[model.config.model_type])
    handle = last.register_forward_hook(lambda m, args, out: caught.append(out if torch.is_tensor(out) else out[0]))
    options = {} if bool(mask.all()) else {"attention_mask": mask.long()}
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False, **options).hidden_states
    handle.remove()
    return {0: states[0], 1: states[1], 2: caught[0], 3: states[2]}


def expected_of(model: Any, batches: Sequence[Sequence[Window]]) -> dict[int, Expected]:
    """Return what every site should hold, window by window in numpy."""
    rows: dict[int, dict[Kind, list[np.ndarray]]] = {layer: {kind: [] for kind in KINDS} for layer in range(4)}
    n_massive, largest = dict.fromkeys(range(4), 0), dict.fromkeys(range(4), 0.0)
    for batch in batches:
        for layer, states in stock_hidden_states(model, batch).items():
            for window, hidden in zip(batch, states, strict=True):
                x = hidden[: len(window.ids)].double().numpy()
                sizes = np.abs(x)
                median = np.sort(sizes, axis=None)[(sizes.size - 1) // 2]
                massive = sizes > max(100, 1000 * median)
                n_massive[layer] += int(massive.sum())
                largest[layer] = max(largest[layer], float(sizes.max()))
                for place, row in enumerate(x):
                    rows[layer][place == 0, bool(massive[place].any())].append(row)
    return {
        layer: Expected(
            {kind: np.array(found).reshape(-1, DIM) for kind, found in of_kinds.items()},
            n_massive[layer],
            largest[layer],
        )
        for layer, of_kinds in rows.items()
    }


def close(value: torch.Tensor, expected: np.ndarray, share: float) -> None:
    """Compare to a share of the largest entry: entries near zero have no digits of their own."""
    np.testing.assert_allclose(
        value.double().numpy(), expected, rtol=0, atol=share * np.abs(expected).max(initial=1e-30)
    )


def check_rows(held: torch.Tensor | Moments, rows: np.ndarray, share: float) -> None:
    if len(rows) <= DIM:
        assert isinstance(held, torch.Tensor)
        assert held.shape == rows.shape
        order, wanted = np.lexsort(held.double().numpy().T), np.lexsort(rows.T)
        close(held[torch.from_numpy(order)], rows[wanted], share)
        return
    assert isinstance(held, Moments)
    assert held.count == len(rows)
    close(held.total, rows.sum(axis=0), share)
    close(held.gram, rows.T @ rows, share)


def check(found: Collection, expected: dict[int, Expected], share: float = 1e-12) -> None:
    """Compare every sum of every site."""
    assert list(found.sites) == list(expected)
    for layer, wanted in expected.items():
        sums = found.sites[layer]
        assert sums.count == len(wanted.all_rows) == found.n_tokens
        assert (sums.n_massive, sums.largest) == (wanted.n_massive, pytest.approx(wanted.largest, rel=share * 1e3))
        for kind in KINDS:
            check_rows(sums.part(kind).result(), wanted.rows[kind], share)
        for chosen in ([Kind(False, False), Kind(False, True)], [Kind(False, False), Kind(True, False)], list(KINDS)):
            every = combined(sums.part(kind) for kind in chosen)
            check_rows(every, np.concatenate([wanted.rows[kind] for kind in chosen]), share)
        norms = np.linalg.norm(wanted.all_rows, axis=1)
        assert sums.unit_total is not None
        assert sums.unit_count == int((norms > 0).sum())
        units = wanted.all_rows[norms > 0] / norms[norms > 0, None]
        np.testing.assert_allclose(sums.unit_total.numpy(), units.sum(axis=0), rtol=0, atol=share * max(len(units), 1))


# ---- sums of a pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "planted", "size", "dtype"),
    [
        ("gpt2", 0, 1, torch.float32), ("gpt2", 3000.0, 3, torch.float32), ("llama", 3000.0, 1, torch.float32),
        ("llama", 0, 3, torch.bfloat16), ("gpt2", 3000.0, 3, torch.float16),
    ],
)  # fmt: skip
def test_sums_are_those_of_numpy_on_stock_hidden_states(opened, family, planted, size, dtype):
    model = opened(family, planted, dtype, tied=False)
    windows = made_windows([20] * 6, [[0], [4, 11], [], [0, 7], [3]])
    found = collected(model, windows, size)
    expected = expected_of(model, [windows[i : i + size] for i in range(0, 6, size)])
    check(found, expected)
    if planted:  # or the kinds would say nothing
        assert all(len(expected[0].rows[kind]) > 0 for kind in KINDS)
        assert expected[1].n_massive > 0
    assert found.n_windows == 6
    assert found.n_batches == 6 // size
    assert found.unique == [len(set(w.ids.tolist())) for w in windows]
    assert found.seen.nonzero().squeeze(1).tolist() == sorted({i for w in windows for i in w.ids.tolist()})


@pytest.mark.parametrize(
    ("lengths", "rows"), [([20], True), ([32], True), ([33], True), ([34], False), ([20, 20], False)]
)
def test_few_rows_are_kept_as_they_are(opened, lengths, rows):
    model, windows = opened("llama"), made_windows(lengths)
    found = collected(model, windows)
    check(found, expected_of(model, [windows]))
    assert (
        isinstance(found.sites[1].part(Kind(False, False)).result(), torch.Tensor) == rows
    )  # all but the first of each window


@pytest.mark.parametrize(("family", "planted"), [("gpt2", 3000.0), ("llama", 0), ("opt", 3000.0)])
def test_windows_of_different_lengths_give_the_sums_that_they_give_alone(opened, family, planted):
    model = opened(family, planted, tied=False)
    with torch.no_grad():  # what stands in the padding is larger than anything else
        model.get_input_embeddings().weight[0] = 1e4
    windows = made_windows([20, 3, 11, 1, 17, 9], [[0], [2], [], [0], [3, 8]])
    together = collected(model, windows, 6)
    check(together, expected_of(model, [windows]))
    # Kernels sum over other shapes in float32; that error passes through two blocks.
    check(together, expected_of(model, [[w] for w in windows]), share=2e-5)
    assert together.n_tokens == 61
    assert not bool(together.seen[0])
    assert together.sites[0].largest < 5000
    assert together.unique == [w.unique_tokens for w in windows]


def test_activations_are_massive_by_the_median_of_their_own_window(opened):
    model = opened("llama", 3000.0)
    with torch.no_grad():
        model.get_input_embeddings().weight[200:] *= 500  # so that 3000 is no longer 1000 times the median there
    small, large = made_windows([20, 20], [[4], [4]])
    small, large = replace(small, ids=small.ids % 190 + 8), replace(large, ids=large.ids % 190 + 205)
    small.ids[4] = large.ids[4] = PLANTED
    found = collected(model, [small, large])
    check(found, expected_of(model, [[small, large]]))
    assert (found.sites[0].n_massive, found.sites[0].part(Kind(False, True)).count) == (1, 1)


def test_an_activation_at_the_limit_is_not_massive():
    """Massive is larger than 100, and than 1000 times the median: 0.125 x 1000 = 125 here."""
    hidden = torch.full((4, 5, 4), 0.125)
    hidden[0, 1, 2], hidden[1, 0, 2], hidden[2, 3, 0], hidden[2, 3, 1] = 125.0, -126.0, 126.0, -130.0
    hidden[3] = 0.001
    hidden[3, 2, 2] = -100.0
    sums = SiteSums("block 1", 4)
    sums.add(hidden, None)
    assert sums.n_massive == 3
    assert {kind: part.count for kind, part in sums.parts.items()} == {
        (False, False): 15,
        (False, True): 1,
        (True, False): 3,
        (True, True): 1,
    }
    assert sums.largest == 130


def test_of_an_even_number_of_activations_the_lower_middle_one_is_the_median():
    for middle, massive in ((0.1, 1), (0.2, 0)):  # 1000 x 0.1 < 150 < 1000 x 0.2
        sums = SiteSums("block 1", 2)
        sums.add(torch.tensor([[[0.05, middle], [0.2, 150.0]]]), None)
        assert sums.n_massive == sums.part(Kind(False, True)).count == massive


def test_zero_rows_have_no_direction_and_the_smallest_have_one():
    sums, hidden = SiteSums("block 1", 4), gaussian(6, 4)[None].clone()
    hidden[0, 2], hidden[0, 4] = 0, hidden[0, 4] * 1e-30
    sums.add(hidden, None)
    assert (sums.count, sums.unit_count) == (6, 5)
    units = hidden[0].double() / hidden[0].double().norm(dim=1, keepdim=True)
    close(sums.unit_total, units[[0, 1, 3, 4, 5]].sum(dim=0).numpy(), 1e-14)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
def test_padding_never_enters_whatever_it_holds(value):
    hidden = gaussian(40, 4).view(2, 20, 4).clone()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 12:] = False
    hidden[0, 3, 2] = 700.0
    rows = [hidden[0, :12].clone(), hidden[1].clone()]
    hidden[0, 12:] = value
    together, alone = SiteSums("block 1", 4), SiteSums("block 1", 4)
    together.add(hidden, mask)
    for part in rows:
        alone.add(part[None], None)
    assert (together.count, together.n_massive, together.largest) == (32, alone.n_massive, 700.0)
    assert {kind: part.count for kind, part in together.parts.items()} == {k: p.count for k, p in alone.parts.items()}
    for kind in together.parts:
        held, other = together.part(kind).result(), alone.part(kind).result()
        assert isinstance(held, Moments) == isinstance(other, Moments)
        if isinstance(held, Moments) and isinstance(other, Moments):
            close(held.gram, other.gram.numpy(), 1e-14)
        else:
            assert torch.equal(held, other)
    close(together.unit_total, alone.unit_total.numpy(), 1e-13)


def test_adding_leaves_the_hidden_states_as_they_were():
    for dtype in (torch.float32, torch.bfloat16):
        hidden, sums = gaussian(60, 8).view(3, 20, 8).to(dtype) * 100, SiteSums("block 1", 8)
        before = hidden.clone()
        sums.add(hidden, None)
        sums.add(hidden, torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) > 0.2)
        assert torch.equal(hidden, before)


# ---- on disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 4])
@pytest.mark.parametrize("planted", [0, 3000.0])
def test_a_collection_comes_back_bit_for_bit_and_goes_on(opened, tmp_path, planted, n):
    model = opened("gpt2", planted, tied=False)
    windows = made_windows([20] * 6, [[0], [4, 11], [], [0, 7], [3]])
    found = collected(model, windows[:n], 2)
    save_collection(found, tmp_path / "state" / "some.safetensors")
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["some.safetensors"]
    back = load_collection(tmp_path / "state" / "some.safetensors")
    assert facts(back) == facts(found)
    assert list(back.sites) == list(found.sites)
    for one in (back, found):
        collect(model, windows[4:], find_sites(model), one)
    assert facts(back) == facts(found)


def test_a_collection_written_again_takes_the_place_of_the_one_before(opened, tmp_path):
    model, windows = opened("llama"), made_windows([20] * 4)
    path = tmp_path / "state.safetensors"
    for n in (1, 3):
        found = collected(model, windows[:n], 1)
        found.complete = n == 3
        save_collection(found, path)
        assert facts(load_collection(path)) == facts(found)


def test_rows_on_two_devices_are_written_as_one(opened, tmp_path):
    """A pass gone on with on a GPU keeps the rows of the state file in the memory of the CPU."""
    with FakeTensorMode():  # torch's own check of devices, without a GPU
        part = Accumulator(4)
        part.add(torch.zeros(1, 4))
        part.add(torch.zeros(1, 4, device="cuda"))
        found = Collection(
            {1: SiteSums("block 1", 4, {Kind(True, False): part})},
            Reservoir(1, 0),
            Predictions(3),
            torch.zeros(3, dtype=torch.bool),
        )
        written = dict(module._tensors(found))
        assert {tuple(t.shape) for name, t in written.items() if name.endswith(".rows")} == {(2, 4)}


# ---- merging -------------------------------------------------------------------------------------------------------


def merged(parts: Sequence[Collection]) -> Collection:
    first, *rest = copy.deepcopy(list(parts))
    for part in rest:
        first.merge(part)
    return first


def alike(one: Collection, other: Collection, share: float = 1e-12) -> None:
    """Compare two collections of the same windows in any order, sums to a share of their largest entry."""
    sets = [{int(k): e for k, e in zip(c.reservoir.keys, c.reservoir.ends.tolist(), strict=True)} for c in (one, other)]
    assert sets[0] == sets[1]
    samples = one.reservoir.sample(), other.reservoir.sample()
    assert samples[0].ends.tolist() == samples[1].ends.tolist()
    assert list(samples[0].layers) == list(samples[1].layers)
    for layer, rows in samples[0].layers.items():
        close(rows, samples[1].layers[layer].double().numpy(), share)
    assert (sorted(one.unique), one.n_tokens) == (sorted(other.unique), other.n_tokens)
    assert torch.equal(one.seen, other.seen)
    assert torch.equal(one.predictions.counts, other.predictions.counts)
    assert one.predictions.n_bytes == other.predictions.n_bytes
    # Logits are float32, and the sums are of float32 values.
    np.testing.assert_allclose(one.predictions.sums, other.predictions.sums, rtol=max(share, 1e-12))
    for layer, sums in one.sites.items():
        wanted = other.sites[layer]
        counts = (sums.count, sums.unit_count, sums.n_massive, pytest.approx(sums.largest, rel=1e-5))
        assert counts == (wanted.count, wanted.unit_count, wanted.n_massive, wanted.largest)
        assert (sums.unit_total is None) == (wanted.unit_total is None)
        if sums.unit_total is not None:
            close(sums.unit_total, wanted.unit_total.numpy(), share)
        for kind in KINDS:
            held = wanted.part(kind).result()
            if isinstance(held, Moments):
                found = sums.part(kind).result()
                assert isinstance(found, Moments)
                assert found.count == held.count
                close(found.total, held.total.numpy(), share)
                close(found.gram, held.gram.numpy(), share)
            else:
                check_rows(sums.part(kind).result(), held.double().numpy(), share)


# windows of each part; d is 32, so 20 tokens are rows and 40 are moments
SPLITS = [(3, 3), (1, 5), (5, 1), (1, 1, 4), (2, 2, 2), (1, 2, 3), (6, 0), (0, 6)]


@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("through_disk", [False, True])
def test_parts_merge_into_the_whole_in_any_order(opened, tmp_path, sizes, through_disk):
    model = opened("gpt2", 3000.0, tied=False)
    windows = made_windows([20] * 6, [[0], [4, 11], [], [0, 7], [3]])
    whole, parts, start = collected(model, windows, 1), [], 0
    for number, n in enumerate(sizes):
        parts.append(collected(model, windows[start : start + n], 1))
        start += n
        if through_disk:
            save_collection(parts[-1], tmp_path / f"{number}.safetensors")
            parts[-1] = load_collection(tmp_path / f"{number}.safetensors")
    before = [facts(part) for part in parts]
    whole.reservoir.prune(whole=True)
    forth, back = merged(parts), merged(parts[::-1])
    alike(forth, whole)
    alike(back, whole)
    assert forth.unique == whole.unique
    first, *rest = parts
    for part in rest:
        first.merge(part)  # itself, not a copy
    collect(model, windows[:1], find_sites(model), first)
    assert [facts(part) for part in rest] == before[1:]


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 3), (1, 1, 4)])
def test_merging_is_associative(opened, sizes):
    model = opened("llama", 3000.0)
    windows = made_windows([20] * 6, [[0], [4, 11], [], [0, 7], [3]])
    bounds = np.cumsum([0, *sizes])

    def parts() -> list[Collection]:
        return [collected(model, windows[i:j], 1) for i, j in pairwise(bounds)]

    a, b, c = parts()
    a.merge(b)
    a.merge(c)
    x, y, z = parts()
    y.merge(z)
    x.merge(y)
    alike(a, x)


def test_a_merge_is_complete_where_both_are(opened):
    model = opened("llama")
    for one, other in ((True, True), (True, False), (False, True)):
        parts = [collected(model, made_windows([20])) for _ in range(2)]
        parts[0].complete, parts[1].complete = one, other
        parts[0].merge(parts[1])
        assert parts[0].complete == (one and other)
        assert parts[0].n_batches == 2


# ---- what cannot be summed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "where"), [(1, "window 2"), (2, "windows 2 to 3")], ids=["window by window", "two at once"]
)
def test_hidden_states_that_are_no_numbers_are_refused_by_layer_and_window(opened, size, where):
    model = opened("gpt2", float("nan"), tied=False)
    windows = made_windows([20] * 4, [[], [], [5]])
    message = rf"^NaN or Inf in the hidden states at layer 0 \(embeddings\), {where}: .*try `dtype` float32$"
    with pytest.raises(NonFiniteActivations, match=message):
        collected(model, windows, size)


def test_the_layer_that_is_named_is_the_first_with_nan(opened):
    model = opened("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteActivations, match=r"at layer 2 \(block 2, before final norm\), windows 0 to 3: "):
        collected(model, made_windows([20] * 4))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 0
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteActivations, match=r"at layer 3 \(after final norm\), window 0: "):
        collected(model, made_windows([20]))


# ---- real windows --------------------------------------------------------------------------------------------------


def real_windows(folder, length: int = 24, count: int = 8) -> list[Window]:
    return middle_windows(PAGE, AutoTokenizer.from_pretrained(folder), length=length, count=count)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_shuffle_keeps_the_places_and_where_positions_are_rotated_the_embeddings_too(checkpoint, opened, family):
    """RoPE models take in positions inside attention: layer 0 of shuffled text is a permutation of its rows."""
    folder, model = checkpoint(family), opened(family)
    windows = real_windows(folder)
    real, shuffled = collected(model, windows), collected(model, [shuffle_within(w, 0, 0) for w in windows])
    assert set(real.reservoir.ends.tolist()) == set(shuffled.reservoir.ends.tolist())
    assert (real.unique, real.n_tokens) == (shuffled.unique, shuffled.n_tokens)
    assert torch.equal(real.seen, shuffled.seen)
    grams = [combined(c.sites[0].parts.values()).gram.numpy() for c in (real, shuffled)]
    assert np.allclose(*grams, rtol=0, atol=1e-12 * np.abs(grams[0]).max()) == (family == "llama")
    later = [combined(c.sites[1].parts.values()).gram.numpy() for c in (real, shuffled)]
    assert not np.allclose(*later, rtol=1e-6)


def test_the_rows_of_the_reservoir_are_the_hidden_states_at_its_places(checkpoint, opened):
    folder, model = checkpoint("llama"), opened("llama")
    windows = real_windows(folder)
    sample = collected(model, windows, 3, reservoir=40).reservoir.sample()
    at = {int(w.ends[place]): (w, place) for w in windows for place in range(1, len(w.ids))}
    assert list(sample.layers) == [0, 1, 2, 3]
    expected = {w.index: stock_hidden_states(model, [w]) for w in windows}
    for layer, rows in sample.layers.items():
        for end, row in zip(sample.ends.tolist(), rows, strict=True):
            window, place = at[end]
            torch.testing.assert_close(row, expected[window.index][layer][0, place], rtol=1e-4, atol=1e-6)
