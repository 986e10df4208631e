"""The command of the study of damage: every kind of change is an option, and texts are shown as they are written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from dimscope.checkpoints import BUILTIN
from dimscope.cli.options import COMMON, Common
from dimscope.cli.studies import run_command, study_help
from dimscope.cli.terminal import Output, writing_table
from dimscope.errors import InvalidArgument
from dimscope.studies.damage.settings import DamageSettings

if TYPE_CHECKING:
    from dimscope.studies.damage.run import Writing
    from dimscope.studies.study import Study

RESCALED = "project-rescaled"
DEFAULT = DamageSettings()


def damage_command(study: Study) -> Callable[..., None]:
    """Return the command of the study of damage."""

    def damage(
        model: str = BUILTIN,
        /,
        *,
        kinds: Annotated[bool, Parameter(negative=())] = False,
        rescaled: Annotated[bool, Parameter(negative=())] = False,
        settings: Annotated[DamageSettings, Parameter(name="*")] = DEFAULT,
        common: Common = COMMON,
        **changes: Annotated[tuple[str, ...], Parameter(negative=())],
    ) -> None:
        if kinds:
            common.show(_kinds())
            return
        added = changes_of(changes, rescaled=rescaled)
        own = replace(settings, changes=(*added, *settings.changes)) if added else settings
        with _shown(bool(own.prompts) and not common.json) as watch:
            run_command(study, model, own, common, watch)

    damage.__doc__ = f"""{study_help(study)}

    Parameters
    ----------
    kinds
        List the kinds of change and the unit of their strength, and stop.
    rescaled
        Rescale every --project by d/k too.
    changes
        A kind of change and its strengths, with commas between them: --truncate 800,600 or --truncate 75%.
    """
    return damage


def _kinds() -> Output:
    import polars as pl

    from dimscope.interventions.perturbations import PERTURBATIONS

    rows = [
        {"option": f"--{p.name}", "strength": p.unit or "on", "random": p.random, "about": p.about}
        for p in PERTURBATIONS.values()
    ]
    return Output({}, {"kinds": pl.DataFrame(rows)})


def changes_of(options: Mapping[str, Sequence[str]], *, rescaled: bool) -> tuple[str, ...]:
    """Return changes as KIND:STRENGTH. Raises InvalidArgument for an option that is no kind of change."""
    from dimscope.interventions.perturbations import PERTURBATIONS

    if unknown := [kind for kind in options if kind not in PERTURBATIONS]:
        raise InvalidArgument(
            f"there is no option or kind of change --{unknown[0]}; kinds are {', '.join(PERTURBATIONS)} (dimscope damage --kinds)"
        )
    if rescaled and "project" not in options:
        raise InvalidArgument("--rescaled goes with --project: it rescales what that projects")
    if rescaled:
        options = {**options, RESCALED: [*options["project"], *options.get(RESCALED, ())]}
    return tuple(
        f"{kind}:{part.strip()}" for kind, values in options.items() for value in values for part in value.split(",")
    )


@contextmanager
def _shown(wanted: bool) -> Generator[Callable[[Writing], object] | None]:
    """Shows texts as they are written, beside those of the undamaged model, where there is a terminal."""
    if not (wanted and sys.stdout.isatty()):
        yield None
        return
    from rich.live import Live

    current: list[Writing] = []
    with Live(auto_refresh=False, transient=False) as live:

        def watch(writing: Writing) -> None:
            if current and current[-1].change != writing.change:  # the one before stays above
                live.console.print(writing_table(current[-1]))
            current[:] = [writing]
            live.update(writing_table(writing), refresh=True)

        yield watch
