"""Vectors from arrays, frames and files: the same rows whatever they came in, read by slices, refused in words."""

from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from matrices import gaussian
from safetensors.torch import save_file

from dimscope.errors import InvalidArgument, NonFiniteRows
from dimscope.vectors import frames
from dimscope.vectors.sources import is_vectors, open_vectors

N, D = 50, 4
X = gaussian(N, D)
LABELS = tuple(f"row {i}" for i in range(N))


def _list_frame(dtype=None):
    return pl.DataFrame(
        {"label": LABELS, "vector": X.tolist()}, schema_overrides={"vector": dtype or pl.List(pl.Float32)}
    )


def _wide_frame():
    return pl.DataFrame(X.numpy(), schema=list("abcd")).with_columns(word=pl.Series(LABELS))


def _saved(folder, form):
    path = folder / f"x{form}"
    if form == ".npy":
        np.save(path, X.numpy())
    elif form == ".npz":
        np.savez_compressed(path, x=X.numpy(), mean=X.numpy().mean(axis=0))
    elif form == ".safetensors":
        save_file({"x": X, "mean": X.mean(dim=0)}, path)
    elif form == "-lists.parquet":
        _list_frame().write_parquet(path, row_group_size=7)
    elif form == "-arrays.parquet":
        _list_frame(pl.Array(pl.Float32, D)).write_parquet(path)
    else:
        _wide_frame().write_parquet(path)
    return path


FILES = (".npy", ".npz", ".safetensors", "-lists.parquet", "-arrays.parquet", "-wide.parquet")
IN_MEMORY = {
    "array": lambda: X.numpy(),
    "read-only": lambda: np.broadcast_to(X.numpy()[None], (1, N, D))[0],
    "big-endian": lambda: X.numpy().astype(">f4"),
    "tensor": lambda: X.clone().requires_grad_(),
    "lists": lambda: X.tolist(),
    "list column": _list_frame,
    "array column": lambda: _list_frame(pl.Array(pl.Float32, D)),
    "columns": _wide_frame,
    "lazy": lambda: _wide_frame().lazy(),
}


@pytest.mark.parametrize("form", FILES)
def test_files_give_the_rows_that_were_saved(tmp_path, form):
    path = _saved(tmp_path, form)
    table = open_vectors(str(path))
    assert (table.n_rows, table.dim, table.name) == (N, D, path.name)
    assert torch.equal(table.load()[1], X)
    assert torch.equal(torch.cat([rows for _, rows in table.blocks(7)]), X)
    assert torch.equal(table.rows(torch.tensor([49, 0, 21])), X[[49, 0, 21]])
    assert table.labels == (LABELS if form.endswith("parquet") else None)


@pytest.mark.parametrize("form", IN_MEMORY)
def test_what_is_in_memory_gives_its_rows(form):
    table = open_vectors(IN_MEMORY[form]())
    assert torch.equal(table.load()[1], X)
    assert table.labels == (LABELS if form in ("list column", "array column", "columns", "lazy") else None)
    assert len(repr(table)) < 80


