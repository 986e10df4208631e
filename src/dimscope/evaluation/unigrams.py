"""Whether a model reads a text better than the frequencies of its tokens alone predict it."""

from collections.abc import Sequence

import torch

from dimscope.activations.collection import next_tokens
from dimscope.texts.window_sums import Interval
from dimscope.texts.windows import Window


def unigram_entropy(windows: Sequence[Window]) -> float:
    """Return the entropy in nats of the tokens that are predicted in some windows of one length.

    This is the least loss of a model that knows the frequencies of the tokens and reads no context. Frequencies of few
    tokens give too low an entropy, so it is estimated with the share of tokens that were not seen (Chao and Shen 2003).
    """
    targets = next_tokens(windows, torch.stack([w.ids for w in windows])).flatten()
    counts = targets[targets >= 0].unique(return_counts=True)[1].double()
    n, singles = float(counts.sum()), float((counts == 1).sum())
    if singles == n:  # no token occurs twice: the coverage would be 0
        singles = n - 1
    shares = (1 - singles / n) * counts / n
    return float((-shares * shares.log() / (1 - (1 - shares) ** n)).sum())


def reads_context(loss: Interval, entropy: float) -> bool:
    """Whether the loss of a model is clearly below the unigram entropy of the text: at the upper end of its interval."""
    return (loss.value if loss.high is None else loss.high) < entropy
