"""Every linear dimension: closed forms, the inequalities between them, and independent programs."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import PROPERTY, gaussian, made_spectrum, orthogonal, spectrum_of, with_singular_values
from sklearn.decomposition import PCA

from dimscope.geometry.dimension import (
    THRESHOLDS,
    effective_rank,
    hill_number,
    isoscore,
    linear_dimensions,
    numerical_rank,
    participation_ratio,
    participation_ratio_corrected,
    stable_rank,
    variance_count,
)
from dimscope.geometry.nulls import white_noise_spectrum

ORDERS = (0, 0.5, 1, 1.5, 2, 5, math.inf)
SPECTRA = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40)


def by_lambda(*shares):
    """Return a spectrum whose eigenvalues are these."""
    return made_spectrum(np.sqrt(shares))


# ---- Hill numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", ORDERS)
@pytest.mark.parametrize("m", [1, 17])
def test_a_flat_spectrum_has_its_length_in_every_order(m, q):
    assert hill_number(torch.full((m,), 0.3), q) == pytest.approx(m, rel=1e-9)


@pytest.mark.parametrize("r", [0.2, 0.5, 0.9])
def test_a_geometric_spectrum_has_closed_forms(r):
    p = (1 - r) * r ** torch.arange(2000, dtype=torch.float64)
    assert hill_number(p, 1) == pytest.approx(math.exp(-math.log(1 - r) - r / (1 - r) * math.log(r)), rel=1e-9)
    assert hill_number(p, 2) == pytest.approx((1 + r) / (1 - r), rel=1e-9)
    assert hill_number(p, 3) == pytest.approx(((1 - r) ** 3 / (1 - r**3)) ** -0.5, rel=1e-9)
    assert hill_number(p, math.inf) == pytest.approx(1 / (1 - r), rel=1e-9)


def test_a_power_law_has_closed_forms():
    m = 768
    index = torch.arange(1, m + 1, dtype=torch.float64)
    harmonic, squares = float((1 / index).sum()), float((1 / index**2).sum())
    p = 1 / index
    assert hill_number(p, 0) == m
    assert hill_number(p, 2) == pytest.approx(harmonic**2 / squares, rel=1e-12)
    assert hill_number(p, math.inf) == pytest.approx(harmonic, rel=1e-12)
    logarithms = float((index.log() / index).sum())
    assert hill_number(p, 1) == pytest.approx(harmonic * math.exp(logarithms / harmonic), rel=1e-12)


@PROPERTY
@given(p=SPECTRA)
def test_hill_numbers_fall_with_the_order_from_the_count_to_the_inverse_maximum(p):
    values = [hill_number(torch.tensor(p, dtype=torch.float64), q) for q in ORDERS]
    assert values[0] == pytest.approx(len(p))
    assert all(low <= high * (1 + 1e-9) for high, low in itertools.pairwise(values))
    assert values[-1] >= 1 - 1e-12


@PROPERTY
@given(p=SPECTRA, scale=st.floats(1e-6, 1e6), seed=st.integers(0, 9), q=st.sampled_from(ORDERS))
def test_hill_numbers_ignore_scale_order_and_zeros_and_double_with_a_copy(p, scale, seed, q):
    x = torch.tensor(p, dtype=torch.float64)
    value = hill_number(x, q)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    assert hill_number(x * scale, q) == pytest.approx(value, rel=1e-9)
    assert hill_number(shuffled, q) == pytest.approx(value, rel=1e-9)
    assert hill_number(torch.cat([x, torch.zeros(3)]), q) == pytest.approx(value, rel=1e-9)
    assert hill_number(torch.cat([x, x]), q) == pytest.approx(2 * value, rel=1e-9)


@pytest.mark.parametrize("q", ORDERS)
def test_nothing_has_no_dimension(q):
    assert hill_number(torch.zeros(4), q) == hill_number(torch.empty(0), q) == 0


def test_high_orders_tend_to_the_inverse_maximum():
    p = torch.full((100,), 0.01)
    assert hill_number(p, 500) == pytest.approx(100, rel=1e-6)


# ---- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "count"), [(0.3, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.95, 3), (1.0, 4)]
)
def test_the_variance_count_is_a_count_not_an_index(threshold, count):
    assert variance_count(by_lambda(0.5, 0.3, 0.16, 0.04), threshold) == count


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_the_variance_count_of_a_flat_spectrum_is_that_share_of_it(threshold):
    assert variance_count(by_lambda(*[1.0] * 100), threshold) == round(100 * threshold)


def test_a_power_law_of_768_values_needs_536_for_95_percent():
    assert variance_count(by_lambda(*(1 / np.arange(1, 769))), 0.95) == 536


@pytest.mark.parametrize("threshold", [0.5, *THRESHOLDS])
def test_the_variance_count_is_that_of_scikit_learn(threshold):
    x = gaussian(500, 20) * torch.linspace(0.1, 3, 20)
    assert (
        variance_count(spectrum_of(x), threshold) == PCA(n_components=threshold).fit(x.double().numpy()).n_components_
    )


@PROPERTY
@given(p=SPECTRA, threshold=st.floats(0.01, 1))
def test_the_count_is_the_least_that_holds_the_share(p, threshold):
    p = np.sort(p)[::-1]
    k = variance_count(by_lambda(*p), threshold)
    cumulative = np.cumsum(p) / p.sum()
    assert cumulative[k - 1] >= threshold - 1e-9
    assert k == 1 or cumulative[k - 2] < threshold


def test_white_noise_itself_needs_most_components():
    """745 of 1,600 for 95% at N = 1,023, by random matrix theory, so that nothing is drawn."""
    assert variance_count(white_noise_spectrum(1023, 1600, 1.0, centred=True), 0.95) == 745


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_numerical_rank_of_a_float32_subspace_is_its_dimension(k):
    x = (gaussian(300, k, dtype=torch.float64) @ orthogonal(20)[:k]).float()
    assert numerical_rank(spectrum_of(x, centred=False)) == numerical_rank(spectrum_of(x)) == k
    assert np.linalg.matrix_rank(x.numpy()) == k


def test_the_numerical_rank_with_its_own_tolerance():
    of = made_spectrum([10.0, 1.0, 0.1, 0.01])
    assert [numerical_rank(of, t) for t in (0.5, 0.05, 0.005, 1e-9)] == [1, 2, 3, 4]
    assert numerical_rank(of, 0.1) == 1  # above the tolerance, not at it


def test_the_default_tolerance_is_d_times_the_eps_of_float32_whatever_n():
    tolerance = 4 * 2.0**-23
    values = [1.0, 0.5, tolerance * 1.01, tolerance * 0.99]
    assert numerical_rank(made_spectrum(values, n_rows=10)) == numerical_rank(made_spectrum(values, n_rows=10**9)) == 3


@pytest.mark.parametrize("tolerance", [0.5, 0.05, 1e-9])
def test_the_tolerance_of_the_family_is_that_of_its_rank_and_changes_nothing_else(tolerance):
    of = made_spectrum([10.0, 1.0, 0.1, 4e-6])
    plain, found = ({d.metric: d.value for d in linear_dimensions(of, **k)} for k in ({}, {"tolerance": tolerance}))
    assert (
        found["numerical rank"] == numerical_rank(of, tolerance) == sum(v > tolerance * 10 for v in (10, 1, 0.1, 4e-6))
    )
    assert plain["numerical rank"] == numerical_rank(of) == 3  # 4e-7 of the largest is below 4 eps
    for name in set(plain) - {"numerical rank"}:
        assert found[name] == plain[name]


@pytest.mark.parametrize(("n", "d"), [(300, 6), (6, 300), (40, 40)])
def test_with_the_larger_side_it_is_the_rank_of_numpy(n, d):
    """numpy's matrix_rank of float32: max(N, d) eps of the largest."""
    values = np.geomspace(1, 1e-9, min(n, d))
    x = (with_singular_values(max(n, d), values.tolist()) + 0).float()
    x = x if n > d else x.T.contiguous()
    found = numerical_rank(spectrum_of(x, centred=False), max(n, d) * 2.0**-23)
    assert found == np.linalg.matrix_rank(x.double().numpy(), tol=max(n, d) * 2.0**-23 * np.linalg.norm(x.numpy(), 2))
    assert 0 < found < min(n, d)


