"""What running a model is going to cost, in one line, before it starts."""

import time
from dataclasses import dataclass

import torch

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.model import DTYPES, Placement
from dimscope.units import readable_bytes, readable_duration

MATRIX_SIZE = 1024  # of the square matrices whose product is timed
ROUNDS = 3
READ_BYTES = 1 << 27  # read to time the memory


def estimate_passes(
    checkpoint: Checkpoint, placement: Placement, n_passes: int, n_tokens: int | None, reservoir: int
) -> str:
    """Estimate passes over texts that collect moments and samples at every site.

    The time is a lower bound: two operations per weight and token, at the speed of a plain product of matrices.

    Args:
        checkpoint: The model.
        placement: Its dtype and device.
        n_passes: How often the texts are read.
        n_tokens: Tokens of all passes; None where whole texts are read, whose length is not known.
        reservoir: Positions sampled at every site.
    """
    weights = _count_weights(checkpoint)
    dim = checkpoint.input_table.shape[1]
    sites = 2 + int(getattr(checkpoint.config, "num_hidden_layers", 0) or 0)
    collected = sites * dim * (16 * dim + 4 * reservoir)  # first tokens have a Gram matrix of their own
    n_bytes = DTYPES[placement.dtype].itemsize * weights.total
    memory = f"weights {readable_bytes(n_bytes)}, sums and samples {readable_bytes(collected)} at most"
    passes = f"{n_passes} pass{'es' if n_passes > 1 else ''}"
    if n_tokens is None:
        return f"{passes} over whole texts on {placement.device} ({placement.dtype}); {memory}"
    seconds = 2 * weights.multiplied * n_tokens / _operations_per_second(placement)
    return (
        f"{passes}, {n_tokens:,} tokens on {placement.device} ({placement.dtype}): {readable_duration(seconds)} or more; "
        f"{memory}"
    )


def estimate_damage(checkpoint: Checkpoint, placement: Placement, n_points: int, n_tokens: int, n_written: int) -> str:
    """Estimate evaluations of a model under many changes. Time and memory traffic are lower bounds.

    Args:
        checkpoint: The model.
        placement: Its dtype and device.
        n_points: Changes, with the unchanged model.
        n_tokens: Tokens evaluated at each of them.
        n_written: Steps of generation in all, each of which reads all weights once.
    """
    weights = _count_weights(checkpoint)
    width = DTYPES[placement.dtype].itemsize
    vocab_size, dim = checkpoint.input_table.shape
    seconds = n_points * 2 * weights.multiplied * n_tokens / _operations_per_second(placement)
    if n_written:
        seconds += n_written * weights.multiplied * width / _bytes_per_second(placement)
    memory = width * weights.total + 4 * n_tokens * (dim + vocab_size)
    changes = f"{n_points - 1:,} change{'s' if n_points != 2 else ''} and the unchanged model"
    written = f", {n_written:,} steps of generation" if n_written else ""
    return (
        f"{changes}, {n_tokens:,} tokens each{written} on {placement.device} ({placement.dtype}): "
        f"{readable_duration(seconds)} or more; {readable_bytes(memory)} at most"
    )


@dataclass(frozen=True, slots=True)
class _Weights:
    """How many weights there are, and how many of them every token is multiplied with."""

    total: int
    multiplied: int


def _count_weights(checkpoint: Checkpoint) -> _Weights:
    total = sum(info.n_elements for info in checkpoint.tensors.values())
    # A token looks its row up in the input table; only where that is the output table too is it multiplied.
    return _Weights(total, total - (0 if checkpoint.tied else checkpoint.input_table.n_elements))


def _bytes_per_second(placement: Placement) -> float:
    """Time how fast memory is read."""
    device = "cpu" if placement.device == "map" else placement.device
    values = torch.ones(READ_BYTES // 4, device=device)
    float(values.sum())
    began = time.perf_counter()
    for _ in range(ROUNDS):
        total = values.sum()
    float(total)
    return ROUNDS * READ_BYTES / (time.perf_counter() - began)


def _operations_per_second(placement: Placement) -> float:
    """Time a product of two square matrices."""
    device = "cpu" if placement.device == "map" else placement.device
    left = torch.ones(MATRIX_SIZE, MATRIX_SIZE, dtype=DTYPES[placement.dtype], device=device)
    float((left @ left)[0, 0])  # the first product sets the library up
    began = time.perf_counter()
    for _ in range(ROUNDS):
        product = left @ left
    float(product[0, 0])  # waits for a GPU
    return ROUNDS * 2 * MATRIX_SIZE**3 / (time.perf_counter() - began)
