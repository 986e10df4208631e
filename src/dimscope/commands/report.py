"""The command that runs studies and writes the page."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from dimscope.checkpoints import BUILTIN
from dimscope.commands.layers import LAYERS, LayersOptions
from dimscope.commands.options import COMMON, TABLE, Common, TableOptions, announce, check_given, check_seed
from dimscope.errors import InvalidArgument
from dimscope.terminal import Output

if TYPE_CHECKING:
    from dimscope.checkpoints.checkpoint import Checkpoint
    from dimscope.studies.layer_plan import LayersSettings

PROMPT = "Once upon a time"  # which any language model can go on with

ROOM = 128  # tokens that a model must read at once to be asked

Studies = Annotated[
    tuple[Literal["embedding", "layers", "damage", "narrowing"], ...],
    Parameter(name="--with", consume_multiple=True, negative=()),
]


def report(
    model: str = BUILTIN,
    /,
    *,
    with_: Studies = ("embedding",),
    full_knn: Annotated[bool, Parameter(negative=())] = False,
    sample: int = 5000,
    seed: int = 0,
    which: TableOptions = TABLE,
    options: LayersOptions = LAYERS,
    common: Common = COMMON,
) -> None:
    """One self-contained page with every figure, its reading and its caveats, and the tables behind it.

    The page is DIR/index.html, the tables DIR/tables/*.parquet. Finished tables in DIR are used again, so that an interrupted
    report goes on where it stopped, and a second one with another study adds to the page.

    Example: `dimscope report builtin --with embedding layers -o report`

    Parameters
    ----------
    with_
        Studies to run: embedding reads the embedding tables only, layers runs the model on texts, damage runs it with
        changed tables (on prose, unless texts are given; `dimscope damage` has the options), narrowing says what every
        smaller width would cost (`dimscope narrow --plan`).
    full_knn
        Precompute the neighbours of every token for the map, not of a sample. V x V x d work: minutes for 150,000 tokens.
    sample
        Tokens whose neighbours are precomputed.
    seed
        Seed of samples, shuffles and nulls.
    """
    from dimscope.narrowing.layouts import layout_of
    from dimscope.report.run import run_damage, run_layers, run_narrowing, run_report
    from dimscope.studies.damage_plan import DamageSettings
    from dimscope.studies.embedding import EmbeddingSettings
    from dimscope.studies.narrowing_bench import NarrowSettings

    if common.out is None:
        raise InvalidArgument("give the folder of the report: dimscope report MODEL -o DIR")
    check_seed(seed)
    check_given("--with", with_, "studies (embedding, layers, damage, narrowing)")
    if sample < 1:
        raise InvalidArgument(f"--sample is at least 1, not {sample}")
    settings = options.settings(common, seed)
    checkpoint = common.open(model)
    if "narrowing" in with_:
        layout_of(checkpoint)  # refuses a family that is not narrowed now, not after the other studies
    facts = {}
    if "embedding" in with_:
        facts = run_report(
            checkpoint, common.out, EmbeddingSettings(
                side=which.side, sample=sample, full_knn=full_knn, seed=seed, skip_nonfinite=which.skip_nonfinite
            ),
        )[1]  # fmt: skip
    if "layers" in with_:
        facts, _ = run_layers(checkpoint, common.out, settings, (), announce)
    if "damage" in with_:
        asked = replace(DamageSettings(), **_reading(checkpoint, settings, options, common), batch=settings.batch)
        facts, _ = run_damage(checkpoint, common.out, asked, announce)
    if "narrowing" in with_:
        asked = replace(NarrowSettings(), **_reading(checkpoint, settings, options, common))
        facts, _ = run_narrowing(checkpoint, common.out, asked, announce=announce)
    told = {"model": facts["model"], "seconds": facts["seconds"]}
    if waiting := facts.get("waiting"):
        common.print(Output({**told, "waiting_for_shards": ", ".join(waiting)}))
    else:
        common.print(Output({"page": common.out / "index.html", **told}))


def _reading(
    checkpoint: Checkpoint, settings: LayersSettings, options: LayersOptions, common: Common
) -> dict[str, Any]:
    """What the studies that judge are told of what `layers` is asked; the rest is as they have it themselves."""
    from dimscope.studies.reading import context_of

    room = context_of(checkpoint) or ROOM
    given = {
        "texts": settings.texts if options.text else None, "length": settings.length, "dtype": settings.dtype,
        "windows": settings.windows if isinstance(settings.windows, int) else None, "device": settings.device,
        "prompts": (PROMPT,) if room >= ROOM else None, "seed": settings.seed,
        "trust_remote_code": common.trust_remote_code,
    }  # fmt: skip
    return {key: value for key, value in given.items() if value is not None}
