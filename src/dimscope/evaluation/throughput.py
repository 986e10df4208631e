"""How fast models run on this machine: tokens read and tokens generated per second, several models in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from dimscope.activations.forward import input_device
from dimscope.activations.hooks import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDS = 3
READ, WRITTEN = 512, 16  # tokens of a prompt, and tokens generated after it


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens per second, medians over the rounds.

    Attributes:
        prefill: Of a prompt that is read at once.
        decode: Of tokens that are generated one by one after it.
    """

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class _Seconds:
    prefill: float
    decode: float


def throughput(
    models: Mapping[str, PreTrainedModel], *, read: int = READ, written: int = WRITTEN
) -> dict[str, Throughput]:
    """Time models on the same random tokens, one sequence at a time, in turns, so that all meet the same machine.

    Args:
        models: The models by name.
        read: Tokens of the prompt.
        written: Tokens generated after it.
    """
    ids = torch.randint(0, 100, (1, read), generator=torch.Generator().manual_seed(0))
    rounds: dict[str, list[_Seconds]] = {name: [] for name in models}
    for number in range(ROUNDS + 1):
        for name, model in models.items():
            with evaluating(model):
                seconds = _time(model, ids, written)
            if number:  # the first round warms up
                rounds[name].append(seconds)
    return {
        name: Throughput(
            read / statistics.median(s.prefill for s in seconds), written / statistics.median(s.decode for s in seconds)
        )
        for name, seconds in rounds.items()
    }


@torch.no_grad()
def _time(model: Any, ids: Int[Tensor, "1 t"], written: int) -> _Seconds:
    """Time reading a prompt with the logits of its last token, and generating tokens after it, with the cache."""
    ids = ids.to(input_device(model))
    began = time.perf_counter()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(dim=-1)
    int(token)  # waits for a GPU
    read = time.perf_counter()
    for _ in range(written):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(dim=-1)
    int(token)
    return _Seconds(read - began, time.perf_counter() - read)
