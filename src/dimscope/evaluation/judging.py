"""How much worse a changed model predicts a text: loss, KL from the model as it was, agreement of the first choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.representations.collection import next_tokens
from dimscope.representations.hidden_states import final_states, logit_transform, position_blocks
from dimscope.representations.windows import Window, grouped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOP = 5  # choices whose agreement is told beside that of the first


@dataclass(frozen=True, slots=True)
class Judgement:
    """Means over the predicted positions of a text; KL and agreement are over all positions, against the model as it was."""

    loss: float  # nats per token
    bits_per_byte: float
    kl: float  # KL(as it was || changed), nats; 0 for the same model
    kl_stderr: float  # of independent positions: a lower bound
    top_1: float  # share of positions with the same first choice
    top_5: float  # share of the five first choices that are among the five of the other
    n_predicted: int
    n_positions: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a model says on windows before it is changed: its final states, T x d numbers, from which its logits come again.

    Its logits themselves would be T x V: 2.5 GB for 4,096 tokens of a vocabulary of 152,000.
    """

    windows: tuple[Window, ...]
    batch: int
    states: tuple[Float[Tensor, "_ t d"], ...]  # of each batch, in the memory of the CPU
    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None

    def logits(self, model: PreTrainedModel, states: Float[Tensor, "r d"]) -> Float[Tensor, "r v"]:
        """Float32 logits by the output table as it was, whatever is hooked to it or put in its place since."""
        raw = torch.nn.functional.linear(states.to(self.weight.device), self.weight, self.bias)
        return logit_transform(model)(raw.float())


@torch.no_grad()
def baseline(model: PreTrainedModel, windows: Sequence[Window], batch: int = 1) -> Baseline:
    """The model as it is, on windows of one length, `batch` of them at once. Raises ValueError for windows of several."""
    if len({len(w.ids) for w in windows}) != 1:
        raise ValueError("a baseline is of windows of one length")
    head = model.get_output_embeddings()
    states = tuple(final_states(model, _ids(group)).cpu() for group in grouped(windows, batch))
    return Baseline(tuple(windows), batch, states, head.weight, getattr(head, "bias", None))


def _ids(windows: Sequence[Window]) -> Tensor:
    return torch.stack([w.ids for w in windows])


@torch.no_grad()
def judge(model: PreTrainedModel, base: Baseline) -> Judgement:
    """The model as it is now against its baseline: one forward pass, and the logits of both, block by block."""
    head, transform = model.get_output_embeddings(), logit_transform(model)
    sums = torch.zeros(6, dtype=torch.float64)  # loss, predicted, kl, kl squared, first, five
    n_positions = 0
    for group, before in zip(grouped(base.windows, base.batch), base.states, strict=True):
        ids = _ids(group)
        targets = next_tokens(group, ids).flatten()
        now, then = final_states(model, ids).flatten(0, 1), before.flatten(0, 1)
        for rows in position_blocks(torch.arange(len(then)), len(base.weight)):
            changed = transform(head(now[rows.to(now.device)]).float())
            original = base.logits(model, then[rows]).to(changed.device)
            sums += _compared(original, changed, targets[rows].to(changed.device)).cpu()
        n_positions += len(then)
    loss, n, kl, squares, first, five = sums.tolist()
    n_bytes = sum(w.predicted_bytes for w in base.windows)
    spread = max(squares / n_positions - (kl / n_positions) ** 2, 0.0)
    return Judgement(
        loss=loss / n, bits_per_byte=loss / math.log(2) / n_bytes, kl=kl / n_positions,
        kl_stderr=math.sqrt(spread / n_positions), top_1=first / n_positions, top_5=five / n_positions / TOP,
        n_predicted=round(n), n_positions=n_positions,
    )  # fmt: skip


def _compared(original: Float[Tensor, "r v"], changed: Float[Tensor, "r v"], targets: Tensor) -> Float[Tensor, " 6"]:
    log_p, log_q = original.log_softmax(dim=1), changed.log_softmax(dim=1)
    known = targets >= 0
    loss = -log_q[known].gather(1, targets[known, None]).double()
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1).double().clamp_min(0)  # rounding may leave less than nothing
    ours, theirs = (x.topk(min(TOP, x.shape[1]), dim=1).indices for x in (log_q, log_p))
    first = (ours[:, 0] == theirs[:, 0]).sum()
    five = (ours[:, :, None] == theirs[:, None, :]).sum()
    return torch.stack([loss.sum(), known.sum().double(), kl.sum(), kl.square().sum(), first.double(), five.double()])