@PROPERTY
@given(p=SPECTRA, one=st.floats(0, 1), other=st.floats(0, 1))
def test_a_larger_tolerance_never_raises_the_rank(p, one, other):
    of = made_spectrum(sorted(p, reverse=True))
    low, high = sorted((one, other))
    assert numerical_rank(of, high) <= numerical_rank(of, low) <= len(p)
    assert numerical_rank(of, 1.0) == 0  # nothing is above the largest


@pytest.mark.parametrize("shape", [(5, 20), (20, 5), (6, 6)])
def test_centring_takes_one_row_from_the_rank(shape):
    x = gaussian(*shape)
    assert numerical_rank(spectrum_of(x)) == min(shape[0] - 1, shape[1])
    assert numerical_rank(spectrum_of(x, centred=False)) == min(shape)


# ---- ratios and entropies ------------------------------------------------------------------------------------------


def test_published_definitions_by_hand():
    of = made_spectrum([3.0, 2.0, 1.0])
    energy = np.array([9.0, 4.0, 1.0])
    sigma = np.array([3.0, 2.0, 1.0]) / 6
    assert participation_ratio(of) == pytest.approx(energy.sum() ** 2 / (energy**2).sum())
    assert stable_rank(of) == pytest.approx(14 / 9)
    assert effective_rank(of, of_lambda=False) == pytest.approx(np.exp(-(sigma * np.log(sigma)).sum()))
    share = energy / 14
    assert effective_rank(of, of_lambda=True) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_stable_rank_is_frobenius_over_spectral():
    x = gaussian(60, 9) + 1
    norms = [np.linalg.norm(x.double().numpy(), ord=o) for o in ("fro", 2)]
    assert stable_rank(spectrum_of(x, centred=False)) == pytest.approx((norms[0] / norms[1]) ** 2, rel=1e-9)


