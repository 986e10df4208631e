"""Correlations between rows against numpy, and planted blocks of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import DTYPES, PROPERTY, gaussian

from dimscope.geometry.correlation import correlated_blocks, correlation_matrix, standardised


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_matrix_is_that_of_numpy(dtype):
    x = (gaussian(30, 12) * torch.linspace(0.01, 100, 30)[:, None] + 2).to(dtype)
    found = correlation_matrix(x)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), np.corrcoef(x.double().numpy()), atol=1e-12)


@PROPERTY
@given(
    n=st.integers(1, 12),
    d=st.integers(2, 9),
    seed=st.integers(0, 99),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-100, 100),
)
def test_correlations_are_symmetric_bounded_and_ignore_scale_and_shift_of_rows(n, d, seed, scale, shift):
    x = gaussian(n, d, seed, torch.float64)
    found = correlation_matrix(x)
    np.testing.assert_allclose(found.numpy(), found.T.numpy(), atol=1e-15)
    assert found.abs().max() <= 1
    np.testing.assert_allclose(found.diagonal().numpy(), 1, atol=1e-12)
    np.testing.assert_allclose(correlation_matrix(x * scale + shift).numpy(), found.numpy(), atol=1e-7)


@pytest.mark.parametrize(("value", "d"), [(0.0, 3), (0.1, 7), (-3.3, 300), (0.1, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constant_rows_become_zero_and_correlate_with_nothing(value, d, dtype):
    x = gaussian(5, d, dtype=dtype)
    x[[1, 3]] = value
    assert torch.equal(standardised(x)[[1, 3]], torch.zeros(2, d, dtype=dtype))
    assert correlation_matrix(x)[1, [0, 2, 3, 4]].abs().max() < 1e-12


@pytest.mark.parametrize("scale", [1e-12, 1e-25])
def test_rows_that_shrank_to_almost_nothing_keep_their_correlations(scale):
    x = gaussian(6, 20)
    x[2] = x[4] * scale
    unit = standardised(x)
    np.testing.assert_allclose(unit.norm(dim=1).numpy(), 1, atol=1e-5)
    assert float(unit[2] @ unit[4]) == pytest.approx(1, abs=1e-5)


def blocks_of(x, at_least):
    groups, pairs = correlated_blocks(x, at_least)
    count = int(groups.group.max()) + 1 if len(groups.group) else 0
    return [groups.position[groups.group == g].tolist() for g in range(count)], pairs


def planted():
    """400 rows of noise; 11 with correlation about 0.998, 4 with 0.9999, and an anticorrelated one."""
    x = gaussian(400, 64)
    x[177:188] = gaussian(1, 64, 1) * torch.linspace(1, 3, 11)[:, None] + 0.05 * gaussian(11, 64, 2)
    x[[10, 20, 30, 40]] = gaussian(1, 64, 3) + 0.005 * gaussian(4, 64, 4)
    x[50] = -x[10]
    return x


def test_planted_blocks_are_found_whole():
    groups, _ = blocks_of(planted(), 0.99)
    assert groups == [list(range(177, 188)), [10, 20, 30, 40]]
    assert blocks_of(gaussian(400, 64), 0.99)[0] == []


def test_blocks_do_not_depend_on_the_lengths_of_the_rows():
    x = planted()
    x[[177, 10, 300]] *= 1e18
    x[[180, 20, 301]] *= 1e-18
    assert blocks_of(x, 0.99)[0] == blocks_of(planted(), 0.99)[0]


@pytest.mark.parametrize("at_least", [0.5, 0.9, 0.997, 0.9999])
def test_the_pairs_are_those_of_the_matrix(at_least):
    x = planted()
    _, pairs = blocks_of(x, at_least)
    r = np.corrcoef(x.double().numpy())
    a, b = np.nonzero(np.triu(r >= at_least, 1))
    assert set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == set(
        zip(a.tolist(), b.tolist(), strict=True)
    )
    np.testing.assert_allclose(1 - pairs.distance**2 / 2, r[pairs.first, pairs.second], atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_constant_rows_are_in_no_block(value):
    x = gaussian(200, 33)
    x[[3, 4, 5]] = value
    x[8] = x[9]
    assert blocks_of(x, 0.99)[0] == [[8, 9]]


def test_the_rows_are_left_as_they_were():
    x = planted()
    before = x.clone()
    correlated_blocks(x, math.sqrt(0.9))
    correlation_matrix(x)
    standardised(x)
    assert torch.equal(x, before)
