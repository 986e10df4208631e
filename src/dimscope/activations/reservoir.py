"""A bounded random sample of positions, the same in every layer, condition and model, for what moments cannot tell."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt
from torch import Tensor

from dimscope.storage import write_tensors


@dataclass(slots=True)
class Reservoir:
    """The rows of at most `size` positions at every layer: those whose byte offsets in the text hash lowest.

    A position is chosen by where its token ends in the text, not by its number, so that models with other tokenizers
    choose the same places wherever their tokens end together (bottom-k sampling with one hash: Cohen & Kaplan 2007).
    The first position of a window never takes part: it is an attention sink in most models.
    """

    size: int
    seed: int
    keys: UInt[np.ndarray, " n"] = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    ends: Int[np.ndarray, " n"] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    rows: dict[int, list[Tensor]] = field(default_factory=dict)  # layer -> float32 rows, in the order of `keys`

    def candidates(self, ends: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"] | None) -> Int[Tensor, " c"]:
        """The flat positions of a batch that get in, and notes them; then `take` has to be called for every layer."""
        allowed = np.ones(ends.shape, dtype=bool) if mask is None else mask.numpy().copy()
        allowed[:, 0] = False
        keys = _hash(ends.numpy(), self.seed)
        rivals = np.concatenate([self.keys, keys[allowed]])
        if len(rivals) > self.size:  # only what can stay: a long batch is never copied whole
            allowed &= keys <= np.partition(rivals, self.size - 1)[self.size - 1]
        places = np.flatnonzero(allowed)
        self.keys = np.concatenate([self.keys, keys.ravel()[places]])
        self.ends = np.concatenate([self.ends, ends.numpy().ravel()[places]])
        return torch.from_numpy(places)

    def take(self, layer: int, hidden: Float[Tensor, "b t d"], places: Int[Tensor, " c"]) -> None:
        """The rows of one layer at the positions that `candidates` gave."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        self.rows.setdefault(layer, []).append(flat[places.to(flat.device)].float().cpu())

    def prune(self, *, whole: bool = False) -> None:
        """Lets the highest hashes go, once there are a quarter too many, or (`whole`) at once."""
        if len(self.keys) <= (self.size if whole else self.size * 5 // 4):
            return
        best = np.sort(np.argsort(self.keys, kind="stable")[: self.size])
        self.keys, self.ends = self.keys[best], self.ends[best]
        self.rows = {layer: [torch.cat(parts)[torch.from_numpy(best)]] for layer, parts in self.rows.items()}

    def merge(self, other: "Reservoir") -> None:
        """The sample of both texts together."""
        self.keys, self.ends = np.concatenate([self.keys, other.keys]), np.concatenate([self.ends, other.ends])
        for layer, parts in other.rows.items():
            self.rows.setdefault(layer, []).extend(parts)
        self.prune(whole=True)

    def sample(self) -> "Sample":
        """The rows in the order of the text."""
        order = np.argsort(self.ends, kind="stable")
        chosen = torch.from_numpy(order)
        return Sample(self.ends[order], {layer: torch.cat(parts)[chosen] for layer, parts in self.rows.items()})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of it, by name, for a file."""
        yield "reservoir.keys", torch.from_numpy(self.keys.view(np.int64).copy())
        yield "reservoir.ends", torch.from_numpy(self.ends.copy())
        yield "reservoir.numbers", torch.tensor([self.size, self.seed])
        for layer, parts in self.rows.items():
            yield f"reservoir.rows.{layer}", torch.cat(parts).contiguous()

    @classmethod
    def from_tensors(cls, held: Mapping[str, Tensor]) -> "Reservoir":
        """What `tensors` gave."""
        size, seed = held["reservoir.numbers"].tolist()
        keys, ends = held["reservoir.keys"].numpy().view(np.uint64), held["reservoir.ends"].numpy()
        rows = {int(name.rpartition(".")[2]): [t] for name, t in held.items() if name.startswith("reservoir.rows.")}
        return cls(size, seed, keys, ends, rows)


def save_reservoir(of: Reservoir, path: Path) -> None:
    """A reservoir as a safetensors file, whole or not at all."""
    write_tensors(path, dict(of.tensors()))


def load_reservoir(path: Path) -> Reservoir:
    """What `save_reservoir` wrote."""
    from safetensors.torch import load_file

    return Reservoir.from_tensors(load_file(path))


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows of some positions at every layer, in the order of the text; `ends` are the bytes where their tokens end."""

    ends: Int[np.ndarray, " n"]
    layers: Mapping[int, Float[Tensor, "n d"]]

    def at(self, places: Int[np.ndarray, " m"]) -> "Sample":
        """Some of the positions, by their number in the sample."""
        return Sample(self.ends[places], {layer: rows[torch.from_numpy(places)] for layer, rows in self.layers.items()})


def common(left: Sample, right: Sample) -> tuple[Sample, Sample]:
    """The positions that two samples of one text share, whatever their tokenizers."""
    # Tokens that share a character may end at one byte; the first of them stands for the place.
    _, in_left, in_right = np.intersect1d(left.ends, right.ends, return_indices=True)
    return left.at(in_left), right.at(in_right)


def _hash(values: Int[np.ndarray, "*n"], seed: int) -> UInt[np.ndarray, "*n"]:
    """splitmix64 (Steele et al. 2014) of integers: as good as random, and the same everywhere."""
    z = values.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
