"""Comparisons of layers, conditions and models: against formulas in numpy, and at the very bytes that they claim."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import PROPERTY, gaussian, orthogonal
from models import TEXT
from polars.testing import assert_frame_equal
from scipy.linalg import subspace_angles
from transformers import AutoModelForCausalLM, AutoTokenizer

import dimscope
from dimscope.activations.reservoir import Sample
from dimscope.studies.layers.rows import Pass
from dimscope.studies.layers.settings import LayersSettings
from dimscope.studies.layers.similarity import SIMILARITY, Side, between_conditions, between_layers, between_models
from dimscope.studies.layers.study import LAYERS as LAYERS_STUDY
from dimscope.studies.study import run_study

pytestmark = pytest.mark.slow  # whole commands or studies

REAL, SHUFFLED, OTHER = Pass("m", "t", "real"), Pass("m", "t", "shuffled"), Pass("other", "t", "real")


# ---- the oracle ----------------------------------------------------------------------------------------------------


def hsic(k, m):
    """Song et al. 2007: the unbiased estimate, with diagonals of zeros."""
    n = len(k)
    k, m = (x - np.diag(np.diag(x)) for x in (k, m))
    parts = np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(axis=0) @ m.sum(axis=0))
    return parts / (n * (n - 3))


def cka(x, y):
    k, m = (z @ z.T for z in (x - x.mean(axis=0), y - y.mean(axis=0)))
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def leading(x, k=16):
    left, values, _ = np.linalg.svd((x - x.mean(axis=0)).T, full_matrices=False)
    return left[:, : min(k, int((values > 1e-6 * values[0]).sum()))]


def check(row, x, y):
    """Every number of a row, for the states of both at the same tokens."""
    x, y, n = x.astype(np.float64), y.astype(np.float64), len(x)
    assert row["n_tokens"] == n
    assert row["cka"] == pytest.approx(cka(x, y), abs=1e-6)  # states are float32
    assert row["cka_null_sd"] == pytest.approx((2 / (n * (n - 3))) ** 0.5)
    angles = np.sort(np.degrees(subspace_angles(leading(x), leading(y))))
    cosines = np.cos(np.radians(angles))
    assert row["k"] == len(angles)
    assert row["overlap"] == pytest.approx((cosines**2).mean(), abs=1e-5)
    assert row["overlap_null"] == pytest.approx(max(leading(x).shape[1], leading(y).shape[1]) / x.shape[1])


# ---- samples by hand -----------------------------------------------------------------------------------------------


def side(of, layers, ends=None):
    n = len(next(iter(layers.values())))
    ends = np.arange(10, 10 + n) if ends is None else np.array(ends)
    return Side(
        of,
        {layer: f"block {layer}" for layer in layers},
        Sample(ends, np.arange(n), np.zeros(n, dtype=np.int64), layers),
    )


def scaled(n, d, seed):
    return gaussian(n, d, seed) * torch.linspace(3, 0.3, d) + 1


def rows_by_layers(frame):
    return {(row["layer"], row["other_layer"]): row for row in frame.iter_rows(named=True)}


def test_between_layers_both_ways_with_ones_on_the_diagonal():
    layers = {0: scaled(200, 24, 0), 1: scaled(200, 24, 1), 4: scaled(200, 24, 0) + 0.5 * gaussian(200, 24, 2)}
    frame = between_layers(side(REAL, layers))
    assert dict(frame.schema) == SIMILARITY
    found = rows_by_layers(frame)
    assert set(found) == {(a, b) for a in layers for b in layers}
    for (a, b), row in found.items():
        check(row, layers[a].numpy(), layers[b].numpy())
        assert row["cka"] == pytest.approx(found[b, a]["cka"], abs=1e-12)
        assert row["overlap"] == pytest.approx(found[b, a]["overlap"], abs=1e-12)
        told = ("comparison", "model", "text", "site", "other_model", "other_text", "other_condition", "other_site")
        assert [row[t] for t in told] == ["between layers", "m", "t", f"block {a}", "m", "t", "real", f"block {b}"]
    for layer in layers:
        assert found[layer, layer]["cka"] == pytest.approx(1, abs=1e-12)
        assert found[layer, layer]["overlap"] == pytest.approx(1, abs=1e-12)
    assert found[0, 4]["cka"] > 0.8
    assert abs(found[0, 1]["cka"]) < 5 * found[0, 1]["cka_null_sd"]


@PROPERTY
@given(seed=st.integers(0, 999), n=st.integers(8, 60), scale=st.floats(0.01, 100), shift=st.floats(-9, 9))
def test_turning_scaling_and_moving_a_layer_leaves_it_alike(seed, n, scale, shift):
    x = scaled(n, 8, seed).double()
    turned = x @ orthogonal(8, seed) * scale + shift
    (row,) = between_conditions(side(REAL, {2: x.float()}), side(SHUFFLED, {2: turned.float()})).iter_rows(named=True)
    assert row["cka"] == pytest.approx(1, abs=1e-5)


def test_between_conditions_is_each_layer_with_itself_at_the_positions_of_both():
    layers, others = (
        {0: scaled(60, 12, 0), 3: scaled(60, 12, 1)},
        {0: scaled(50, 12, 2), 3: scaled(50, 12, 3), 5: scaled(50, 12, 4)},
    )
    ends, other_ends = range(100, 160), [*range(90, 120), *range(140, 160)]
    frame = between_conditions(side(REAL, layers, ends), side(SHUFFLED, others, other_ends))
    assert dict(frame.schema) == SIMILARITY
    found = rows_by_layers(frame)
    assert list(found) == [(0, 0), (3, 3)]
    left, right = [*range(20), *range(40, 60)], [*range(10, 30), *range(30, 50)]  # 100 to 119, and 140 to 159
    for layer in layers:
        check(found[layer, layer], layers[layer][left].numpy(), others[layer][right].numpy())
    assert set(frame["comparison"]) == {"real and shuffled"}
    assert set(frame["other_condition"]) == {"shuffled"}


def test_two_models_of_other_widths_share_no_space_but_can_be_alike():
    x = scaled(80, 12, 0)
    wide = x @ gaussian(12, 20, 1)
    frame = between_models(side(REAL, {0: x, 1: scaled(80, 12, 2)}), side(OTHER, {0: wide, 2: scaled(80, 20, 3)}))
    found = rows_by_layers(frame)
    assert list(found) == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert found[0, 0]["cka"] == pytest.approx(cka(x.double().numpy(), wide.double().numpy()), abs=1e-6)
    assert found[0, 0]["cka"] > 0.5 > found[1, 2]["cka"]
    names = ("overlap", "overlap_null", "k")
    assert all(row[name] is None for row in found.values() for name in names)
    assert {row["other_model"] for row in found.values()} == {"other"}
    assert {row["comparison"] for row in found.values()} == {"between models"}


def test_at_most_1024_tokens_spread_over_the_text_are_compared():
    n = 3000
    x, y = scaled(n, 6, 0), scaled(n, 6, 1)
    y[:1500] = x[:1500]  # alike in the first half only
    (row,) = between_conditions(side(REAL, {1: x}), side(SHUFFLED, {1: y})).iter_rows(named=True)
    places = np.linspace(0, n - 1, 1024).round().astype(int)
    check(row, x[places].numpy(), y[places].numpy())
    assert 0.1 < row["cka"] < 0.7
    everywhere = between_layers(side(REAL, {1: x}))
    assert everywhere["n_tokens"].to_list() == [1024]


@pytest.mark.parametrize("n", [0, 1, 3])
def test_too_few_tokens_are_an_empty_table(n):
    layers = {0: gaussian(n, 6)}
    for frame in (between_layers(side(REAL, layers)), between_conditions(side(REAL, layers), side(SHUFFLED, layers))):
        assert dict(frame.schema) == SIMILARITY
        assert len(frame) == 0
    assert len(between_layers(side(REAL, {0: gaussian(4, 6)}))) == 1


def test_texts_without_a_common_byte_are_an_empty_table():
    layers = {0: gaussian(20, 6)}
    frame = between_models(side(REAL, layers, range(20)), side(OTHER, layers, range(20, 40)))
    assert dict(frame.schema) == SIMILARITY
    assert len(frame) == 0


def test_states_that_are_all_equal_are_alike_to_nothing():
    """null, not NaN: the table has no number for what does not exist."""
    layers = {0: torch.ones(20, 6), 1: gaussian(20, 6)}
    found = rows_by_layers(between_layers(side(REAL, layers)))
    for pair in ((0, 0), (0, 1), (1, 0)):
        assert found[pair]["cka"] is found[pair]["overlap"] is None
    assert found[1, 1]["cka"] == pytest.approx(1)


def test_a_rank_below_16_is_the_k_of_its_overlap():
    low = gaussian(50, 3) @ gaussian(3, 24, 1)
    found = rows_by_layers(between_layers(side(REAL, {0: low, 1: scaled(50, 24, 2)})))
    assert (found[0, 0]["k"], found[0, 1]["k"], found[1, 1]["k"]) == (3, 3, 16)
    assert found[0, 1]["overlap_null"] == pytest.approx(16 / 24)


# ---- real models ---------------------------------------------------------------------------------------------------

WINDOWS, LENGTH = 4, 48


def prefix_of(tokenizer):
    return [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)


def window_spans(folder, text):
    """Return the characters at which the windows of the studied model begin and end."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    offsets, room = encode(tokenizer, text)["offset_mapping"], LENGTH - len(prefix_of(tokenizer))
    starts = [(2 * i + 1) * len(offsets) // (2 * WINDOWS) - room // 2 for i in range(WINDOWS)]
    return [(offsets[start - 1][1], offsets[start + room - 1][1]) for start in starts]


def sampled(folder, text, spans=None):
    """Return the states of every site at every byte where a token inside `spans` ends, first tokens left out."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    encoded, prefix = encode(tokenizer, text), prefix_of(tokenizer)
    stops = [stop for _, stop in encoded["offset_mapping"]]
    ends, states = [], {0: [], 1: [], 3: []}
    for first, last in spans or window_spans(folder, text):
        chosen = [i for i, stop in enumerate(stops) if i and stops[i - 1] >= first and stop <= last]
        ids = prefix + [encoded["input_ids"][i] for i in chosen]
        ends += [len(text[: stops[i]].encode()) for i in chosen[1 - len(prefix) :]]
        with torch.no_grad():
            hidden = model.eval()(torch.tensor([ids]), output_hidden_states=True).hidden_states
        # Layer 2 is the last block, which hidden_states has only after the norm, as layer 3.
        for layer, i in {0: 0, 1: 1, 3: 2}.items():
            states[layer].append(hidden[i][0, 1:].numpy())
    assert len(set(ends)) == len(ends)
    return np.array(ends), {layer: np.concatenate(rows) for layer, rows in states.items()}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return a text whose bytes are not its characters, with the letters outside of all windows."""
    path = tmp_path_factory.mktemp("text") / "page.txt"
    path.write_text("Größe – müßig: ½ ≠ ⅓.\n" + TEXT, encoding="utf-8")
    return path


def studied(model, folder, page, others=(), **settings):
    given = {
        "windows": WINDOWS,
        "length": LENGTH,
        "shuffles": 1,
        "shuffles_across": 0,
        "logits": False,
        "device": "cpu",
        **settings,
    }
    opened = [dimscope.open(m) for m in (model, *others)]
    settings = LayersSettings(texts=(str(page),), compare=opened[1:], **given)
    return run_study(LAYERS_STUDY, opened[0], settings, out=folder).tables["similarity"]


@pytest.mark.parametrize("width", [32, 64])
def test_two_models_are_compared_at_the_same_bytes_whatever_their_tokenizers(checkpoint, tmp_path, page, width):
    llama, gpt2 = checkpoint("llama", seed=7), checkpoint("gpt2", hidden_size=width, vocab_size=400, seed=7)
    found = studied(llama, tmp_path, page, [gpt2], random_weights=False).filter(comparison="between models")
    text = page.read_text(encoding="utf-8")
    (ends, left), (other_ends, right) = sampled(llama, text), sampled(gpt2, text, window_spans(llama, text))
    shared = np.intersect1d(ends, other_ends)
    assert 20 < len(shared) < len(ends)
    x, y = (
        {layer: rows[np.searchsorted(e, shared)] for layer, rows in s.items()}
        for e, s in ((ends, left), (other_ends, right))
    )
    rows = rows_by_layers(found)
    assert len(rows) == 4 * 4
    for a in x:
        for b in y:
            row = rows[a, b]
            assert row["n_tokens"] == len(shared)
            assert row["cka"] == pytest.approx(
                cka(x[a].astype(float), y[b].astype(float)), abs=1e-5
            )  # layers of float32
            if width == 32:
                check(row, x[a], y[b])
            else:
                assert row["overlap"] is row["k"] is None
            assert (row["model"], row["other_model"], row["other_condition"]) == (llama.name, gpt2.name, "real")


def test_real_text_and_random_weights_are_compared_at_the_same_positions(checkpoint, tmp_path, page):
    """A twin of seed 0 of a checkpoint with the weights of seed 0 is that checkpoint: as alike as can be."""
    found = studied(checkpoint("llama"), tmp_path, page)
    twin = found.filter(comparison="real and random weights")
    assert twin["layer"].to_list() == [0, 1, 2, 3]
    np.testing.assert_allclose(twin["cka"], 1, atol=1e-6)
    np.testing.assert_allclose(twin["overlap"], 1, atol=1e-6)
    assert set(twin["n_tokens"]) == {WINDOWS * (LENGTH - 1)}
    other = studied(checkpoint("llama", seed=7), tmp_path / "other", page).filter(comparison="real and random weights")
    assert (other["cka"] < 0.9).all()


def test_shuffled_text_is_held_against_real_text_at_the_same_positions(checkpoint, tmp_path, page):
    """With rotary positions, layer 0 of shuffled text is the same rows in another order: as alike as any two orders."""
    found = studied(checkpoint("llama", seed=7), tmp_path, page, random_weights=False, shuffles=2)
    shuffled = found.filter(comparison="real and shuffled")
    assert shuffled["layer"].to_list() == [0, 1, 2, 3]  # one draw is enough
    n = WINDOWS * (LENGTH - 1)
    assert set(shuffled["n_tokens"]) == {n}
    assert abs(shuffled["cka"][0]) < 5 * (2 / (n * (n - 3))) ** 0.5
    assert shuffled["overlap"][0] == pytest.approx(1, abs=1e-6)  # and of the same span
    ends, states = sampled(checkpoint("llama", seed=7), page.read_text(encoding="utf-8"))
    layers = rows_by_layers(found.filter(comparison="between layers"))
    assert len(layers) == 4 * 4
    for a in states:
        for b in states:
            check(layers[a, b], states[a], states[b])
            assert layers[a, b]["cka"] == pytest.approx(layers[b, a]["cka"], abs=1e-12)
    assert len(ends) == n


def test_every_text_is_held_against_itself(checkpoint, tmp_path):
    """The rows of two texts are those of either text alone: real text against shuffled, random and another model's."""
    texts = {"one.txt": TEXT, "two.txt": TEXT[::-1]}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    llama, gpt2 = checkpoint("llama", seed=7), checkpoint("gpt2", seed=7)
    given = {
        "windows": WINDOWS,
        "length": LENGTH,
        "shuffles": 1,
        "shuffles_across": 0,
        "logits": False,
        "device": "cpu",
    }
    opened = [dimscope.open(llama), dimscope.open(gpt2)]

    def similarity(folder, *names):
        sources = tuple(str(tmp_path / name) for name in names)
        settings = LayersSettings(texts=sources, compare=opened[1:], **given)
        return run_study(LAYERS_STUDY, opened[0], settings, out=tmp_path / folder).tables["similarity"]

    both = similarity("both", *texts)
    for name in texts:
        part = both.filter(text=name)
        assert set(part["other_text"]) == {name}
        assert part["comparison"].n_unique() == 4
        assert_frame_equal(part, similarity(name + " alone", name), rel_tol=1e-6, abs_tol=1e-6)


def test_the_built_in_model_is_itself_layer_by_layer(tmp_path):
    prose = Path(str(files("dimscope.builtin"))) / "texts/prose.txt"
    found = studied("builtin", tmp_path, prose, ["builtin"], shuffles=0, random_weights=False)
    own, other = (found.filter(comparison=f"between {c}") for c in ("layers", "models"))
    assert own["layer"].n_unique() == 8
    assert own.filter(pl.col("layer") == pl.col("other_layer"))["cka"].to_list() == pytest.approx([1] * 8)
    assert other["cka"].to_list() == pytest.approx(own["cka"].to_list(), abs=1e-9)
    assert own.select(pl.col("cka").is_between(-1, 1).all()).item()
    neighbours = own.filter(pl.col("layer") + 1 == pl.col("other_layer"))["cka"]
    assert neighbours.min() > 0.3
