"""The points of a study of damage: one change of one side with one seed each."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dimscope.errors import InvalidArgument
from dimscope.interventions.insertion import Side
from dimscope.interventions.perturbations import find_perturbation
from dimscope.studies.damage.changes import DEFAULT_CHANGES, Step, parse_change
from dimscope.studies.damage.settings import DamageSettings

UNDAMAGED = "undamaged"
Table = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Point:
    """One change of one side with one seed.

    Attributes:
        steps: Perturbations in their order; none for the undamaged model.
        side: The table that is changed.
        seed: The seed; None where nothing is random.
    """

    steps: tuple[Step, ...] = ()
    side: Side = "input"
    seed: int | None = None

    @property
    def kind(self) -> str:
        """Return the names of the perturbations with + between them."""
        return "+".join(name for name, _ in self.steps) or UNDAMAGED

    @property
    def strength(self) -> float | None:
        """Return the strength of a single perturbation that has one."""
        name, strength = self.steps[0] if len(self.steps) == 1 else ("", 0.0)
        return strength if name and find_perturbation(name).unit else None

    @property
    def unit(self) -> str | None:
        """Return the unit of the strength."""
        return None if self.strength is None else find_perturbation(self.steps[0][0]).unit

    @property
    def n_kept(self) -> float | None:
        """Return the number of dimensions that a single perturbation keeps; None for those that drop none."""
        return self.strength if self.strength is not None and find_perturbation(self.kind).keeps else None

    @property
    def label(self) -> str:
        """Return the change for readers: "truncate 600", "truncate 600 + noise 0.1"."""
        steps = (f"{name} {strength:.10g}" if find_perturbation(name).unit else name for name, strength in self.steps)
        return " + ".join(steps) or UNDAMAGED

    @property
    def slug(self) -> str:
        """Return a name for files."""
        content = json.dumps([self.steps, self.side, self.seed])
        return f"{self.kind.replace('+', '-')}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    @property
    def tables(self) -> Sequence[Table]:
        """Return the tables that are changed; none of the undamaged model."""
        return tables_of(self.side) if self.steps else ()


def tables_of(side: Side) -> Sequence[Table]:
    """Return the tables of a side."""
    return ("input", "output") if side == "both" else (side,)


def plan_points(settings: DamageSettings, dims: Mapping[str, int]) -> list[Point]:
    """Return the undamaged model, then every change with every side and seed, each once.

    Args:
        settings: The settings of the study.
        dims: The width of each table, by "input" and "output".

    Raises:
        InvalidArgument: A strength is out of range, or the model does not have a side.
    """
    if missing := [side for side in settings.sides if side != "input" and "output" not in dims]:
        raise InvalidArgument(f"`sides` must be input for a model without an output table, got {missing[0]}")
    points = [Point()]
    for side in settings.sides:
        dim = min(dims[table] for table in tables_of(side))
        for change in tuple(map(parse_change, settings.changes)) or DEFAULT_CHANGES:
            steps = tuple(step.resolve(dim) for step in change)
            seeded = any(find_perturbation(name).random for name, _ in steps)
            seeds = range(settings.seed, settings.seed + settings.draws) if seeded else [None]
            points += [Point(steps, side, seed) for seed in seeds]
    return list(dict.fromkeys(points))