def test_the_participation_ratio_is_that_of_scikit_dimension():
    from skdim.id import lPCA

    x = (gaussian(400, 12) * torch.linspace(0.2, 3, 12)).double().numpy()
    oracle = lPCA(ver="participation_ratio").fit(x).dimension_
    assert participation_ratio(spectrum_of(torch.from_numpy(x))) == pytest.approx(oracle, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(400, 100), (200, 200), (100, 400)])
def test_white_noise_has_the_dimensions_that_theory_says(n, d):
    of = spectrum_of(gaussian(n, d, seed=n))
    small, large = min(n - 1, d), max(n - 1, d)
    assert participation_ratio(of) == pytest.approx(n * d / (n + d + 1), rel=0.02)
    assert effective_rank(of, of_lambda=True) == pytest.approx(small * math.exp(-small / (2 * large)), rel=0.02)
    assert stable_rank(of) == pytest.approx(
        d / (1 + math.sqrt(d / n)) ** 2, rel=0.06
    )  # the edge fluctuates as N^(-2/3)
    assert variance_count(of, 0.95) < small


def isoscore_as_published(x):
    """The algorithm of Rudman et al. 2022, step by step: rotate, normalise the variances, distance from isotropy."""
    d = x.shape[1]
    variances = np.var(PCA().fit_transform(x), axis=0, ddof=1)
    scaled = math.sqrt(d) * variances / np.linalg.norm(variances)
    defect = np.linalg.norm(scaled - 1) / math.sqrt(2 * (d - math.sqrt(d)))
    used = (d - defect**2 * (d - math.sqrt(d))) ** 2 / d**2
    return (d * used - 1) / (d - 1)


