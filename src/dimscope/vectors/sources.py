"""N x d vectors from wherever they are: arrays, tensors, frames, .npy, .npz, Parquet, safetensors.

A file is read block by block, so that it may be larger than memory; only the arrays of an .npz file are loaded, because
they may be compressed.
"""

import zipfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from dimscope.errors import InvalidArgument
from dimscope.vectors.frames import is_frame, table_from_frame, table_from_parquet
from dimscope.vectors.table import VectorTable, require_finite

SUFFIXES = (".npy", ".npz", ".parquet", ".safetensors")
KEYED = SUFFIXES[1:]  # several arrays may be in one such file


def open_vectors(
    source: object,
    *,
    key: str | None = None,
    labels: Sequence[str] | None = None,
    skip_nonfinite: bool = False,
    name: str | None = None,
) -> VectorTable:
    """Open N x d vectors as a table that is read block by block. One pass checks that they are finite.

    Floating-point numbers keep their dtype. Integers become float32 where that is exact (8 and 16 bits), else float64.

    Args:
        source: a numpy array, torch tensor, polars or pandas frame, or nested list; or the path of a .npy, .npz, .parquet
            or .safetensors file. In a frame or Parquet file the vectors are one column of lists (or arrays), or else
            all numeric columns; strings are labels (the column "label", or the only one of strings).
        key: the array of an .npz file, tensor of a .safetensors file or list column of a frame, where there are several.
            The path may end with it, too: "vectors.npz:key".
        labels: one string per row, instead of those of the source.
        skip_nonfinite: leave rows with NaN, Inf or missing numbers out instead of raising.
        name: of the vectors, for titles and messages; by default the name of the file.

    Raises:
        InvalidArgument: for what is not there, not readable, not two-dimensional, empty, ragged or not numbers, and for
            a number of labels that is not the number of rows.
        NonFiniteRows: where rows hold NaN or Inf and are not skipped (names the first ones), or where every row does.

    >>> open_vectors([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], labels=["a", "b", "c"])
    VectorTable(vectors: 3 x 2, float64, labelled)
    """
    return require_finite(vectors_of(source, key=key, labels=labels, name=name), skip_nonfinite=skip_nonfinite)


def vectors_of(
    source: object, *, key: str | None = None, labels: Sequence[str] | None = None, name: str | None = None
) -> VectorTable:
    """Open N x d vectors as `open_vectors` does, but without the pass that checks that they are finite.

    Raises:
        InvalidArgument: as `open_vectors`.
    """
    table = _open(source, key)
    table = replace(table, name=name or table.name or "vectors")
    if labels is not None:
        if isinstance(labels, str):
            raise InvalidArgument("`labels` must be one string per row, got a single string")
        table = replace(table, labels=tuple(labels))
    if table.labels is not None and len(table.labels) != table.n_rows:
        raise InvalidArgument(f"`labels` must be {table.n_rows:,}, one per row, got {len(table.labels):,}")
    return table


def is_vectors(source: object) -> bool:
    """Return whether a source is vectors for `open_vectors`, and not the name or folder of a model.

    >>> is_vectors("vectors.parquet"), is_vectors("gpt2"), is_vectors(np.zeros((2, 3)))
    (True, False, True)
    """
    if isinstance(source, str | Path):
        return split_key(source)[0].suffix in SUFFIXES
    return isinstance(source, np.ndarray | Tensor | list | tuple) or is_frame(source)


def split_key(source: str | Path) -> tuple[Path, str | None]:
    """Split "vectors.npz:key" into the path and the key; None where there is no key.

    >>> split_key("a/vectors.npz:layer_3")[1]
    'layer_3'
    """
    head, colon, key = str(source).rpartition(":")
    if colon and Path(head).suffix in KEYED and not Path(source).exists():
        return Path(head), key
    return Path(source), None


def _open(source: object, key: str | None) -> VectorTable:
    if isinstance(source, str | Path):
        path, suffix_key = split_key(source)
        return _open_file(path, key or suffix_key)
    if is_frame(source):
        return table_from_frame(source, key)
    if key is not None:
        raise InvalidArgument(f"`key` picks an array of a file or a column of a frame, not of {type(source).__name__}")
    if isinstance(source, Tensor):
        return _table(source.shape, str(source.dtype).removeprefix("torch."), _tensor_reader(source.detach()), "tensor")
    if isinstance(source, list | tuple):
        source = _array_of_lists(source)
    if isinstance(source, np.ndarray):
        return _table(source.shape, source.dtype.name, _array_reader(lambda: source), "array")
    raise InvalidArgument(
        f"vectors must be an array, tensor, frame or path ({', '.join(SUFFIXES)}), got {type(source).__name__}"
    )


def _open_file(path: Path, key: str | None) -> VectorTable:
    openers = {".npy": _open_npy, ".npz": _open_npz, ".parquet": table_from_parquet, ".safetensors": _open_safetensors}
    if path.suffix not in openers:
        raise InvalidArgument(f"{path}: vectors are read from {', '.join(SUFFIXES)} files")
    with _file_errors(path):
        return replace(openers[path.suffix](path, key), name=f"{path.name}:{key}" if key else path.name)


@contextmanager
def _file_errors(path: Path) -> Generator[None]:
    """Turn the errors of a missing, forbidden or damaged file into InvalidArgument."""
    from polars.exceptions import PolarsError
    from safetensors import SafetensorError

    try:
        with path.open("rb"):  # polars and safetensors have words of their own for a file that is missing
            pass
        yield
    except FileNotFoundError as e:
        raise InvalidArgument(f"{path}: no such file") from e
    except OSError as e:
        raise InvalidArgument(f"{path}: cannot be read ({e.strerror or e})") from e
    except (ValueError, EOFError, zipfile.BadZipFile, PolarsError, SafetensorError) as e:
        if isinstance(e, InvalidArgument):
            raise
        raise InvalidArgument(f"{path}: no {path.suffix} file of vectors, or a damaged one ({_first_line(e)})") from e


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---- numpy -----------------------------------------------------------------------------------------------------------


