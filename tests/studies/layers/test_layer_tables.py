"""Every number of the layers study: against float64 numpy on what transformers itself returns, and on planted rows."""

import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from damage import set_rows
from hypothesis import given
from hypothesis import strategies as st
from matrices import PROPERTY, gaussian, orthogonal, with_singular_values
from polars.testing import assert_frame_equal
from sklearn.neighbors import NearestNeighbors
from transformers import AutoModelForCausalLM, AutoTokenizer

import dimscope
from dimscope.activations.collection import Collection
from dimscope.activations.predictions import Predictions
from dimscope.activations.reservoir import Reservoir
from dimscope.activations.site_sums import MASSIVE, MASSIVE_RATIO, SiteSums
from dimscope.studies.layers import tables as measures
from dimscope.studies.layers.rows import LAYERS, PREDICTIONS, Pass
from dimscope.studies.layers.settings import LayersSettings
from dimscope.studies.layers.state_measures import ONE_PER_TYPE, TYPE_MEANS, WITHIN_TYPES
from dimscope.studies.layers.study import LAYERS as LAYERS_STUDY
from dimscope.studies.study import run_study

pytestmark = pytest.mark.slow  # whole commands or studies

HOME = Path(str(files("dimscope.builtin")))
PROSE = (HOME / "texts/prose.txt").read_text(encoding="utf-8")
EPS = 2.0**-23  # of float32
THRESHOLDS = (0.8, 0.9, 0.95, 0.99)
REAL = Pass("m", "t", "real")
FURTHER = Pass("m", "t", "shuffled", 1, 1)

# The study goes through Gram matrices, whose eigenvalues are off by some eps lambda_1. So what is summed over lambda has
# ten digits and more; a singular value may be off by sqrt(eps) sigma_1 = 1.5e-8 sigma_1, and the sum over 256 of them by 4e-6
# where the rank is not full. Null spectra: what the oracle's grid is good for.
DIGITS = {"effective rank (entropy of sigma)": 4e-6}
TENTH = 1e-9


# ---- the oracle ----------------------------------------------------------------------------------------------------


def entropy_rank(values):
    p = values[values > 0] / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def family(s, n, thresholds, tolerance):
    """Return every linear dimension of singular values of matrices with n degrees of freedom, and the anisotropy."""
    energy = s**2
    cumulative = np.cumsum(energy) / energy.sum()
    square = (n**2 * (energy**2).sum() / n**2 - n * energy.sum() ** 2 / n**2) / ((n - 1) * (n + 2))
    return {
        **{f"variance count {100 * t:g}%": int(np.argmax(cumulative >= t - 1e-12)) + 1 for t in thresholds},
        "numerical rank": int((s > tolerance * s[0]).sum()),
        "participation ratio": energy.sum() ** 2 / (energy**2).sum(),
        "participation ratio, corrected": (energy.sum() ** 2 / n**2 - 2 * square / n) / square,
        "effective rank (entropy of sigma)": entropy_rank(s),
        "effective rank (entropy of lambda)": entropy_rank(energy),
        "stable rank": energy.sum() / energy[0],
        "anisotropy": energy[0] / energy.sum(),
    }


def measured(x, tolerance, *, centred=True, standardised=False, thresholds=THRESHOLDS):
    """Return the family of rows by numpy's SVD in float64."""
    x = x.astype(np.float64)
    x = x - x.mean(axis=0) if centred else x
    x = x / x.std(axis=0) if standardised else x
    n = len(x) - centred
    return family(np.linalg.svd(x, compute_uv=False)[: min(n, x.shape[1])], n, thresholds, tolerance)


@cache
def noise(n, d, centred, tolerance, thresholds=THRESHOLDS):
    """Return the family of white noise: its eigenvalues at the Marchenko-Pastur quantiles, on a plain grid."""
    free = n - centred
    rank, beta = min(free, d), min(free, d) / max(free, d)
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    edges = np.linspace(low, high, 500_001)
    x = (edges[1:] + edges[:-1]) / 2
    cumulative = np.concatenate([[0], np.cumsum(np.sqrt((high - x) * (x - low)) / x)])
    values = np.interp((np.arange(rank)[::-1] + 0.5) / rank, cumulative / cumulative[-1], edges)
    return family(np.sqrt(values * max(free, d)), free, thresholds, tolerance)


# ---- a real model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A table of the study, and the states (windows x tokens x d) and ids that transformers has for it."""

    table: pl.DataFrame
    states: dict[int, np.ndarray]
    ids: np.ndarray

    @property
    def tolerance(self):
        """Return the stated tolerance of the rank, by the number of rows."""
        d = self.states[0].shape[2]
        return lambda n: (max(n, d) if len(self.ids) == 1 else d) * EPS


