"""Calibration: one pass of a text through a model, for second moments of its residual stream and a sample of its states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.activations.forward import final_states
from dimscope.activations.hooks import Hook, hooked
from dimscope.activations.output_head import OutputHead, declared_head
from dimscope.checkpoints.families import Layout
from dimscope.texts.windows import Window, grouped
from dimscope.vectors.moments import upper_gram

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLED = 256  # states of each norm, for the gains
NEWTON = 8  # steps at most; three do


@dataclass(frozen=True, slots=True)
class Calibration:
    """Moments and samples of the residual stream on a text. Where the norms take out the mean, it is out of all three.

    Attributes:
        raw: Uncentred second moment of the stream, summed over all norms, in float64.
        normalised: The same of its states divided by their root mean square, as the norms see them.
        samples: States at the same positions, by the gain of the norm, in the order of the stream.
        eps: Epsilon of the norms.
        n_tokens: Tokens of the text.
    """

    raw: Float[Tensor, "d d"]
    normalised: Float[Tensor, "d d"]
    samples: Mapping[str, Float[Tensor, "_ d"]]
    eps: float
    n_tokens: int


@torch.no_grad()
def calibrate(model: PreTrainedModel, layout: Layout, windows: Iterable[Window], batch: int = 1) -> Calibration:
    """Compute the moments at the input of every norm on the stream, in memory of d x d numbers whatever the length of the text.

    Args:
        model: The dense model.
        layout: Its family.
        windows: The text, in windows of one length.
        batch: Windows at once.
    """
    norms = [name for name, _ in model.named_parameters() if layout.part(name) == "gain"]
    listed = list(windows)
    n_tokens = sum(len(w.ids) for w in listed)
    dim, step = model.config.hidden_size, max(1, n_tokens // SAMPLED) | 1
    # An odd step from its middle on: first tokens are unlike all others, and must not be sampled more often than they occur.
    raw, normalised = (torch.zeros(dim, dim, dtype=torch.float64) for _ in range(2))
    samples: dict[str, list[Tensor]] = {name: [] for name in norms}
    eps = getattr(model.config, layout.eps)

    def accumulate(name: str) -> Callable[..., None]:
        def add(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            flat = args[0].reshape(-1, dim)
            rows = (flat.cpu() if flat.device.type == "mps" else flat).double()  # Apple's GPU has no float64
            rows = rows - rows.mean(dim=1, keepdim=True) if layout.centred else rows
            raw.add_(upper_gram(rows).cpu())
            normalised.add_(upper_gram(rms_normed(rows, eps)).cpu())
            samples[name].append(rows[step // 2 :: step].float().cpu())

        return add

    hooks = [Hook(model.get_submodule(name.removesuffix(".weight")), accumulate(name), before=True) for name in norms]
    with hooked(hooks):
        for group in grouped(listed, batch):
            final_states(model, torch.stack([w.ids for w in group]))
    kept = {name: torch.cat(rows) for name, rows in samples.items()}
    return Calibration(*(m.triu() + m.triu(1).T for m in (raw, normalised)), kept, eps, n_tokens)


def rms_normed(rows: Float[Tensor, "n d"], eps: float) -> Float[Tensor, "n d"]:
    """Return every row divided by its root mean square, as an RMSNorm without gain does."""
    return rows * torch.rsqrt(rows.square().mean(dim=1, keepdim=True) + eps)


def calibrated_gains(calibration: Calibration, basis: Float[Tensor, "d k"]) -> dict[str, Tensor]:
    """Return for every norm the gain with which its narrow output is nearest to the projected output of the dense one.

    c = E<P^T y, y'> / E|y'|^2 over the sampled states, y the dense norm's output without gain and y' the narrow one's.
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
    """Return the factor of the final norm's gain at which the narrow model's predictions are nearest to the dense one's.

    The gain of the final norm is an inverse softmax temperature. With z the derivative of the narrow logits by it, the
    slope of KL(dense || narrow) is E[(q - p) z] and its curvature E[Var_q z], and Newton's method finds the minimum. Where
    logits are not capped, z is the logits without bias, and the KL is convex.
    """
    pairs = []
    for group in grouped(windows, batch):
        ids = torch.stack([w.ids for w in group])
        pairs.append([final_states(m, ids).flatten(0, 1) for m in (dense, student)])
    wide, narrow = (torch.cat(states) for states in zip(*pairs, strict=True))
    teacher, head = declared_head(dense), declared_head(student)
    factor = 1.0
    for _ in range(NEWTON):
        slope = curvature = 0.0
        for rows in teacher.blocks(torch.arange(len(wide))):
            p = teacher.logits(wide[rows]).softmax(dim=1).to(narrow.device)
            raw = torch.nn.functional.linear(narrow[rows], head.weight).float()
            bias = 0.0 if head.bias is None else head.bias.float()
            logits = head.transform(factor * raw + bias)
            z = _slopes(head, raw, logits)
            q = logits.softmax(dim=1)
            mean = (q * z).sum(dim=1)
            slope += float((mean - (p * z).sum(dim=1)).sum())
            curvature += float((q * (z - mean[:, None]).square()).sum())
        step = slope / curvature if curvature > 0 else 0.0
        # Far from the minimum the curvature may be nearly 0.
        factor = min(max(factor - step, factor / 2), factor * 2)
        if abs(step) < 1e-5:
            break
    return factor


def _slopes(head: OutputHead, raw: Float[Tensor, "n v"], logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """Return the derivatives of logits = cap(scale * (factor * raw + bias)) by the factor."""
    slopes = raw if head.scale == 1 else raw * head.scale
    return slopes if head.cap is None else slopes * (1 - (logits / head.cap).square())
