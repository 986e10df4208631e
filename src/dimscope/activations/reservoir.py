"""A bounded random sample of positions, the same in every layer, condition and model, for measures that need single rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt
from torch import Tensor

from dimscope.activations.state import load_state, save_state

PLACES = ("ends", "tokens", "windows")  # what is known of a sampled position, by the names of the attributes


def _no_integers() -> Int[np.ndarray, " n"]:
    return np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class Reservoir:
    """The rows of at most `size` positions at every layer: those whose byte offsets in the text hash lowest.

    A position is chosen by where its token ends in the text, not by its number, so that models with other tokenizers
    choose the same positions wherever their tokens end together (bottom-k sampling with one hash: Cohen & Kaplan 2007).
    The first position of a window is never sampled: it is an attention sink in most models.

    Attributes:
        size: Positions, at most.
        seed: Of the hash.
        keys: The hashes of the positions.
        ends: The bytes at which their tokens end.
        tokens: The ids of their tokens.
        windows: The numbers of their windows.
        rows: The rows (float32) of each layer, in the order of `keys`.
    """

    size: int
    seed: int
    keys: UInt[np.ndarray, " n"] = field(default_factory=lambda: np.empty(0, dtype=np.uint64), repr=False)
    ends: Int[np.ndarray, " n"] = field(default_factory=_no_integers, repr=False)
    tokens: Int[np.ndarray, " n"] = field(default_factory=_no_integers, repr=False)
    windows: Int[np.ndarray, " n"] = field(default_factory=_no_integers, repr=False)
    rows: dict[int, list[Tensor]] = field(default_factory=dict, repr=False)

    def candidates(
        self,
        ends: Int[Tensor, "b t"],
        ids: Int[Tensor, "b t"],
        windows: Sequence[int],
        mask: Bool[Tensor, "b t"] | None,
    ) -> Int[Tensor, " c"]:
        """Choose positions of a batch, and return them in the flattened b x t; then `take` must follow for every layer.

        Args:
            ends: The bytes at which the tokens of the batch end.
            ids: The tokens of the batch.
            windows: The number in the text of each window of the batch.
            mask: False at padding; None where there is none.
        """
        allowed = np.ones(ends.shape, dtype=bool) if mask is None else mask.numpy().copy()
        allowed[:, 0] = False
        keys = _hash(ends.numpy(), self.seed)
        rivals = np.concatenate([self.keys, keys[allowed]])
        if len(rivals) > self.size:  # only what can stay: a long batch is never copied whole
            allowed &= keys <= np.partition(rivals, self.size - 1)[self.size - 1]
        positions = np.flatnonzero(allowed)
        self.keys = np.concatenate([self.keys, keys.ravel()[positions]])
        self.ends = np.concatenate([self.ends, ends.numpy().ravel()[positions]])
        self.tokens = np.concatenate([self.tokens, ids.numpy().ravel()[positions]])
        self.windows = np.concatenate([self.windows, np.asarray(windows)[positions // ends.shape[1]]])
        return torch.from_numpy(positions)

    def take(self, layer: int, hidden: Float[Tensor, "b t d"], positions: Int[Tensor, " c"]) -> None:
        """Add the rows of one layer at the positions that `candidates` returned."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        self.rows.setdefault(layer, []).append(flat[positions.to(flat.device)].float().cpu())

    def prune(self, *, whole: bool = False) -> None:
        """Drop the highest hashes: once there are a quarter too many, or (`whole`) at once."""
        if len(self.keys) <= (self.size if whole else self.size * 5 // 4):
            return
        best = np.sort(np.argsort(self.keys, kind="stable")[: self.size])
        for name in ("keys", *PLACES):
            setattr(self, name, getattr(self, name)[best])
        self.rows = {layer: [torch.cat(parts)[torch.from_numpy(best)]] for layer, parts in self.rows.items()}

    def merge(self, other: "Reservoir") -> None:
        """Become the sample of both texts together."""
        for name in ("keys", *PLACES):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(other, name)]))
        for layer, parts in other.rows.items():
            self.rows.setdefault(layer, []).extend(parts)
        self.prune(whole=True)

    def sample(self) -> "Sample":
        """Return the rows in the order of the text."""
        order = np.argsort(self.ends, kind="stable")
        chosen = torch.from_numpy(order)
        rows = {layer: torch.cat(parts)[chosen] for layer, parts in self.rows.items()}
        return Sample(*(getattr(self, name)[order] for name in PLACES), rows)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all of it as named tensors, for a file."""
        yield "reservoir.keys", torch.from_numpy(self.keys.view(np.int64).copy())
        for name in PLACES:
            yield f"reservoir.{name}", torch.from_numpy(getattr(self, name).copy())
        yield "reservoir.numbers", torch.tensor([self.size, self.seed])
        for layer, parts in self.rows.items():
            yield f"reservoir.rows.{layer}", torch.cat(parts).contiguous()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Reservoir":
        """Return the reservoir whose `tensors` these are; others are ignored."""
        size, seed = tensors["reservoir.numbers"].tolist()
        keys = tensors["reservoir.keys"].numpy().view(np.uint64)
        places = (tensors[f"reservoir.{name}"].numpy() for name in PLACES)
        rows = {int(name.rpartition(".")[2]): [t] for name, t in tensors.items() if name.startswith("reservoir.rows.")}
        return cls(size, seed, keys, *places, rows)


def save_reservoir(reservoir: Reservoir, path: Path) -> None:
    """Write a reservoir as one file, whole or not at all."""
    save_state(path, dict(reservoir.tensors()))


def load_reservoir(path: Path) -> Reservoir | None:
    """Return what `save_reservoir` wrote; None where that is nothing, or of another definition."""
    tensors = load_state(path)
    return None if tensors is None else Reservoir.from_tensors(tensors)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Rows of some positions at every layer, in the order of the text.

    Attributes:
        ends: The bytes at which the tokens of the positions end.
        tokens: The ids of these tokens.
        windows: The numbers of their windows.
        layers: The rows of each layer.
    """

    ends: Int[np.ndarray, " n"] = field(repr=False)
    tokens: Int[np.ndarray, " n"] = field(repr=False)
    windows: Int[np.ndarray, " n"] = field(repr=False)
    layers: Mapping[int, Float[Tensor, "n d"]] = field(repr=False)

    def at(self, chosen: Int[np.ndarray, " m"]) -> "Sample":
        """Return some of the positions, by their number in the sample."""
        layers = {layer: rows[torch.from_numpy(chosen)] for layer, rows in self.layers.items()}
        return Sample(*(getattr(self, name)[chosen] for name in PLACES), layers)


def common(left: Sample, right: Sample) -> tuple[Sample, Sample]:
    """Return both samples at the positions that they share, whatever the tokenizers."""
    # Tokens that share a character may end at one byte; the first of them stands for that byte.
    _, in_left, in_right = np.intersect1d(left.ends, right.ends, return_indices=True)
    return left.at(in_left), right.at(in_right)


def _hash(values: Int[np.ndarray, "*n"], seed: int) -> UInt[np.ndarray, "*n"]:
    """Hash integers by splitmix64 (Steele et al. 2014): as good as random, and the same everywhere."""
    z = values.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
