"""A basis that is learned: which directions to keep is asked of the model's own predictions, all weights a function of them.

P = qr(A) and the gains of the norms are trained by forward KL to the dense model; every other weight stays a fixed
function of P, so that the result is still one orthonormal map, and its checkpoint a standard one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.narrowing.bases import directions_of, fitted
from dimscope.narrowing.conversion import Origin
from dimscope.narrowing.projection import Cut, narrow_model
from dimscope.narrowing.training import Goal, Point, Schedule, distance, looking, minimise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dimscope.checkpoints.model import Placement
    from dimscope.texts.windows import Window

RATE = 5e-3


def learn_basis(
    dense: PreTrainedModel,
    cut: Cut,
    training: Sequence[Window],
    held_out: Sequence[Window],
    schedule: Schedule,
    placement: Placement,
    *,
    store: Path | None = None,
    recipe: str = "",
    announce: Callable[[Point], object] = lambda point: None,
) -> tuple[Cut, list[Point]]:
    """The cut with the basis and gains that predict held-out text best, and the way there. It begins with those of `cut`.

    Source: P as the Q of a QR, a retraction of the Stiefel manifold (Absil, Mahony, Sepulchre, Optimization Algorithms on
    Matrix Manifolds, 2008, 4.1.1), trained without constraints.
    """
    from dimscope.checkpoints.model import Placement

    student = narrow_model(cut, Placement("float32", placement.device))
    device = next(student.parameters()).device
    raw = directions_of(cut.basis, cut.layout.centred).to(device, torch.float32).requires_grad_()
    norms = [o.source for o in cut.origins.values() if o.part == "gain" and o.source is not None]
    usual = torch.tensor(cut.usual_gain)
    gains = {n: cut.gains.get(n, usual).detach().clone().to(device, torch.float32).requires_grad_() for n in norms}
    before = {
        o.norm: g.to(device, torch.float32) for o in cut.origins.values() if (g := cut.gain_before(o)) is not None
    }

    changed = {n: o for n, o in cut.origins.items() if o.part not in ("zeros", "shift", "kept", "reader bias")}

    def weight(origin: Origin, basis: Float[Tensor, "d k"]) -> Tensor:
        """A weight of the narrow model as a function of the basis and the gains."""
        assert origin.source is not None
        if origin.part == "gain":
            return (gains[origin.source] - cut.layout.gain_offset).expand(basis.shape[1])
        whole = cut.third_of(dense.get_parameter(origin.source).detach().to(device, torch.float32), origin.third)
        if origin.part == "writer":
            return basis.T @ whole
        return whole @ cut.right(origin, before.get(origin.norm), basis)

    @torch.no_grad()
    def place(basis: Float[Tensor, "d k"]) -> None:
        for name, origin in changed.items():
            student.get_parameter(name).copy_(weight(origin, basis))

    def backward(ids: Int[Tensor, "b t"]) -> float:
        basis = fitted(raw, cut.layout.centred)
        leaf = basis.detach().requires_grad_()
        place(leaf)
        student.zero_grad(set_to_none=True)
        loss = distance(student, dense, ids)
        for name, origin in changed.items():  # one by one: their graphs would take the memory of the model again
            torch.autograd.backward(weight(origin, leaf), student.get_parameter(name).grad)
        torch.autograd.backward(basis, leaf.grad)
        return loss

    distance_now = looking(student, dense, held_out, schedule.batch)

    @torch.no_grad()
    def look() -> float:
        place(fitted(raw, cut.layout.centred))
        return distance_now()

    points = minimise(
        Goal([raw, *gains.values()], backward, look), training, schedule, store=store, recipe=recipe, announce=announce
    )
    with torch.no_grad():
        basis: Float[Tensor, "d k"] = fitted(raw.double().cpu(), cut.layout.centred)
    learned = {name: gain.detach().double().cpu() for name, gain in gains.items()}
    return replace(cut, basis=basis, gains=learned), points
