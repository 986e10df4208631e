"""Sums over predictions are those of float64, whatever the blocks, and what has no target has no loss."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from matrices import PROPERTY, gaussian
from models import TEXT
from scipy.special import log_softmax
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from dimscope.activations import output_head
from dimscope.activations.collection import collect, empty_collection
from dimscope.activations.predictions import BINS, Predictions
from dimscope.texts.texts import Text
from dimscope.texts.windows import Window, middle_windows, shuffle_within

TEXTS = {"page": Text("page", lambda: iter([TEXT]), {}, None)}


def in_float64(logits: np.ndarray, targets: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sums (count and sum of loss, entropy, max log-softmax) and each max log-softmax: the oracle."""
    logp = log_softmax(logits.astype(np.float64), axis=1)
    with_target = kept & (targets >= 0)
    loss = -logp[np.arange(len(logp)), np.maximum(targets, 0)][with_target]
    entropy, best = -(np.exp(logp) * logp).sum(axis=1)[kept], logp.max(axis=1)[kept]
    return np.array([[len(x), x.sum()] for x in (loss, entropy, best)]), best


def check(found: Predictions, logits: np.ndarray, targets: np.ndarray, kept: np.ndarray, rtol: float = 1e-5) -> None:
    sums, best = in_float64(logits, targets, kept)
    # Logits are float32: a value carries the rounding of the largest logit, a sum that of all its values.
    atol = 4e-7 * max(1.0, float(np.abs(logits).max())) * len(logits)
    np.testing.assert_array_equal(found.sums[:, 0].numpy(), sums[:, 0])
    np.testing.assert_allclose(found.sums.numpy(), sums, rtol=rtol, atol=atol)
    assert int(found.counts.sum()) == int(kept.sum())
    edges = np.linspace(-math.log(logits.shape[1]), 0, BINS + 1)
    inner = edges[1:-1]
    if np.abs(best[:, None] - inner).min(initial=1) > 1e-5:  # none so near to an edge that rounding decides
        expected = np.bincount(np.clip(np.searchsorted(edges, best, side="right") - 1, 0, BINS - 1), minlength=BINS)
        np.testing.assert_array_equal(found.counts.numpy(), expected)


