"""Tables as streams: the rows that the file holds, in order, without the excluded ones."""

import math

import pytest
import torch
from damage import set_rows
from hypothesis import given
from hypothesis import strategies as st
from matrices import DTYPES, PROPERTY, gaussian, table_without
from models import stock_tables

from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.errors import InvalidArgument, NonFiniteRows
from dimscope.vectors import table as table_module
from dimscope.vectors.embedding import open_table
from dimscope.vectors.table import VectorTable, nonfinite_rows, table_from_tensor


@PROPERTY
@given(n=st.integers(1, 60), size=st.integers(1, 70), excluded=st.sets(st.integers(0, 59), max_size=20))
def test_blocks_are_the_rows_in_order_without_the_excluded(n, size, excluded):
    x = gaussian(n, 3)
    excluded = {i for i in excluded if i < n}
    table = table_without(x, excluded)
    kept = [i for i in range(n) if i not in excluded]
    ids, rows = zip(*table.blocks(size), strict=True)
    assert torch.cat(ids).tolist() == kept
    assert torch.equal(torch.cat(rows), x[kept])
    assert max(map(len, rows)) <= size
    assert table.n_used == len(kept)


def test_a_block_is_never_longer_than_asked_for():
    asked = []

    def read(start, stop):
        asked.append((start, stop))
        return torch.zeros(stop - start, 2)

    table = VectorTable(10, 2, "F32", read)
    assert [len(ids) for ids, _ in table.blocks(4)] == [4, 4, 2]
    assert asked == [(0, 4), (4, 8), (8, 10)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_come_as_float32_and_float64_stays_in_blocks(dtype):
    x = gaussian(20, 3, dtype=dtype)
    table = table_from_tensor(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ((_, rows),) = table.blocks()
    ids, loaded = table.load()
    assert rows.dtype == wide
    assert torch.equal(rows, x.to(wide))
    assert ids.tolist() == list(range(20))
    assert loaded.dtype == table.rows(ids).dtype == torch.float32
    assert torch.equal(loaded, x.float())
    assert torch.equal(table.rows(ids), x.float())


@PROPERTY
@given(ids=st.lists(st.integers(0, 99), max_size=30), block=st.integers(1, 120))
def test_rows_by_id_in_any_order_with_repeats(ids, block):
    x = gaussian(100, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_module, "BLOCK", block)
        found = table_from_tensor(x).rows(torch.tensor(ids, dtype=torch.int64))
    assert torch.equal(found, x[ids])


def test_far_ids_are_read_apart(monkeypatch):
    monkeypatch.setattr(table_module, "BLOCK", 1000)
    spans = []

    def read(start, stop):
        spans.append(stop - start)
        return torch.zeros(stop - start, 1)

    ids = [9_999, 3, 5, 5_000, 0, 4_999, *range(1990, 2010)]
    VectorTable(10_000, 1, "F32", read).rows(torch.tensor(ids))
    assert sum(spans) < 100
    assert spans == [6, 10, 10, 1, 1, 1]  # no read crosses the end of a block


@pytest.mark.parametrize(("ids", "named"), [([0, 7], 7), ([-1, 3], -1)])
def test_ids_outside_the_table_are_named(ids, named):
    with pytest.raises(InvalidArgument, match=rf"ids must be 0 to 6, got {named}"):
        table_from_tensor(gaussian(7, 2)).rows(torch.tensor(ids))


def test_load_leaves_the_excluded_out():
    x = gaussian(30, 2)
    ids, rows = table_without(x, {0, 7, 29}).load()
    assert ids.tolist() == [i for i in range(30) if i not in {0, 7, 29}]
    assert torch.equal(rows, x[ids])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_rows_are_found(dtype):
    x = gaussian(40, 3, dtype=dtype)
    x[3, 1], x[17, 0], x[39, 2] = math.nan, math.inf, -math.inf
    x[20, 0], x[20, 1] = math.inf, -math.inf
    x[25] = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) / 8  # large, but a number that float32 holds
    assert nonfinite_rows(table_from_tensor(x)) == [3, 17, 20, 39]


def test_float64_rows_too_large_for_float32_stay_finite_or_are_named():
    x = gaussian(5, 2, dtype=torch.float64)
    x[2] = 1e300
    table = table_from_tensor(x)
    assert nonfinite_rows(table) or torch.isfinite(table.load()[1]).all()


def test_a_models_own_parameter_is_a_table():
    layer = torch.nn.Embedding(20, 4)
    _, rows = table_from_tensor(layer.weight).load()
    assert not rows.requires_grad
    assert not table_from_tensor(layer.weight).rows(torch.tensor([1])).requires_grad
    assert not any(block.requires_grad for _, block in table_from_tensor(layer.weight).blocks())


# ---- open_table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "dtype"), [("input", "float32"), ("output", "bfloat16"), ("input", "float16")])
def test_a_checkpoints_tables_are_those_of_stock_transformers(checkpoint, side, dtype):
    folder = checkpoint("llama", tied=False, dtype=dtype)
    _, rows = open_table(open_checkpoint(folder), side).load()
    assert torch.equal(rows.double(), torch.from_numpy(stock_tables(folder)[side]))


def test_the_output_table_of_a_tied_model_is_its_input_table(checkpoint):
    opened = open_checkpoint(checkpoint("qwen2"))
    assert torch.equal(open_table(opened, "output").load()[1], open_table(opened, "input").load()[1])


def test_a_side_that_is_not_there(checkpoint):
    with pytest.raises(InvalidArgument, match="no output table"):
        open_table(open_checkpoint(checkpoint("bert")), "output")
    with pytest.raises(InvalidArgument, match="input, output, not 'both'"):
        open_table(open_checkpoint(checkpoint("qwen2")), "both")


def test_nonfinite_rows_are_refused_by_name_or_left_out(checkpoint, editable):
    folder = editable(checkpoint("qwen2"))
    set_rows(folder, [2, 5, 8, 11, 14, 17, 20], math.nan)
    with pytest.raises(NonFiniteRows, match=r"7 of 512 rows .* \(rows 2, 5, 8, 11, 14, \.\.\.\).*`skip_nonfinite`"):
        open_table(open_checkpoint(folder))
    table = open_table(open_checkpoint(folder), skip_nonfinite=True)
    assert table.excluded == {2, 5, 8, 11, 14, 17, 20}
    ids, rows = table.load()
    assert len(rows) == 505
    assert torch.isfinite(rows).all()
    assert not table.excluded & set(ids.tolist())


def test_a_table_without_a_finite_row_is_refused_whatever_is_skipped(checkpoint, editable):
    folder = editable(checkpoint("qwen2"))
    set_rows(folder, range(512), math.nan)
    with pytest.raises(NonFiniteRows, match="every row"):
        open_table(open_checkpoint(folder), skip_nonfinite=True)


def test_few_nonfinite_rows_are_all_named(checkpoint, editable):
    folder = editable(checkpoint("qwen2"))
    set_rows(folder, [9], math.inf)
    with pytest.raises(NonFiniteRows, match=r"1 of 512 rows .* \(rows 9\)"):
        open_table(open_checkpoint(folder))
