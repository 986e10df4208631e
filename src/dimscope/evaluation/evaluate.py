"""How much worse a changed model predicts a text: loss, KL from the unchanged model, agreement of the first choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.activations.collection import next_tokens
from dimscope.activations.forward import final_states
from dimscope.activations.output_head import OutputHead, output_head
from dimscope.checkpoints.model import available_memory
from dimscope.texts.windows import Window, grouped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE_SHARE = 1 / 8  # of the free memory, which the log-probabilities of a baseline may take
LARGEST_EXPONENT = 709  # whose exponential is a float
ROWS = 8  # positions compared at once: what is computed from them stays in the processor's cache


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over the positions of a text, of a model compared with its baseline.

    Attributes:
        loss: Nats per predicted token.
        loss_rise: Loss above that of the baseline, position by position.
        loss_rise_stderr: Its standard error if positions were independent: a lower bound.
        bits_per_byte: Loss in bits per byte of text.
        kl: KL(baseline || model) in nats, over all positions; 0 for the same model.
        kl_stderr: Its standard error if positions were independent: a lower bound.
        top_1: Share of all positions with the same first choice.
        n_predicted: Positions that the next token follows.
        n_positions: All positions.
    """

    loss: float
    loss_rise: float
    loss_rise_stderr: float
    bits_per_byte: float
    kl: float
    kl_stderr: float
    top_1: float
    n_predicted: int
    n_positions: int

    @property
    def perplexity(self) -> float:
        """Return exp(loss), infinite where that is no float."""
        return math.exp(self.loss) if self.loss < LARGEST_EXPONENT else math.inf


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
    head, sums = output_head(model), _Sums()
    for number, (group, before) in enumerate(zip(grouped(base.windows, base.batch), base.states, strict=True)):
        ids = _ids(group)
        targets = next_tokens(group, ids).flatten()
        states = (final_states(model, ids) if changed else before).flatten(0, 1)
        for block, rows in enumerate(base.blocks(number)):
            logits = head.logits(states[rows.to(states.device)])
            log_p = base.log_probs(number, block).to(logits.device)
            parts = (x.split(ROWS) for x in (log_p, logits, targets[rows].to(logits.device)))
            for p, z, following in zip(*parts, strict=True):
                sums.add(p, z.log_softmax(dim=1), following)
    return sums.means(sum(w.predicted_bytes for w in base.windows))


@dataclass(slots=True)
class _Sums:
    """Sums over positions, in float64, on the device of the logits.

    Loss and its rise are summed over the positions that a token follows, KL and agreement over all.
    """

    n_predicted: Tensor | float = 0.0
    n_positions: int = 0
    loss: Tensor | float = 0.0
    rise: Tensor | float = 0.0
    rise_squares: Tensor | float = 0.0
    kl: Tensor | float = 0.0
    kl_squares: Tensor | float = 0.0
    same_first: Tensor | float = 0.0

    def add(self, log_p: Float[Tensor, "r v"], log_q: Float[Tensor, "r v"], targets: Int[Tensor, " r"]) -> None:
        """Add a few positions.

        Args:
            log_p: Log-probabilities of the baseline.
            log_q: Log-probabilities of the model.
            targets: The tokens that follow, -1 where none does.
        """
        predicted = targets >= 0
        following = targets[predicted, None]
        loss, before = (-x[predicted].gather(1, following)[:, 0].double() for x in (log_q, log_p))
        rise = loss - before
        # Rounding may make the KL of two nearly equal distributions negative.
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=1).double().clamp_min(0)
        self.n_predicted += predicted.sum().double()
        self.n_positions += len(targets)
        self.loss += loss.sum()
        self.rise += rise.sum()
        self.rise_squares += rise.square().sum()
        self.kl += kl.sum()
        self.kl_squares += kl.square().sum()
        self.same_first += (log_q.argmax(dim=1) == log_p.argmax(dim=1)).sum().double()

    def means(self, n_bytes: int) -> Evaluation:
        """Return the means, with `n_bytes` of text under the predicted tokens."""
        n, loss, rise, kl = float(self.n_predicted), float(self.loss), float(self.rise), float(self.kl)
        return Evaluation(
            loss=loss / n,
            loss_rise=rise / n,
            loss_rise_stderr=_stderr(rise, float(self.rise_squares), n),
            bits_per_byte=loss / math.log(2) / n_bytes,
            kl=kl / self.n_positions,
            kl_stderr=_stderr(kl, float(self.kl_squares), self.n_positions),
            top_1=float(self.same_first) / self.n_positions,
            n_predicted=round(n),
            n_positions=self.n_positions,
        )


def _stderr(total: float, squares: float, n: float) -> float:
    """Return the standard error of a mean from the sum, the sum of squares and the number of values."""
    return math.sqrt(max(squares / n - (total / n) ** 2, 0.0) / n)
