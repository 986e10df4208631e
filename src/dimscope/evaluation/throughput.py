"""How fast models run on this machine: tokens read and tokens written per second, several models in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dimscope.activations.forward import input_device
from dimscope.activations.hooks import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDS = 3
READ, WRITTEN = 512, 16  # tokens of a prompt, and tokens written after it


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens per second, medians over the rounds: of a prompt read at once, and of tokens written one by one after it."""

    prefill: float
    decode: float


@torch.no_grad()
def throughput(
    models: Mapping[str, PreTrainedModel], *, read: int = READ, written: int = WRITTEN
) -> dict[str, Throughput]:
    """Each model by its name on the same random tokens, one sequence at a time; in turns, so that all meet the same machine."""
    ids = torch.randint(0, 100, (1, read), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(ROUNDS + 1):
        for name, model in models.items():
            with evaluating(model):
                found = _timed(model, ids, written)
            if number:  # the first round warms up
                seconds[name].append(found)
    medians = {
        name: [statistics.median(times) for times in zip(*rounds, strict=True)] for name, rounds in seconds.items()
    }
    return {name: Throughput(read / prefill, written / decode) for name, (prefill, decode) in medians.items()}


def _timed(model: Any, ids: torch.Tensor, written: int) -> tuple[float, float]:
    """Seconds to read the prompt with the logits of its last token, and to write tokens after it, with the cache."""
    ids = ids.to(input_device(model))
    began = time.perf_counter()
    found = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = found.logits[:, -1:].argmax(dim=-1)
    int(token)  # waits for a GPU
    read = time.perf_counter()
    for _ in range(written):
        found = model(input_ids=token, past_key_values=found.past_key_values, use_cache=True)
        token = found.logits[:, -1:].argmax(dim=-1)
    int(token)
    return read - began, time.perf_counter() - read
