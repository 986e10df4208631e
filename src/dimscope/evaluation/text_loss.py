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
    """

    loss: float
    bits_per_byte: float
    n_tokens: int

    @property
    def perplexity(self) -> float:
        """Return exp(loss), infinite where that is no float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def text_loss(model: PreTrainedModel, windows: Sequence[Window], batch: int = 1) -> TextLoss:
    """Return the loss of a model on windows of one length, `batch` of them per forward pass."""
    result = evaluate(model, baseline(model, windows, batch), changed=False)
    return TextLoss(result.loss, result.bits_per_byte, result.n_predicted)