def middle(ids, count, length, bos):
    """Return the ids of windows, each from the middle of one of `count` equal parts of the text."""
    room = length - 1
    starts = [(2 * i + 1) * len(ids) // (2 * count) - room // 2 for i in range(count)]
    return np.array([[bos, *ids[start : start + room]] for start in starts])


@torch.no_grad()
def stock_states(model, ids):
    """Return the states of every site: the last block before the norm is what the model gives without its norm."""
    hidden = model(torch.from_numpy(ids), output_hidden_states=True, use_cache=False).hidden_states
    norm, model.model.norm = model.model.norm, torch.nn.Identity()
    before = model(torch.from_numpy(ids), output_hidden_states=True, use_cache=False).hidden_states[-1]
    model.model.norm = norm
    layers = [*hidden[:-1], before, hidden[-1]]
    return {layer: states.numpy() for layer, states in enumerate(layers)}


def run(folder, checkpoint, **settings):
    opened = dimscope.open(checkpoint)
    home = opened.source.fetch("config.json").parent
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32),
        AutoTokenizer.from_pretrained(home),
    )
    bare = {"shuffles": 0, "shuffles_across": 0, "random_weights": False, "logits": False, "device": "cpu"}
    given = LayersSettings(texts=("builtin:prose",), **bare, **settings)
    tables = run_study(LAYERS_STUDY, opened, given, out=folder).tables
    ids = tokenizer(PROSE, add_special_tokens=False)["input_ids"]
    windows = middle(ids, given.windows, given.length, tokenizer.bos_token_id)
    return Run(tables["layers"], stock_states(model.eval(), windows), windows)


CASES = {
    "fewer rows than columns": {"windows": 1, "length": 128},
    "one window": {"windows": 1, "length": 320},
    "many windows": {"windows": 3, "length": 128},
    "massive tokens": {"windows": 4, "length": 48},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, checkpoint):
    """Return `runs(case)`: each case once."""

    @cache
    def get(case):
        folder, model = tmp_path_factory.mktemp("run"), "builtin"
        if case == "massive tokens":
            model = massive_llama(checkpoint("llama"), folder / "model")
        return run(folder / "out", model, **CASES[case])

    return get