def random_case(n: int, v: int, seed: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, targets (some -1) and which positions count."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(-1, v, (n,), generator=generator)
    kept = torch.rand(n, generator=generator) > 0.3
    return gaussian(n, v, seed) * scale, targets, kept


def one_window(logits: torch.Tensor) -> torch.Tensor:
    """Return the number of the window of each position: 0."""
    return torch.zeros(len(logits), dtype=torch.int64)


# ---- blocks of logits ----------------------------------------------------------------------------------------------


@PROPERTY
@given(
    n=st.integers(1, 60),
    v=st.integers(2, 90),
    size=st.integers(1, 60),
    seed=st.integers(0, 99),
    scale=st.floats(0, 30),
)
def test_sums_are_those_of_float64_whatever_the_blocks(n, v, size, seed, scale):
    logits, targets, kept = random_case(n, v, seed, scale)
    before, found = logits.clone(), Predictions(v)
    for part in zip(logits.split(size), targets.split(size), kept.split(size), strict=True):
        found.add(*part, one_window(part[0]))
    check(found, *(x.numpy() for x in (logits, targets, kept)))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("offset", [0.0, -100.0, 1000.0])  # the logits of GPT-2 are about -100
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_a_large_vocabulary_and_a_common_offset_of_the_logits(scale, offset):
    logits, targets, kept = random_case(40, 50_000, 1, scale)
    logits, found = logits + offset, Predictions(50_000)
    found.add(logits, targets, kept, one_window(logits))
    check(found, *(x.numpy() for x in (logits, targets, kept)))


def test_merge_is_all_positions_and_leaves_the_other_alone():
    logits, targets, kept = random_case(50, 40, 2)
    for cut in (0, 1, 30, 50):
        parts = []
        for piece in (slice(None, cut), slice(cut, None)):
            parts.append(Predictions(40))
            parts[-1].add_bytes(0, len(logits[piece]))
            parts[-1].add(logits[piece], targets[piece], kept[piece], one_window(logits[piece]))
        one, other = parts
        before = (other.sums.clone(), other.counts.clone(), other.n_bytes)
        one.merge(other)
        check(one, *(x.numpy() for x in (logits, targets, kept)))
        assert one.n_bytes == 50
        one.add(logits, targets, kept, one_window(logits))
        assert torch.equal(other.sums, before[0])
        assert torch.equal(other.counts, before[1])
        assert other.n_bytes == before[2]


def test_predictions_come_back_from_their_tensors_bit_for_bit():
    found = Predictions(40)
    found.add_bytes(3, 2**40 + 1)
    logits, targets, kept = random_case(50, 40, 2)
    found.add(logits, targets, kept, torch.arange(50) // 20)
    back = Predictions.from_tensors(dict(found.tensors()))
    assert (back.vocab_size, back.n_bytes) == (40, 2**40 + 1)
    assert torch.equal(back.by_window.stacked(), found.by_window.stacked())
    assert sorted(back.by_window.groups) == [0, 1, 2, 3]
    assert torch.equal(back.counts, found.counts)


# ---- the histogram -------------------------------------------------------------------------------------------------


def test_the_bins_reach_from_uniform_to_certain():
    v = 1000
    uniform, certain = torch.zeros(4, v), torch.zeros(3, v)
    certain[:, 7] = 1e4
    found = Predictions(v)
    found.add(uniform, torch.full((4,), 7), torch.ones(4, dtype=torch.bool), one_window(uniform))
    assert found.counts.nonzero().tolist() == [[0]]
    found.add(certain, torch.full((3,), 7), torch.ones(3, dtype=torch.bool), one_window(certain))
    assert (int(found.counts[0]), int(found.counts[-1]), int(found.counts.sum())) == (4, 3, 7)
    assert found.edges.shape == (BINS + 1,)
    assert float(found.edges[0]) == pytest.approx(-math.log(v), rel=1e-15)
    assert float(found.edges[-1]) == 0
    np.testing.assert_allclose(np.diff(found.edges.numpy()), math.log(v) / BINS, rtol=1e-9)
    means = found.sums[:, 1] / found.sums[:, 0]
    expected = [4 / 7 * math.log(v), 4 / 7 * math.log(v), -4 / 7 * math.log(v)]
    np.testing.assert_allclose(means.numpy(), expected, rtol=1e-6)


def test_a_value_in_the_middle_of_a_bin_is_counted_there():
    v = 500
    for number in range(BINS):
        best = -math.log(v) * (1 - (number + 0.5) / BINS)
        logits = torch.full((1, v), math.log((1 - math.exp(best)) / (v - 1)))
        logits[0, 3] = best
        found = Predictions(v)
        found.add(logits, torch.tensor([-1]), torch.tensor([True]), one_window(logits))
        assert found.counts.nonzero().tolist() == [[number]]


def test_nothing_kept_is_nothing_counted():
    found = Predictions(9)
    logits = gaussian(5, 9)
    found.add(logits, torch.full((5,), 2), torch.zeros(5, dtype=torch.bool), one_window(logits))
    assert int(found.counts.sum()) == 0
    assert float(found.sums.abs().sum()) == 0


# ---- a model's predictions -----------------------------------------------------------------------------------------


@pytest.fixture
def opened(checkpoint):
    """Return `opened(family)`: a model of stock transformers, and windows of the page by its tokenizer."""
    transformers.utils.logging.disable_progress_bar()

    def load(family: str, length: int = 30, count: int = 5, **arguments: str) -> tuple:
        folder = checkpoint(family)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()
        with torch.no_grad():  # so that the losses differ from ln V
            model.get_output_embeddings().weight.mul_(20)
        return model, middle_windows(TEXTS["page"], AutoTokenizer.from_pretrained(folder), length=length, count=count)

    return load


def predicted(model, windows, size: int) -> Predictions:
    into = empty_collection(model, [], 4, 0)
    for start in range(0, len(windows), size):
        collect(model, windows[start : start + size], [], into)
    return into.predictions


def stock_logits(model, window: Window) -> torch.Tensor:
    with torch.no_grad():
        return model(window.ids[None], use_cache=False).logits[0].float()


def expected_of(model, windows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return logits, targets and kept of all windows, with targets written down by hand."""
    logits, targets = [], []
    for window in windows:
        logits.append(stock_logits(model, window).double().numpy())
        own = [-1] * len(window.ids)
        for place in range(len(own) - 1):
            if place + 1 >= window.n_prefix:  # what follows is of the text
                own[place] = int(window.ids[place + 1])
        targets += own
    logits = np.concatenate(logits)
    return logits, np.array(targets), np.ones(len(logits), dtype=bool)


def cut(window: Window, length: int) -> Window:
    return replace(window, **{name: getattr(window, name)[:length] for name in ("ids", "ends", "n_bytes")})


# GPT-2 without and Llama with a prefix
@pytest.mark.parametrize(("family", "size", "block"), [("gpt2", 1, None), ("llama", 2, None), ("llama", 5, 1)])
def test_the_sums_of_a_pass_are_those_of_stock_logits(opened, monkeypatch, family, size, block):
    if block is not None:
        monkeypatch.setattr(output_head, "BLOCK_BYTES", block)
    model, windows = opened(family)
    assert windows[0].n_prefix == (family == "llama")
    for given_windows in (windows, [shuffle_within(w, 3, 0) for w in windows]):
        check(predicted(model, given_windows, size), *expected_of(model, given_windows))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bits_per_byte_count_the_bytes_whose_tokens_were_predicted(opened, family):
    model, windows = opened(family)
    found, total, n_bytes, text = predicted(model, windows, 2), 0.0, 0, TEXT.encode()
    for window in windows:
        first = max(window.n_prefix, 1)
        losses = cross_entropy(
            stock_logits(model, window)[first - 1 : -1].double(), window.ids[first:], reduction="sum"
        )
        total += float(losses)
        n_bytes += len(text[int(window.ends[first - 1]) : int(window.ends[-1])])
    assert found.n_bytes == n_bytes
    assert int(found.sums[0, 0]) == sum(len(w.ids) - max(w.n_prefix, 1) for w in windows)
    bits = float(found.sums[0, 1]) / found.n_bytes / math.log(2)
    assert bits == pytest.approx(total / n_bytes / math.log(2), rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_is_not_predicted_from_nor_predicted(opened, family):
    model, whole = opened(family)
    windows = [cut(w, length) for w, length in zip(whole, (30, 7, 19, 2, 25), strict=True)]
    alone, together = predicted(model, windows, 1), predicted(model, windows, 5)
    check(together, *expected_of(model, windows))
    np.testing.assert_array_equal(together.sums[:, 0], alone.sums[:, 0])
    np.testing.assert_allclose(together.sums, alone.sums, rtol=1e-5)
    assert together.n_bytes == alone.n_bytes == sum(int(w.n_bytes[max(w.n_prefix, 1) :].sum()) for w in windows)


@pytest.mark.parametrize("n_prefix", [0, 1, 2, 3])
def test_a_prefix_of_any_length_is_no_target(opened, n_prefix):
    model, _ = opened("gpt2")
    ids = torch.tensor([5, 6, 7, 300, 301, 302, 303])
    n_bytes = torch.tensor([0] * n_prefix + [4] * (7 - n_prefix))
    window = Window(0, ids, n_bytes.cumsum(0), n_bytes, n_prefix)
    found = predicted(model, [window], 1)
    check(found, *expected_of(model, [window]))
    assert int(found.sums[0, 0]) == 7 - max(n_prefix, 1)
    assert found.n_bytes == 4 * (7 - max(n_prefix, 1))
    assert int(found.counts.sum()) == 7


def test_entropy_and_confidence_stay_in_their_ranges(opened):
    for family in ("gpt2", "llama"):
        model, windows = opened(family)
        found = predicted(model, windows, 5)
        mean = (found.sums[:, 1] / found.sums[:, 0]).tolist()
        assert 0 < mean[1] < math.log(512)
        assert -math.log(512) < mean[2] < 0
        assert mean[0] > -mean[2]


def test_the_logits_of_a_model_in_bfloat16_are_judged_in_float32(opened):
    model, windows = opened("llama", dtype=torch.bfloat16)
    check(predicted(model, windows, 1), *expected_of(model, windows), rtol=1e-2)


def test_without_logits_nothing_is_predicted(opened):
    model, windows = opened("llama")
    into = empty_collection(model, [], 4, 0)
    collect(model, windows, [], into, logits=False)
    assert (into.predictions.n_bytes, int(into.predictions.counts.sum())) == (0, 0)
    assert float(into.predictions.sums.abs().sum()) == 0
    assert into.n_tokens == 150
