"""What running a model is going to cost, said before it starts."""

import time

import torch

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.model import DTYPES, Placement

SIDE = 1024  # of the matrices whose product is timed
ROUNDS = 3
READ = 1 << 27  # bytes read to time the memory


def estimate_passes(
    checkpoint: Checkpoint, placement: Placement, n_passes: int, n_tokens: int | None, reservoir: int
) -> str:
    """How many passes and tokens, roughly how long, and how much memory, in one line.

    The time is that of two operations per weight and token at the speed of a plain product of matrices, so a lower bound.
    """
    numbers, used = _weights(checkpoint)
    width = DTYPES[placement.dtype].itemsize
    dim = checkpoint.input_table.shape[1]
    layers = 2 + int(getattr(checkpoint.config, "num_hidden_layers", 0) or 0)
    kept = layers * dim * (16 * dim + 4 * reservoir)  # first tokens have a Gram matrix of their own
    memory = f"weights {_size(width * numbers)}, sums and samples {_size(kept)} at most"
    passes = f"{n_passes} pass{'es' if n_passes > 1 else ''}"
    if n_tokens is None:
        return f"{passes} over whole texts on {placement.device} ({placement.dtype}); {memory}"
    seconds = 2 * used * n_tokens / _speed(placement)
    return f"{passes}, {n_tokens:,} tokens on {placement.device} ({placement.dtype}): {duration(seconds)} or more; {memory}"


def estimate_damage(checkpoint: Checkpoint, placement: Placement, n_points: int, n_tokens: int, n_written: int) -> str:
    """How many changes on how many tokens, roughly how long, and how much memory, in one line.

    Beside the passes, every token that is written reads all weights once. Both are lower bounds.
    """
    numbers, used = _weights(checkpoint)
    width = DTYPES[placement.dtype].itemsize
    vocab_size, dim = checkpoint.input_table.shape
    seconds = n_points * 2 * used * n_tokens / _speed(placement) + n_written * used * width / _bandwidth(placement)
    memory = width * numbers + 4 * n_tokens * (dim + vocab_size)
    changes = f"{n_points - 1:,} change{'s' if n_points != 2 else ''} and the model as it is"
    written = f", {n_written:,} steps of writing" if n_written else ""
    return (
        f"{changes}, {n_tokens:,} tokens each{written} on {placement.device} ({placement.dtype}): {duration(seconds)} or "
        f"more; {_size(memory)} at most"
    )


def _weights(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many weights there are, and how many of them every token is multiplied with."""
    numbers = sum(info.n_elements for info in checkpoint.tensors.values())
    # A token looks its row up in the input table; only where that is the output table too is it multiplied.
    return numbers, numbers - (0 if checkpoint.tied else checkpoint.input_table.n_elements)


def _bandwidth(placement: Placement) -> float:
    """Bytes per second at which memory is read."""
    device = "cpu" if placement.device == "map" else placement.device
    held = torch.ones(READ // 4, device=device)
    float(held.sum())
    began = time.perf_counter()
    for _ in range(ROUNDS):
        total = held.sum()
    float(total)
    return ROUNDS * READ / (time.perf_counter() - began)


def _speed(placement: Placement) -> float:
    """Operations per second of a product of two square matrices."""
    device = "cpu" if placement.device == "map" else placement.device
    left = torch.ones(SIDE, SIDE, dtype=DTYPES[placement.dtype], device=device)
    float((left @ left)[0, 0])  # the first product sets the library up
    began = time.perf_counter()
    for _ in range(ROUNDS):
        product = left @ left
    float(product[0, 0])  # waits for a GPU
    return ROUNDS * 2 * SIDE**3 / (time.perf_counter() - began)


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{max(1, round(n_bytes / 1e6))} MB"


def duration(seconds: float) -> str:
    """As people say it: "40 s", "12 min", "1.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
