"""The command that runs studies and writes the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from dimscope.checkpoints import BUILTIN
from dimscope.cli.options import COMMON, Common, announce, log_stage
from dimscope.cli.studies import prepared
from dimscope.cli.terminal import Output
from dimscope.errors import InvalidArgument
from dimscope.studies.options import DType

if TYPE_CHECKING:
    from dimscope.checkpoints.checkpoint import Checkpoint
    from dimscope.studies.study import Study
    from dimscope.vectors.table import VectorTable


@Parameter(name="*")
@dataclass(frozen=True)
class Shared:
    """Options that every chosen study with such a setting gets."""

    side: Literal["input", "output"] | None = None
    "Which embedding table leads [default: input]."
    skip_nonfinite: Annotated[bool | None, Parameter(negative=())] = None
    "Leave out rows with NaN or Inf instead of refusing the table."
    texts: Annotated[tuple[str, ...] | None, Parameter(name="--text", consume_multiple=True, negative=())] = None
    "Texts for the studies that run the model [default: each study's own]."
    keep_line_ends: Annotated[bool | None, Parameter(negative=())] = None
    "Keep CRLF and CR line ends of the texts, which are read as LF otherwise."
    windows: int | None = None
    "Windows per text, for the studies that run the model [default: each study's own]."
    length: int | None = None
    "Tokens per window, for the studies that run the model [default: each study's own]."
    prompts: Annotated[tuple[str, ...] | None, Parameter(name="--prompt", consume_multiple=True, negative=())] = None
    "Prompts for damage and narrowing [default: 'Once upon a time', where the model reads 128 tokens]."
    dtype: DType | None = None
    "Dtype of the computation, for the studies that run the model [default: auto]."
    device: str | None = None
    "Device, for the studies that run the model: auto, cpu, cuda, cuda:1 or mps [default: auto]."
    seed: int | None = None
    "Random seed of every study [default: 0]."


SHARED = Shared()
PROMPT = "Once upon a time"  # which any language model can continue
PROMPT_TOKENS = 128  # tokens that a model must read at once for a prompt and its continuation


def report_command(listed: Sequence[Study]) -> Callable[..., None]:
    """Return the command that runs several studies into one page."""
    options = study_options(listed)
    defaults = options()
    names = tuple(study.name for study in listed)
    chosen = Annotated[tuple[Literal[names], ...], Parameter(consume_multiple=True, negative=())]  # ty: ignore[invalid-type-form]

    def report(
        model: str = BUILTIN,
        /,
        *,
        studies: Annotated[Any, chosen] = names[:1],
        shared: Shared = SHARED,
        own: Annotated[Any, options] = defaults,
        common: Common = COMMON,
    ) -> None:
        if common.out is None:
            raise InvalidArgument("`out` is required: dimscope report MODEL -o DIR")
        if not studies:
            raise InvalidArgument(f"`studies` takes one or more of {', '.join(names)}, got none")
        _run({study: getattr(own, study.name) for study in listed if study.name in studies}, shared, model, common)

    report.__doc__ = HELP
    report.__annotations__ |= {"studies": chosen, "own": options, "shared": Shared, "common": Common, "model": str}
    return report


HELP = """Write one self-contained page with every figure, its reading and its caveats, and the tables behind it.

The page is OUT/index.html, the tables OUT/tables/*.parquet. Finished tables in OUT are reused, so that an interrupted
report resumes, and a second one with another study adds to the page. Every option of a study can be set as
--STUDY.OPTION, such as --layers.shuffles 2 or --embedding.full-knn; `dimscope STUDY --help` lists them.

Example: `dimscope report builtin --studies embedding layers -o report`

Parameters
----------
studies
    Studies to run.
"""


def study_options(studies: Sequence[Study]) -> Any:
    """Return a dataclass with --STUDY.OPTION for every setting of every study."""
    columns = []
    for study in studies:
        kind = Annotated[study.settings, Parameter(show=False)]  # ty: ignore[invalid-type-form]
        columns.append((study.name, kind, field(default=study.settings())))
    options: Any = Parameter(name="*")(make_dataclass("StudyOptions", columns, frozen=True))
    options.__module__ = __name__  # cyclopts takes classes of the standard library, make_dataclass's own, as one value
    return options


def with_shared(settings: Any, shared: Shared) -> Any:
    """Return settings with the shared options that were set, as far as the study has them."""
    own = {f.name for f in fields(settings)}
    values = {f.name: getattr(shared, f.name) for f in fields(shared)}
    return replace(settings, **{name: value for name, value in values.items() if value is not None and name in own})


def _run(settings: Mapping[Study, Any], shared: Shared, model: str, common: Common) -> None:
    from dimscope.report import run_studies
    from dimscope.studies.study import Monitor

    assert common.out is not None, "report() sees to it"
    source = common.open_source(model)
    if shared.prompts is None and _runs_model(settings) and _reads_prompts(source):
        shared = replace(shared, prompts=(PROMPT,))
    own = {study: prepared(with_shared(chosen, shared), common) for study, chosen in settings.items()}
    results = run_studies(source, own, common.out, Monitor(announce, log_stage))
    facts: dict[str, Any] = {"model": source.name}
    waiting = [shard for result in results for shard in result.waiting]
    facts |= {"waiting_for_shards": ", ".join(waiting)} if waiting else {"page": common.out / "index.html"}
    common.print(Output({**facts, "seconds": round(sum(result.facts.seconds or 0.0 for result in results), 1)}))


def _reads_prompts(source: Checkpoint | VectorTable) -> bool:
    """Return whether this is a model that reads a prompt and its continuation at once."""
    from dimscope.checkpoints.checkpoint import Checkpoint
    from dimscope.studies.reading import context_of

    return isinstance(source, Checkpoint) and (context_of(source) or PROMPT_TOKENS) >= PROMPT_TOKENS


def _runs_model(settings: Mapping[Study, Any]) -> bool:
    return any(hasattr(chosen, "prompts") for chosen in settings.values())
