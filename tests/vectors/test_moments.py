"""Moments are the same numbers however the rows are cut, and as good as float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import DTYPES, PROPERTY, gaussian

from dimscope.vectors import moments as module
from dimscope.vectors.moments import Moments, merge, moments


def close(a: Moments, b: Moments, relative: float = 1e-13) -> bool:
    """Compare to a share of the largest entry: entries near zero have no digits of their own."""
    same = a.count == b.count
    for x, y in ((a.total, b.total), (a.gram, b.gram)):
        same = same and bool((x - y).abs().max() <= relative * y.abs().max().clamp_min(1e-300))
    return same


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 3), (3, 7), (1024, 4), (1025, 4), (40, 300)])
def test_count_sum_and_gram_are_those_of_numpy(shape):
    x = gaussian(*shape, dtype=torch.float64) + 3
    found = moments([x])
    assert found.count == shape[0]
    np.testing.assert_allclose(found.total.numpy(), x.numpy().sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.mean.numpy(), x.numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.gram.numpy(), x.numpy().T @ x.numpy(), rtol=1e-12)
    centred = x.numpy() - x.numpy().mean(axis=0)
    scale = np.abs(found.gram.numpy()).max()
    np.testing.assert_allclose(found.scatter(centred=True).numpy(), centred.T @ centred, atol=1e-12 * scale)
    assert torch.equal(found.scatter(centred=False), found.gram)


def test_the_gram_is_exactly_symmetric_across_panels(monkeypatch):
    monkeypatch.setattr(module, "PANEL", 4)
    x = gaussian(60, 11)
    gram = moments([x]).gram
    assert torch.equal(gram, gram.T)
    np.testing.assert_allclose(gram.numpy(), x.double().numpy().T @ x.double().numpy(), atol=1e-4)


@PROPERTY
@given(
    n=st.integers(1, 80),
    d=st.integers(1, 9),
    size=st.integers(1, 90),
    chunk=st.integers(1, 90),
    seed=st.integers(0, 99),
)
def test_moments_do_not_depend_on_the_block_size(n, d, size, chunk, seed):
    x = gaussian(n, d, seed, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        found = moments(x.split(size))
    assert close(found, moments([x]))


@PROPERTY
@given(sizes=st.lists(st.integers(1, 40), min_size=3, max_size=3), d=st.integers(1, 6), seed=st.integers(0, 99))
def test_merge_is_commutative_and_associative_and_equals_one_pass(sizes, d, seed):
    x = gaussian(sum(sizes), d, seed, torch.float64)
    a, b, c = (moments([part]) for part in x.split(sizes))
    assert close(merge(a, b), merge(b, a), 0)
    assert close(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert close(merge(merge(a, b), c), moments([x]))


def test_a_generator_of_blocks_with_an_empty_one_among_them():
    x = gaussian(10, 3, dtype=torch.float64)
    assert close(moments(part for part in (x[:4], x[4:4], x[4:])), moments([x]))


@pytest.mark.parametrize("blocks", [[], [torch.empty(0, 3)]], ids=["no block", "an empty block"])
def test_no_rows_have_no_moments(blocks):
    with pytest.raises(ValueError, match="no rows"):
        moments(blocks)


def test_long_float32_sums_do_not_drift():
    x = torch.full((300_000, 2), 0.1)
    found = moments(x.split(8192))
    exact = float(x[0, 0].double())
    assert float(found.total[0]) == pytest.approx(300_000 * exact, rel=1e-12)
    # Equal products are the worst case: each of the 1,024 float32 additions of a chunk may round the same way.
    assert float(found.gram[0, 1]) == pytest.approx(300_000 * exact**2, rel=1024 * 2.0**-24)
    assert float(moments(x.split(8192), dtype=torch.float64).gram[0, 1]) == pytest.approx(300_000 * exact**2, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_summed_in_float64_when_asked(dtype):
    x = gaussian(2000, 5, dtype=dtype)
    found = moments([x], dtype=torch.float64)
    assert found.total.dtype == found.gram.dtype == torch.float64
    assert close(found, moments([x.double()]), 0)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_the_blocks_are_left_as_they_were(dtype):
    x = gaussian(50, 4)
    before = x.clone()
    found = moments([x], dtype=dtype)
    found.scatter(centred=True)
    assert torch.equal(x, before)
