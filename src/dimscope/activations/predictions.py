"""What a model predicts, summed over positions: loss, entropy, and how sure it is of its first choice."""

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

    `sums` has a row for each of QUANTITIES: number of positions, sum, sum of squares.
    """

    vocab_size: int
    counts: Int[Tensor, " bins"] = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    sums: Float[Tensor, "q 3"] = field(default_factory=lambda: torch.zeros(len(QUANTITIES), 3, dtype=torch.float64))
    n_bytes: int = 0  # of text, under the tokens whose loss was taken

    @property
    def edges(self) -> Float[Tensor, " e"]:
        """The bins are the same for every text, condition and model of one vocabulary size: max log-softmax >= -ln V."""
        return torch.linspace(-math.log(self.vocab_size), 0, BINS + 1, dtype=torch.float64)

    def add(self, logits: Float[Tensor, "r v"], targets: Int[Tensor, " r"], kept: Bool[Tensor, " r"]) -> None:
        """A block of positions; `targets` is -1 where no token follows, `kept` False at padding."""
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
        places = (BINS + torch.floor(best[kept].cpu() / width)).long().clamp(0, BINS - 1)
        self.counts += torch.bincount(places, minlength=BINS)

    def merge(self, other: "Predictions") -> None:
        """The sums of both."""
        self.counts, self.sums = self.counts + other.counts, self.sums + other.sums
        self.n_bytes += other.n_bytes

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of it, by name, for a file."""
        yield "predictions.counts", self.counts
        yield "predictions.sums", self.sums
        yield "predictions.numbers", torch.tensor([self.vocab_size, self.n_bytes])

    @classmethod
    def from_tensors(cls, held: Mapping[str, Tensor]) -> "Predictions":
        """What `tensors` gave."""
        vocab_size, n_bytes = held["predictions.numbers"].tolist()
        return cls(vocab_size, held["predictions.counts"], held["predictions.sums"], n_bytes)