@pytest.mark.parametrize(
    ("dtype", "read_as"),
    [
        *((d, d) for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
        *((d, torch.float32) for d in (torch.int8, torch.uint8, torch.int16)),
        *((d, torch.float64) for d in (torch.int32, torch.int64)),
    ],
    ids=str,
)
def test_numbers_keep_their_value_in_a_floating_point_dtype(tmp_path, dtype, read_as):
    x = (16 * X).to(dtype)
    save_file({"x": x}, tmp_path / "x.safetensors")
    sources = [x, tmp_path / "x.safetensors"] + ([] if dtype == torch.bfloat16 else [x.numpy()])
    for source in sources:
        rows = open_vectors(source).read(3, 20)
        assert rows.dtype == read_as
        assert torch.equal(rows.double(), x[3:20].double())


def test_a_float64_frame_stays_float64_and_mixed_columns_become_it():
    wide = pl.DataFrame({"a": [1, 2], "b": pl.Series([0.1, 0.2], dtype=pl.Float64)})
    assert open_vectors(wide).read(0, 2).tolist() == [[1, 0.1], [2, 0.2]]


def test_npy_is_read_by_slices_and_never_whole(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.zeros((30_000, 8), dtype=np.float32))
    table, copied, array = open_vectors(tmp_path / "x.npy"), [], np.array
    monkeypatch.setattr(np, "array", lambda rows, **given: copied.append(len(rows)) or array(rows, **given))
    assert sum(len(rows) for _, rows in table.blocks(1000)) == 30_000
    table.rows(torch.tensor([5, 29_999]))
    assert copied == [1000] * 30 + [1, 1]


def test_parquet_is_decoded_span_by_span(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "SPAN_BYTES", 8 * D * 4)
    table = open_vectors(_saved(tmp_path, "-lists.parquet"))
    reader = table.read.__self__
    for ids, rows in table.blocks(5):
        assert torch.equal(rows, X[ids])
        assert len(reader.rows) <= 8


def test_one_of_several_arrays_is_named(tmp_path):
    np.savez(tmp_path / "x.npz", a=X.numpy(), b=2 * X.numpy(), c=np.zeros(3))
    save_file({"a": X, "b": 2 * X}, tmp_path / "x.safetensors")
    pl.DataFrame({"a": X.tolist(), "b": (2 * X).tolist()}).write_parquet(tmp_path / "x.parquet")
    for suffix in ("npz", "safetensors", "parquet"):
        path = tmp_path / f"x.{suffix}"
        with pytest.raises(InvalidArgument, match=r"a.*b.*`key`"):
            open_vectors(path)
        assert torch.equal(open_vectors(path, key="b").load()[1], 2 * X)
        assert torch.equal(open_vectors(f"{path}:b").load()[1], 2 * X)
        with pytest.raises(InvalidArgument, match="'z'"):
            open_vectors(path, key="z")
    with pytest.raises(InvalidArgument, match=r"a 50 x 4, b 50 x 4, c 3;.*x\.npz:a"):
        open_vectors(tmp_path / "x.npz")


def test_rows_that_are_not_finite_are_named_or_left_out(tmp_path):
    x = X.clone()
    x[3, 1], x[7, 0] = torch.nan, torch.inf
    np.save(tmp_path / "x.npy", x.numpy())
    with pytest.raises(
        NonFiniteRows, match=r"x\.npy: 2 of 50 rows hold NaN or Inf \(rows 3, 7\); pass `skip_nonfinite`"
    ):
        open_vectors(tmp_path / "x.npy")
    table = open_vectors(x, skip_nonfinite=True)
    assert (table.n_used, table.excluded) == (48, {3, 7})
    with pytest.raises(NonFiniteRows, match="every row"):
        open_vectors(x[3:4], skip_nonfinite=True)


def test_missing_numbers_of_a_frame_are_not_finite():
    columns = pl.DataFrame({"a": [1.0, None], "b": [2, 3]})
    lists = pl.DataFrame({"v": [[1.0, 2.0], [None, 3.0]]})
    for frame in (columns, lists):
        with pytest.raises(NonFiniteRows, match=r"rows 1\)"):
            open_vectors(frame)


def test_a_pandas_frame_is_read_column_by_column():
    class DataFrame(dict):  # pandas is not needed for the tests
        columns = ("word", "vector")

    DataFrame.__module__ = "pandas.core.frame"
    vectors = np.empty(N, dtype=object)
    vectors[:] = list(X.numpy())
    columns = {"word": np.array(LABELS, dtype=object), "vector": vectors}
    table = open_vectors(DataFrame({name: SimpleNamespace(to_numpy=lambda v=v: v) for name, v in columns.items()}))
    assert torch.equal(table.load()[1], X)
    assert table.labels == LABELS


def test_labels_are_one_per_row():
    assert open_vectors(X, labels=LABELS).labels == LABELS
    assert open_vectors(_wide_frame(), labels=["x"] * N).labels == ("x",) * N
    with pytest.raises(InvalidArgument, match="`labels` must be 50, one per row, got 2"):
        open_vectors(X, labels=["a", "b"])
    with pytest.raises(InvalidArgument, match="a single string"):
        open_vectors(X, labels="a" * N)
    two = _wide_frame().with_columns(note=pl.lit("n"))
    assert open_vectors(two).labels is None
    assert open_vectors(two.rename({"word": "label"})).labels == LABELS


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros(3), r"1 dimensions: 3; reshape\(1, -1\)"),
        (torch.zeros(2, 3, 4), "3 dimensions: 2 x 3 x 4"),
        (np.float64(3.0), "got float64"),
        (np.zeros((0, 3)), "0 x 3"),
        (np.zeros((3, 0)), "3 x 0"),
        (np.zeros((2, 2), dtype=complex), "complex128"),
        (torch.zeros(2, 2, dtype=torch.bool), "bool"),
        (np.array([["a", "b"]]), "strings"),
        (np.array([[1, None]]), "Python objects"),
        ([[1.0, 2.0], [3.0]], "differ in length"),
        (pl.DataFrame({"v": [[1.0, 2.0], [3.0]]}), "row 1 has 1 numbers, row 0 has 2"),
        (pl.DataFrame({"v": [[1.0], None]}), "row 1 has 0 numbers"),
        (pl.DataFrame({"word": ["a"]}), r"no numeric columns; the columns are word \(String\)"),
        (pl.DataFrame({"a": []}, schema={"a": pl.Float32}), "without rows"),
        (3, "got int"),
    ],
    ids=str,
)
def test_what_is_no_matrix_of_numbers_is_refused(source, words):
    with pytest.raises(InvalidArgument, match=words):
        open_vectors(source)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="no such file"):
        open_vectors(tmp_path / "none.npy")
    with pytest.raises(InvalidArgument, match=r"are read from \.npy, \.npz"):
        open_vectors(tmp_path / "x.csv")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidArgument, match="Python objects"):
        open_vectors(tmp_path / "objects.npy")
    for suffix in (".npy", ".npz", ".parquet", ".safetensors"):
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(b"no vectors here")
        with pytest.raises(InvalidArgument, match="or a damaged one"):
            open_vectors(path)
        (tmp_path / f"folder{suffix}").mkdir()
        with pytest.raises(InvalidArgument, match="cannot be read"):
            open_vectors(tmp_path / f"folder{suffix}")
    whole = _saved(tmp_path, ".npy")
    whole.write_bytes(whole.read_bytes()[:-8])
    with pytest.raises(InvalidArgument, match="or a damaged one"):
        open_vectors(whole)


def test_what_is_vectors_is_told_from_the_name_of_a_model(tmp_path):
    assert all(map(is_vectors, (X, X.numpy(), _wide_frame(), "x.npy", tmp_path / "x.parquet", "x.npz:key")))
    assert not any(map(is_vectors, ("gpt2", "builtin", tmp_path, "org/model.npy-like", 3)))
