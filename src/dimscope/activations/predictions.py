"""What a model predicts, summed over positions: loss, entropy, and the probability of its first choice."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dimscope.texts.window_sums import WindowSums

BINS = 60  # of the max log-softmax, from -ln V to 0
QUANTITIES = ("loss", "entropy", "max log-softmax")


@dataclass(slots=True)
class Predictions:
    """Sums over positions of loss (nats), entropy and max log-softmax, and the histogram of the latter.

    Attributes:
        vocab_size: V, the number of logits.
        counts: The histogram of max log-softmax, over `edges`.
        by_window: Of each window the number of positions and the sum over them for each of QUANTITIES, and the bytes of
            text under the tokens whose loss was taken.
    """

    vocab_size: int
    counts: Int[Tensor, " bins"] = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64), repr=False)
    by_window: WindowSums = field(default_factory=lambda: WindowSums(2 * len(QUANTITIES) + 1), repr=False)

    @property
    def sums(self) -> Float[Tensor, "q 2"]:
        """Return for each of QUANTITIES the number of positions and the sum over them."""
        return self.by_window.stacked()[:, :-1].sum(dim=0).view(len(QUANTITIES), 2)

    @property
    def n_bytes(self) -> int:
        """Return the bytes of text under the tokens whose loss was taken."""
        return int(self.by_window.stacked()[:, -1].sum())

    @property
    def edges(self) -> Float[Tensor, " e"]:
        """Return the edges of the bins, from -ln V to 0: the same for every text, condition and model of one vocabulary size."""
        return torch.linspace(-math.log(self.vocab_size), 0, BINS + 1, dtype=torch.float64)

    def add(
        self,
        logits: Float[Tensor, "r v"],
        targets: Int[Tensor, " r"],
        kept: Bool[Tensor, " r"],
        windows: Int[Tensor, " r"],
    ) -> None:
        """Add a block of positions.

        Args:
            logits: Their logits.
            targets: The tokens that follow, -1 where none does.
            kept: False at padding.
            windows: The number of the window of each.
        """
        # log p = shifted - log z, so that one subtraction and one exponential serve all three.
        shifted = logits - logits.amax(dim=1, keepdim=True)
        weights = shifted.exp()
        z = weights.sum(dim=1)
        best = -z.log().double()
        entropy = (z.log() - weights.mul_(shifted).sum(dim=1) / z).double()
        loss = (z.log() - shifted.gather(1, targets.clamp_min(0)[:, None]).squeeze(1)).double()
        counted = torch.stack([kept & (targets >= 0), kept, kept])
        values = torch.stack([loss, entropy, best]).where(counted, 0.0)
        numbers = torch.stack([counted.double(), values], dim=1).flatten(0, 1).cpu()
        for window in windows.unique().tolist():
            self.by_window.add(window, F.pad(numbers[:, windows == window].sum(dim=1), (0, 1)))
        width = math.log(self.vocab_size) / BINS
        bins = (BINS + torch.floor(best[kept].cpu() / width)).long().clamp(0, BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS)

    def add_bytes(self, window: int, n: int) -> None:
        """Add bytes of text under the tokens of a window whose loss was taken."""
        numbers = torch.zeros(self.by_window.width, dtype=torch.float64)
        numbers[-1] = n
        self.by_window.add(window, numbers)

    def merge(self, other: "Predictions") -> None:
        """Add the sums over other positions."""
        self.counts = self.counts + other.counts
        self.by_window.merge(other.by_window)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all of it as named tensors, for a file."""
        yield "predictions.counts", self.counts
        yield from self.by_window.tensors("predictions.windows")
        yield "predictions.vocab_size", torch.tensor(self.vocab_size)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Predictions":
        """Return the predictions whose `tensors` these are; others are ignored."""
        by_window = WindowSums.from_tensors(tensors, "predictions.windows")
        return cls(int(tensors["predictions.vocab_size"]), tensors["predictions.counts"], by_window)
