"""How fast models run on this machine: tokens read and tokens generated per second, several models in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from dimscope.activations.hooks import evaluating
from dimscope.checkpoints.model import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The median lies between the slowest and the fastest with a probability of 1 - 2 / 2^9 = 99.6%. Of eleven models that are as
# fast as their base, as many as a plan times, one is faster in every round with a probability of 11 / 2^9 = 2%.
ROUNDS = 9
READ, WRITTEN = 512, 16  # tokens of a prompt, and tokens generated after it


@dataclass(frozen=True, slots=True)
class Spread:
    """A median over the rounds, between the smallest and the largest of them: its interval of 99.6%."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens per second in every round.

    Attributes:
        prefill_rounds: Of a prompt that is read at once.
        decode_rounds: Of tokens that are generated one by one after it.
    """

    prefill_rounds: tuple[float, ...]
    decode_rounds: tuple[float, ...]

    @property
    def prefill(self) -> Spread:
        """Return the tokens of a prompt per second."""
        return _spread(self.prefill_rounds)

    @property
    def decode(self) -> Spread:
        """Return the tokens generated per second."""
        return _spread(self.decode_rounds)


@dataclass(frozen=True, slots=True)
class SpeedRatio:
    """How many times as fast one model is as another, round by round."""

    prefill: Spread
    decode: Spread


def speed_ratio(model: Throughput, base: Throughput) -> SpeedRatio:
    """Return how many times as fast a model is as a base that was timed in the same rounds."""
    pairs = ((model.prefill_rounds, base.prefill_rounds), (model.decode_rounds, base.decode_rounds))
    return SpeedRatio(*(_spread([a / b for a, b in zip(own, other, strict=True)]) for own, other in pairs))


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def throughput(
    models: Mapping[str, PreTrainedModel], *, read: int = READ, written: int = WRITTEN
) -> dict[str, Throughput]:
    """Time models on the same random tokens, one sequence at a time, in turns, so that all meet the same machine.

    Every other round takes them in reverse order, so that none is always the first.

    Args:
        models: The models by name.
        read: Tokens of the prompt.
        written: Tokens generated after it.
    """
    ids = torch.randint(0, 100, (1, read), generator=torch.Generator().manual_seed(0))
    rounds: dict[str, list[_Seconds]] = {name: [] for name in models}
    for number in range(ROUNDS + 1):
        for name, model in list(models.items())[:: 1 if number % 2 else -1]:
            with evaluating(model):
                seconds = _time(model, ids, written)
            if number:  # the first round warms up
                rounds[name].append(seconds)
    return {
        name: Throughput(tuple(read / s.prefill for s in seconds), tuple(written / s.decode for s in seconds))
        for name, seconds in rounds.items()
    }


@dataclass(frozen=True, slots=True)
class _Seconds:
    prefill: float
    decode: float


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
