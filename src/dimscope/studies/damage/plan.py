"""What a study of damage is asked, and its points: one change of one side with one seed each."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dimscope.errors import InvalidArgument
from dimscope.interventions.insertion import Side
from dimscope.interventions.perturbations import check_strength, find_perturbation
from dimscope.studies.damage.settings import DamageSettings

UNDAMAGED = "undamaged"
LENGTH, WINDOWS = 512, 4  # tokens of a window, and windows, where none are asked for

Step = tuple[str, float]  # the name of a perturbation, and its strength


@dataclass(frozen=True, slots=True)
class Asked:
    """A strength as it was asked for: a number, or a share of the dimensions ("75%"), which the model settles."""

    kind: str
    amount: float
    percent: bool = False

    def settled(self, dim: int) -> Step:
        """The step in `dim` dimensions. Raises InvalidArgument for what the perturbation cannot have there."""
        unit = find_perturbation(self.kind).unit
        if self.percent and unit != "dimensions":
            raise InvalidArgument(f"--{self.kind} takes {unit or 'no strength'}, so {self.amount:g}% has no meaning")
        finite = math.isfinite(self.amount)
        strength = float(round(self.amount / 100 * dim)) if self.percent and finite else self.amount
        check_strength(self.kind, strength, dim)
        return self.kind, strength


def _grid(kinds: Mapping[str, Iterable[float]], *, percent: bool = False) -> tuple[tuple[Asked, ...], ...]:
    return tuple((Asked(kind, amount, percent),) for kind, amounts in kinds.items() for amount in amounts)


_PERCENTS = (87.5, 75.0, 62.5, 50.0, 37.5, 25.0, 12.5)

DEFAULT = (
    *_grid(dict.fromkeys(("truncate", "project", "project-rescaled"), _PERCENTS), percent=True),
    *_grid({"noise": (0.1, 0.5, 1.0, 2.0), "shift": (0.1, 0.5, 1.0, 2.0), "scale": (0.5, 2.0)}),
)
"""What is tried where nothing is asked for."""


@dataclass(frozen=True, slots=True)
class Point:
    """One change of one side with one seed; no steps for the model as it is."""

    steps: tuple[Step, ...] = ()
    side: Side = "input"
    seed: int | None = None  # None where nothing is random

    @property
    def kind(self) -> str:
        return "+".join(name for name, _ in self.steps) or UNDAMAGED

    @property
    def strength(self) -> float | None:
        """Of a single step that has one."""
        name, strength = self.steps[0] if len(self.steps) == 1 else ("", 0.0)
        return strength if name and find_perturbation(name).unit else None

    @property
    def label(self) -> str:
        """As it is shown: "truncate 600", "truncate 600 + noise 0.1"."""
        told = (f"{name} {strength:.10g}" if find_perturbation(name).unit else name for name, strength in self.steps)
        return " + ".join(told) or UNDAMAGED

    @property
    def slug(self) -> str:
        told = json.dumps([self.steps, self.side, self.seed])
        return f"{self.kind.replace('+', '-')}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"

    def kept(self) -> float | None:
        """The number of dimensions that are kept, where the change is of that sort."""
        name, strength = self.steps[0] if len(self.steps) == 1 else ("", 0.0)
        return strength if name and find_perturbation(name).keeps else None


def plan_points(settings: DamageSettings, dims: Mapping[str, int]) -> list[Point]:
    """The undamaged model, then every change with every side and seed; the same one only once.

    `dims` is the width of each table, by "input" and "output". Raises InvalidArgument for unknown perturbations,
    strengths out of range, and a side that the model does not have.
    """
    if missing := [side for side in settings.sides if side != "input" and "output" not in dims]:
        raise InvalidArgument(f"--side {missing[0]}: this model has no output table")
    points = [Point()]
    for side in settings.sides:
        dim = min(dims[table] for table in tables_of(side))
        for chain in tuple(map(parse_change, settings.changes)) or DEFAULT:
            steps = tuple(asked.settled(dim) for asked in chain)
            seeded = any(find_perturbation(name).random for name, _ in steps)
            seeds = range(settings.seed, settings.seed + settings.draws) if seeded else [None]
            points += [Point(steps, side, seed) for seed in seeds]
    return list(dict.fromkeys(points))


def tables_of(side: Side) -> Sequence[Literal["input", "output"]]:
    """The tables that a side is."""
    return ("input", "output") if side == "both" else (side,)


def parse_change(text: str) -> tuple[Asked, ...]:
    """A chain such as "truncate:600+noise:0.1". Raises InvalidArgument for what is none."""
    return tuple(
        parse_strength(name.strip(), strength.strip() or None)
        for name, _, strength in (part.partition(":") for part in text.split("+"))
    )


def parse_strength(kind: str, text: str | None) -> Asked:
    """A strength such as "600" or "75%"; "on", or nothing, for a perturbation without one. Raises InvalidArgument."""
    unit = find_perturbation(kind).unit
    if not unit:
        if text not in (None, "on"):
            raise InvalidArgument(f"{kind} has no strength: --{kind} on, not {text}")
        return Asked(kind, 0.0)
    number = (text or "").removesuffix("%")
    try:
        amount = float(number)
    except ValueError:
        raise InvalidArgument(f"--{kind} takes {unit}, such as 100 or 75%, not {text or 'nothing'!r}") from None
    return Asked(kind, amount, percent=(text or "").endswith("%"))


def facts_of(settings: DamageSettings) -> dict[str, Any]:
    """What the page needs to know of what was asked."""
    return {
        "preset": settings.preset, "draws": settings.draws, "seed": settings.seed, "sides": list(settings.sides),
        "system": settings.system, "decoding": settings.decoding, "new_tokens": settings.new_tokens,
    }  # fmt: skip
