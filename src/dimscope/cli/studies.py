"""The command of a study: its settings are the options."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from dimscope.checkpoints import BUILTIN
from dimscope.cli.options import COMMON, Common, announce, log_stage, text_sources
from dimscope.cli.terminal import Output

if TYPE_CHECKING:
    from dimscope.studies.study import Study, StudyResult


Watch = Callable[..., object]
UNWATCHED = nullcontext()


def study_command(study: Study) -> Callable[..., None]:
    """Return the command that runs a study."""
    default = study.settings()

    def command(
        model: str = BUILTIN,
        /,
        *,
        settings: Annotated[Any, Parameter(name="*")] = default,
        common: Common = COMMON,
    ) -> None:
        run_command(study, model, settings, common)

    command.__name__ = study.name
    command.__doc__ = study_help(study)
    options = Annotated[study.settings, Parameter(name="*")]  # ty: ignore[invalid-type-form]
    command.__annotations__ |= {"settings": options, "model": str, "common": Common}
    return command


def study_help(study: Study) -> str:
    """Return the help of the command of a study."""
    resumes = (
        "With --out: OUT/tables/*.parquet and the page OUT/index.html. An interrupted study resumes when the same command is "
        "run again."
    )
    example = f"\n\nExample: `{study.example}`" if study.example else ""
    return f"{study.question}\n\n{resumes}{example}"


def run_command(
    study: Study, model: str, settings: Any, common: Common, watching: AbstractContextManager[Watch | None] = UNWATCHED
) -> None:
    """Open a model, run a study on it, and print its summary.

    `watching` is open while the study runs, and closed before the summary is printed.
    """
    from dimscope.report import run_studies
    from dimscope.studies.study import Monitor

    source = common.open_source(model)
    own = prepared(settings, common)
    with watching as watch:
        [result] = run_studies(source, {study: own}, common.out, Monitor(announce, log_stage, watch))
    common.print(result_output(result, common))


def prepared(settings: Any, common: Common) -> Any:
    """Return settings with what the options of every command add: opened models, standard input, trust."""
    added: dict[str, Any] = {}
    if hasattr(settings, "texts"):
        added["texts"] = text_sources(settings.texts)
    if hasattr(settings, "trust_remote_code"):
        added["trust_remote_code"] = common.trust_remote_code
    if getattr(settings, "compare", ()):
        added["compare"] = tuple(common.open(other, "main") for other in settings.compare)
    return replace(settings, **added)


def result_output(result: StudyResult, common: Common) -> Output:
    """Return what is printed of a finished study; on request as JSON, whole."""
    facts: dict[str, Any] = {"model" if result.facts.is_model else "vectors": result.facts.name}
    if result.waiting:
        return Output({**facts, "waiting_for_shards": ", ".join(result.waiting), "seconds": result.facts.seconds})
    summary = result.study.load().summarise(result.tables, result.facts)
    page = {} if common.out is None else {"page": common.out / "index.html"}
    facts = {**facts, **page, "seconds": result.facts.seconds}
    rest = {name: table for name, table in result.tables.items() if name in summary.files}
    return Output(facts, summary.frames, files_only=rest, answer=summary.answer)
