"""One pass of a text through a model: second moments of its residual stream at every norm, and a sample of its states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.activations.forward import final_states
from dimscope.activations.output_head import position_blocks
from dimscope.checkpoints.families import Layout
from dimscope.texts.windows import Window, grouped
from dimscope.vectors.moments import upper_gram

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT = 256  # states of each norm that are kept, for the gains
NEWTON = 8  # steps at most; three do


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a text says about the stream. Both moments are uncentred sums over all norms, in float64.

    `raw` is of the stream itself, `normalised` of its states divided by their root mean square: what the norms see.
    Where the norms take the mean out, it is out of all three.
    """

    raw: Float[Tensor, "d d"]
    normalised: Float[Tensor, "d d"]
    samples: Mapping[
        str, Float[Tensor, "_ d"]
    ]  # by the gain of the norm, in the order of the stream, the same positions
    eps: float
    n_tokens: int


@torch.no_grad()
def calibrate(model: PreTrainedModel, layout: Layout, windows: Iterable[Window], batch: int = 1) -> Calibration:
    """The moments at the input of every norm on the stream; d x d numbers are held, whatever the length of the text."""
    norms = [name for name, _ in model.named_parameters() if layout.part(name)[0] == "gain"]
    listed = list(windows)
    n_tokens = sum(len(w.ids) for w in listed)
    dim, step = model.config.hidden_size, max(1, n_tokens // KEPT) | 1
    # An odd step from its middle on: first tokens are unlike all others, and must not be met more often than they are.
    raw, normalised = (torch.zeros(dim, dim, dtype=torch.float64) for _ in range(2))
    samples: dict[str, list[Tensor]] = {name: [] for name in norms}
    eps = getattr(model.config, layout.eps)

    def seen(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            flat = args[0].reshape(-1, dim)
            rows = (flat.cpu() if flat.device.type == "mps" else flat).double()  # Apple's GPU has no float64
            rows = rows - rows.mean(dim=1, keepdim=True) if layout.centred else rows
            raw.add_(upper_gram(rows).cpu())
            normalised.add_(upper_gram(rms_normed(rows, eps)).cpu())
            samples[name].append(rows[step // 2 :: step].float().cpu())

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


@torch.no_grad()
def final_temperature(
    student: PreTrainedModel, dense: PreTrainedModel, windows: Iterable[Window], batch: int = 1
) -> float:
    """The factor of the final norm's gain at which the narrow model's predictions are nearest to the dense one's.

    The gain of the final norm is an inverse softmax temperature. KL(dense || narrow) is convex in it: with z the narrow
    logits without bias its slope is E[(q - p) z] and its curvature E[Var_q z], and Newton's method finds the minimum.
    """
    pairs = []
    for group in grouped(windows, batch):
        ids = torch.stack([w.ids for w in group])
        pairs.append([final_states(m, ids).flatten(0, 1) for m in (dense, student)])
    wide, narrow = (torch.cat(states) for states in zip(*pairs, strict=True))
    heads = [m.get_output_embeddings() for m in (dense, student)]
    factor = 1.0
    for _ in range(NEWTON):
        slope = curvature = 0.0
        for rows in position_blocks(torch.arange(len(wide)), len(heads[0].weight)):
            p = heads[0](wide[rows]).float().softmax(dim=1).to(narrow.device)
            z = torch.nn.functional.linear(narrow[rows], heads[1].weight).float()
            bias = 0.0 if heads[1].bias is None else heads[1].bias.float()
            q = (factor * z + bias).softmax(dim=1)
            mean = (q * z).sum(dim=1)
            slope += float((mean - (p * z).sum(dim=1)).sum())
            curvature += float((q * (z - mean[:, None]).square()).sum())
        step = slope / curvature if curvature > 0 else 0.0
        factor = min(
            max(factor - step, factor / 2), factor * 2
        )  # far from the minimum the curvature may be nearly none
        if abs(step) < 1e-5:
            break
    return factor
