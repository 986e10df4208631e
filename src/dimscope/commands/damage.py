"""The command that damages a model's embedding table and tells what is lost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from dimscope.checkpoints import BUILTIN
from dimscope.commands.options import COMMON, Common, Given, announce, check_given, check_seed, text_sources
from dimscope.errors import InvalidArgument
from dimscope.terminal import Output, writing_table

if TYPE_CHECKING:
    from dimscope.studies.damage import Writing
    from dimscope.studies.damage_plan import Asked, DamageSettings

RESCALED = "project-rescaled"


@Parameter(name="*")
@dataclass(frozen=True)
class DamageOptions:
    """Options of the study of damage, beside the changes themselves."""

    chain: Given = None
    "Changes one after the other, such as truncate:75%+noise:0.1."
    rescaled: Annotated[bool, Parameter(negative=())] = False
    "Rescale every --project by d/k too."
    side: Annotated[
        tuple[Literal["input", "output", "both"], ...] | None, Parameter(consume_multiple=True, negative=())
    ] = None
    "Which table is changed; one side of a tied model leaves the other as it is (input)."
    seeds: int | None = None
    "Draws of what is random (3)."
    text: Given = None
    "Texts to judge on: files, folders, FILE.parquet:COLUMN, URLs, -, builtin:prose (default), or generated: the model's own."
    windows: int | None = None
    "Windows of each text, spread evenly over it (4, or as many as it has)."
    length: int | None = None
    "Tokens of a window; by default the context of the model, 512 at most."
    from_start: Annotated[bool, Parameter(negative=())] = False
    "Windows from the beginning of the text on, not spread over it."
    prompt: Given = None
    "Prompts that the model answers after every change."
    system: str | None = None
    "System prompt, for a model with a chat template."
    chat: Annotated[bool | None, Parameter(negative="--plain")] = None
    "Put prompts into the model's chat template, or give them as they are (the template, where there is one)."
    decoding: Literal["greedy", "sample", "model"] | None = None
    "greedy, sample from the model's own distribution, or model: as its generation config has it (greedy)."
    new_tokens: int | None = None
    "Tokens of an answer at most (64)."
    text_seeds: int | None = None
    "Draws for which the prompts are answered (1)."
    token_errors: Annotated[bool, Parameter(negative=())] = False
    "The error of every token as a table too: V rows for each change."
    batch: int | None = None
    "Windows at once."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    "What to compute in; auto is float32 on a CPU where that fits, else as stored."
    device: str | None = None
    "auto, cpu, cuda, cuda:1, mps, or map: spread over all devices by accelerate."
    preset: Literal["notebook"] | None = None
    "notebook: the changes and prompts of the original notebook, as shares of the dimensions; other options go on top."

    def settings(self, changes: Mapping[str, Sequence[str]], common: Common, seed: int) -> DamageSettings:
        """What the study is asked. Raises InvalidArgument for what does not make sense whatever the model."""
        from dimscope.studies.damage_plan import DamageSettings, notebook_settings

        check_seed(seed)
        for option, values, what in (
            ("--text", self.text, "texts"), ("--prompt", self.prompt, "prompts"), ("--chain", self.chain, "changes"),
            ("--side", self.side, "input, output or both"),
        ):  # fmt: skip
            check_given(option, values, what)
        for name in ("seeds", "windows", "new_tokens", "text_seeds", "batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InvalidArgument(f"--{name.replace('_', '-')} is at least 1, not {value}")
        base = notebook_settings() if self.preset == "notebook" else DamageSettings()
        asked = _changes(changes, self.chain or (), self.rescaled)
        if self.system is not None and self.chat is False:
            raise InvalidArgument("--system goes into a chat template, and --plain leaves that out")
        wanted = True if self.system is not None else self.chat
        template = None if wanted is None else "chat" if wanted else "plain"
        decoding = replace(base.decoding, seed=seed)
        if self.decoding is not None:
            decoding = replace(decoding, method=self.decoding)
        if self.new_tokens is not None:
            decoding = replace(decoding, max_new_tokens=self.new_tokens)
        given = {
            "changes": asked or None, "sides": self.side, "seeds": self.seeds, "texts": text_sources(self.text),
            "windows": self.windows, "length": self.length, "from_start": self.from_start or None,
            "prompts": self.prompt, "system": self.system, "template": template, "text_seeds": self.text_seeds,
            "token_errors": self.token_errors or None, "batch": self.batch, "dtype": self.dtype, "device": self.device,
        }  # fmt: skip
        chosen = {key: value for key, value in given.items() if value is not None}
        return replace(base, **chosen, decoding=decoding, seed=seed, trust_remote_code=common.trust_remote_code)


DAMAGE = DamageOptions()


def damage(
    model: str = BUILTIN,
    /,
    *,
    kinds: Annotated[bool, Parameter(negative=())] = False,
    seed: int = 0,
    options: DamageOptions = DAMAGE,
    common: Common = COMMON,
    **changes: Annotated[tuple[str, ...], Parameter(negative=())],
) -> None:
    """What the model loses when its embedding table loses dimensions, or is changed otherwise.

    Every kind of change is an option that takes strengths: --truncate 800,600 or --truncate 75%, --project, --noise,
    --scale and more; --kinds lists them all. Without any, a sweep of the common ones. With --out: DIR/tables/*.parquet and
    the page DIR/index.html; an interrupted study goes on where it stopped when the same command is given again.

    Example: `dimscope damage builtin --truncate 75%,50% --project 75% --rescaled --noise 0.1,1 --prompt 'Once upon a time' -o damage`

    Parameters
    ----------
    kinds
        List the kinds of change, what their strength is, and stop.
    seed
        Seed of random changes, sampled texts and samples of rows.
    changes
        A kind of change and its strengths, with commas between them.
    """
    if kinds:
        common.show(_kinds())
        return
    import polars as pl

    from dimscope.report.run import run_damage
    from dimscope.studies.damage_claims import UNTESTED
    from dimscope.studies.damage_measures import summary_frame

    settings = options.settings(changes, common, seed)
    checkpoint = common.open(model)
    with common.folder() as directory, _shown(bool(settings.prompts) and not common.json) as watch:
        facts, tables = run_damage(checkpoint, directory, settings, announce, watch)
    told = {"model": facts["model"], "seconds": facts["seconds"]}
    told |= {} if common.out is None else {"page": common.out / "index.html"}
    summary, claims = summary_frame(tables["damage"]), tables.get("claims")
    # What is the same in a whole table goes into its title.
    parts = [summary] if common.json else summary.partition_by("on", maintain_order=True)
    frames: dict[str, pl.DataFrame | None] = {
        "summary" if n == 0 else f"summary {n + 1}": part for n, part in enumerate(parts)
    }
    claims = None if claims is None else claims.filter(pl.col("verdict") != UNTESTED)
    frames |= {"breaking": tables.get("breaking"), "claims": claims}
    if "generations" in tables:
        told_of = ("prompt", "change", "side", "seed", "text", "n_same", "repetition")
        frames["texts"] = tables["generations"].select(*told_of)
    rest = {name: tables[name] for name in ("damage", "operator") if name in tables}
    shown = {name: frame for name, frame in frames.items() if frame is not None and frame.height}
    common.print(Output(told, shown, files_only=rest))


def _kinds() -> Output:
    import polars as pl

    from dimscope.interventions.perturbations import PERTURBATIONS

    rows = [
        {"option": f"--{p.name}", "strength": p.strength or "on", "random": p.random, "about": p.about}
        for p in PERTURBATIONS.values()
    ]
    return Output({}, {"kinds": pl.DataFrame(rows)})


def _changes(
    given: Mapping[str, Sequence[str]], chains: Sequence[str], rescaled: bool
) -> tuple[tuple[Asked, ...], ...]:
    """The changes that were asked for. Raises InvalidArgument for an option that is none."""
    from dimscope.interventions.perturbations import PERTURBATIONS
    from dimscope.studies.damage_plan import parse_change, parse_strength

    if unknown := [kind for kind in given if kind not in PERTURBATIONS]:
        raise InvalidArgument(
            f"there is no option or kind of change --{unknown[0]}; kinds are {', '.join(PERTURBATIONS)} (dimscope damage --kinds)"
        )
    if rescaled and "project" not in given:
        raise InvalidArgument("--rescaled goes with --project: it rescales what that projects")
    if rescaled:
        given = {**given, RESCALED: [*given["project"], *given.get(RESCALED, ())]}
    strengths = {kind: [part for value in values for part in value.split(",")] for kind, values in given.items()}
    single = [(parse_strength(kind, part.strip()),) for kind, parts in strengths.items() for part in parts]
    return (*single, *map(parse_change, chains))


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
