"""Intrinsic dimension: known clouds, the laws that the estimators rest on, the definitions by brute force, copies."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import DTYPES, PROPERTY, gaussian, orthogonal
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import cdist
from scipy.special import betaln

from dimscope.errors import InvalidArgument
from dimscope.geometry import intrinsic, pairs
from dimscope.geometry.intrinsic import distinct_rows, intrinsic_dimensions, white_noise_dimension

LIKELY, SQUARES, LEVINA = "TwoNN, maximum likelihood", "TwoNN, least squares", "Levina-Bickel MLE"


def estimates(rows, **options):
    return {(e.metric, e.scale): e for e in intrinsic_dimensions(rows, **options)}


def values(rows, **options):
    return {key: e.value for key, e in estimates(rows, errors=False, **options).items()}


def cube(n, d, seed=0):
    return torch.rand(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ball(n, d, seed=0):
    x = gaussian(n, d, seed, torch.float64)
    return x / x.norm(dim=1, keepdim=True) * cube(n, 1, seed + 1) ** (1 / d)


def cloud(n, d, seed=0):
    return gaussian(n, d, seed, torch.float64)


# ---- known clouds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "d"), [(cloud, 1), (ball, 2), (cube, 5)])
def test_a_flat_sheet_has_its_dimension(make, d):
    """Four standard errors are 2.5 times the true spread. Larger scales feel the edge: 12% less in a 5-d cube."""
    found = estimates(make(1500, d, 3) @ orthogonal(20)[:d])
    likely = found[LIKELY, None]
    assert abs(likely.value - d) < 4 * likely.stderr
    assert abs(found[SQUARES, None].value - d) < 4 * likely.stderr
    for key in (("GRIDE", 2), ("GRIDE", 8), (LEVINA, 20)):
        assert found[key].value == pytest.approx(d, rel=0.15)


def test_a_thick_sheet_is_flat_from_afar():
    """A square with noise a tenth of its grain in 8 dimensions: high dimension near by, 2 at larger scales."""
    x = torch.cat([cube(2000, 2), torch.zeros(2000, 6)], dim=1) + 0.01 * cloud(2000, 8, 1)
    curve = [value for (metric, _), value in values(x).items() if metric == "GRIDE"]
    assert curve[0] > 4
    assert all(later < earlier for earlier, later in itertools.pairwise(curve))
    assert curve[-1] == pytest.approx(2, rel=0.15)


def test_the_known_low_bias_is_left_in_and_the_null_shows_it():
    for dim, low, high in ((10, 9, 10.5), (50, 28, 36)):
        null = white_noise_dimension(1000, dim)
        assert low < null[LIKELY, None] < high
        assert all(value < 1.05 * dim for value in null.values())
        assert null["GRIDE", 64] < null["GRIDE", 8] < null["GRIDE", 1]


def test_the_null_is_a_gaussian_of_the_same_shape_whatever_the_global_seed():
    shape = (300, 7)
    state = torch.manual_seed(5).get_state()
    null = white_noise_dimension(*shape)
    white_noise_dimension.cache_clear()
    torch.manual_seed(6)
    assert white_noise_dimension(*shape) == null
    assert torch.equal(state, torch.manual_seed(5).get_state())
    assert null.keys() == values(cloud(*shape, 99)).keys()
    spread = [values(cloud(*shape, s))[LIKELY, None] for s in range(12)]
    assert abs(null[LIKELY, None] - np.mean(spread)) < 4 * np.std(spread)


# ---- invariances ---------------------------------------------------------------------------------------------------


def test_only_ratios_of_distances_count():
    x = cube(400, 4)
    expected = values(x)
    for other in (1e-6 * x, 1e6 * x, x @ orthogonal(4), x @ orthogonal(30)[:4], x + 1e6, x.flip(0)):
        assert values(other) == pytest.approx(expected, rel=1e-6)  # the shift leaves 9 digits of 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_type_are_measured_in_float64_and_left_as_they_were(dtype):
    x = (cloud(300, 6) + 5).to(dtype)
    before = x.clone()
    assert values(x) == values(x.double())
    assert torch.equal(x, before)


# ---- the definitions -----------------------------------------------------------------------------------------------


def gride_log_likelihood(d, mu, n1):
    """Return the sum of ln f(mu | d) of Denti et al. 2022, equation by equation."""
    n2 = 2 * n1
    terms = math.log(d) + (n2 - n1 - 1) * np.log(mu**d - 1) - (d * (n2 - 1) + 1) * np.log(mu) - betaln(n2 - n1, n1)
    return terms.sum()


def by_definition(x, k, scales):
    """Return every estimate from the whole matrix of distances."""
    r = np.sort(cdist(x, x), axis=1)  # column j: the j-th neighbour, 0 the point itself
    n = len(r)
    log_mu = np.sort(np.log(r[:, 2] / r[:, 1]))
    low = log_mu[: int(0.9 * n)]
    heights = -np.log(1 - np.arange(1, len(low) + 1) / n)
    inverses = [sum(math.log(row[k] / row[j]) for j in range(1, k)) / (k - 1) for row in r]
    found = {
        (LIKELY, None): (n - 1) / log_mu.sum(),
        (SQUARES, None): np.linalg.lstsq(low[:, None], heights, rcond=None)[0][0],
        (LEVINA, k): n / sum(inverses),
    }
    for n1 in scales:
        mu = r[:, 2 * n1] / r[:, n1]
        best = minimize_scalar(
            lambda d, mu=mu, n1=n1: -gride_log_likelihood(d, mu, n1), bounds=(0.1, 50), options={"xatol": 1e-9}
        ).x
        found["GRIDE", n1] = best
    return found


@pytest.mark.parametrize(("n", "d", "k"), [(64, 1, 5), (200, 3, 20), (333, 12, 2)])
def test_every_estimate_is_the_definition_by_brute_force(n, d, k, monkeypatch):
    monkeypatch.setattr(intrinsic, "ROWS_AT_ONCE", 50)
    x = cloud(n, d, n) * torch.linspace(0.5, 2, d) + 3
    found = estimates(x, k=k)
    scales = [scale for metric, scale in found if metric == "GRIDE"]
    expected = by_definition(x.numpy(), k, scales)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].value == pytest.approx(value, rel=1e-6), key  # the search of the oracle stops there


@PROPERTY
@given(n=st.integers(8, 90), seed=st.integers(0, 99))
def test_gride_at_the_nearest_neighbours_is_two_nn_and_the_scales_double(n, seed):
    found = values(cloud(n, 3, seed))
    assert found["GRIDE", 1] == pytest.approx(found[LIKELY, None] * n / (n - 1), rel=1e-9)
    scales = [scale for metric, scale in found if metric == "GRIDE"]
    assert scales == [2**i for i in range(len(scales))]
    assert 2 * scales[-1] <= n / 4 < 4 * scales[-1]


@pytest.mark.parametrize(("n", "d"), [(300, 3), (300, 40)])
def test_scikit_dimension_agrees(n, d):
    from skdim.id import MLE, TwoNN

    x = cloud(n, d)
    found = values(x, k=12)
    assert found[SQUARES, None] == pytest.approx(TwoNN().fit(x.numpy()).dimension_, rel=1e-6)
    with np.errstate(divide="ignore"):  # it takes ln(1 - F) of the last point, and does not use it here
        whole = TwoNN(method="mle", discard_fraction=0).fit(x.numpy())
    assert found[LIKELY, None] == pytest.approx(whole.dimension_, rel=1e-6)
    local = MLE().fit(x.numpy(), n_neighbors=12, comb="mle")  # "mle": the mean of the inverses
    assert found[LEVINA, 12] == pytest.approx(local.dimension_, rel=1e-6)


# ---- the laws ------------------------------------------------------------------------------------------------------


def drawn(n, d, n1, seed):
    """Return ln of distances whose ratios follow the law: (r_n1 / r_n2)^d is Beta(n1, n2 - n1), a share of volume."""
    share = np.random.default_rng(seed).beta(n1, n1, size=n)
    logs = np.zeros((n, 2 * n1))
    logs[:, -1] = -np.log(share) / d
    return logs


@pytest.mark.parametrize(("d", "n1"), [(0.01, 1), (1.0, 2), (7.0, 16), (3000.0, 512), (3000.0, 1)])
def test_the_law_of_the_ratios_gives_its_dimension_back(d, n1):
    assert intrinsic._gride(drawn(4000, d, n1, 1), n1) == pytest.approx(d, rel=3 / math.sqrt(4000))


@pytest.mark.parametrize("d", [0.01, 7.0])
def test_two_nn_recovers_the_exponent_of_a_pareto_law(d):
    mu = np.random.default_rng(2).pareto(100 * d, size=4000) + 1  # the power, so that d = 0.01 does not overflow
    logs = np.stack([np.zeros(4000), 100 * np.log(mu)], axis=1)
    assert intrinsic._two_nn(logs) == pytest.approx((d, d), rel=4 / math.sqrt(4000))


# ---- errors --------------------------------------------------------------------------------------------------------


def test_the_standard_errors_are_the_spread_over_clouds_at_every_scale():
    """The formula for independent points is too small by 3.6 times at the largest scale here."""
    runs = [estimates(cube(200, 2, s)) for s in range(30)]
    for key in runs[0]:
        spread = np.std([run[key].value for run in runs], ddof=1)
        stated = np.sqrt(np.mean([run[key].stderr ** 2 for run in runs]))
        assert 0.65 < stated / spread < 1.5, key  # 13% from 30 runs, times 3


def test_groups_of_different_dimension_raise_the_error():
    """Four windows are lines and four are clouds: another text could have five of either."""
    lines = torch.cat([cloud(160, 1, 1), torch.zeros(160, 5)], dim=1)
    rows = torch.cat([lines, 3 + cloud(160, 6, 2)])
    by_group = {(e.metric, e.scale): e for e in intrinsic_dimensions(rows, groups=np.repeat(np.arange(8), 40))}
    alone = estimates(rows)
    assert by_group[LIKELY, None].value == alone[LIKELY, None].value
    assert by_group[LIKELY, None].stderr > 1.5 * alone[LIKELY, None].stderr


def test_errors_are_left_out_on_request_and_for_few_rows():
    assert {e.stderr for e in intrinsic_dimensions(cloud(200, 3), errors=False)} == {None}
    assert {e.stderr for e in intrinsic_dimensions(cloud(50, 3))} == {None}


# ---- Gaussian rows of the same covariance --------------------------------------------------------------------------


def test_a_curved_sheet_is_below_gaussian_rows_of_its_covariance_and_a_gaussian_cloud_is_not():
    angles = 2 * math.pi * torch.rand(800, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    waves = torch.cat(
        [f(k * angles) for k in (1, 2, 3) for f in (torch.sin, torch.cos)], dim=1
    )  # a torus in 12 dimensions
    sheet, flat = estimates(waves), estimates(cloud(800, 12))
    assert sheet[LIKELY, None].value < 3
    assert intrinsic.gaussian_dimension(waves)[LIKELY, None] > 7
    null = intrinsic.gaussian_dimension(cloud(800, 12))[LIKELY, None]
    assert null == pytest.approx(flat[LIKELY, None].value, abs=4 * flat[LIKELY, None].stderr)


def test_gaussian_rows_have_the_covariance_of_the_rows(monkeypatch):
    rows, seen = cloud(500, 4) @ torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.1], dtype=torch.float64)) + 7, []
    monkeypatch.setattr(intrinsic, "intrinsic_dimensions", lambda of, **_: seen.append(of) or [])
    for seed in range(40):
        intrinsic.gaussian_dimension(rows, seed)
    mean = torch.stack([of.T @ of for of in seen]).mean(dim=0) / 500
    torch.testing.assert_close(mean, torch.cov(rows.T), rtol=0.05, atol=0.02)


# ---- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [0, 1e-4])
def test_near_copies_change_nothing_and_are_counted(distance):
    x = cloud(500, 10)
    picks = torch.cat([torch.arange(100), torch.full((150,), 3)])  # 100 rows twice, one of them 152 times
    crowd = torch.cat([x, x[picks] + distance * cloud(250, 10, 1)])
    alone, found = estimates(x), estimates(crowd)
    assert found.keys() == alone.keys()
    for key, e in found.items():
        assert e.value == pytest.approx(alone[key].value, rel=1e-9)
        assert e.stderr == (None if alone[key].stderr is None else pytest.approx(alone[key].stderr, rel=1e-9))
        assert (e.n_used, e.n_dropped) == (500, 250)
    shuffled = values(crowd[torch.randperm(750, generator=torch.Generator().manual_seed(0))])
    assert shuffled == pytest.approx({key: e.value for key, e in alone.items()}, rel=1e-3)


def test_near_copies_that_stay_would_wreck_two_nn(monkeypatch):
    x = cloud(500, 10)
    crowd = torch.cat([x, x[:250] + 1e-5 * cloud(250, 10, 1)])
    expected = values(crowd)[LIKELY, None]
    monkeypatch.setattr(intrinsic, "distinct_rows", lambda rows: torch.arange(len(rows)))
    assert values(crowd)[LIKELY, None] < 0.05 * expected


def net_by_hand(x, radius):
    kept = []
    for i, row in enumerate(x):
        if all(np.linalg.norm(row - x[j]) > radius for j in kept):
            kept.append(i)
    return kept


@PROPERTY
@given(n=st.integers(1, 60), d=st.integers(1, 3), seed=st.integers(0, 99), radius=st.floats(0, 1.5))
def test_a_row_is_kept_unless_an_earlier_kept_one_is_within_the_radius(n, d, seed, radius):
    x = cloud(n, d, seed).round(decimals=1) if seed % 2 else cloud(n, d, seed)
    assert distinct_rows(x, radius).tolist() == net_by_hand(x.numpy(), radius)


def test_a_chain_is_thinned_and_not_swallowed():
    x = torch.arange(100.0)[:, None]
    assert distinct_rows(x, 1.5).tolist() == list(range(0, 100, 2))
    assert distinct_rows(x, 0.5).tolist() == list(range(100))


def test_radius_zero_takes_exact_copies_only():
    x = cloud(50, 5)
    assert distinct_rows(torch.cat([x, x.flip(0), x + 1e-14]), 0.0).tolist() == [*range(50), *range(100, 150)]


def test_points_that_are_close_by_nature_stay():
    line, square = cube(2000, 1, 5), cube(2000, 2)
    assert 2000 - len(distinct_rows(line)) <= 10  # one in 500
    assert 2000 - len(distinct_rows(square)) <= 1
    spread = [values(cube(2000, 1, s))[LIKELY, None] for s in range(3)]
    assert np.mean(spread) == pytest.approx(1, rel=0.06)  # 1% from the radius, 1.7% standard error of the mean


@pytest.mark.parametrize("factor", [1e8])
def test_a_massive_row_makes_no_copies_of_the_others(factor):
    x = cloud(1000, 10)
    expected = values(x)[LIKELY, None]
    x[7] *= factor
    x = torch.cat([x, x[50:60]])
    found = estimates(x)[LIKELY, None]
    assert found.value == pytest.approx(expected, rel=0.01)  # one row of 1,000 has other neighbours
    assert (found.n_used, found.n_dropped) == (1000, 10)


@pytest.mark.parametrize(("count", "factor"), [(1, 300.0), (10, 1e4), (4, 1e12), (1, 1e37)])
def test_beside_massive_rows_every_estimate_is_the_definition_by_brute_force(count, factor):
    x = cloud(400, 5)
    x[7 : 7 + count] *= factor
    found = estimates(x, k=10)
    scales = [scale for metric, scale in found if metric == "GRIDE"]
    # A massive row is equally far from all others, to the last digit from 1e9 on: a tie, where GRIDE by equations is infinite.
    expected = by_definition(x.numpy(), 10, scales if factor < 1e6 else [])
    for key, value in expected.items():
        assert found[key].value == pytest.approx(value, rel=1e-6), key
    assert all((e.n_used, e.n_dropped) == (400, 0) for e in found.values())
    ordinary = values(cloud(400, 5), k=10)
    assert all(found["GRIDE", n1].value == pytest.approx(ordinary["GRIDE", n1], rel=0.3) for n1 in scales)


def test_a_massive_row_leaves_few_pairs_to_measure(monkeypatch):
    measured, measure = [], pairs._measure

    def counted(rows, first, second, radius):
        measured.append(len(first))
        return measure(rows, first, second, radius)

    monkeypatch.setattr(pairs, "_measure", counted)
    x = cloud(1000, 400)
    x[7] *= 300
    x[8] = x[9]
    assert len(distinct_rows(x)) == 999
    assert sum(measured) < 1000


@pytest.mark.parametrize("distance", [0, 1e-6])
def test_nine_rows_in_ten_may_be_copies_of_one(distance):
    x = cloud(800, 6)
    x[80:] = x[3] + distance * cloud(720, 6, 1)
    assert distinct_rows(x).tolist() == list(range(80))


def test_points_whose_neighbours_are_lost_in_rounding_are_dropped_and_counted():
    x = cloud(500, 4)
    far = torch.tensor([[1e7, 0, 0, 0], [1e7, 1, 0, 0]], dtype=torch.float64)
    found = estimates(torch.cat([x, far]))[LIKELY, None]
    assert found.value == pytest.approx(values(x)[LIKELY, None], rel=1e-3)
    assert (found.n_used, found.n_dropped) == (500, 2)


# ---- the smallest and the flattest ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_fewer_than_eight_distinct_rows_have_no_estimate(n):
    assert intrinsic_dimensions(cloud(n, 3)) == []
    assert intrinsic_dimensions(cloud(n, 3).repeat(3, 1)) == []


@pytest.mark.parametrize("d", [1, 3])
def test_eight_rows_have_estimates_and_at_most_seven_neighbours(d):
    found = estimates(cloud(8, d))
    assert list(found) == [(LIKELY, None), (SQUARES, None), ("GRIDE", 1), (LEVINA, 7)]
    assert all(math.isfinite(e.value) and e.value > 0 and (e.n_used, e.n_dropped) == (8, 0) for e in found.values())


@pytest.mark.parametrize("value", [0.0, 1.1, 1e30])
def test_equal_rows_have_no_estimate_and_one_of_them_is_kept(value):
    x = torch.full((50, 3), value)
    assert intrinsic_dimensions(x) == []
    assert distinct_rows(x).tolist() == [0]


def test_a_lattice_has_no_estimate():
    assert intrinsic_dimensions(torch.cartesian_prod(torch.arange(20.0), torch.arange(20.0))) == []


def test_single_ties_do_no_harm():
    """Numbers of few digits: every tenth pair of nearest distances is equal, at every scale some are."""
    x = cube(600, 2)
    expected, found = values(x), values(x.mul(200).round())
    assert all(found[key] == pytest.approx(expected[key], rel=0.1) for key in expected)


def test_arguments_that_mean_nothing_are_refused():
    with pytest.raises(InvalidArgument, match="`k` must be 2 or more, got 1"):
        intrinsic_dimensions(cloud(30, 2), k=1)
    with pytest.raises(InvalidArgument, match="radius"):
        distinct_rows(cloud(30, 2), -1.0)