def massive_llama(source, folder):
    """A copy whose rows for the commonest words hold an activation of 500, which stays in the stream up to the norm."""
    import shutil

    shutil.copytree(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    row = gaussian(1, 32)[0] * 0.02
    row[5] = 500.0
    set_rows(folder, [tokenizer.convert_tokens_to_ids("▁the"), tokenizer.convert_tokens_to_ids("▁a")], row)
    return folder


def massive_tokens(states):
    sizes = np.abs(states)
    limit = np.maximum(MASSIVE, MASSIVE_RATIO * np.median(sizes.reshape(len(states), -1), axis=1))
    return (sizes > limit[:, None, None]), (sizes > limit[:, None, None]).any(axis=2)


def clouds(states):
    """Return (preprocess, centred, rows, standardised, dropped) of every cloud of the table."""
    x = states.reshape(-1, states.shape[2])
    _, massive = massive_tokens(states)
    yield "raw", True, x, False, 0
    yield "raw", False, x, False, 0
    yield "without first token", True, states[:, 1:].reshape(-1, x.shape[1]), False, len(states)
    yield "without massive tokens", True, x[~massive.ravel()], False, int(massive.sum())
    yield "z-scored", True, x, True, 0


WHOLE = {
    "mean cosine", "massive activations", "largest activation", "rogue dimension share", "rogue dimension index"
}  # fmt: skip
SPECTRAL = list(family(np.ones(4), 3, THRESHOLDS, EPS))


@pytest.mark.parametrize("case", CASES)
def test_every_spectral_number_is_that_of_numpy_on_the_states_of_transformers(runs, case):
    of = runs(case)
    assert sorted(of.states) == of.table["layer"].unique().sort().to_list()
    for layer, states in of.states.items():
        table = of.table.filter(pl.col("layer") == layer, pl.col("metric").is_in(SPECTRAL))
        table = table.filter(~pl.col("preprocess").is_in([ONE_PER_TYPE, TYPE_MEANS, WITHIN_TYPES]))
        assert len(table) == 5 * len(SPECTRAL)
        for preprocess, centred, rows, standardised, dropped in clouds(states):
            tolerance, dim = of.tolerance(len(rows)), rows.shape[1]
            expected = measured(rows, tolerance, centred=centred, standardised=standardised)
            null = noise(len(rows), dim, centred, tolerance)
            part = table.filter(preprocess=preprocess, centred=centred)
            assert part["metric"].to_list() == list(expected)
            for row in part.iter_rows(named=True):
                name, value = row["metric"], expected[row["metric"]]
                told = f"{case}, layer {layer}, {preprocess}, {name}"
                assert row["value"] == pytest.approx(value, rel=DIGITS.get(name, TENTH)), told
                assert row["null"] == pytest.approx(null[name], rel=1e-4), told
                assert (row["n_tokens"], row["n_dropped"], row["dim"]) == (len(rows), dropped, dim), told
                if name == "anisotropy":
                    assert row["share_of_dim"] is row["share_of_rank"] is row["share_of_null"] is None
                    continue
                assert row["share_of_dim"] == pytest.approx(row["value"] / dim, rel=1e-12)
                assert row["share_of_rank"] == pytest.approx(row["value"] / expected["numerical rank"], rel=1e-12)
                assert row["share_of_null"] == pytest.approx(row["value"] / row["null"], rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_what_needs_no_spectrum_is_that_of_numpy_too(runs, case):
    of = runs(case)
    for layer, states in of.states.items():
        x = states.reshape(-1, states.shape[2]).astype(np.float64)
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        cosines = unit @ unit.T
        spread = x.var(axis=0)
        activations, _ = massive_tokens(states)
        inner = states[:, 1:].reshape(-1, x.shape[1]).astype(np.float64)  # the reservoir leaves first positions out
        norms = np.linalg.norm(inner, axis=1)
        expected = {
            "mean cosine": (cosines[~np.eye(len(x), dtype=bool)].mean(), 0, len(x)),
            "massive activations": (activations.sum(), None, len(x)),
            "largest activation": (np.abs(states).max(), None, len(x)),
            "rogue dimension share": (spread.max() / spread.sum(), 1 / x.shape[1], len(x)),
            "rogue dimension index": (spread.argmax(), None, len(x)),
            "median norm": (np.quantile(norms, 0.5, method="lower"), None, len(inner)),
        }
        for name, (value, null, n) in expected.items():
            row = of.table.filter(layer=layer, metric=name).row(0, named=True)
            assert row["value"] == pytest.approx(value, rel=TENTH, abs=1e-12), (layer, name)
            assert row["null"] == (null if null is None else pytest.approx(null))
            assert row["n_tokens"] == n
            assert row["share_of_dim"] is row["share_of_rank"] is row["share_of_null"] is None
        (row,) = of.table.filter(layer=layer, metric="effective rank (unit rows)").iter_rows(named=True)
        around = inner - inner.mean(axis=0)
        shares = np.linalg.svd(around / np.linalg.norm(around, axis=1, keepdims=True), compute_uv=False) ** 2 / len(
            inner
        )
        value = np.exp(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())
        assert row["value"] == pytest.approx(value, rel=TENTH)
        null = noise(len(inner), x.shape[1], True, EPS)["effective rank (entropy of lambda)"]
        assert row["null"] == pytest.approx(null, rel=1e-4)
        assert row["share_of_dim"] == pytest.approx(value / x.shape[1])
        assert row["share_of_null"] == pytest.approx(value / null, rel=1e-4)


def test_the_massive_tokens_of_the_case_are_some_and_not_all(runs):
    """What the case is for: some rows are left out before the norm, none after it."""
    of = runs("massive tokens")
    dropped = of.table.filter(preprocess="without massive tokens", metric="stable rank").sort("layer")["n_dropped"]
    assert dropped.to_list()[-1] == 0
    assert all(0 < n < of.ids.size // 4 for n in dropped.to_list()[:-1])
    ratio = of.table.filter(layer=1, metric="participation ratio", centred=True)
    by = dict(ratio.select("preprocess", "value").iter_rows())
    assert by["raw"] < 1.1 < 10 < by["without massive tokens"]


@pytest.mark.parametrize("case", ["fewer rows than columns", "many windows"])
def test_twonn_is_that_of_scikit_learn_on_the_different_rows(runs, case):
    """At layer 0 of a model with rotary positions a row is a copy of another where the token is the same."""
    of = runs(case)
    for layer in (0, 3):
        rows = of.states[layer][:, 1:].reshape(-1, of.states[layer].shape[2]).astype(np.float64)
        ids = of.ids[:, 1:].ravel()
        kept = np.sort(np.unique(ids, return_index=True)[1]) if layer == 0 else np.arange(len(rows))
        distances, _ = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(rows[kept]).kneighbors(rows[kept])
        mu = np.log(distances[:, 2] / distances[:, 1])
        (row,) = of.table.filter(layer=layer, metric="TwoNN, maximum likelihood", preprocess="raw").iter_rows(
            named=True
        )
        value = (len(mu) - 1) / mu.sum()
        assert (row["n_tokens"], row["n_dropped"]) == (len(kept), len(rows) - len(kept))
        assert row["value"] == pytest.approx(value, rel=1e-6)  # squares and roots of distances


# ---- planted rows --------------------------------------------------------------------------------------------------


def collected(hidden, reservoir=4096, tokens=None):
    """Return the collection of one site whose states (windows x tokens x d) are these; by default no token occurs twice."""
    b, t, d = hidden.shape
    sums, sample = SiteSums("block 1", d), Reservoir(reservoir, 0)
    sums.add(hidden, None)
    ends = torch.arange(b * t).view(b, t)
    sample.take(1, hidden, sample.candidates(ends, ends if tokens is None else tokens, range(b), None))
    sample.prune(whole=True)
    return Collection({1: sums}, sample, Predictions(50), torch.ones(50, dtype=torch.bool), [t] * b, b * t, 1, True)


def frame_of(collection, of=REAL, thresholds=THRESHOLDS):
    return measures.layers_frame(of, collection, measures.layer_spectra(collection, THRESHOLDS), thresholds)


def values(frame, preprocess="raw", centred=True):
    part = frame.filter(pl.col("preprocess") == preprocess, pl.col("centred") == centred, pl.col("scale").is_null())
    return dict(part.select("metric", "value").iter_rows())


def raw_values(rows, windows=1):
    """Return the raw, centred spectral numbers of rows alone: without a sample, and without further clouds."""
    hidden = rows.view(windows, -1, rows.shape[1])
    return values(frame_of(collected(hidden, reservoir=2), FURTHER))


@pytest.mark.parametrize("windows", [1, 4])
@pytest.mark.parametrize(("n", "d"), [(60, 64), (400, 64)])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_a_subspace_has_its_dimension_whatever_the_noise_below_the_tolerance(k, n, d, windows):
    basis = orthogonal(d)[:k]
    x = (gaussian(n, k, 1, torch.float64) @ basis + 1e-8 * gaussian(n, d, 2, torch.float64) + 0.2).float()
    frame = frame_of(collected(x.view(windows, -1, d)))
    for preprocess in ("raw", "without first token", "without massive tokens", "z-scored"):
        found = values(frame, preprocess)
        assert found["numerical rank"] == k
        assert 0.5 * k < found["variance count 99%"] <= k
    assert values(frame, centred=False)["numerical rank"] == k + 1  # and the mean


@pytest.mark.parametrize("k", [1, 5, 20])
def test_a_flat_subspace_under_noise_is_k_for_every_measure_but_the_rank(k):
    x = with_singular_values(400, [100.0] * k + [0.02] * (64 - k)).float()
    found = raw_values(x)
    for name in ("participation ratio", "effective rank (entropy of lambda)", "stable rank"):
        assert found[name] == pytest.approx(k, rel=1e-3), name
    for percent in (80, 90, 95, 99):  # the noise takes its part, so 4 of 5 hold less than 80%
        assert found[f"variance count {percent}%"] == k * percent // 100 + 1
    assert found["numerical rank"] == 64


def test_the_tolerance_of_the_rank_is_that_of_matrix_rank_in_one_window_and_does_not_grow_in_a_stream():
    n, d = 400, 8
    x = with_singular_values(n, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 100 * EPS]).float()  # between d eps and n eps
    assert raw_values(x)["numerical rank"] == np.linalg.matrix_rank(x.numpy()) == 7
    assert raw_values(x, windows=2)["numerical rank"] == 8
    assert measures.rank_tolerance(n, d, one_window=True) == n * EPS
    assert measures.rank_tolerance(5, d, one_window=True) == measures.rank_tolerance(n, d, one_window=False) == d * EPS


@pytest.mark.parametrize("jitter", [0.0, 1e-6])
def test_copies_do_not_harm_intrinsic_dimensions_and_are_counted(jitter):
    """A square in 32 dimensions, a third of whose rows come twice."""
    square = torch.rand(601, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = (square @ orthogonal(32)[:2]).float()
    again = rows[1:201] + jitter * gaussian(200, 32)
    plain = frame_of(collected(rows[None]))
    doubled = frame_of(collected(torch.cat([rows, again])[None]))
    estimates = plain.filter(pl.col("metric").str.contains("TwoNN|GRIDE|Levina"))
    assert len(estimates) >= 3 + 5
    near = estimates.filter(metric="TwoNN, maximum likelihood")["value"][0]
    assert near == pytest.approx(2, abs=4 * 2 / math.sqrt(600))
    for before, after in zip(
        estimates.iter_rows(named=True),
        doubled.filter(pl.col("metric").str.contains("TwoNN|GRIDE|Levina")).iter_rows(named=True),
        strict=True,
    ):
        assert after["n_dropped"] == 200
        assert (before["n_dropped"], before["n_tokens"], after["n_tokens"]) == (0, 600, 600)
        assert (after["metric"], after["scale"]) == (before["metric"], before["scale"])
        # Distances of float32 rows less another mean.
        assert after["value"] == pytest.approx(before["value"], rel=1e-6)
        assert after["null"] == before["null"]


@pytest.mark.parametrize("windows", [1, 5])
def test_one_massive_token_owns_the_raw_numbers_and_is_told_and_left_out(windows):
    x = gaussian(200, 24)
    x[57, 7] = -5000
    hidden = x.view(windows, -1, 24)
    frame = frame_of(collected(hidden))
    raw, without = values(frame), values(frame, "without massive tokens")
    assert raw["participation ratio"] == pytest.approx(1, abs=1e-3)
    assert raw["variance count 95%"] == raw["variance count 99%"] == 1
    assert raw["anisotropy"] > 0.99
    rest = np.delete(x.numpy(), 57, axis=0)
    for name, value in measured(rest, (200 if windows == 1 else 24) * EPS).items():
        assert without[name] == pytest.approx(value, rel=1e-9), name
    assert without["participation ratio"] > 20
    assert set(frame.filter(preprocess="without massive tokens")["n_dropped"]) == {1}
    told = values(frame, centred=False)
    assert (told["massive activations"], told["largest activation"]) == (1, 5000)
    assert raw["rogue dimension index"] == 7


def test_a_massive_activation_is_larger_than_a_hundred_and_than_a_thousand_medians():
    """Sun et al. 2024: both. The window's own median counts, not that of all."""
    x = gaussian(120, 16).view(2, 60, 16)
    x[0, 10, 3] = 300  # below 1,000 medians of 0.67
    x[1] *= 0.01
    x[1, 20, 4] = 99  # below 100
    assert values(frame_of(collected(x)), centred=False)["massive activations"] == 0
    x[0, 30, 2], x[1, 20, 4], x[1, 20, 5] = 5000, 101, -102
    frame = frame_of(collected(x))
    assert values(frame, centred=False)["massive activations"] == 3
    assert set(frame.filter(preprocess="without massive tokens")["n_dropped"]) == {2}  # tokens; the 300 is still none


def test_a_first_token_like_an_attention_sink_is_left_out():
    x = gaussian(200, 24).view(4, 50, 24)
    x[:, 0] *= 90
    frame = frame_of(collected(x))
    assert values(frame)["participation ratio"] < 4
    without = values(frame, "without first token")
    for name, value in measured(x[:, 1:].reshape(-1, 24).numpy(), 24 * EPS).items():
        assert without[name] == pytest.approx(value, rel=1e-9), name
    assert set(frame.filter(preprocess="without first token")["n_dropped"]) == {4}
    assert values(frame, centred=False)["median norm"] < 2 * math.sqrt(24)  # the sample knows no first tokens


@pytest.mark.parametrize("n", [20, 200])
def test_a_rogue_column_owns_the_raw_numbers_and_not_the_z_scored(n):
    x = gaussian(n, 24)
    expected = measured(x.numpy(), n * EPS, standardised=True)
    x[:, 11] *= 80
    frame = frame_of(collected(x[None]))
    raw, scored = values(frame), values(frame, "z-scored")
    assert raw["participation ratio"] < 1.1
    assert raw["rogue dimension index"] == 11
    spread = x.double().numpy().var(axis=0)
    assert raw["rogue dimension share"] == pytest.approx(spread[11] / spread.sum(), rel=1e-9)
    assert raw["rogue dimension share"] > 0.99
    for name in set(expected) - {"numerical rank"}:
        assert scored[name] == pytest.approx(expected[name], rel=1e-6), name  # the factor is rounded to float32
    assert scored["numerical rank"] == min(n - 1, 24)


def test_constant_columns_are_no_dimensions_of_z_scores():
    x = gaussian(200, 24)
    x[:, [3, 9]] = 1.7
    frame = frame_of(collected(x[None]))
    assert values(frame, "z-scored")["numerical rank"] == values(frame)["numerical rank"] == 22
    rest = np.delete(x.numpy(), [3, 9], axis=1)
    expected = measured(rest, EPS, standardised=True)["participation ratio"]
    assert values(frame, "z-scored")["participation ratio"] == pytest.approx(expected, rel=1e-9)


@PROPERTY
@given(seed=st.integers(0, 999), n=st.integers(6, 60), windows=st.sampled_from([1, 2, 3]))
def test_windows_in_one_batch_or_many_and_in_any_order_are_one_cloud(seed, n, windows):
    x = gaussian(n * windows, 12, seed) + 1
    whole = collected(x.view(windows, n, 12), reservoir=2)
    parts = [collected(w[None], reservoir=2) for w in x.view(windows, n, 12).flip(0)]
    for part in parts[1:]:
        parts[0].merge(part)
    left, right = (frame_of(c).filter(pl.col("metric") != "rogue dimension index") for c in (whole, parts[0]))
    assert_frame_equal(left, right, rel_tol=1e-6, abs_tol=1e-9)


# ---- sample size ---------------------------------------------------------------------------------------------------


def power_law(n, d, seed, alpha=1.0):
    """Return N rows whose population variances are i^-alpha."""
    return gaussian(n, d, seed) * torch.arange(1, d + 1).pow(-alpha / 2)


@pytest.mark.parametrize(("n", "reads"), [(64, 52), (512, 267), (1024, 361)])
def test_the_count_for_95_percent_of_a_spectrum_of_1_over_i_grows_with_n(n, reads):
    """Population: 536 of 768. The figures are the reference's; one draw spreads by 1%."""
    found = raw_values(power_law(n, 768, seed=n))
    assert found["variance count 95%"] == pytest.approx(reads, rel=0.02)


def test_the_curve_over_n_reads_the_same_figures():
    collection = collected(power_law(1025, 768, seed=1)[None])  # the first position is never in the sample
    curve = measures.curve_frame(REAL, collection, (0.95,))
    counts = curve.filter(metric="variance count 95%")
    assert counts["n_tokens"].to_list() == [64, 128, 256, 512, 1024]
    by = dict(counts.select("n_tokens", "value").iter_rows())
    for n, reads in {64: 52, 512: 267, 1024: 361}.items():
        assert by[n] == pytest.approx(reads, rel=0.03), n
    assert counts["value"].is_sorted()
    for row in counts.iter_rows(named=True):
        assert row["null"] == pytest.approx(noise(row["n_tokens"], 768, True, EPS)["variance count 95%"], abs=1)


@pytest.mark.parametrize(("alpha", "d"), [(1.0, 96), (0.5, 64)])
def test_the_corrected_ratio_is_the_populations_where_the_plug_in_is_low(alpha, d):
    """Rows are Gaussian and independent, so the correction holds; means over 24 draws, spread 1/sqrt(24) of one draw's."""
    variances = np.arange(1.0, d + 1) ** -alpha
    truth = variances.sum() ** 2 / (variances**2).sum()
    found = {}
    for n in (24, 96, 1536):
        draws = [raw_values(power_law(n, d, 1000 * n + seed, alpha)) for seed in range(24)]
        names = ("participation ratio", "participation ratio, corrected")
        found[n] = [(np.mean(x), np.std(x) / math.sqrt(len(x))) for x in ([v[m] for v in draws] for m in names)]
    for n, ((plug_in, _), (corrected, spread)) in found.items():
        assert corrected == pytest.approx(truth, abs=4 * spread + 0.02 * truth), n  # a ratio of unbiased estimates
        assert plug_in < corrected
    plain = [found[n][0][0] for n in (24, 96, 1536)]
    assert plain == sorted(plain)
    assert plain[0] < 0.65 * truth
    assert plain[-1] == pytest.approx(truth, rel=0.05)


# ---- white noise ---------------------------------------------------------------------------------------------------

# Spread of a draw over the null at these sizes; counts are whole numbers, and the largest eigenvalue fluctuates as n^(-2/3).
SPREAD = {"stable rank": 0.06, "anisotropy": 0.06, "participation ratio, corrected": 0.04}


@pytest.mark.parametrize(("windows", "n", "d"), [(1, 40, 64), (1, 65, 64), (2, 200, 64), (3, 100, 24)])
def test_planted_white_noise_is_its_own_null_in_every_cloud(windows, n, d):
    frames = [frame_of(collected(gaussian(windows * n, d, seed).view(windows, n, d), reservoir=2)) for seed in range(6)]
    told = pl.concat(frames).filter(pl.col("metric").is_in(SPECTRAL))
    ratios = told.with_columns(ratio=pl.col("value") / pl.col("null"))
    means = ratios.group_by("preprocess", "centred", "metric").agg(pl.col("ratio").mean(), pl.col("null").first())
    assert len(means) == 5 * len(SPECTRAL)
    for row in means.iter_rows(named=True):
        step = 1 / row["null"] if "count" in row["metric"] else 0
        assert row["ratio"] == pytest.approx(1, abs=SPREAD.get(row["metric"], 0.02) + step), row
    exact = told.filter(metric="numerical rank")
    assert (exact["value"] == exact["null"]).all()
    shares = told.filter(pl.col("metric") != "anisotropy")
    expected = shares.select(pl.col("value") / pl.col("null")).to_series()
    assert (shares["share_of_null"] - expected).abs().max() < 1e-12


def test_intrinsic_estimates_of_white_noise_are_their_own_null():
    """Which is below d: TwoNN cannot see all 32. Standard errors are those of independent points, so twice as wide."""
    frames = [frame_of(collected(gaussian(301, 32, seed)[None])) for seed in range(1, 7)]
    told = pl.concat(frames).filter(pl.col("metric").str.contains("TwoNN|GRIDE|Levina"))
    means = told.group_by("metric", "scale").agg(pl.col("value", "null").mean(), pl.col("value").std().alias("sd"))
    assert len(means) == 2 + 6 + 1
    for row in means.iter_rows(named=True):
        assert row["value"] == pytest.approx(row["null"], abs=4 * row["sd"]), row
        assert row["null"] < 28
    assert told.select((pl.col("share_of_null") - pl.col("value") / pl.col("null")).abs().max()).item() < 1e-12
    assert set(told["n_tokens"]) == {300}


def test_a_null_has_the_shape_of_the_rows_that_are_left():
    """150 windows of 3 rows: without the first token a third is gone, and with it a null of 450 rows."""
    x = gaussian(450, 40).view(150, 3, 40)
    x[1, 1, 5] = 9000
    frame = frame_of(collected(x, reservoir=2))
    ratio = frame.filter(pl.col("metric") == "participation ratio")
    nulls = {
        (p, c): (n, null) for p, c, n, null in ratio.select("preprocess", "centred", "n_tokens", "null").iter_rows()
    }
    shapes = {"raw": 450, "without first token": 300, "without massive tokens": 449, "z-scored": 450}
    assert {p: n for (p, c), (n, _) in nulls.items() if c} == shapes
    for (_, centred), (n, null) in nulls.items():
        assert null == pytest.approx(noise(n, 40, centred, EPS)["participation ratio"], rel=1e-4)
    assert len({null for _, null in nulls.values()}) == 4


# ---- tables --------------------------------------------------------------------------------------------------------


def no_nan(frame):
    for name, dtype in frame.schema.items():
        if dtype.is_float():
            assert frame[name].is_nan().sum() == 0, name
            assert frame[name].is_infinite().sum() == 0, name


def odd_states():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 30, 8, generator=generator)
    return {
        "two rows": noise[:, :2], "three rows": noise[:, :3], "windows of two": noise.view(15, 2, 8),
        "all zero": torch.zeros(1, 20, 8), "all equal": torch.full((1, 20, 8), 3.0), "one column": noise.view(1, 240, 1),
        "a line": noise[:, :, :1] * torch.ones(8), "zero rows": torch.cat([noise, torch.zeros(1, 9, 8)], dim=1),
        "all massive": torch.eye(8)[None] * 1e6, "two different": noise[:, [0, 1] * 9],
    }  # fmt: skip


@pytest.mark.parametrize("name", odd_states())
def test_odd_states_have_tables_with_null_where_there_is_no_number(name):
    collection = collected(odd_states()[name])
    layers = frame_of(collection)
    assert dict(layers.schema) == LAYERS
    no_nan(layers)
    assert (layers.filter(metric="numerical rank")["value"] >= 0).all()
    no_nan(measures.scree_frame(REAL, collection, measures.layer_spectra(collection, THRESHOLDS)))
    no_nan(measures.text_frame(REAL, collection, None))
    frame = measures.predictions_frame(REAL, collection.predictions)
    assert dict(frame.schema) == PREDICTIONS
    assert len(frame) == 0
    no_nan(measures.confidence_frame(REAL, collection.predictions))


@pytest.mark.parametrize("name", odd_states())
def test_odd_states_have_a_curve_with_null_where_there_is_no_number(name):
    no_nan(measures.curve_frame(REAL, collected(odd_states()[name]), THRESHOLDS))


@pytest.mark.parametrize("size", [0, 2])
def test_a_sample_too_small_has_no_rows_in_the_table(size):
    collection = collected(gaussian(20, 8)[None], reservoir=size)
    assert set(frame_of(collection)["metric"]) == {*SPECTRAL, *WHOLE}


def test_further_draws_have_raw_numbers_only_and_the_spectral_ones_centred():
    collection = collected(gaussian(100, 8).view(2, 50, 8))
    first, further = frame_of(collection, Pass("m", "t", "shuffled")), frame_of(collection, FURTHER)
    assert set(further["preprocess"]) == {"raw", ONE_PER_TYPE}
    assert further.filter(pl.col("metric").is_in(SPECTRAL))["centred"].all()
    assert set(further["seed"]) == {1}
    keys = ["preprocess", "centred", "metric", "scale"]
    same = first.join(further, on=keys, how="semi", nulls_equal=True)
    errors = ["seed", "stderr", "low", "high", "halves"]
    assert_frame_equal(same.drop(errors), further.drop(errors), check_row_order=False)
    only_first = {"participation ratio, across windows", "same-token nearest neighbors"}
    assert set(first["metric"]) - set(further["metric"]) == only_first


def test_thresholds_name_their_rows():
    frame = frame_of(collected(gaussian(50, 8)[None], reservoir=2), thresholds=(0.5, 0.995))
    counts = [m for m in frame["metric"].unique(maintain_order=True) if "count" in m]
    assert counts == ["variance count 50%", "variance count 99.5%"]


def test_the_scree_is_the_share_of_every_component_beside_white_noise():
    x = gaussian(60, 8) * torch.linspace(1, 3, 8)
    collection = collected(x.view(2, 30, 8))
    frame = measures.scree_frame(REAL, collection, measures.layer_spectra(collection, THRESHOLDS))
    energy = np.linalg.svd(x.double().numpy() - x.double().numpy().mean(axis=0), compute_uv=False) ** 2
    np.testing.assert_allclose(frame["share"], energy / energy.sum(), rtol=1e-9)
    np.testing.assert_allclose(frame["cumulative"], np.cumsum(energy) / energy.sum(), rtol=1e-9)
    assert frame["index"].to_list() == list(range(1, 9))
    assert frame["null_share"].sum() == pytest.approx(1)
    assert frame["null_cumulative"][-1] == pytest.approx(1)
    assert frame["null_share"].is_sorted(descending=True)
    white = noise(60, 8, True, EPS)
    assert 1 / frame["null_share"][0] == pytest.approx(white["stable rank"], rel=1e-4)
    assert 1 / (frame["null_share"] ** 2).sum() == pytest.approx(white["participation ratio"], rel=1e-4)
    assert set(frame["n_tokens"]) == {60}
    assert frame.select("site", "layer", "condition").unique().row(0) == ("block 1", 1, "real")


@pytest.mark.parametrize(("n", "sizes"), [(41, [40]), (65, [64]), (66, [64, 65]), (200, [64, 128, 199])])
def test_the_curve_has_growing_parts_up_to_all_that_is_kept(n, sizes):
    x = gaussian(n, 12)
    curve = measures.curve_frame(REAL, collected(x[None]), (0.9,))
    assert curve["n_tokens"].unique().sort().to_list() == sizes
    expected = measured(x[1:].numpy(), max(n - 1, 12) * EPS, thresholds=(0.9,))
    last = dict(curve.filter(n_tokens=n - 1).select("metric", "value").iter_rows())
    assert {*last, "anisotropy"} == set(expected)
    for name, value in last.items():
        assert value == pytest.approx(expected[name], rel=1e-8), name


def test_the_parts_of_the_curve_are_from_all_over_the_text():
    """Rows whose directions follow each other along the text: the first 64 of 513 lie in an eighth of them."""
    x = torch.zeros(513, 64)
    x[1:] = gaussian(512, 64) * torch.eye(8).repeat_interleave(64, 0).repeat_interleave(8, 1)
    curve = measures.curve_frame(REAL, collected(x[None]), (0.9,))
    by = dict(curve.filter(metric="participation ratio").select("n_tokens", "value").iter_rows())
    assert by[64] > 16
    assert by[512] > 50


def test_the_rank_of_growing_parts_of_one_cloud_does_not_fall():
    """A tolerance that grew with N would lose the last value between 64 and 1,600 rows; see docs/definitions.md."""
    x = with_singular_values(1601, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 500 * EPS]).float()
    curve = measures.curve_frame(REAL, collected(x.view(1, 1601, 8)), (0.9,))
    ranks = curve.filter(metric="numerical rank")
    assert ranks["n_tokens"].to_list() == [64, 128, 256, 512, 1024, 1600]
    assert ranks["value"].to_list() == [8] * 6


# ---- predictions ---------------------------------------------------------------------------------------------------


def predicted(n, v, seed=0, n_bytes=0, window=100):
    logits = gaussian(n, v, seed) * 4
    targets = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(seed))
    targets[-1] = -1
    found = Predictions(v)
    if n_bytes:
        found.add_bytes(0, n_bytes)
    found.add(logits, targets, torch.ones(n, dtype=torch.bool), torch.arange(n) // window)
    logp = logits.double().log_softmax(dim=1).numpy()
    return found, logp, targets.numpy()


def test_the_confidence_density_integrates_to_one_on_bins_that_all_share():
    found, logp, _ = predicted(500, 50)
    frame = measures.confidence_frame(REAL, found)
    width = frame["bin_right"] - frame["bin_left"]
    assert (frame["density"] * width).sum() == pytest.approx(1, rel=1e-12)
    assert frame["bin_left"][0] == pytest.approx(-math.log(50))
    assert frame["bin_right"][-1] == 0
    assert (frame["bin_left"][1:] == frame["bin_right"][:-1]).all()
    counts, _ = np.histogram(logp.max(axis=1), np.append(frame["bin_left"], 0.0))
    assert frame["count"].to_list() == counts.tolist()
    np.testing.assert_allclose(frame["density"], counts / 500 / (math.log(50) / len(frame)))
    other = measures.confidence_frame(FURTHER, predicted(30, 50, seed=1)[0])
    assert_frame_equal(frame.select("bin_left", "bin_right"), other.select("bin_left", "bin_right"))


def test_predictions_are_means_over_positions_and_bits_per_byte_by_hand():
    found, logp, targets = predicted(300, 50, n_bytes=1234)
    frame = measures.predictions_frame(REAL, found)
    told = {row["metric"]: row for row in frame.iter_rows(named=True)}
    losses = -logp[np.arange(299), targets[:-1]]
    expected = {"loss": losses, "entropy": -(np.exp(logp) * logp).sum(axis=1), "max log-softmax": logp.max(axis=1)}
    for name, of in expected.items():
        assert told[name]["value"] == pytest.approx(of.mean(), rel=1e-6)  # logits are float32
        without = [(of.sum() - part.sum()) / (len(of) - len(part)) for part in np.split(of, [100, 200])]
        assert told[name]["stderr"] == pytest.approx(
            math.sqrt(2 / 3 * ((without - np.mean(without)) ** 2).sum()), rel=1e-5
        )
        assert told[name]["low"] < told[name]["value"] < told[name]["high"]
        assert told[name]["n_tokens"] == len(of)
    assert told["bits per byte"]["value"] == pytest.approx(losses.sum() / math.log(2) / 1234, rel=1e-6)
    assert told["bits per byte"]["n_tokens"] == 299


def test_the_texts_table_counts_windows_and_different_tokens():
    collection = collected(gaussian(60, 8).view(3, 20, 8))
    collection.unique = [7, 9, 14]
    collection.seen[20:] = False
    frame = measures.text_frame(REAL, collection, "<s>")
    (row,) = frame.iter_rows(named=True)
    assert row == {
        **REAL.row(), "n_windows": 3, "window_length": 20, "n_tokens": 60, "unique_tokens": 10.0,
        "unique_tokens_sd": pytest.approx(np.std([7, 9, 14], ddof=1)), "unique_in_all": 20, "bos": "<s>",
    }  # fmt: skip
    collection.unique = [7]
    one = measures.text_frame(REAL, collection, None)
    assert one.schema == frame.schema
    assert (one["unique_tokens_sd"][0], one["bos"][0]) == (None, None)
