"""How well a model predicts a text, as it is at the moment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dimscope.evaluation.evaluate import baseline, evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dimscope.texts.windows import Window


@dataclass(frozen=True, slots=True)
class TextLoss:
    """The mean loss of a model over the predicted tokens of a text.

    Attributes:
        loss: Nats per token.
        bits_per_byte: The same in bits per byte of text, which survives a change of vocabulary.
        n_tokens: Predicted tokens.
        loss_stderr: Standard error of the loss by the jackknife over windows; None for one window.
        bits_per_byte_stderr: That of the bits per byte.
    """

    loss: float
    bits_per_byte: float
    n_tokens: int
    loss_stderr: float | None = None
    bits_per_byte_stderr: float | None = None

    @property
    def perplexity(self) -> float:
        """Return exp(loss), infinite where that is no float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def text_loss(model: PreTrainedModel, windows: Sequence[Window], batch: int = 1) -> TextLoss:
    """Return the loss of a model on windows of one length, `batch` of them per forward pass."""
    result = evaluate(model, baseline(model, windows, batch), changed=False)
    loss, bits = result.loss, result.bits_per_byte
    return TextLoss(loss.value, bits.value, result.n_predicted, loss.stderr, bits.stderr)
