"""Spectra from moments against SVD and scikit-learn, their invariances, and the precision they promise."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import (
    DTYPES,
    PROPERTY,
    gaussian,
    made_spectrum,
    orthogonal,
    spectrum_of,
    svd_values,
    with_singular_values,
)
from sklearn.decomposition import PCA

from dimscope.geometry import spectrum as module
from dimscope.geometry.dimension import numerical_rank
from dimscope.geometry.spectrum import principal_components, spectrum, table_moments
from dimscope.vectors.moments import moments

SHAPES = [(200, 12), (12, 40), (13, 13), (2, 5), (50, 1)]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_those_of_the_svd(shape, centred):
    x = gaussian(*shape) + 0.5
    found = spectrum_of(x, centred=centred)
    expected = svd_values(x, centred=centred)[: found.max_rank]
    assert len(found.singular_values) == found.max_rank == min(shape[0] - centred, shape[1])
    # The Gram route squares the condition number: half of the 16 digits, at the scale of the largest value.
    np.testing.assert_allclose(found.singular_values.numpy(), expected, atol=1e-7 * expected[0])
    assert (found.singular_values.diff() <= 0).all()
    assert found.preprocess == ("centred" if centred else "uncentred")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_measured_in_float64(dtype):
    x = gaussian(300, 8, dtype=dtype)
    found = spectrum_of(x)
    assert found.singular_values.dtype == torch.float64
    np.testing.assert_allclose(found.singular_values.numpy(), svd_values(x), rtol=1e-10)


def test_explained_variance_is_that_of_scikit_learn():
    x = gaussian(300, 10) * torch.linspace(1, 3, 10) + 5
    oracle = PCA().fit(x.double().numpy())
    found = spectrum_of(x)
    np.testing.assert_allclose(found.explained_variance_ratio.numpy(), oracle.explained_variance_ratio_, rtol=1e-9)
    np.testing.assert_allclose(found.singular_values.numpy(), oracle.singular_values_, rtol=1e-9)
    assert float(found.explained_variance_ratio.sum()) == pytest.approx(1, abs=1e-12)


def test_components_are_those_of_scikit_learn_up_to_sign():
    x = gaussian(400, 9) * torch.linspace(1, 4, 9) @ orthogonal(9).float() - 2
    oracle = PCA(n_components=4).fit(x.double().numpy()).components_
    found = principal_components(moments([x], dtype=torch.float64), 4).numpy()
    assert found.shape == (9, 4)
    np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-12)
    signs = np.sign((found.T * oracle).sum(axis=1))
    np.testing.assert_allclose(found.T, signs[:, None] * oracle, atol=1e-9)


def test_uncentred_components_are_the_right_singular_vectors():
    x = gaussian(100, 6) + 1
    _, _, right = np.linalg.svd(x.double().numpy())
    found = principal_components(moments([x], dtype=torch.float64), 1, centred=False).numpy()[:, 0]
    assert abs(found @ right[0]) == pytest.approx(1, abs=1e-12)


def test_signs_of_components_are_fixed_by_their_largest_entry():
    of = moments([gaussian(100, 7)])
    components = principal_components(of, 7)
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()
    assert torch.equal(components, principal_components(moments([-gaussian(100, 7)]), 7))


def test_more_components_than_dimensions_are_all_of_them():
    assert principal_components(moments([gaussian(20, 3)]), 10).shape == (3, 3)


@PROPERTY
@given(
    n=st.integers(2, 40),
    d=st.integers(1, 10),
    seed=st.integers(0, 50),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-10, 10),
)
def test_explained_variance_is_invariant(n, d, seed, scale, shift):
    x = gaussian(n, d, seed, torch.float64)
    expected = spectrum_of(x).explained_variance_ratio
    for other in (x @ orthogonal(d, seed), x * scale, x[torch.randperm(n)], x + shift):
        found = spectrum_of(other).explained_variance_ratio
        np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-9)
    stacked = spectrum_of(torch.cat([x, x])).explained_variance_ratio[: len(expected)]
    np.testing.assert_allclose(stacked.numpy(), expected.numpy(), atol=1e-9)


@PROPERTY
@given(n=st.integers(2, 30), d=st.integers(1, 8), seed=st.integers(0, 50))
def test_the_energy_is_the_squared_frobenius_norm_and_centring_only_lowers_values(n, d, seed):
    x = gaussian(n, d, seed, torch.float64) + 0.7
    raw, centred = spectrum_of(x, centred=False).singular_values, spectrum_of(x).singular_values
    assert float(raw.square().sum()) == pytest.approx(float(x.square().sum()), rel=1e-10)
    assert (centred <= raw[: len(centred)] * (1 + 1e-9) + 1e-6).all()


def test_degenerate_tables_have_spectra_without_nan():
    zeros = spectrum_of(torch.zeros(5, 3))
    assert zeros.singular_values.tolist() == zeros.explained_variance_ratio.tolist() == [0, 0, 0]
    assert len(spectrum_of(gaussian(1, 3)).singular_values) == 0
    assert len(spectrum_of(gaussian(1, 3), centred=False).singular_values) == 1
    same = spectrum_of(torch.ones(9, 3))
    assert float(same.singular_values.max()) < 1e-6


def test_planted_values_are_recovered():
    values = [30.0, 20.0, 5.0, 1.0, 0.1]
    np.testing.assert_allclose(
        spectrum_of(with_singular_values(100, values)).singular_values.numpy(), values, rtol=1e-8
    )
    assert made_spectrum(values).max_rank == 5


# ---- rows, or their moments ----------------------------------------------------------------------------------------


def held(x, kind):
    """Return rows as they are, or their moments."""
    return x if kind == "rows" else moments([x], dtype=torch.float64)


def scored(x, *, centred=True):
    """Return the singular values of z-scores in numpy, columns that are constant 0; uncentred: over the root mean square."""
    x = x.double().numpy()
    x = x - x.mean(axis=0) if centred else x
    spread = np.sqrt((x**2).sum(axis=0) / (len(x) - centred))
    return np.linalg.svd(np.divide(x, spread, out=np.zeros_like(x), where=spread > 1e-9), compute_uv=False)


@pytest.mark.parametrize("standardised", [False, True])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", ["rows", "moments"])
@pytest.mark.parametrize("shape", [(200, 12), (12, 40), (40, 41), (2, 5), (50, 1)])
def test_rows_and_moments_have_the_singular_values_of_the_svd(shape, kind, centred, standardised):
    x = gaussian(*shape) * torch.linspace(1, 4, shape[1]) + 0.5
    found = module.spectrum_of(held(x, kind), centred=centred, standardised=standardised)
    expected = (scored if standardised else svd_values)(x, centred=centred)[: found.max_rank]
    assert (found.n_rows, found.dim, found.centred) == (*shape, centred)
    assert len(found.singular_values) == found.max_rank == min(shape[0] - centred, shape[1])
    np.testing.assert_allclose(found.singular_values.numpy(), expected, atol=1e-7 * expected[0])  # the Gram route
    assert found.singular_values.dtype == torch.float64


@pytest.mark.parametrize("kind", ["rows", "moments"])
def test_centred_is_what_rows_are_unless_told_otherwise(kind):
    x = gaussian(50, 6) + 3
    found = module.spectrum_of(held(x, kind))
    assert found.centred
    np.testing.assert_allclose(found.singular_values.numpy(), svd_values(x), rtol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(60, 8), (8, 60)])
def test_rows_of_every_dtype_are_measured_in_float64_and_left_alone(dtype, shape):
    x = gaussian(*shape, dtype=dtype) + 2
    before = x.clone()
    for standardised in (False, True):
        found = module.spectrum_of(x, standardised=standardised).singular_values.numpy()
        expected = (scored if standardised else svd_values)(x)[: len(found)]
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", ["rows", "moments"])
@pytest.mark.parametrize("shape", [(60, 8), (7, 8)])
def test_z_scores_have_unit_variance_whatever_the_scale_of_a_column(kind, shape):
    x = gaussian(*shape, dtype=torch.float64)
    expected = module.spectrum_of(x, standardised=True).singular_values.numpy()
    assert (expected**2).sum() == pytest.approx(8 * (shape[0] - 1), rel=1e-9)
    other = x * torch.logspace(-4, 4, 8, dtype=torch.float64) + 5 * torch.logspace(-4, 4, 8, dtype=torch.float64)
    found = module.spectrum_of(held(other, kind), standardised=True).singular_values.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["rows", "moments"])
@pytest.mark.parametrize("constant", [0.0, 1.1, 1e6])
def test_a_constant_column_has_no_z_score(kind, constant):
    x = gaussian(60, 8)
    x[:, [2, 5]] = constant
    found = module.spectrum_of(held(x, kind), standardised=True)
    np.testing.assert_allclose(found.singular_values[:6].numpy(), scored(x[:, [0, 1, 3, 4, 6, 7]])[:6], rtol=1e-7)
    assert numerical_rank(found) == 6
    assert float(found.singular_values.square().sum()) == pytest.approx(6 * 59, rel=1e-9)


@pytest.mark.parametrize("kind", ["rows", "moments"])
@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_rows_have_a_spectrum_of_all_kinds(kind, n):
    x = gaussian(n, 5) + 1
    for centred in (True, False):
        for standardised in (True, False):
            found = module.spectrum_of(held(x, kind), centred=centred, standardised=standardised)
            assert len(found.singular_values) == n - centred
            assert found.singular_values.isfinite().all()


@PROPERTY
@given(
    n=st.integers(2, 40), d=st.integers(1, 12), seed=st.integers(0, 99), shift=st.floats(-5, 5), centred=st.booleans()
)
def test_rows_and_their_moments_have_one_spectrum(n, d, seed, shift, centred):
    x = gaussian(n, d, seed) + shift
    for standardised in (False, True):
        rows, sums = (
            module.spectrum_of(held(x, kind), centred=centred, standardised=standardised).singular_values.square()
            for kind in ("rows", "moments")
        )
        np.testing.assert_allclose(rows.numpy(), sums.numpy(), atol=1e-9 * float(sums.sum()) + 1e-12)


# ---- precision of big tables ---------------------------------------------------------------------------------------


class Blocks:
    """Blocks of a matrix that count how often they are asked for."""

    def __init__(self, matrix):
        self.matrix, self.passes = matrix, 0

    def __call__(self):
        self.passes += 1
        return self.matrix.split(4096)


def measured(x, *, centred):
    blocks = Blocks(x)
    return spectrum(table_moments(blocks, *x.shape), centred=centred), blocks.passes


@pytest.mark.parametrize(("condition", "centred"), [(1.5, True), (25, True), (25, False), (1e3, True)])
def test_every_singular_value_of_a_big_float32_table_is_accurate(monkeypatch, condition, centred):
    """The tolerance: float32 sums depend on the number of threads; 1.4e-6 with one, below 1e-6 with two."""
    monkeypatch.setattr(module, "SMALL", 0)
    x = with_singular_values(20_000, torch.logspace(2, 2 - np.log10(condition), 24).tolist()).float()
    found, passes = measured(x, centred=centred)
    np.testing.assert_allclose(found.singular_values.numpy(), svd_values(x, centred=centred), rtol=2e-6)
    assert passes == (2 if condition > module.CONDITION else 1)


def test_without_the_second_pass_the_small_values_would_be_wrong():
    x = with_singular_values(20_000, torch.logspace(2, -1, 24).tolist()).float()
    single = spectrum(moments(x.split(4096)), centred=True).singular_values
    assert float((single[-1] / svd_values(x)[-1] - 1).abs()) > 1e-5


def test_a_small_table_is_multiplied_in_float64_at_once():
    x = with_singular_values(2_000, torch.logspace(2, -2, 8).tolist()).float()
    found, passes = measured(x, centred=True)
    assert passes == 1
    np.testing.assert_allclose(found.singular_values.numpy(), svd_values(x), rtol=1e-7)


def test_a_constant_column_does_not_count_as_a_dimension_of_the_centred_table(monkeypatch):
    """Uncentred, the column is as strong as the others, so the uncentred condition number says nothing about it."""
    monkeypatch.setattr(module, "SMALL", 0)
    x = gaussian(5_000, 16)
    x[:, 3] = 1.1
    found, _ = measured(x, centred=True)
    assert numerical_rank(found) == 15


@pytest.mark.parametrize("small", [0, 10**11])
def test_the_table_is_left_as_it_was(monkeypatch, small):
    monkeypatch.setattr(module, "SMALL", small)
    x = gaussian(100, 5) * torch.logspace(0, 3, 5)
    before = x.clone()
    of = table_moments(lambda: [x], 100, 5)
    spectrum(of, centred=True)
    gram = of.gram.clone()
    principal_components(of, 2)
    assert torch.equal(x, before)
    assert torch.equal(of.gram, gram)
