"""safetensors headers and byte ranges: read as the safetensors library reads them, whatever bytes a file holds."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path

import damage
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dimscope.checkpoints.sources import LocalFolder, read_range
from dimscope.checkpoints.tensors import DTYPES, open_safetensors, parse_header
from dimscope.errors import CorruptCheckpoint, DimscopeError

FILE = "model.safetensors"
TENSORS = {
    "table": torch.arange(60, dtype=torch.float32).view(20, 3),
    "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "scalar": torch.tensor(4.0),
    "empty": torch.zeros(0, 5),
    "flags": torch.tensor([True, False]),
    "cube": torch.arange(24, dtype=torch.float64).view(2, 3, 4),
}


def write(folder: Path, data: bytes) -> LocalFolder:
    (folder / FILE).write_bytes(data)
    return LocalFolder(folder, "model")


@pytest.fixture(scope="module")
def sound() -> bytes:
    return safetensors.torch.save(TENSORS, metadata={"format": "pt"})


def test_tensors_are_those_of_the_library(sound, tmp_path):
    reader = open_safetensors(write(tmp_path, sound), [FILE])
    assert reader.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        info = reader.tensors[name]
        assert (info.shape, info.n_bytes, info.n_elements) == (tuple(tensor.shape), tensor.nbytes, tensor.numel())
        assert DTYPES[info.dtype] == tensor.dtype
        if tensor.ndim:
            assert torch.equal(reader.read_rows(name, 0, len(tensor)), tensor)
    assert torch.equal(reader.read_rows("table", 18, 99), TENSORS["table"][18:])


def test_a_header_longer_than_the_first_look(tmp_path):
    many = {f"layers.{n}.weight": torch.full((1, 1), float(n)) for n in range(2000)}
    data = safetensors.torch.save(many)
    assert int.from_bytes(data[:8], "little") > 100_000
    reader = open_safetensors(write(tmp_path, data), [FILE])
    assert len(reader.tensors) == 2000
    assert float(reader.read_rows("layers.1999.weight", 0, 1)) == 1999


def test_every_cut_of_a_file_is_seen(sound, tmp_path):
    for keep in (*range(40), len(sound) // 2, len(sound) - 1):
        with pytest.raises(CorruptCheckpoint, match=FILE):
            parse_header(write(tmp_path, sound[:keep]), FILE)


def test_a_file_that_shrinks_while_it_is_read(sound, tmp_path):
    reader = open_safetensors(write(tmp_path, sound), [FILE])
    damage.truncate(tmp_path / FILE, 0.99)
    last = max(reader.tensors.values(), key=lambda info: info.end)
    with pytest.raises(CorruptCheckpoint, match="ends in the middle"):
        reader.read_rows(last.name, 0, last.shape[0])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F4", "", None, 3]) | JSON,
        "shape": st.lists(st.integers(-2, 9) | st.floats(-1, 9) | st.text(max_size=2), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-5, 300) | st.floats(-1, 300), min_size=1, max_size=3) | JSON,
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(min_size=1, max_size=4), ENTRY, max_size=3) | JSON)
def test_any_header_is_read_or_refused(tmp_path, header):
    """Nothing but a DimscopeError comes out, and what is declared sound can be read or is refused when it is read."""
    encoded = json.dumps(header).encode()
    source = write(tmp_path, struct.pack("<Q", len(encoded)) + encoded + bytes(256))
    try:
        reader = open_safetensors(source, [FILE])
    except DimscopeError:
        return
    for name, info in reader.tensors.items():
        assert all(isinstance(n, int) for n in (*info.shape, info.begin, info.end, info.n_bytes)), info
        if info.shape and info.dtype in DTYPES:
            assert reader.read_rows(name, 0, info.shape[0]).shape == info.shape


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path, data):
    with suppress(DimscopeError):
        parse_header(write(tmp_path, data), FILE)


@pytest.mark.parametrize(("begin", "end"), [(0, 0), (0, 5), (3, 100), (9, 10), (10, 20), (50, 60), (7, 3)])
def test_ranges_end_where_the_file_ends(tmp_path, begin, end):
    path = tmp_path / "ten"
    path.write_bytes(bytes(range(10)))
    assert read_range(path, begin, end).tolist() == list(range(10))[begin:end]
