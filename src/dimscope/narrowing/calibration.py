"""One pass of a text through a model: second moments of its residual stream at every norm, and a sample of its states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.narrowing.layouts import Layout
from dimscope.representations.hidden_states import final_states
from dimscope.representations.moments import upper_gram
from dimscope.representations.windows import Window, grouped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT = 256  # states of each norm that are kept, for the gains


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a text says about the stream. Both moments are uncentred sums over all norms, in float64.

    `raw` is of the stream itself, `normalised` of its states divided by their root mean square: what the norms see.
    Where the norms take the mean out, it is out of all three.
    """

    raw: Float[Tensor, "d d"]
    normalised: Float[Tensor, "d d"]
    samples: Mapping[str, Float[Tensor, "_ d"]]  # by the gain of the norm, in the order of the stream, the same positions
    eps: float
    n_tokens: int


@torch.no_grad()
def calibrate(model: PreTrainedModel, layout: Layout, windows: Iterable[Window], batch: int = 1) -> Calibration:
    """The moments at the input of every norm on the stream; d x d numbers are held, whatever the length of the text."""
    norms = [name for name, _ in model.named_parameters() if layout.part(name)[0] == "gain"]
    listed = list(windows)
    n_tokens = sum(len(w.ids) for w in listed)
    dim, step = model.config.hidden_size, max(1, n_tokens // KEPT)
    raw, normalised = (torch.zeros(dim, dim, dtype=torch.float64) for _ in range(2))
    samples: dict[str, list[Tensor]] = {name: [] for name in norms}
    eps = getattr(model.config, layout.eps)

    def seen(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, dim).double()
            rows = rows - rows.mean(dim=1, keepdim=True) if layout.centred else rows
            raw.add_(upper_gram(rows).cpu())
            normalised.add_(upper_gram(rms_normed(rows, eps)).cpu())
            samples[name].append(rows[::step].float().cpu())

        return hook

    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(seen(name)) for name in norms
    ]
    try:
        for group in grouped(listed, batch):
            final_states(model, torch.stack([w.ids for w in group]))
    finally:
        for handle in handles:
            handle.remove()
    kept = {name: torch.cat(rows) for name, rows in samples.items()}
    return Calibration(*(m.triu() + m.triu(1).T for m in (raw, normalised)), kept, eps, n_tokens)


def rms_normed(rows: Float[Tensor, "n d"], eps: float) -> Float[Tensor, "n d"]:
    """Every row divided by its root mean square, as an RMSNorm without gain does."""
    return rows * torch.rsqrt(rows.square().mean(dim=1, keepdim=True) + eps)


def calibrated_gains(calibration: Calibration, basis: Float[Tensor, "d k"]) -> dict[str, Tensor]:
    """For every norm the number by which the narrow norm's output is nearest to the projected output of the dense one.

    c = E<P^T y, y'> / E|y'|^2 over the kept states, y the dense norm's output without gain and y' the narrow one's.
    """
    d, k = basis.shape
    gains = {}
    for name, rows in calibration.samples.items():
        exact = rows.double()
        dense = rms_normed(exact, calibration.eps) @ basis
        narrow = rms_normed(exact @ basis, calibration.eps * d / k)
        gains[name] = (dense * narrow).sum() / narrow.square().sum()
    return gains
