"""What is said before a model runs: memory and passes by hand, time at a given speed."""

from functools import cache

import pytest
import torch
from matrices import gaussian
from models import write_table_checkpoint

import dimscope
from dimscope.activations.reservoir import Reservoir
from dimscope.activations.site_sums import SiteSums
from dimscope.checkpoints.model import Placement
from dimscope.studies import estimate as module
from dimscope.studies.estimate import estimate_passes

CPU = Placement("float32", "cpu")
V, D = 151_936, 256


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Return `large(tied)`: a checkpoint with tables of the length of Qwen2.5's and one small block, each once."""

    def zeros(start, stop):
        return torch.zeros(stop - start, D)

    @cache
    def opened(tied):
        folder = tmp_path_factory.mktemp("large")
        return dimscope.open(
            write_table_checkpoint(folder, V, D, tied=tied, holes=True, rows=zeros, output_rows=None if tied else zeros)
        )

    return opened


def n_block(checkpoint):
    """Return how many numbers a block and the norm after it have."""
    return sum(t.n_elements for name, t in checkpoint.tensors.items() if "embed" not in name and "head" not in name)


def test_the_memory_of_weights_sums_and_samples_by_hand(large):
    """39 M numbers of 4 bytes; 3 sites with two d x d matrices of float64 and 2,048 rows of float32."""
    checkpoint = large(tied=True)
    assert 4 * (V * D + n_block(checkpoint)) == pytest.approx(0.2e9, abs=0.05e9)
    assert 3 * (16 * D * D + 4 * 2048 * D) == 9_437_184
    said = estimate_passes(checkpoint, CPU, 5, None, 2048)
    assert said == "5 passes over whole texts on cpu (float32); weights 157 MB, sums and samples 9.4 MB at most"


def test_half_the_bytes_and_twice_the_tables(large):
    """The weights at 2 bytes: 78 MB in the table and 0.3 to 1 MB in the block."""
    n_bytes = 2 * (V * D + n_block(large(tied=True)))
    narrow = estimate_passes(large(tied=True), Placement("bfloat16", "cpu"), 1, None, 64)
    weights = f"weights {n_bytes / 1e6:.1f} MB"
    assert narrow == f"1 pass over whole texts on cpu (bfloat16); {weights}, sums and samples 3.3 MB at most"
    assert "weights 31" in estimate_passes(large(tied=False), CPU, 1, None, 64)


@pytest.mark.parametrize("tied", [True, False])
def test_the_time_is_two_operations_for_each_weight_that_is_multiplied_and_token(large, monkeypatch, tied):
    """A look-up multiplies nothing: an input table counts only where it is the output table too."""
    monkeypatch.setattr(module, "_operations_per_second", lambda placement: 1e9)
    checkpoint = large(tied=tied)
    seconds = 2 * (V * D + n_block(checkpoint)) * 1_034 / 1e9
    assert 75 < seconds < 90
    said = estimate_passes(checkpoint, CPU, 2, 1_034, 64)
    assert said.startswith(f"2 passes, 1,034 tokens on cpu (float32): {seconds:.0f} s or more; weights ")


@pytest.mark.parametrize(
    ("speed", "words"),
    [(1e12, "1 s"), (1e9, "80 s"), (8e8, "2 min"), (2e7, "67 min"), (1e7, "2.2 h"), (1e5, "222.7 h")],
)
def test_durations_are_in_seconds_minutes_or_hours(large, monkeypatch, speed, words):
    monkeypatch.setattr(module, "_operations_per_second", lambda placement: speed)
    checkpoint = large(tied=True)
    tokens = round(40.1e9 / (V * D + n_block(checkpoint)))  # 80.2e9 operations
    assert f": {words} or more; " in estimate_passes(checkpoint, CPU, 1, tokens, 64)


def test_the_speed_is_that_of_this_machine(checkpoint):
    speed = module._operations_per_second(CPU)
    assert 1e8 < speed < 1e14  # a product of 1,024 x 1,024 in 20 s, or faster than any device there is
    tiny = dimscope.open(checkpoint("llama"))
    said = estimate_passes(tiny, CPU, 3, 1_000, 64)
    assert (
        said == "3 passes, 1,000 tokens on cpu (float32): 1 s or more; weights 205 kB, sums and samples 98.3 kB at most"
    )


def test_a_stream_of_many_windows_takes_no_more_than_was_said(large):
    """First tokens are summed by themselves; above d windows they are a matrix of their own."""
    said = estimate_passes(large(tied=True), CPU, 1, None, 64)
    promised = float(said.rpartition("samples ")[2].split()[0])
    taken, sample = 0, Reservoir(64, 0)
    for layer in range(3):
        sums = SiteSums(f"block {layer}", D)
        hidden = gaussian(1200, D, layer).view(300, 4, D)
        sums.add(hidden, None)
        parts = [t for part in sums.parts.values() for t in (part.upper, part.total, *part.pieces) if t is not None]
        taken += sum(t.numel() * t.element_size() for t in parts)
        if layer == 0:
            ends = torch.arange(1200).view(300, 4)
            places = sample.candidates(ends, ends, range(300), None)
        sample.take(layer, hidden, places)
    sample.prune(whole=True)
    taken += sum(t.numel() * t.element_size() for rows in sample.rows.values() for t in rows)
    assert taken / 1e6 < promised + 0.1
