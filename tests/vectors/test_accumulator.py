"""Few rows stay rows, many become their moments, and merging never touches what is merged."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import PROPERTY, gaussian
from torch._subclasses.fake_tensor import FakeTensorMode

from dimscope.vectors import moments as module
from dimscope.vectors.moments import Accumulator, Moments, combined

D = 6


def filled(rows: torch.Tensor, size: int = 3, dim: int = D) -> Accumulator:
    """Return an accumulator that was given the rows in pieces."""
    accumulator = Accumulator(dim)
    for piece in rows.split(size):
        accumulator.add(piece)
    return accumulator


def check(found: torch.Tensor | Moments, rows: torch.Tensor) -> None:
    """Compare with numpy in float64: rows bit for bit (in any order of whole pieces), moments to 1e-12 of their size."""
    x = rows.double().numpy()
    if len(rows) <= rows.shape[1]:
        assert isinstance(found, torch.Tensor)
        assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, rows.tolist()))
        return
    assert isinstance(found, Moments)
    assert found.count == len(rows)
    assert found.gram.dtype == found.total.dtype == torch.float64
    for value, expected in ((found.total.numpy(), x.sum(axis=0)), (found.gram.numpy(), x.T @ x)):
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def snapshot(of: Accumulator) -> tuple:
    """Return what an accumulator holds, to compare bit for bit."""
    sums = [None if t is None else t.tolist() for t in (of.total, of.upper)]
    return of.count, [piece.tolist() for piece in of.pieces], sums


# ---- adding --------------------------------------------------------------------------------------------------------


@PROPERTY
@given(n=st.integers(0, 60), d=st.integers(1, 9), size=st.integers(1, 70), chunk=st.integers(1, 20))
def test_the_rows_while_there_are_d_at_most_then_their_moments(n, d, size, chunk):
    rows = gaussian(n, d, seed=n) + 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        accumulator = filled(rows, size, d)
    assert accumulator.count == n
    if n <= d:
        assert torch.equal(accumulator.result(), rows)
    check(accumulator.result(), rows)


def test_exactly_d_rows_are_kept_and_one_more_is_not():
    rows = gaussian(D + 1, D)
    accumulator = filled(rows[:D])
    assert torch.equal(accumulator.result(), rows[:D])
    accumulator.add(rows[D:])
    assert accumulator.pieces == []
    check(accumulator.result(), rows)


def test_no_more_than_d_rows_or_one_matrix_is_held():
    accumulator, rows = Accumulator(D), gaussian(50, D)
    for row in rows.split(1):
        accumulator.add(row)
        numbers = sum(piece.numel() for piece in accumulator.pieces)
        numbers += sum(t.numel() for t in (accumulator.total, accumulator.upper) if t is not None)
        assert numbers <= D * D + D
    check(accumulator.result(), rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_products_are_made_in_float64(dtype):
    rows = (gaussian(300, D) * 100 + 1000).to(dtype)
    check(filled(rows, 7).result(), rows)


def test_the_gram_is_symmetric_across_panels(monkeypatch):
    monkeypatch.setattr(module, "PANEL", 4)
    rows = gaussian(30, 11)
    found = filled(rows, 9, 11).result()
    check(found, rows)
    assert isinstance(found, Moments)
    assert torch.equal(found.gram, found.gram.T)


def test_what_is_held_is_not_changed_by_what_is_added_later():
    rows = gaussian(40, D)
    accumulator = filled(rows[:20])
    early = accumulator.result()
    accumulator.add(rows[20:])
    check(early, rows[:20])


# ---- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right"),
    [(0, 0), (0, 40), (1, D - 1), (D - 1, 1), (D, 1), (1, D), (D + 1, 1), (2, 40), (40, 0), (40, D), (40, 40)],
)
def test_a_merge_is_all_rows_and_leaves_the_other_alone(left, right):
    rows, more = gaussian(left + right, D, seed=left) + 1, gaussian(9, D, seed=99)
    one, other = filled(rows[:left]), filled(rows[left:])
    before = snapshot(other)
    one.merge(other)
    check(one.result(), rows)
    assert one.count == left + right
    assert snapshot(other) == before
    one.add(more)
    check(one.result(), torch.cat([rows, more]))
    assert snapshot(other) == before
    other.add(more)  # and the other way round
    check(one.result(), torch.cat([rows, more]))
    check(other.result(), torch.cat([rows[left:], more]))


@PROPERTY
@given(sizes=st.lists(st.integers(0, 15), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_merging_is_associative_and_commutative(sizes, seed):
    rows = gaussian(sum(sizes), D, seed)
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        parts = [filled(piece) for piece in rows.split(sizes)]
        a, b, c = (parts[i] for i in order)
        a.merge(b)
        a.merge(c)
        check(a.result(), rows)
        x, y, z = (filled(rows.split(sizes)[i]) for i in order)
        y.merge(z)
        x.merge(y)
        check(x.result(), rows)


@pytest.mark.parametrize("sizes", [(2, 3), (4, 4), (7, 2), (2, 7), (8, 9), (0, 7), (7, 0), (2, 2, 2), (3, 0, 9, 1)])
def test_combined_is_all_rows_and_leaves_every_part_alone(sizes):
    rows = gaussian(sum(sizes), D, seed=5)
    parts = [filled(piece) for piece in rows.split(sizes)]
    before = copy.deepcopy([snapshot(part) for part in parts])
    found = combined(parts)
    check(found, rows)
    assert [snapshot(part) for part in parts] == before
    if isinstance(found, Moments):  # of its own, not a part's matrix
        found.gram.zero_()
        assert [snapshot(part) for part in parts] == before


def test_combined_of_empty_parts_is_no_rows_and_of_no_parts_an_error():
    assert combined([Accumulator(D), Accumulator(D)]).shape == (0, D)
    with pytest.raises(ValueError, match="moments of no rows"):
        combined([])


# ---- devices -------------------------------------------------------------------------------------------------------


def test_rows_on_two_devices_are_held_together():
    """A pass gone on with on a GPU: the rows of the state file are in the memory of the CPU, the new ones are not."""
    with FakeTensorMode():  # torch's own check of devices, without a GPU
        accumulator = Accumulator(D)
        accumulator.add(torch.zeros(2, D))
        accumulator.add(torch.zeros(2, D, device="cuda"))
        assert accumulator.result().shape == (4, D)
        assert combined([accumulator]).device.type == "cpu"


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")])
def test_moments_on_two_devices_are_combined(devices):
    """The kinds of a site's rows: those that did not occur again after a pass was gone on with are still on the CPU."""
    with FakeTensorMode():
        parts = [
            Accumulator(D, [], 9, *(torch.zeros(s, dtype=torch.float64, device=where) for s in ((D,), (D, D))))
            for where in devices
        ]
        found = combined(parts)
        assert isinstance(found, Moments)
        assert found.gram.device.type == "cpu"
        parts[0].merge(parts[1])
