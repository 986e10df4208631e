"""The rows of the lowest hashes, the same places in every layer and however the text is cut, and never more than that."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import PROPERTY
from models import TEXT, TOKENIZERS, write_tokenizer
from scipy import stats
from transformers import AutoTokenizer

from dimscope.activations.reservoir import Reservoir, Sample, common
from dimscope.texts.texts import Text
from dimscope.texts.windows import Window, middle_windows, shuffle_across, shuffle_within

LAYERS = (0, 3, 7)
Batch = tuple[torch.Tensor, torch.Tensor | None]  # ends, mask


def splitmix(value: int, seed: int) -> int:
    """Hash with Python's own integers: the oracle."""
    z = (value + (seed + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def lowest(ends: Sequence[int], size: int, seed: int) -> list[int]:
    """Return the ends with the lowest hashes, in the order of the text."""
    return sorted(sorted(ends, key=lambda end: splitmix(end, seed))[:size])


def row_of(layer: int, ends: torch.Tensor) -> torch.Tensor:
    """Return rows that tell their layer and place."""
    return torch.stack([torch.full(ends.shape, float(layer)), ends.float(), ends.float() * layer], dim=-1)


def candidates(reservoir: Reservoir, ends: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Choose positions whose token is their end and whose window is its first end."""
    return reservoir.candidates(ends, ends, ends[:, 0].tolist(), mask)


def feed(reservoir: Reservoir, batches: Sequence[Batch]) -> Iterator[int]:
    """Give batches to a reservoir, as `collect` does; yield the rows held at every moment, of each layer alike."""
    for ends, mask in batches:
        places = candidates(reservoir, ends, mask)
        for layer in LAYERS:
            reservoir.take(layer, row_of(layer, ends), places)
        counts = {sum(map(len, parts)) for parts in reservoir.rows.values()}
        assert counts == {len(reservoir.keys)} == {len(reservoir.ends)}
        yield len(reservoir.keys)
        reservoir.prune()
        yield len(reservoir.keys)


def filled(size: int, seed: int, batches: Sequence[Batch], *, whole: bool = True) -> Reservoir:
    reservoir = Reservoir(size, seed)
    for _ in feed(reservoir, batches):
        pass
    if whole:
        reservoir.prune(whole=True)
    return reservoir


def windows_of_ends(lengths: Sequence[int], gap: int = 3) -> list[torch.Tensor]:
    """Return the ends of the tokens of windows of these lengths, one after another."""
    stops = torch.arange(1, sum(lengths) + 1) * gap
    return list(stops.split(list(lengths)))


def batched(windows: Sequence[torch.Tensor], size: int) -> list[Batch]:
    """Return batches of so many windows, padded on the right where their lengths differ."""
    batches = []
    for start in range(0, len(windows), size):
        group = windows[start : start + size]
        lengths = torch.tensor([len(w) for w in group])
        ends = torch.nn.utils.rnn.pad_sequence(group, batch_first=True)
        mask = torch.arange(ends.shape[1]) < lengths[:, None]
        batches.append((ends, None if bool(mask.all()) else mask))
    return batches


def positions(windows: Sequence[torch.Tensor]) -> list[int]:
    """Return all places but the first of every window."""
    return [end for w in windows for end in w[1:].tolist()]


def check(sample: Sample, expected: Sequence[int]) -> None:
    """Compare the places, and at every layer the rows with those of these places, bit for bit."""
    assert sample.ends.tolist() == list(expected)
    assert sorted(sample.layers) == list(LAYERS)
    for layer, rows in sample.layers.items():
        assert rows.dtype == torch.float32
        assert torch.equal(rows, row_of(layer, torch.tensor(list(expected), dtype=torch.int64)))


# ---- which rows ----------------------------------------------------------------------------------------------------


@PROPERTY
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    size=st.integers(1, 60),
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)
def test_the_lowest_hashes_of_all_places_but_the_first_of_each_window(lengths, size, batch, seed):
    windows = windows_of_ends(lengths)
    reservoir = filled(size, seed, batched(windows, batch))
    sample = reservoir.sample()
    check(sample, lowest(positions(windows), size, seed))
    assert sample.tokens.tolist() == sample.ends.tolist()
    first = {end: int(w[0]) for w in windows for end in w.tolist()}
    assert sample.windows.tolist() == [first[end] for end in sample.ends.tolist()]


def test_the_rows_do_not_depend_on_the_batches_nor_on_the_order_of_the_windows():
    windows = windows_of_ends([17, 40, 5, 33, 28, 9, 31])
    expected = lowest(positions(windows), 20, 3)
    for order in (windows, windows[::-1], windows[3:] + windows[:3]):
        for size in (1, 2, 7):
            check(filled(20, 3, batched(order, size)).sample(), expected)


def test_it_is_bounded_at_every_moment():
    windows = windows_of_ends([50] * 60)
    reservoir = Reservoir(16, 0)
    moments = list(feed(reservoir, batched(windows, 3)))
    assert max(moments[0::2]) <= 16 * 9 // 4  # a quarter too many, and a batch's own
    assert max(moments[1::2]) <= 16 * 5 // 4
    assert max(moments) > 16  # or the bounds would say nothing


def test_a_long_batch_is_never_copied_whole():
    (ends,) = windows_of_ends([100_000])
    reservoir = Reservoir(16, 0)
    places = candidates(reservoir, ends[None])
    assert len(places) == 16
    hidden = torch.zeros(1, 100_000, 3)
    reservoir.take(0, hidden, places)
    assert reservoir.rows[0][0].untyped_storage().nbytes() == 16 * 3 * 4


def test_pruning_waits_until_a_quarter_is_too_many():
    windows = windows_of_ends([26])  # 25 places
    reservoir = filled(20, 0, batched(windows, 1), whole=False)
    assert len(reservoir.keys) == 20  # more places than rows: only those that can stay
    one_more = windows_of_ends([21, 2, 2, 2, 2, 2, 2])
    reservoir = filled(20, 1, batched(one_more, 1), whole=False)
    assert 20 <= len(reservoir.keys) <= 25
    reservoir.prune(whole=True)
    check(reservoir.sample(), lowest(positions(one_more), 20, 1))


def test_half_precision_rows_are_kept_in_float32():
    reservoir, ends = Reservoir(4, 0), torch.arange(10)[None]
    hidden = torch.randn(1, 10, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    places = candidates(reservoir, ends)
    reservoir.take(2, hidden, places)
    assert torch.equal(reservoir.sample().layers[2], hidden[0, reservoir.sample().ends].float())


def test_every_place_is_as_likely_as_any_other():
    """Chosen k of N over many seeds. The counts are negatively correlated, which the factor (N - 1) / N corrects."""
    (ends,) = windows_of_ends([101])
    k, n, seeds = 20, 100, 500
    counts, pairs = np.zeros(n), 0
    for seed in range(seeds):
        chosen = filled(k, seed, [(ends[None], None)]).ends // 3 - 2
        counts[chosen] += 1
        pairs += int((np.diff(np.sort(chosen)) == 1).sum())
    share = k / n
    statistic = ((counts - seeds * share) ** 2).sum() / (seeds * share * (1 - share)) * (n - 1) / n
    assert 0.001 < stats.chi2.sf(statistic, n - 1) < 0.999
    # Neighbours are chosen together as often as any two places: (n - 1) pairs, each with k(k - 1) / n(n - 1).
    expected = seeds * k * (k - 1) / n
    assert abs(pairs - expected) < 4 * np.sqrt(expected)


# ---- parts ---------------------------------------------------------------------------------------------------------


@PROPERTY
@given(
    lengths=st.lists(st.integers(2, 40), min_size=3, max_size=12),
    size=st.integers(1, 60),
    shards=st.integers(2, 3),
    seed=st.integers(0, 99),
)
def test_the_parts_of_a_text_merge_into_the_sample_of_the_whole(lengths, size, shards, seed):
    windows = windows_of_ends(lengths)
    expected = lowest(positions(windows), size, seed)
    for order in (1, -1):
        merged, *rest = [filled(size, seed, batched(windows[i::shards], 2)) for i in range(shards)][::order]
        for part in rest:
            before = [t.clone() for _, t in part.tensors()]
            merged.merge(part)
            assert all(torch.equal(t, b) for (_, t), b in zip(part.tensors(), before, strict=True))
            assert len(merged.keys) <= size
        check(merged.sample(), expected)


def test_what_was_merged_is_not_changed_by_what_comes_later():
    windows = windows_of_ends([30, 30, 30])
    one, other = (filled(25, 0, batched([w], 1)) for w in windows[:2])
    before = other.sample()
    one.merge(other)
    for _ in feed(one, batched(windows[2:], 1)):
        pass
    one.prune(whole=True)
    check(one.sample(), lowest(positions(windows), 25, 0))
    check(other.sample(), before.ends.tolist())


def test_an_empty_reservoir_takes_in_another_and_leaves_it_alone():
    windows = windows_of_ends([8, 8])
    one, other = Reservoir(25, 0), filled(25, 0, batched(windows[:1], 1))
    one.merge(other)
    for _ in feed(one, batched(windows[1:], 1)):
        pass
    check(one.sample(), positions(windows))
    assert {len(torch.cat(rows)) for rows in other.rows.values()} == {len(other.keys)}
    check(other.sample(), positions(windows[:1]))


@pytest.mark.parametrize("whole", [True, False])
def test_a_reservoir_comes_back_from_its_tensors_bit_for_bit_and_goes_on(whole):
    windows = windows_of_ends([30] * 6)
    reservoir = filled(25, 2**40 + 1, batched(windows[:4], 1), whole=whole)
    back = Reservoir.from_tensors(dict(reservoir.tensors()))
    assert (back.size, back.seed) == (25, 2**40 + 1)
    assert back.keys.dtype == np.uint64
    assert (back.keys > 2**63).any() == (reservoir.keys > 2**63).any()
    for name in ("keys", "ends"):
        np.testing.assert_array_equal(getattr(back, name), getattr(reservoir, name))
    for layer in LAYERS:
        assert torch.equal(torch.cat(back.rows[layer]), torch.cat(reservoir.rows[layer]))
    for one in (back, reservoir):
        for _ in feed(one, batched(windows[4:], 1)):
            pass
        one.prune(whole=True)
        check(one.sample(), lowest(positions(windows), 25, 2**40 + 1))


def test_hashes_above_two_to_the_63_come_back():
    reservoir = filled(1000, 0, batched(windows_of_ends([200]), 1))
    assert 70 < int((reservoir.keys > 2**63).sum()) < 130  # or the test would say nothing
    back = Reservoir.from_tensors(dict(reservoir.tensors()))
    np.testing.assert_array_equal(back.keys, reservoir.keys)


def test_an_empty_reservoir_has_tensors_too():
    back = Reservoir.from_tensors(dict(Reservoir(5, 3).tensors()))
    assert (back.size, back.seed, len(back.keys), back.rows) == (5, 3, 0, {})


def test_tokens_that_end_at_one_byte_do_not_break_the_bound():
    ends = torch.tensor([0, 3, 3, 3, 3, 9, 9, 9, 9, 12])[None]  # a character that became several tokens
    for size in (1, 2, 3, 5):
        reservoir = filled(size, 0, [(ends, None)])
        assert len(reservoir.keys) == size
        keys = sorted(splitmix(int(e), 0) for e in ends[0, 1:])
        assert sorted(reservoir.keys.tolist()) == keys[:size]


# ---- real tokens ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Return `read(kind)`: windows of the page that cover most of it, by a tokenizer of this kind."""
    page, made = Text("page", lambda: iter([TEXT]), {}, None), {}

    def windows(kind: str) -> list[Window]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            write_tokenizer(folder, kind, 512)
            made[kind] = middle_windows(page, AutoTokenizer.from_pretrained(folder), length=50, count=None)
        return made[kind]

    return windows


def sampled(windows: Sequence[Window], size: int, seed: int = 0) -> Sample:
    return filled(size, seed, batched([w.ends for w in windows], 2)).sample()


@pytest.mark.parametrize("kind", list(TOKENIZERS))
def test_a_shuffle_has_the_same_places(kind, read):
    real = read(kind)
    ends = [end for w in real for end in w.ends[1:].tolist()]
    check(sampled(real, 40), lowest(ends, 40, 0))
    for shuffled in ([shuffle_within(w, 5, 1) for w in real], shuffle_across(real, 5, 1)):
        assert any(not torch.equal(a.ids, b.ids) for a, b in zip(real, shuffled, strict=True))
        np.testing.assert_array_equal(sampled(shuffled, 40).ends, sampled(real, 40).ends)


@pytest.mark.parametrize("kinds", [("byte_bpe", "sentencepiece"), ("byte_bpe", "wordpiece")])
def test_two_tokenizers_choose_the_same_places_where_their_tokens_end_together(kinds, read):
    left, right = (read(kind) for kind in kinds)
    everywhere = [{end for w in ws for end in w.ends[1:].tolist()} for ws in (left, right)]
    shared = everywhere[0] & everywhere[1]
    assert len(shared) < min(map(len, everywhere))
    for seed in range(3):
        samples = [sampled(ws, 60, seed) for ws in (left, right)]
        pair = common(*samples)
        assert pair[0].ends.tolist() == pair[1].ends.tolist()
        assert set(pair[0].ends.tolist()) == set(samples[0].ends.tolist()) & set(samples[1].ends.tolist())
        for sample in pair:
            check(sample, sample.ends.tolist())
        # Independent samples would share 60 x 60 x |shared| / (n x m) places at most.
        by_chance = 3600 * len(shared) / (len(everywhere[0]) * len(everywhere[1]))
        assert len(pair[0].ends) > 2 * by_chance
    whole = common(sampled(left, 10_000), sampled(right, 10_000))
    assert set(whole[0].ends.tolist()) == shared


def test_of_tokens_that_end_at_one_byte_the_first_stands_for_the_place():
    left = Sample(np.array([2, 5, 5, 9]), *[np.arange(4)] * 2, {1: torch.tensor([[0.0], [1.0], [2.0], [3.0]])})
    right = Sample(np.array([5, 7, 9, 9]), *[np.arange(4)] * 2, {1: torch.tensor([[4.0], [5.0], [6.0], [7.0]])})
    one, other = common(left, right)
    assert one.ends.tolist() == other.ends.tolist() == [5, 9]
    assert one.layers[1].tolist() == [[1.0], [3.0]]
    assert other.layers[1].tolist() == [[4.0], [6.0]]
