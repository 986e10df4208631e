"""Debiased CKA against the published HSIC_1 and its exact spread over pairings; subspaces against numpy and scipy."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import DTYPES, PROPERTY, gaussian, orthogonal

from dimscope.geometry.representation_similarity import centred_gram, debiased_cka, leading_subspace, subspace_overlap

SEEDS = range(60)


def noise(n, d, seed=0):
    return gaussian(n, d, seed, torch.float64)


def cka(x, y):
    return float(debiased_cka(centred_gram(x)[None], centred_gram(y)[None]))


def hsic_1(x, y):
    """HSIC_1 as Song et al. 2007 print it: traces and sums of Gram matrices without their diagonals."""
    x, y = x.double().numpy(), y.double().numpy()
    n, one = len(x), np.ones(len(x))
    k, l = x @ x.T, y @ y.T  # noqa: E741
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    both = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    return both / (n * (n - 3))


def biased_cka(x, y):
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


# ---- CKA -----------------------------------------------------------------------------------------------------------


@PROPERTY
@given(n=st.integers(4, 12), d=st.integers(1, 9), e=st.integers(1, 9), seed=st.integers(0, 99))
def test_it_is_the_published_ratio_of_hsic_1(n, d, e, seed):
    x, y = noise(n, d, seed) + 1, noise(n, e, seed + 100) - 0.5
    expected = hsic_1(x, y) / math.sqrt(hsic_1(x, x) * hsic_1(y, y))
    assert cka(x, y) == pytest.approx(expected, abs=1e-9)
    assert cka(x, y) == pytest.approx(cka(y, x), abs=1e-12)
    assert -1 <= cka(x, y) <= 1


@pytest.mark.parametrize(("n", "d", "e", "shared"), [(5, 3, 2, False), (5, 3, 2, True), (5, 1, 40, True)])
def test_over_all_pairings_the_mean_is_zero_and_the_deviation_the_stated_one(n, d, e, shared):
    """Even for a cloud and its own copy: every pairing, one by one, so exactly and not within a spread."""
    x = noise(n, d)
    y = torch.cat([x, noise(n, e, 1)], dim=1) if shared else noise(n, e, 1)
    paired = torch.stack([centred_gram(y[list(order)]) for order in itertools.permutations(range(n))])
    found = debiased_cka(centred_gram(x)[None], paired)
    assert float(found.mean()) == pytest.approx(0, abs=1e-12)
    assert float(found.square().mean()) == pytest.approx(2 / (n * (n - 3)), rel=1e-9)


@pytest.mark.parametrize("p", [10, 100])
def test_independent_clouds_read_zero_where_the_biased_form_reads_its_width(p):
    n = 60
    pairs = [(noise(n, p, 2 * s), noise(n, p, 2 * s + 1)) for s in SEEDS]
    found = [cka(x, y) for x, y in pairs]
    deviation = math.sqrt(2 / (n * (n - 3)))
    assert abs(np.mean(found)) < 4 * deviation / math.sqrt(len(SEEDS))
    # The deviation of a deviation over 60 draws is 9%.
    assert np.std(found) == pytest.approx(deviation, rel=0.4)
    assert np.mean([biased_cka(x, y) for x, y in pairs]) == pytest.approx(p / (n - 1 + p), rel=0.05)


def test_a_shared_signal_reads_its_share():
    """p of p + q columns in common: ||Cov(x, y)||_F^2 = p and ||Var||_F^2 = p + q, so p / (p + q), at any N."""
    n, p, q = 120, 6, 10
    found = []
    for s in SEEDS:
        signal, left, right = noise(n, p, 3 * s), noise(n, q, 3 * s + 1), noise(n, q, 3 * s + 2)
        found.append(cka(torch.cat([signal, left], dim=1), torch.cat([signal, right], dim=1) @ orthogonal(p + q)))
    assert all(0.2 < value < 0.6 for value in found)
    # A ratio of unbiased estimates is itself off by some 1/n.
    assert abs(np.mean(found) - p / (p + q)) < 4 * np.std(found) / math.sqrt(len(SEEDS)) + 1 / n


@PROPERTY
@given(
    n=st.integers(4, 40),
    d=st.integers(1, 30),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-160, -0.3, 7.0, 1e160]),
)
def test_a_cloud_is_itself_however_turned_scaled_and_moved(n, d, seed, scale):
    x = noise(n, d, seed)
    turned = (x @ orthogonal(d, seed) + 3) * scale
    widened = torch.cat([turned, torch.full((n, 5), 2.0 * scale, dtype=torch.float64)], dim=1)
    assert cka(x, x) == pytest.approx(1, abs=1e-14)
    # One column of 4 rows can come near the degenerate clouds, where the Gram matrix cancels.
    assert cka(x, turned) == pytest.approx(1, abs=1e-9)
    assert cka(x, widened) == pytest.approx(1, abs=1e-9)


def test_breaking_the_pairs_of_rows_kills_it():
    x = noise(200, 30)
    y = x @ noise(30, 50, 1) + 0.5 * noise(200, 50, 2)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert cka(x, y) > 0.4
    assert abs(cka(x, y[order])) < 4 * math.sqrt(2 / (200 * 197))
    assert cka(x[order], y[order]) == pytest.approx(cka(x, y), abs=1e-12)


def test_stacked_vectors_give_every_pair_at_once():
    left = [noise(20, d, d) for d in (3, 8)]
    right = [noise(20, d, d) for d in (30, 8, 2)]
    found = debiased_cka(torch.stack([centred_gram(x) for x in left]), torch.stack([centred_gram(y) for y in right]))
    assert found.shape == (2, 3)
    for (i, x), (j, y) in itertools.product(enumerate(left), enumerate(right)):
        assert float(found[i, j]) == pytest.approx(cka(x, y), abs=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_vector_is_the_u_centred_matrix_in_float64(dtype):
    x = (gaussian(30, 7) + 2).to(dtype)
    found = centred_gram(x)
    assert found.dtype == torch.float64
    assert found.shape == (30 * 29 / 2,)
    assert float(found.norm()) == pytest.approx(1, abs=1e-14)
    whole = torch.zeros(30, 30, dtype=torch.float64)
    whole[tuple(torch.triu_indices(30, 30, 1))] = found
    assert float((whole + whole.T).sum(dim=0).abs().max()) < 1e-13
    assert torch.allclose(found, centred_gram(x.double()), rtol=0, atol=1e-14)


def test_one_large_row_and_a_large_mean_do_not_own_it():
    """A massive first token on a coordinate of its own adds to no inner product; a rogue coordinate is all mean."""
    x, y = noise(50, 6), noise(50, 9, 1)
    y[:, :6] += x
    x[0] = 0
    quiet = cka(x, y)
    x = torch.cat([x, torch.zeros(50, 1, dtype=torch.float64)], dim=1)
    x[0, 6] = 1e4
    x[:, 5] += 1e4
    # Products of 1e8 leave 8 digits; the biased form is blind: it sees the first token only.
    assert cka(x, y) == pytest.approx(quiet, abs=1e-7)
    assert biased_cka(x, y) < quiet / 2


DEGENERATE = {
    "zeros": torch.zeros(6, 3),
    "equal": torch.full((6, 3), 0.1),
    "all but one equal": torch.cat([torch.full((5, 3), 0.1), gaussian(1, 3)]),
    "a simplex": orthogonal(6) + 0.3,
    "orthogonal": orthogonal(6) * torch.linspace(0.1, 5, 6)[:, None] - 7,
    "narrow and far away": torch.full((6, 1), 1e200, dtype=torch.float64),
}


@pytest.mark.parametrize("x", DEGENERATE.values(), ids=DEGENERATE)
def test_a_cloud_without_a_u_centred_matrix_has_no_cka(x):
    vector = centred_gram(x)
    assert torch.equal(vector, torch.zeros(15, dtype=torch.float64))
    stacked = torch.stack([vector, centred_gram(noise(6, 3, 1)), centred_gram(noise(6, 3, 2))])
    expected = torch.tensor([[True, True, True], [True, False, False], [True, False, False]])
    assert torch.equal(debiased_cka(stacked, stacked).isnan(), expected)


def test_a_row_that_is_not_finite_has_no_cka():
    for bad in (math.nan, math.inf):
        x = noise(6, 3)
        x[2, 1] = bad
        assert centred_gram(x).isnan().all()
        assert math.isnan(cka(x, noise(6, 3, 1)))


def test_rounding_takes_nothing_above_one():
    """A unit vector's product with itself, and a unit column's, are above 1 by one digit in some of 60."""
    vectors = torch.stack([centred_gram(noise(9, 4, s)) for s in SEEDS])
    assert float(debiased_cka(vectors, vectors).max()) <= 1
    assert float(debiased_cka(vectors, -vectors).min()) >= -1
    columns = [orthogonal(30, s)[:, :1] for s in SEEDS]
    assert all(subspace_overlap(column, column).overlap <= 1 for column in columns)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_than_four_rows_are_refused(n):
    with pytest.raises(ValueError, match=f"at least 4 rows, got {n}"):
        centred_gram(noise(n, 5))


# ---- leading subspace ----------------------------------------------------------------------------------------------


def svd_projector(x, k):
    x = x.double().numpy()
    right = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][:k]
    return right.T @ right


def assert_orthonormal(basis):
    identity = torch.eye(basis.shape[1], dtype=torch.float64)
    assert torch.allclose(basis.T @ basis, identity, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "d", "k", "dtype"),
    [
        (12, 40, 1, DTYPES[0]),
        (40, 12, 5, DTYPES[1]),
        (20, 20, 11, DTYPES[2]),
        (12, 40, 11, DTYPES[3]),
        (40, 12, 1, DTYPES[3]),
    ],
    ids=str,
)
def test_the_leading_subspace_is_that_of_numpys_svd(dtype, n, d, k):
    x = (gaussian(n, d) * torch.linspace(2, 0.5, d) + 4).to(dtype)
    basis = leading_subspace(x, k)
    assert basis.dtype == torch.float64
    assert basis.shape == (d, k)
    assert_orthonormal(basis)
    np.testing.assert_allclose((basis @ basis.T).numpy(), svd_projector(x, k), atol=1e-9)


@pytest.mark.parametrize(("n", "d"), [(12, 40), (40, 12)])
def test_columns_lead_in_order(n, d):
    x = noise(n, d) * torch.linspace(3, 0.2, d)
    basis = leading_subspace(x, 8)
    lengths = ((x - x.mean(dim=0)) @ basis).norm(dim=0)
    assert torch.equal(lengths, lengths.sort(descending=True).values)
    for k in (1, 4):
        assert torch.allclose(basis[:, :k].abs(), leading_subspace(x, k).abs(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "d"), [(12, 40), (40, 12), (1, 5), (2, 5)])
def test_a_rank_below_k_gives_fewer_columns(n, d):
    rank = min(3, n - 1)
    x = noise(n, 3) @ noise(3, d, 1) + 5
    basis = leading_subspace(x, 9)
    assert basis.shape == (d, rank)
    assert_orthonormal(basis)
    np.testing.assert_allclose((basis @ basis.T).numpy(), svd_projector(x, rank), atol=1e-10)


@pytest.mark.parametrize(("n", "d"), [(12, 40), (40, 12)])
def test_weak_components_are_orthonormal_too(n, d):
    """Singular values over five decades: X^T u / sigma alone loses orthogonality with the square of that."""
    left = torch.linalg.qr(noise(n, 6) - noise(n, 6).mean(dim=0)).Q
    x = left * torch.logspace(0, -5, 6, dtype=torch.float64) @ orthogonal(d)[:6]
    basis = leading_subspace(x, 6)
    assert basis.shape == (d, 6)
    assert_orthonormal(basis)
    # A Gram matrix knows the direction of singular value s to eps / s^2.
    np.testing.assert_allclose((basis @ basis.T).numpy(), svd_projector(x, 6), atol=2e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e300])
@pytest.mark.parametrize(("n", "d"), [(7, 20), (70, 6)])
def test_equal_rows_have_no_subspace(n, d, value):
    assert leading_subspace(torch.full((n, d), value, dtype=torch.float64), 4).shape == (d, 0)


@pytest.mark.parametrize(("n", "d"), [(7, 20), (70, 6)])
@pytest.mark.parametrize("scale", [1e-160, 1e160])
def test_no_product_overflows(n, d, scale):
    x = noise(n, d)
    found, expected = leading_subspace(x * scale, 4), leading_subspace(x, 4)
    assert torch.allclose(found @ found.T, expected @ expected.T, rtol=0, atol=1e-10)


# ---- overlap of subspaces ------------------------------------------------------------------------------------------


def test_a_subspace_and_itself_its_part_and_its_complement():
    q = orthogonal(9)
    turned = q[:, :4] @ orthogonal(4, 1)
    for other in (q[:, :4], turned):
        found = subspace_overlap(q[:, :4], other)
        assert found.overlap == pytest.approx(1, abs=1e-14)
        assert found.overlap <= 1
    part = subspace_overlap(q[:, :6], turned)
    assert (part.overlap, part.k, part.null) == (pytest.approx(1), 4, pytest.approx(6 / 9))
    complement = subspace_overlap(turned, q[:, 4:])
    assert complement.overlap == pytest.approx(0, abs=1e-14)


@PROPERTY
@given(d=st.integers(1, 12), widths=st.tuples(st.integers(1, 12), st.integers(1, 12)), seed=st.integers(0, 99))
def test_the_overlap_is_the_mean_square_of_the_cosines_of_scipys_angles(d, widths, seed):
    k, j = (min(width, d) for width in widths)
    left, right = orthogonal(d, seed)[:, :k], orthogonal(d, seed + 100)[:, :j]
    found = subspace_overlap(left, right)
    assert found.k == min(k, j)
    angles = scipy.linalg.subspace_angles(left.numpy(), right.numpy())
    assert found.overlap == pytest.approx(np.mean(np.cos(angles) ** 2), abs=1e-7)
    projected = float((left.T @ right).square().sum())
    assert found.overlap == pytest.approx(projected / min(k, j), abs=1e-12)
    back = subspace_overlap(right, left)
    assert (back.overlap, back.null) == (pytest.approx(found.overlap, abs=1e-12), found.null)


@pytest.mark.parametrize(("k", "j", "d"), [(4, 4, 16), (3, 8, 16), (10, 5, 12), (1, 1, 5)])
def test_random_subspaces_overlap_by_the_null(k, j, d):
    found = [subspace_overlap(orthogonal(d, 2 * s)[:, :k], orthogonal(d, 2 * s + 1)[:, :j]) for s in range(200)]
    overlaps = [one.overlap for one in found]
    assert {one.null for one in found} == {max(k, j) / d}
    assert abs(np.mean(overlaps) - found[0].null) < 4 * found[0].null_sd / math.sqrt(200)
    assert np.std(overlaps) == pytest.approx(found[0].null_sd, rel=0.25)


def test_a_subspace_without_columns_has_no_overlap():
    for left, right in itertools.permutations([torch.zeros(7, 0), orthogonal(7)[:, :3]]):
        found = subspace_overlap(left, right)
        assert math.isnan(found.overlap)
        assert found.k == 0


def test_the_tensors_are_left_as_they_were():
    x, y = noise(30, 6) + 1, orthogonal(8)[:, :3]
    vectors = torch.stack([centred_gram(x), torch.zeros(435, dtype=torch.float64)])
    before = [each.clone() for each in (x, y, vectors)]
    centred_gram(x)
    leading_subspace(x, 2)
    leading_subspace(x[:5], 2)
    subspace_overlap(y, y)
    debiased_cka(vectors, vectors)
    assert all(torch.equal(*pair) for pair in zip((x, y, vectors), before, strict=True))
