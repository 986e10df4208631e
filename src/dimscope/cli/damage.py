"""The command of the study of damage: every kind of change is an option, and texts are shown while they are generated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field, make_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from dimscope.checkpoints import BUILTIN
from dimscope.cli.options import COMMON, Common
from dimscope.cli.studies import run_command, study_help
from dimscope.errors import InvalidArgument
from dimscope.interventions.perturbations import PERTURBATIONS, Perturbation
from dimscope.studies.damage.settings import PRESETS, DamageSettings

if TYPE_CHECKING:
    from rich.table import Table

    from dimscope.studies.damage.run import GenerationProgress
    from dimscope.studies.study import Study

RESCALED = "project-rescaled"
DEFAULT = DamageSettings()
GROUP = Group("Kinds of change (several strengths are separated by commas)", sort_key=1)
RESCALED_OPTION = Parameter(
    negative=(),
    group=GROUP,
    show_default=False,
    help="For every --project, also try the same projection multiplied by d/k.",
)


def damage_command(study: Study) -> Callable[..., None]:
    """Return the command of the study of damage."""
    options = _kind_options()
    none = options()

    def damage(
        model: str = BUILTIN,
        /,
        *,
        kinds: Annotated[Any, Parameter(name="*")] = none,
        rescaled: Annotated[bool, RESCALED_OPTION] = False,
        settings: Annotated[DamageSettings, Parameter(name="*")] = DEFAULT,
        common: Common = COMMON,
    ) -> None:
        requested = {name: getattr(kinds, _field(name)) for name in PERTURBATIONS}
        added = changes_of({name: strengths for name, strengths in requested.items() if strengths}, rescaled=rescaled)
        preset = PRESETS[settings.preset]["changes"] if settings.preset else ()
        other = () if settings.changes == preset else settings.changes  # kinds replace the changes of a preset
        own = replace(settings, changes=(*added, *other)) if added else settings
        run_command(study, model, own, common, _shown(bool(own.prompts) and not common.json))

    damage.__annotations__["kinds"] = Annotated[options, Parameter(name="*")]  # ty: ignore[invalid-type-form]
    damage.__doc__ = study_help(study)
    return damage


def _field(kind: str) -> str:
    return kind.replace("-", "_")


def _kind_options() -> type:
    """Return a dataclass with one option per kind of change."""
    columns = []
    for kind in PERTURBATIONS.values():
        option = Parameter(name=f"--{kind.name}", negative=(), group=GROUP, show_default=False, help=_help(kind))
        columns.append((_field(kind.name), Annotated[tuple[str, ...], option], field(default=())))
    options: Any = Parameter(name="*")(make_dataclass("KindOptions", columns, frozen=True))
    options.__module__ = __name__  # cyclopts takes classes of the standard library, make_dataclass's own, as one value
    return options


def _help(kind: Perturbation) -> str:
    """Return what a kind does, and strengths as an example."""
    examples = {
        "dimensions": "k: 800,600 or 75%,50% of the dimensions", "factor": "Factors: 0.5,2",
        "standard deviations": "Standard deviations: 0.1,1", "bits": "b: 8,4", "": "Strength: on",
    }  # fmt: skip
    return f"{kind.about} {examples[kind.unit]}."


def changes_of(options: Mapping[str, Sequence[str]], *, rescaled: bool) -> tuple[str, ...]:
    """Return changes as KIND:STRENGTH, kind by kind.

    Raises:
        InvalidArgument: `rescaled` without a projection.
    """
    if rescaled and "project" not in options:
        raise InvalidArgument("`rescaled` needs `project`: it rescales those projections")
    if rescaled:
        options = {**options, RESCALED: [*options["project"], *options.get(RESCALED, ())]}
    return tuple(
        f"{kind}:{part.strip()}" for kind, values in options.items() for value in values for part in value.split(",")
    )


@contextmanager
def _shown(enabled: bool) -> Generator[Callable[[GenerationProgress], object] | None]:
    """Show texts while they are generated, beside those of the undamaged model, where there is a terminal."""
    if not (enabled and sys.stdout.isatty()):
        yield None
        return
    from rich.live import Live

    current: list[GenerationProgress] = []
    with Live(auto_refresh=False, transient=False) as live:

        def watch(progress: GenerationProgress) -> None:
            if current and current[-1].change != progress.change:  # the one before stays above
                live.console.print(progress_table(current[-1]))
            current[:] = [progress]
            live.update(progress_table(progress), refresh=True)

        yield watch


def progress_table(progress: GenerationProgress) -> Table:
    """Return the answers to prompts as far as they are generated, beside those of the undamaged model."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from dimscope.units import readable_duration

    left = f" · about {readable_duration(progress.seconds_left)} left" if progress.seconds_left is not None else ""
    title = f"{escape(progress.change)} · {progress.number} of {progress.total}{left}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = [progress.prompts, *([progress.undamaged] if progress.undamaged is not None else []), progress.texts]
    for name in ("prompt", *(["undamaged"] if progress.undamaged is not None else []), progress.change):
        table.add_column(escape(name), overflow="fold", ratio=1 if name == "prompt" else 2)
    for row in zip(*columns, strict=True):
        table.add_row(*map(escape, row))
    return table