@pytest.mark.parametrize("spread", [1, 3, 30])
def test_isoscore_is_the_published_algorithm(spread):
    x = gaussian(300, 8, dtype=torch.float64) * torch.linspace(1, spread, 8)
    assert isoscore(spectrum_of(x)) == pytest.approx(isoscore_as_published(x.numpy()), rel=1e-9)


def test_isoscore_goes_from_a_line_to_a_flat_spectrum():
    assert isoscore(by_lambda(1, 0, 0)) == 0
    assert isoscore(by_lambda(2, 2, 2)) == pytest.approx(1)
    assert math.isnan(isoscore(by_lambda(1)))


# ---- the corrected participation ratio -----------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [True, False])
def test_the_correction_takes_the_bias_off(centred):
    """Population 30 x diag(1/i): true ratio H^2 / H2. 200 tables of 40 rows: the plug-in is a quarter low."""
    variances = 1 / torch.arange(1, 31, dtype=torch.float64).sqrt()
    truth = float(variances.sum() ** 2 / variances.square().sum())
    shift = 3.0 if centred else 0.0
    draws = [
        spectrum_of(gaussian(40, 30, s, torch.float64) * variances.sqrt() + shift, centred=centred) for s in range(200)
    ]
    plug_in = np.mean([participation_ratio(d) for d in draws])
    corrected = [participation_ratio_corrected(d) for d in draws]
    assert plug_in < 0.75 * truth
    assert np.mean(corrected) == pytest.approx(truth, rel=0.03)  # a ratio of unbiased estimates; its own bias is O(1/N)
    assert abs(np.mean(corrected) - truth) < 0.1 * (truth - plug_in)


def test_the_correction_vanishes_with_many_rows():
    values = [3.0, 2.0, 1.0]
    of = made_spectrum(values, n_rows=10**9)
    assert participation_ratio_corrected(of) == pytest.approx(participation_ratio(of), rel=1e-6)


@pytest.mark.parametrize("n_rows", [1, 2])
def test_two_rows_are_too_few_to_correct(n_rows):
    assert math.isnan(participation_ratio_corrected(spectrum_of(gaussian(n_rows, 5))))


def test_the_correction_is_nan_where_the_estimate_is_not_positive():
    assert math.isnan(participation_ratio_corrected(made_spectrum([1.0, 1.0, 1.0], n_rows=4)))


@pytest.mark.parametrize("n", [3, 8, 20, 64])
def test_rows_at_right_angles_have_no_corrected_ratio_whatever_the_rounding(n):
    """Their spectrum is flat, so that the estimate of tr(Sigma^2) is 0: not 1e-17, which would make 1e17 dimensions."""
    for x in (torch.eye(n, dtype=torch.float64), orthogonal(n), 1e6 * orthogonal(n, seed=n)):
        for centred in (True, False):
            assert math.isnan(participation_ratio_corrected(spectrum_of(x, centred=centred)))


# ---- the family ----------------------------------------------------------------------------------------------------


@PROPERTY
@given(n=st.integers(2, 30), d=st.integers(1, 12), seed=st.integers(0, 99), centred=st.booleans())
def test_the_family_is_ordered_and_below_the_rank(n, d, seed, centred):
    of = spectrum_of(gaussian(n, d, seed, torch.float64) * torch.linspace(0.5, 2, d), centred=centred)
    chain = [
        1,
        stable_rank(of),
        participation_ratio(of),
        effective_rank(of, of_lambda=True),
        effective_rank(of, of_lambda=False),
    ]
    chain += [numerical_rank(of), of.max_rank]
    assert all(low <= high * (1 + 1e-9) for low, high in itertools.pairwise(chain))


