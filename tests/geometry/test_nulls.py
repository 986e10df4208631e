"""What noise would show: random matrix theory against integrals, simulation and planted structure."""

import math

import numpy as np
import pytest
import torch
from matrices import DTYPES, gaussian, made_spectrum, spectrum_of, svd_values, table_without, with_singular_values
from scipy.integrate import quad

from dimscope.geometry import nulls
from dimscope.geometry.dimension import participation_ratio
from dimscope.geometry.nulls import (
    gavish_donoho_rank,
    marchenko_pastur_quantiles,
    noise_edge,
    noise_scale,
    permuted_moments,
    permuted_spectrum,
    white_noise_spectrum,
)
from dimscope.vectors.table import table_from_tensor

SHAPES = [(1000, 1000), (1000, 500), (200, 1000), (10_000, 10), (7, 7)]

# ---- Marchenko-Pastur ----------------------------------------------------------------------------------------------


def density(x, beta):
    """The law as it is printed in the paper."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    return math.sqrt(max(0.0, (high - x) * (x - low))) / (2 * math.pi * beta * x)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_law_ends_at_its_edges(shape):
    beta = min(shape) / max(shape)
    low, high = marchenko_pastur_quantiles(*shape, np.array([0.0, 1.0]))
    assert low == pytest.approx((1 - math.sqrt(beta)) ** 2, abs=1e-12)
    assert high == pytest.approx((1 + math.sqrt(beta)) ** 2, rel=1e-12)


@pytest.mark.parametrize(("beta", "share"), [(1.0, 0.1), (0.5, 0.5), (0.01, 0.9), (0.01, 0.1)])
def test_quantiles_hold_their_share_of_the_density(beta, share):
    x = marchenko_pastur_quantiles(10_000, round(10_000 * beta), np.array([share]))[0]
    held, _ = quad(density, (1 - math.sqrt(beta)) ** 2, x, args=(beta,), limit=200)
    assert held == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_of_the_law(shape):
    beta = min(shape) / max(shape)
    x = marchenko_pastur_quantiles(*shape, (np.arange(100_000) + 0.5) / 100_000)
    assert x.mean() == pytest.approx(1, rel=1e-4)
    assert (x**2).mean() == pytest.approx(1 + beta, rel=1e-4)


def test_rows_and_columns_are_exchangeable():
    shares = np.linspace(0, 1, 9)
    a, b = marchenko_pastur_quantiles(30, 70, shares), marchenko_pastur_quantiles(70, 30, shares)
    np.testing.assert_array_equal(a, b)


# ---- the Gaussian table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "centred"), [((400, 100), True), ((100, 400), False), ((150, 150), True)])
def test_the_expected_spectrum_is_that_of_gaussian_tables(shape, centred):
    drawn = np.mean(
        [spectrum_of(2 * gaussian(*shape, s), centred=centred).singular_values.numpy() for s in range(10)], axis=0
    )
    expected = white_noise_spectrum(*shape, 2.0, centred=centred)
    assert (expected.n_rows, expected.dim, expected.centred) == (*shape, centred)
    assert len(expected.singular_values) == expected.max_rank == len(drawn)
    # Quantiles are exact in the limit; at these sizes values differ by N^(-2/3) of the largest, which is 4%.
    np.testing.assert_allclose(expected.singular_values.numpy(), drawn, atol=0.04 * drawn[0])
    energy = float(expected.singular_values.square().sum())
    assert energy == pytest.approx(4 * (shape[0] - centred) * shape[1], rel=1e-3)


def test_the_expected_spectrum_is_not_uniform():
    values = white_noise_spectrum(1000, 500, 1.0, centred=False).singular_values
    gaps = -values.diff()
    assert gaps[:5].min() > 2 * gaps[len(gaps) // 2]


@pytest.mark.parametrize(("shape", "std"), [((600, 80), 0.02), ((80, 600), 50.0), ((150, 150), 1.0)])
def test_the_noise_scale_is_the_standard_deviation_even_under_spikes(shape, std):
    x = gaussian(*shape, dtype=torch.float64) * std
    assert noise_scale(spectrum_of(x)) == pytest.approx(std, rel=0.03)
    x += 50 * std * gaussian(shape[0], 2, 1, torch.float64) @ gaussian(2, shape[1], 2, torch.float64)
    assert noise_scale(spectrum_of(x)) == pytest.approx(std, rel=0.05)


def test_noise_passes_its_edge_once_in_a_hundred_tables():
    above, largest = 0, []
    for seed in range(300):
        of = spectrum_of(gaussian(120, 40, seed, torch.float64))
        largest.append(float(of.singular_values[0]) / noise_edge(of, 1.0))
        above += largest[-1] > 1
    assert above <= 9  # Poisson of mean 3: more than 9 once in 900
    assert np.quantile(largest, 0.99) == pytest.approx(1, abs=0.015)


def test_the_edge_scales_and_tends_to_the_sum_of_roots():
    of = made_spectrum([1.0] * 1000, n_rows=1_000_000)
    assert noise_edge(of, 3.0) == pytest.approx(3 * noise_edge(of, 1.0), rel=1e-12)
    assert noise_edge(of, 1.0) == pytest.approx(math.sqrt(1_000_000) + math.sqrt(1000), rel=1e-3)


@pytest.mark.parametrize("k", [1, 4])
def test_planted_directions_are_the_ones_above_edge_and_threshold(k):
    noise = gaussian(400, 60, dtype=torch.float64)
    planted = with_singular_values(400, [100.0 + i for i in range(k)] + [0.0] * (60 - k))
    of = spectrum_of(noise + planted)
    assert int((of.singular_values > noise_edge(of, noise_scale(of))).sum()) == k
    assert gavish_donoho_rank(of) == k
    assert gavish_donoho_rank(spectrum_of(noise)) == 0


# ---- Gavish and Donoho ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "omega"), [((1001, 1001), 2.8584), ((2000, 1000), 2.1711), ((1000, 50), 1.5194)])
def test_the_threshold_is_omega_times_the_median(shape, omega):
    """Omega of square matrices is 2.8584 and the fit of the paper, 0.56 b^3 - 0.95 b^2 + 1.82 b + 1.43, is within 0.02."""
    beta = min(shape) / max(shape)
    assert omega == pytest.approx(0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, abs=0.02)
    m = shape[1]
    for factor, rank in ((1 - 2e-4, 0), (1 + 2e-4, 1)):
        assert gavish_donoho_rank(made_spectrum([omega * factor] + [1.0] * (m - 1), shape[0], centred=False)) == rank


# ---- the permuted table --------------------------------------------------------------------------------------------


def null(table, *, centred=True, draws, seed=0):
    found = permuted_spectrum(permuted_moments(table, draws=draws, seed=seed), centred=centred)
    return found.mean, found.sd


def permuted(table, seed=0):
    return torch.cat(list(nulls._permuted_blocks(table, seed)))


@pytest.fixture(params=[2, 64], ids=["many blocks", "one block"])
def stretches(request, monkeypatch):
    monkeypatch.setattr(nulls, "STRETCHES", request.param)


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_column_keeps_its_values(dtype):
    x = gaussian(1000, 6, dtype=dtype) * torch.linspace(1, 4, 6).to(dtype)
    before = x.clone()
    shuffled = permuted(table_from_tensor(x))
    assert not torch.equal(shuffled, x.float())
    assert torch.equal(shuffled.sort(dim=0).values, x.float().sort(dim=0).values)
    assert torch.equal(x, before)


@pytest.mark.usefixtures("stretches")
def test_the_excluded_rows_stay_out_of_the_permuted_table():
    x = gaussian(700, 5)
    x[[0, 130, 131, 699]] = math.nan
    kept = [i for i in range(700) if i not in {0, 130, 131, 699}]
    shuffled = permuted(table_without(x, {0, 130, 131, 699}))
    assert torch.equal(shuffled.sort(dim=0).values, x[kept].sort(dim=0).values)
    of, _ = null(table_without(x, {0, 130, 131, 699}), centred=True, draws=2, seed=0)
    assert of.n_rows == 696
    assert torch.isfinite(of.singular_values).all()


@pytest.mark.usefixtures("stretches")
def test_permuting_kills_planted_correlation_and_keeps_the_variances():
    direction = torch.linspace(0.5, 2, 20)
    x = gaussian(2000, 1) * direction * 5 + gaussian(2000, 20, 1)
    assert participation_ratio(spectrum_of(x)) < 1.1
    of, _ = null(table_from_tensor(x), centred=True, draws=3, seed=0)
    variances = x.double().var(dim=0).sort(descending=True).values
    assert float(of.singular_values.square().sum()) == pytest.approx(float(variances.sum()) * 1999, rel=0.01)
    eigenvalues = of.singular_values.square() / 1999
    np.testing.assert_allclose(eigenvalues.numpy(), variances.numpy(), rtol=0.25)


def test_a_trend_along_the_ids_does_not_survive():
    """128 x 200 rows whose columns all grow with the id: blocks of neighbours would keep that in common."""
    trend = torch.linspace(-3, 3, 128 * 200)[:, None]
    x = trend + 0.5 * gaussian(128 * 200, 8)
    of, _ = null(table_from_tensor(x), centred=True, draws=1, seed=0)
    assert participation_ratio(spectrum_of(x)) < 1.3
    assert participation_ratio(of) == pytest.approx(8, rel=0.02)


@pytest.mark.parametrize(("n", "d"), [(100, 300), (40, 64)])
def test_fewer_rows_than_columns_are_permuted_as_well(n, d):
    """Against the plain way: every column by a permutation of its own."""
    x = 3 * gaussian(n, 1) * torch.ones(d) + gaussian(n, d, 1)
    oracle = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.stack([column[torch.randperm(n, generator=generator)] for column in x.T], dim=1)
        oracle.append(svd_values(shuffled)[: n - 1])
    of, _ = null(table_from_tensor(x), centred=True, draws=5, seed=0)
    np.testing.assert_allclose(of.singular_values.numpy()[:10], np.mean(oracle, axis=0)[:10], rtol=0.1)


def test_white_noise_is_its_own_permuted_table():
    x = gaussian(600, 30)
    of, spread = null(table_from_tensor(x), centred=True, draws=10, seed=0)
    np.testing.assert_allclose(of.singular_values.numpy(), svd_values(x), rtol=0.05)
    assert (spread > 0).all()
    assert (spread < 0.05 * of.singular_values).all()


def test_the_seed_decides_and_one_draw_has_no_spread():
    table = table_from_tensor(gaussian(300, 5))
    runs = [null(table, centred=True, draws=1, seed=s) for s in (1, 1, 2)]
    assert torch.equal(runs[0][0].singular_values, runs[1][0].singular_values)
    assert not torch.equal(runs[0][0].singular_values, runs[2][0].singular_values)
    assert runs[0][1].isnan().all()
    assert runs[0][1].shape == runs[0][0].singular_values.shape


def test_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    null(table_from_tensor(gaussian(50, 3)), centred=False, draws=2, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_constant_column_adds_no_dimension_to_the_permuted_table():
    x = gaussian(5000, 8)
    x[:, 2] = 1.1
    of, _ = null(table_from_tensor(x), centred=True, draws=1, seed=0)
    assert float(of.singular_values[-1] / of.singular_values[0]) < 1e-6
