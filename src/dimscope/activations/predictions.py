"""What a model predicts, summed over positions: loss, entropy, and the probability of its first choice."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BINS = 60  # of the max log-softmax, from -ln V to 0
QUANTITIES = ("loss", "entropy", "max log-softmax")


@dataclass(slots=True)
class Predictions:
    """Sums over positions of loss (nats), entropy and max log-softmax, and the histogram of the latter.

    Attributes:
        vocab_size: V, the number of logits.
        counts: The histogram of max log-softmax, over `edges`.
        sums: A row for each of QUANTITIES: number of positions, sum, sum of squares.
        n_bytes: Bytes of text under the tokens whose loss was taken.
    """

    vocab_size: int
    counts: Int[Tensor, " bins"] = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64), repr=False)
    sums: Float[Tensor, "q 3"] = field(
        default_factory=lambda: torch.zeros(len(QUANTITIES), 3, dtype=torch.float64), repr=False
    )
    n_bytes: int = 0

    @property
    def edges(self) -> Float[Tensor, " e"]:
        """Return the edges of the bins, from -ln V to 0: the same for every text, condition and model of one vocabulary size."""
        return torch.linspace(-math.log(self.vocab_size), 0, BINS + 1, dtype=torch.float64)

    def add(self, logits: Float[Tensor, "r v"], targets: Int[Tensor, " r"], kept: Bool[Tensor, " r"]) -> None:
        """Add a block of positions.

        Args:
            logits: Their logits.
            targets: The tokens that follow, -1 where none does.
            kept: False at padding.
        """
        # log p = shifted - log z, so that one subtraction and one exponential serve all three.
        shifted = logits - logits.amax(dim=1, keepdim=True)
        weights = shifted.exp()
        z = weights.sum(dim=1)
        best = -z.log().double()
        entropy = (z.log() - weights.mul_(shifted).sum(dim=1) / z).double()
        loss = (z.log() - shifted.gather(1, targets.clamp_min(0)[:, None]).squeeze(1)).double()
        for row, values in enumerate((loss[kept & (targets >= 0)], entropy[kept], best[kept])):
            self.sums[row] += torch.stack([torch.ones_like(values), values, values.square()]).sum(dim=1).cpu()
        width = math.log(self.vocab_size) / BINS
        bins = (BINS + torch.floor(best[kept].cpu() / width)).long().clamp(0, BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS)

    def merge(self, other: "Predictions") -> None:
        """Add the sums over other positions."""
        self.counts, self.sums = self.counts + other.counts, self.sums + other.sums
        self.n_bytes += other.n_bytes

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all of it as named tensors, for a file."""
        yield "predictions.counts", self.counts
        yield "predictions.sums", self.sums
        yield "predictions.numbers", torch.tensor([self.vocab_size, self.n_bytes])

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Predictions":
        """Return the predictions whose `tensors` these are; others are ignored."""
        vocab_size, n_bytes = tensors["predictions.numbers"].tolist()
        return cls(vocab_size, tensors["predictions.counts"], tensors["predictions.sums"], n_bytes)