@PROPERTY
@given(n=st.integers(3, 30), d=st.integers(1, 8), seed=st.integers(0, 99), scale=st.floats(0.01, 100))
def test_the_family_is_invariant(n, d, seed, scale):
    x = gaussian(n, d, seed, torch.float64)
    expected = {v.metric: v.value for v in linear_dimensions(spectrum_of(x)) if "corrected" not in v.metric}
    for other in (x @ orthogonal(d, seed), x * scale, x.flip(0), x + 2.5, torch.cat([x, x])):
        for found in linear_dimensions(spectrum_of(other)):
            if found.metric in expected:
                assert found.value == pytest.approx(expected[found.metric], rel=1e-5), found.metric


def test_one_row_a_hundred_times_longer_owns_everything():
    x = gaussian(400, 50)
    before = participation_ratio(spectrum_of(x))
    x[7] *= 100
    assert before > 40
    assert participation_ratio(spectrum_of(x)) < 1.2


def test_a_subspace_with_noise_is_seen_by_every_member():
    x = with_singular_values(500, [100.0] * 6 + [0.01] * 26)
    of = spectrum_of(x)
    for found in (
        participation_ratio(of),
        stable_rank(of),
        effective_rank(of, of_lambda=True),
        variance_count(of, 0.99),
    ):
        assert found == pytest.approx(6, rel=0.01)
    assert numerical_rank(of) == 32


def test_every_name_says_what_it_was_computed_from():
    for centred, preprocess in ((True, "centred"), (False, "uncentred")):
        of = spectrum_of(gaussian(60, 7) + 1, centred=centred)
        found = {d.metric: d for d in linear_dimensions(of)}
        assert list(found) == [
            "variance count 80%",
            "variance count 90%",
            "variance count 95%",
            "variance count 99%",
            "numerical rank",
            "participation ratio",
            "participation ratio, corrected",
            "effective rank (entropy of sigma)",
            "effective rank (entropy of lambda)",
            "stable rank",
        ]
        assert {d.preprocess for d in found.values()} == {preprocess}
        for name, of_lambda in (("sigma", False), ("lambda", True)):
            entropy = found[f"effective rank (entropy of {name})"]
            assert (entropy.spectrum, entropy.order) == (name, 1)
            assert entropy.value == effective_rank(of, of_lambda=of_lambda)
        assert found["participation ratio"].value == participation_ratio(of)
        assert found["participation ratio"].order == 2
        assert found["stable rank"].value == stable_rank(of)
        assert found["numerical rank"].value == numerical_rank(of)
        assert found["variance count 95%"].value == variance_count(of, 0.95)


@pytest.mark.parametrize(
    ("threshold", "name"),
    [
        (0.8, "80%"),
        (0.995, "99.5%"),
        (0.29, "29%"),
        (0.57, "57%"),
        (0.9999, "99.99%"),
        (1 / 3, "33.3333%"),
        (0.005, "0.5%"),
    ],
)
def test_a_count_is_named_after_its_percent(threshold, name):
    """100 x 0.29 is 28.999999999999996 in floating point; the name is not."""
    of = made_spectrum([3.0, 2.0, 1.0])
    first, second = linear_dimensions(of, (threshold, 0.9))[:2]
    assert (first.metric, second.metric) == (f"variance count {name}", "variance count 90%")
    assert first.value == variance_count(of, threshold)
    assert (first.spectrum, first.order) == ("lambda", None)


def test_without_thresholds_there_are_no_counts():
    names = [d.metric for d in linear_dimensions(made_spectrum([3.0, 2.0, 1.0]), ())]
    assert names[0] == "numerical rank"
    assert len(names) == 6


@pytest.mark.parametrize(
    "x", [torch.zeros(5, 3), gaussian(1, 3), torch.ones(4, 1)], ids=["zeros", "one row", "one column"]
)
def test_degenerate_tables_have_dimensions_without_a_crash(x):
    for centred in (True, False):
        for found in linear_dimensions(spectrum_of(x, centred=centred)):
            assert math.isnan(found.value) == ("corrected" in found.metric) or found.value >= 0
