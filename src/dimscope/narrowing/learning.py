"""A learned basis: the directions to keep are trained by forward KL to the dense model.

The basis P = qr(A) and the gains of the norms are trained; every other weight stays a fixed function of P, so that the
result is still one orthonormal map, and its checkpoint a standard one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.checkpoints.model import Placement
from dimscope.narrowing.assembly import narrow_model
from dimscope.narrowing.bases import directions_of, orthonormal
from dimscope.narrowing.conversion import Origin
from dimscope.narrowing.projection import Narrowing
from dimscope.narrowing.training import (
    UNRECORDED,
    Objective,
    Progress,
    Schedule,
    TrainingWindows,
    held_out_evaluator,
    kl_divergence,
    minimise,
)
from dimscope.narrowing.training_state import Point

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RATE = 5e-3  # of Adam
FIXED = ("zeros", "shift", "kept", "reader bias")  # parts that do not depend on the basis


@dataclass(frozen=True, slots=True)
class LearnedBasis:
    """The narrowing with the basis and gains that predict held-out text best, and the evaluations on the way."""

    narrowing: Narrowing
    points: list[Point]


@dataclass(frozen=True, slots=True, eq=False)
class _Student:
    """A narrow model whose weights are functions of a basis and of the gains of its norms.

    Attributes:
        narrowing: Where the weights come from.
        dense: The dense model.
        model: The narrow model, in float32.
        directions: What is trained, and `orthonormal` makes the basis from.
        gains: What is trained beside it, by norm of the dense model.
        folded: The gain of each norm of the dense model, which is multiplied into the weights behind it.
        origins: The parameters that depend on the basis or on a gain, with their origins.
    """

    narrowing: Narrowing
    dense: PreTrainedModel
    model: PreTrainedModel
    directions: Float[Tensor, "d _"]
    gains: Mapping[str, Tensor]
    folded: Mapping[str | None, Float[Tensor, " d"]]
    origins: Mapping[str, Origin]

    @property
    def centred(self) -> bool:
        """Whether the norms take out the mean."""
        return self.narrowing.layout.centred


def learn_basis(
    dense: PreTrainedModel,
    narrowing: Narrowing,
    windows: TrainingWindows,
    schedule: Schedule,
    placement: Placement,
    progress: Progress = UNRECORDED,
) -> LearnedBasis:
    """Train the basis and the gains of a narrowing, from those it has, towards the predictions of the dense model.

    Args:
        dense: The dense model, which is not changed.
        narrowing: What to begin with.
        windows: To train on, and to choose the best on.
        schedule: How long and how fast.
        placement: The device.
        progress: Where the state is kept, and who follows.

    Source: P as the Q of a QR, a retraction of the Stiefel manifold (Absil, Mahony, Sepulchre, Optimization Algorithms on
    Matrix Manifolds, 2008, 4.1.1), trained without constraints.
    """
    student = _student(dense, narrowing, placement)
    kl_now = held_out_evaluator(student.model, dense, windows.held_out, schedule.batch)

    @torch.no_grad()
    def held_out() -> float:
        _set_weights(student, orthonormal(student.directions, student.centred))
        return kl_now()

    leaves = [student.directions, *student.gains.values()]
    objective = Objective(leaves, lambda ids: _backward(student, ids), held_out)
    points = minimise(objective, windows.training, schedule, progress)
    with torch.no_grad():
        basis: Float[Tensor, "d k"] = orthonormal(student.directions.double().cpu(), student.centred)
    gains = {name: gain.detach().double().cpu() for name, gain in student.gains.items()}
    return LearnedBasis(replace(narrowing, basis=basis, gains=gains), points)


def _student(dense: PreTrainedModel, narrowing: Narrowing, placement: Placement) -> _Student:
    model = narrow_model(narrowing, Placement("float32", placement.device))
    device, origins = next(model.parameters()).device, narrowing.origins

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().to(device, torch.float32).requires_grad_()

    usual = torch.tensor(narrowing.usual_gain)
    norms = [o.source for o in origins.values() if o.part == "gain" and o.source is not None]
    folded = {o.norm: gain for o in origins.values() if (gain := narrowing.gain_before(o)) is not None}
    return _Student(
        narrowing,
        dense,
        model,
        directions=leaf(directions_of(narrowing.basis, narrowing.layout.centred)),
        gains={name: leaf(narrowing.gains.get(name, usual)) for name in norms},
        folded={norm: gain.to(device, torch.float32) for norm, gain in folded.items()},
        origins={name: origin for name, origin in origins.items() if origin.part not in FIXED},
    )


def _weight(student: _Student, origin: Origin, basis: Float[Tensor, "d k"]) -> Tensor:
    """Return a weight of the narrow model as a function of the basis and the gains."""
    assert origin.source is not None
    narrowing = student.narrowing
    if origin.part == "gain":
        return (student.gains[origin.source] - narrowing.layout.gain_offset).expand(basis.shape[1])
    stored = student.dense.get_parameter(origin.source).detach().to(basis.device, torch.float32)
    whole = narrowing.third_of(stored, origin.third)
    if origin.part == "writer":
        return basis.T @ whole
    return whole @ narrowing.right(origin, student.folded.get(origin.norm), basis)


@torch.no_grad()
def _set_weights(student: _Student, basis: Float[Tensor, "d k"]) -> None:
    for name, origin in student.origins.items():
        student.model.get_parameter(name).copy_(_weight(student, origin, basis))


def _backward(student: _Student, ids: Int[Tensor, "b t"]) -> float:
    """Leave the gradients of the KL in the directions and the gains, and return the KL.

    The chain rule in three steps: the KL to the weights, the weights to the basis and the gains, the basis to the directions.
    """
    basis = orthonormal(student.directions, student.centred)
    leaf = basis.detach().requires_grad_()
    _set_weights(student, leaf)
    student.model.zero_grad(set_to_none=True)
    kl = kl_divergence(student.model, student.dense, ids)
    for name, origin in student.origins.items():  # one by one: all graphs would take the memory of the model again
        torch.autograd.backward(_weight(student, origin, leaf), student.model.get_parameter(name).grad)
    torch.autograd.backward(basis, leaf.grad)
    return kl
