"""Changes as they are requested: "truncate:75%+noise:0.1". Imports no torch."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dimscope.errors import InvalidArgument
from dimscope.interventions.perturbations import check_strength, find_perturbation

Step = tuple[str, float]  # the name of a perturbation, and its strength


@dataclass(frozen=True, slots=True)
class RequestedStep:
    """A perturbation with a strength as it was requested: a number, or a percentage of the dimensions of a model.

    Attributes:
        kind: Name of the perturbation.
        amount: The number before the unit or the percent sign.
        percent: Whether it is a percentage.
    """

    kind: str
    amount: float
    percent: bool = False

    def resolve(self, dim: int) -> Step:
        """Return the step for a table of `dim` dimensions.

        Raises:
            InvalidArgument: The strength is out of range there, or a percentage has no meaning for this perturbation.
        """
        unit = find_perturbation(self.kind).unit
        if self.percent and unit != "dimensions":
            raise InvalidArgument(f"{self.kind} takes {unit or 'no strength'}, so {self.amount:g}% has no meaning")
        finite = math.isfinite(self.amount)
        strength = float(round(self.amount / 100 * dim)) if self.percent and finite else self.amount
        check_strength(self.kind, strength, dim)
        return self.kind, strength


def parse_change(change: str) -> tuple[RequestedStep, ...]:
    """Return the steps of a change.

    >>> [(step.kind, step.amount, step.percent) for step in parse_change("truncate:75%+noise:0.1")]
    [('truncate', 75.0, True), ('noise', 0.1, False)]

    Raises:
        InvalidArgument: A step is no perturbation, or its strength no number.
    """
    parts = (part.partition(":") for part in change.split("+"))
    return tuple(parse_step(name.strip(), strength.strip() or None) for name, _, strength in parts)


def parse_step(kind: str, strength: str | None) -> RequestedStep:
    """Return a step from a strength such as "600" or "75%"; "on", or None, for a perturbation without one.

    Raises:
        InvalidArgument: There is no such perturbation, or it does not take this strength.
    """
    unit = find_perturbation(kind).unit
    if not unit:
        if strength not in (None, "on"):
            raise InvalidArgument(f"{kind} has no strength: pass {kind}:on, got {strength!r}")
        return RequestedStep(kind, 0.0)
    try:
        amount = float((strength or "").removesuffix("%"))
    except ValueError:
        example = "100 or 75%" if unit == "dimensions" else "4" if unit == "bits" else "0.5"
        raise InvalidArgument(f"{kind} takes {unit}, such as {example}, got {strength or 'nothing'!r}") from None
    return RequestedStep(kind, amount, percent=(strength or "").endswith("%"))


def _grid(kinds: Mapping[str, Iterable[float]], *, percent: bool = False) -> tuple[tuple[RequestedStep, ...], ...]:
    return tuple((RequestedStep(kind, amount, percent),) for kind, amounts in kinds.items() for amount in amounts)


_PERCENTS = (87.5, 75.0, 62.5, 50.0, 37.5, 25.0, 12.5)

DEFAULT_CHANGES = (
    *_grid(dict.fromkeys(("truncate", "project", "project-rescaled"), _PERCENTS), percent=True),
    *_grid({"noise": (0.1, 0.5, 1.0, 2.0), "shift": (0.1, 0.5, 1.0, 2.0), "scale": (0.5, 2.0)}),
)
"""What is tried where no change is requested."""
