"""How much worse a changed model predicts a text: loss, KL from the unchanged model, agreement of the first choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.activations.collection import next_tokens
from dimscope.activations.forward import final_states
from dimscope.activations.output_head import OutputHead, output_head
from dimscope.checkpoints.model import available_memory
from dimscope.errors import NonFiniteActivations
from dimscope.texts.window_sums import Interval, WindowSums, interval
from dimscope.texts.windows import Window, grouped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE_SHARE = 1 / 8  # of the free memory, which the log-probabilities of a baseline may take
LARGEST_EXPONENT = 709  # whose exponential is a float
ROWS = 8  # positions compared at once: what is computed from them stays in the processor's cache


SUMS = ("n_predicted", "n_positions", "n_bytes", "loss", "loss_rise", "kl", "top_1")
"""What is summed over each window: three counts, then the numbers of its positions."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over the positions of a text, of a model compared with its baseline.

    Every mean has a standard error and a 95% interval from the jackknife over windows, because neighbouring positions
    depend on each other. Differences are paired: the sums of a window hold the rise of the loss at each position.

    Attributes:
        loss: Nats per predicted token.
        loss_rise: Loss above that of the baseline, position by position.
        bits_per_byte: Loss in bits per byte of text.
        kl: KL(baseline || model) in nats, over all positions; 0 for the same model.
        top_1: Share of all positions with the same first choice.
        n_predicted: Positions that the next token follows.
        n_positions: All positions.
        sums: The `SUMS` of each window, or of each group of neighbouring windows where there are many.
    """

    loss: Interval
    loss_rise: Interval
    bits_per_byte: Interval
    kl: Interval
    top_1: Interval
    n_predicted: int
    n_positions: int
    sums: Float[Tensor, "g 7"] = field(repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        """Return exp(loss), infinite where that is no float."""
        return math.exp(self.loss.value) if self.loss.value < LARGEST_EXPONENT else math.inf


def require_finite_evaluation(evaluation: Evaluation, dtype: str) -> None:
    """Refuse an evaluation of NaN or Inf, which agrees with everything.

    Raises:
        NonFiniteActivations: Loss or KL is no finite number.
    """
    if not (math.isfinite(evaluation.loss.value) and math.isfinite(evaluation.kl.value)):
        raise NonFiniteActivations(
            f"the model computes NaN or Inf in {dtype}: its weights are damaged, or `dtype` is too narrow; try `dtype` float32"
        )


def mean_of(name: str) -> Callable[[Float[Tensor, "... 7"]], Float[Tensor, " ..."]]:
    """Return what computes a mean over positions ("loss", "loss_rise", "kl" or "top_1") from `SUMS`."""
    value = SUMS.index(name)
    count = SUMS.index("n_predicted" if name in ("loss", "loss_rise") else "n_positions")
    return lambda sums: sums[..., value] / sums[..., count]


def evaluation_of(sums: Float[Tensor, "g 7"]) -> Evaluation:
    """Return the evaluation of a text, or of some of its windows, from the `SUMS` of its windows."""
    loss, n_bytes = SUMS.index("loss"), SUMS.index("n_bytes")
    n_predicted, n_positions = sums[:, :2].sum(dim=0).tolist()
    return Evaluation(
        loss=interval(sums, mean_of("loss")),
        loss_rise=interval(sums, mean_of("loss_rise")),
        bits_per_byte=interval(sums, lambda s: s[..., loss] / math.log(2) / s[..., n_bytes]),
        kl=interval(sums, mean_of("kl")),
        top_1=interval(sums, mean_of("top_1")),
        n_predicted=round(n_predicted),
        n_positions=round(n_positions),
        sums=sums,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """What a model predicts on windows before it is changed.

    Its final states, T x d numbers, are kept, from which its logits are computed again. The log-probabilities are T x V
    numbers, 2.5 GB for 4,096 tokens of a vocabulary of 152,000: they are kept only where they take little of the free
    memory, and are the same where they are computed again.

    Attributes:
        windows: Windows of one length.
        batch: Windows at once.
        states: The final states of each batch, in the memory of the CPU.
        head: The output head as it was, whatever is hooked to the table or replaces it since.
        cache: Log-probabilities by batch and block of positions, or None.
    """

    windows: tuple[Window, ...] = field(repr=False)
    batch: int
    states: tuple[Float[Tensor, "_ t d"], ...] = field(repr=False)
    head: OutputHead
    cache: tuple[tuple[Float[Tensor, "_ v"], ...], ...] | None = field(default=None, repr=False)

    def blocks(self, batch: int) -> Sequence[Int[Tensor, " r"]]:
        """Return the positions of a batch in the blocks in which its logits are computed."""
        return self.head.blocks(torch.arange(len(self.states[batch].flatten(0, 1))))

    def log_probs(self, batch: int, block: int) -> Float[Tensor, "r v"]:
        """Return the log-probabilities (float32) of a block of positions of a batch."""
        if self.cache is not None:
            return self.cache[batch][block]
        rows = self.blocks(batch)[block]
        return self.head.logits(self.states[batch].flatten(0, 1)[rows]).log_softmax(dim=1)


@torch.no_grad()
def baseline(model: PreTrainedModel, windows: Sequence[Window], batch: int = 1) -> Baseline:
    """Record what a model predicts as it is.

    Args:
        model: The model before any change.
        windows: Windows of one length.
        batch: Windows at once.

    Raises:
        ValueError: The windows have several lengths, or there are none.
    """
    if len({len(w.ids) for w in windows}) != 1:
        raise ValueError("a baseline needs windows of one length")
    states = tuple(final_states(model, _ids(group)).cpu() for group in grouped(windows, batch))
    base = Baseline(tuple(windows), batch, states, output_head(model).frozen())
    weight = base.head.weight
    n_bytes = 4 * len(weight) * sum(len(w.ids) for w in windows)
    if weight.device.type != "cpu" or n_bytes > CACHE_SHARE * available_memory():
        return base
    batches = range(len(states))
    return replace(base, cache=tuple(tuple(base.log_probs(b, i) for i in range(len(base.blocks(b)))) for b in batches))


def _ids(windows: Sequence[Window]) -> Int[Tensor, "b t"]:
    return torch.stack([w.ids for w in windows])


@torch.no_grad()
def evaluate(model: PreTrainedModel, base: Baseline, *, changed: bool = True) -> Evaluation:
    """Compare a model with its baseline, by one forward pass over the windows of the baseline.

    Args:
        model: The model as it is now.
        base: Its baseline.
        changed: False takes the states of the baseline in place of a forward pass.
    """
    head, sums = replace(base.head, module=model.get_output_embeddings()), WindowSums(len(SUMS))
    for number, (group, before) in enumerate(zip(grouped(base.windows, base.batch), base.states, strict=True)):
        ids = _ids(group)
        targets = next_tokens(group, ids).flatten()
        states = (final_states(model, ids) if changed else before).flatten(0, 1)
        numbers: list[Tensor] = []
        for block, rows in enumerate(base.blocks(number)):
            logits = head.logits(states[rows.to(states.device)])
            log_p = base.log_probs(number, block).to(logits.device)
            parts = (x.split(ROWS) for x in (log_p, logits, targets[rows].to(logits.device)))
            numbers += [
                _position_numbers(p, z.log_softmax(dim=1), following) for p, z, following in zip(*parts, strict=True)
            ]
        totals = torch.cat(numbers).unflatten(0, ids.shape).sum(dim=1).cpu()
        for place, (window, total) in enumerate(zip(group, totals, strict=True)):
            total[SUMS.index("n_bytes")] = window.predicted_bytes
            sums.add(number * base.batch + place, total)
    return evaluation_of(sums.stacked())


def _position_numbers(
    log_p: Float[Tensor, "r v"], log_q: Float[Tensor, "r v"], targets: Int[Tensor, " r"]
) -> Float[Tensor, "r 7"]:
    """Return the `SUMS` of a few positions, in float64, without the bytes.

    Loss and its rise are 0 at positions that no token follows.

    Args:
        log_p: Log-probabilities of the baseline.
        log_q: Log-probabilities of the model.
        targets: The tokens that follow, -1 where none does.
    """
    predicted = targets >= 0
    following = targets.clamp_min(0)[:, None]
    loss, before = (-x.gather(1, following)[:, 0].double().where(predicted, 0.0) for x in (log_q, log_p))
    # Rounding may make the KL of two nearly equal distributions negative.
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1).double().clamp_min(0)
    same_first = log_q.argmax(dim=1) == log_p.argmax(dim=1)
    ones, none = torch.ones_like(kl), torch.zeros_like(kl)
    return torch.stack([predicted.double(), ones, none, loss, loss - before, kl, same_first.double()], dim=1)
