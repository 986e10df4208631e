"""Mean cosine, partition function and norms against the plain way over all pairs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import DTYPES, PROPERTY, gaussian, orthogonal, table_without
from scipy.special import logsumexp
from sklearn.metrics.pairwise import cosine_similarity

from dimscope.geometry.isotropy import partition_isotropy, row_norms, row_statistics
from dimscope.vectors import table as table_module
from dimscope.vectors.moments import moments
from dimscope.vectors.table import table_from_tensor


def all_pairs(x):
    """Return the mean cosine over all pairs of different rows, one by one."""
    similarity = cosine_similarity(x.double().numpy())
    n = len(similarity)
    return (similarity.sum() - np.trace(similarity)) / (n * (n - 1))


def mean_cosine(table, centre=None):
    (found,) = row_statistics(table, torch.zeros(table.dim) if centre is None else centre)
    return found.mean_cosine


# ---- mean cosine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 2])
def test_the_closed_form_is_the_mean_over_all_pairs(dtype, shift):
    x = (gaussian(150, 12) + shift).to(dtype)
    assert mean_cosine(table_from_tensor(x)) == pytest.approx(all_pairs(x), abs=1e-12)
    centre = x.double().mean(dim=0)
    assert mean_cosine(table_from_tensor(x), centre) == pytest.approx(all_pairs(x.double() - centre), abs=1e-12)


@PROPERTY
@given(n=st.integers(2, 40), d=st.integers(1, 8), seed=st.integers(0, 99), size=st.integers(1, 50))
def test_any_block_size_gives_the_same(n, d, seed, size):
    x = gaussian(n, d, seed) + 0.3
    whole = table_from_tensor(x)
    cut = table_module.VectorTable(n, d, "F32", whole.read)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_module.VectorTable.blocks, "__defaults__", (size,))
        found = mean_cosine(cut)
    assert found == pytest.approx(all_pairs(x), abs=1e-12)
    assert -1 / (n - 1) - 1e-9 <= found <= 1 + 1e-9


def test_extremes():
    assert mean_cosine(table_from_tensor(torch.ones(9, 3) * torch.arange(1, 10)[:, None])) == pytest.approx(1)
    assert mean_cosine(table_from_tensor(torch.tensor([[1.0, 2.0], [-3.0, -6.0]]))) == pytest.approx(-1)
    assert mean_cosine(table_from_tensor(torch.eye(6))) == pytest.approx(0, abs=1e-15)


def test_isotropic_rows_have_cosine_zero_within_the_stated_deviation():
    n, d = 300, 20
    found = [mean_cosine(table_from_tensor(gaussian(n, d, s))) for s in range(60)]
    deviation = math.sqrt(2 / (n * (n - 1) * d))
    assert abs(np.mean(found)) < 4 * deviation / math.sqrt(60)
    assert np.std(found) == pytest.approx(deviation, rel=0.4)


def test_it_ignores_scale_rotation_order_and_zero_rows():
    x = gaussian(80, 6, dtype=torch.float64) + 0.5
    expected = mean_cosine(table_from_tensor(x))
    lengths = torch.linspace(0.1, 9, 80)[:, None].double()
    with_zeros = torch.cat([torch.zeros(3, 6, dtype=torch.float64), x])
    for other in (x * lengths, x @ orthogonal(6), x.flip(0), with_zeros):
        assert mean_cosine(table_from_tensor(other)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("x", [torch.zeros(5, 3), torch.ones(1, 3)], ids=["zeros", "one row"])
def test_without_a_pair_there_is_no_mean(x):
    assert math.isnan(mean_cosine(table_from_tensor(x)))


def test_excluded_rows_have_no_part():
    x = gaussian(60, 5) + 1
    x[[4, 59]] = math.nan
    kept = [i for i in range(60) if i not in {4, 59}]
    table = table_without(x, {4, 59})
    assert mean_cosine(table) == pytest.approx(all_pairs(x[kept]), abs=1e-12)
    np.testing.assert_allclose(row_norms(table).numpy(), np.linalg.norm(x[kept].double().numpy(), axis=1), rtol=1e-12)


# ---- norms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_those_of_numpy_in_float64(dtype):
    x = gaussian(30, 7, dtype=dtype) * 100
    found = row_norms(table_from_tensor(x))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), np.linalg.norm(x.double().numpy(), axis=1), rtol=1e-12)
    for centre in (x.double().mean(dim=0), x.float().mean(dim=0)):
        expected = np.linalg.norm(x.double().numpy() - centre.double().numpy(), axis=1)
        origin, from_centre = row_statistics(table_from_tensor(x), torch.zeros(7), centre)
        np.testing.assert_allclose(origin.norms.numpy(), found.numpy(), rtol=1e-12)
        np.testing.assert_allclose(from_centre.norms.numpy(), expected, rtol=1e-12)
        assert origin.fourth_powers == pytest.approx(float(x.double().pow(4).sum()), rel=1e-12)
        assert from_centre.fourth_powers == pytest.approx(float((x.double() - centre.double()).pow(4).sum()), rel=1e-12)


# ---- partition function --------------------------------------------------------------------------------------------


def isotropy(x, *, centred):
    table = table_from_tensor(x)
    (about_mean,) = row_statistics(table, x.double().mean(dim=0))
    norm = float((about_mean.norms if centred else row_norms(table)).mean())
    return partition_isotropy(table, moments([x], dtype=torch.float64), norm, centred=centred)


def by_hand(x, *, centred):
    w = x.double().numpy()
    w = w - w.mean(axis=0) if centred else w
    w = w / np.linalg.norm(w, axis=1).mean()
    _, directions = np.linalg.eigh(w.T @ w)
    log_z = logsumexp(w @ np.concatenate([directions, -directions], axis=1), axis=0)
    return math.exp(log_z.min() - log_z.max())


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partition_isotropy_by_hand(dtype, centred):
    x = (gaussian(300, 10) * torch.linspace(0.5, 2, 10) + 0.4).to(dtype)
    assert isotropy(x, centred=centred) == pytest.approx(by_hand(x, centred=centred), rel=1e-5)  # float32 products


def test_partition_isotropy_goes_from_a_cone_to_a_ball():
    ball, cone = gaussian(4000, 8), gaussian(4000, 8) * 0.05 + torch.eye(8)[0]
    assert isotropy(ball, centred=False) > 0.95
    assert isotropy(cone, centred=False) == pytest.approx(math.exp(-2), rel=0.02)
    assert isotropy(cone, centred=True) > 0.95


def test_both_signs_are_tried():
    """All rows along one direction: Z is e for it and 1/e for its opposite, which another sign convention would miss."""
    x = torch.tensor([[1.0, 0.0]] * 5 + [[1.0, 1e-3]] * 5)
    assert isotropy(x, centred=False) == pytest.approx(math.exp(-2), rel=1e-3)
    assert isotropy(-x, centred=False) == pytest.approx(math.exp(-2), rel=1e-3)


def test_partition_isotropy_ignores_scale_and_rotation_and_survives_large_rows():
    x = gaussian(200, 5, dtype=torch.float64) + 0.2
    expected = isotropy(x, centred=False)
    assert isotropy(x * 1e4, centred=False) == pytest.approx(expected, rel=1e-4)
    assert isotropy(x @ orthogonal(5), centred=False) == pytest.approx(expected, rel=1e-4)
    raw = partition_isotropy(table_from_tensor(x * 1e3), moments([x * 1e3]), 1.0, centred=False)
    assert 0 <= raw <= 1


def test_partition_isotropy_of_blocks_and_excluded_rows():
    x = gaussian(90, 4) + 0.3
    x[7] = math.nan
    kept = [i for i in range(90) if i != 7]
    table = table_without(x, {7})
    norm = float(row_norms(table).mean())
    of = moments([x[kept]], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_module.VectorTable.blocks, "__defaults__", (16,))
        found = partition_isotropy(table, of, norm, centred=False)
    assert found == pytest.approx(by_hand(x[kept], centred=False), rel=1e-5)


def test_the_table_is_left_as_it_was():
    x = gaussian(50, 4)
    before = x.clone()
    centre = x.mean(dim=0).double()
    kept = centre.clone()
    isotropy(x, centred=True)
    row_statistics(table_from_tensor(x), centre)
    row_norms(table_from_tensor(x))
    assert torch.equal(x, before)
    assert torch.equal(centre, kept)