def _open_npy(path: Path, key: str | None) -> VectorTable:
    if key is not None:
        raise InvalidArgument(f"{path}: a .npy file holds one array; leave `key` out")
    mapped = npy.open_memmap(path, mode="r")
    # Mapped again at each read: pages of a mapping that stays count as memory of this process.
    return _table(mapped.shape, mapped.dtype.name, _array_reader(lambda: npy.open_memmap(path, mode="r")), str(path))


def _open_npz(path: Path, key: str | None) -> VectorTable:
    shapes = _npz_shapes(path)
    key = _choose(path, "array", {k: shape for k, shape in shapes.items() if len(shape) == 2}, shapes, key)
    with np.load(path, allow_pickle=False) as arrays:
        array = arrays[key]
    return _table(array.shape, array.dtype.name, _array_reader(lambda: array), f"{path}: {key}")


def _npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of an .npz file, from the headers alone."""
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                version = npy.read_magic(file)
                read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shapes[member.removesuffix(".npy")] = read(file)[0]
    return shapes


def _array_of_lists(rows: Sequence[Any]) -> np.ndarray:
    try:
        return np.array(rows)
    except ValueError as e:
        raise InvalidArgument("vectors must all have the same number of numbers: the lists differ in length") from e


def _array_reader(mapped: Callable[[], np.ndarray]) -> Callable[[int, int], Tensor]:
    def read(start: int, stop: int) -> Tensor:
        rows = mapped()[start:stop]
        # A copy of the block: torch takes neither read-only memory nor foreign byte orders.
        return torch.from_numpy(np.array(rows, dtype=_stored_as(rows.dtype), order="C"))

    return read


def _stored_as(dtype: np.dtype) -> np.dtype:
    """Return the floating-point dtype that holds these numbers exactly (64-bit integers above 2^53 are rounded)."""
    if dtype.kind == "f":
        return dtype.newbyteorder("=")
    return np.dtype(np.float32 if dtype.itemsize <= 2 else np.float64)


# ---- torch -----------------------------------------------------------------------------------------------------------


def _open_safetensors(path: Path, key: str | None) -> VectorTable:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        shapes = {k: tuple(tensors.get_slice(k).get_shape()) for k in tensors.keys()}  # noqa: SIM118
        key = _choose(path, "tensor", {k: shape for k, shape in shapes.items() if len(shape) == 2}, shapes, key)
        dtype = tensors.get_slice(key)[:0].dtype

    def read(start: int, stop: int) -> Tensor:
        with safe_open(path, framework="pt") as tensors:
            return _as_floats(tensors.get_slice(key)[start:stop])

    return _table(shapes[key], str(dtype).removeprefix("torch."), read, f"{path}: {key}")


def _tensor_reader(matrix: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: _as_floats(matrix[start:stop].cpu())


def _as_floats(rows: Tensor) -> Tensor:
    """Return numbers as floating point: 8 and 16 bits as float32, larger integers as float64."""
    if rows.dtype.is_floating_point:
        return rows
    return rows.to(torch.float32 if rows.dtype.itemsize <= 2 else torch.float64)


# ---- what all have in common -----------------------------------------------------------------------------------------


def _choose(
    path: Path, kind: str, matrices: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]], key: str | None
) -> str:
    """Return the key, or that of the only two-dimensional array. Raises InvalidArgument that lists the arrays."""
    listing = ", ".join(f"{k} {' x '.join(map(str, shape))}" for k, shape in list(shapes.items())[:10]) or "none"
    if len(shapes) > 10:
        listing += ", ..."
    if key is not None:
        if key not in shapes:
            raise InvalidArgument(f"{path}: no {kind} {key!r}; the {kind}s are {listing}")
        return key
    if len(matrices) != 1:
        hint = f"; name one with `key` or as {path}:{next(iter(matrices))}" if matrices else ""
        raise InvalidArgument(f"{path}: {len(matrices)} two-dimensional {kind}s; the {kind}s are {listing}{hint}")
    return next(iter(matrices))


def _table(shape: Sequence[int], dtype: str, read: Callable[[int, int], Tensor], label: str) -> VectorTable:
    """Return a table of these rows after the checks that every source needs."""
    if len(shape) != 2:
        sizes = " x ".join(map(str, shape)) or "a single number"
        hint = "; reshape(1, -1) makes one vector of it" if len(shape) == 1 else ""
        raise InvalidArgument(
            f"{label}: vectors must be two-dimensional (N x d), got {len(shape)} dimensions: {sizes}{hint}"
        )
    if not shape[0] or not shape[1]:
        raise InvalidArgument(
            f"{label}: vectors must have at least one row and one column, got {shape[0]} x {shape[1]}"
        )
    if not dtype.startswith(("float", "bfloat", "int", "uint")) or dtype == "float128":
        raise InvalidArgument(f"{label}: vectors must be real numbers of at most 64 bits, got {_dtype_name(dtype)}")
    return VectorTable(int(shape[0]), int(shape[1]), dtype, read)


def _dtype_name(dtype: str) -> str:
    if dtype == "object":
        return "Python objects (ragged lists, or numbers mixed with something else)"
    return "strings" if dtype.startswith(("str", "bytes")) else dtype
