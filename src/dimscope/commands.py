"""One function per command: options in, one call into the library, frames out to the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import polars as pl
from cyclopts import Parameter

from dimscope.checkpoints import BUILTIN
from dimscope.errors import InvalidArgument
from dimscope.results import check_folder
from dimscope.terminal import Output, print_json, print_tables, write

if TYPE_CHECKING:
    from dimscope.checkpoints.checkpoint import Checkpoint
    from dimscope.representations.embedding import EmbeddingTable

Side = Literal["input", "output"]


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """Options of every command."""

    revision: str | None = None
    "Branch, tag or commit of a model on the hub."
    side: Side = "input"
    "Which table: the input embeddings, or the output embeddings of an untied model."
    json: Annotated[bool, Parameter(negative=())] = False
    "Print JSON, and nothing else, on standard output."
    out: Annotated[Path | None, Parameter(alias="-o")] = None
    "Folder to write the tables to, as Parquet."
    limit: int = 40
    "Rows of each table to print."
    skip_nonfinite: Annotated[bool, Parameter(negative=())] = False
    "Leave out rows with NaN or Inf instead of refusing the table."
    allow_pickle: Annotated[bool, Parameter(negative=())] = False
    "Read pickle weights. They can run code on this machine when loaded."
    trust_remote_code: Annotated[bool, Parameter(negative=())] = False
    "Run the Python code that comes with the model. It can do anything that you can."

    def open(self, model: str) -> Checkpoint:
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

        from dimscope.checkpoints.checkpoint import open_checkpoint

        if self.out is not None:
            check_folder(self.out)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        hub_logging.set_verbosity_error()
        return open_checkpoint(
            model, revision=self.revision, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code
        )

    def table(self, checkpoint: Checkpoint) -> EmbeddingTable:
        from dimscope.representations.embedding import open_table

        return open_table(checkpoint, self.side, skip_nonfinite=self.skip_nonfinite)

    def show(self, output: Output) -> None:
        if self.out is not None:
            write(output, self.out)
        if self.json:
            print_json(output)
        else:
            print_tables(output, self.limit)


DEFAULT = Common()


def inspect(model: str = BUILTIN, /, *, common: Common = DEFAULT) -> None:
    """What the model is made of: every tensor with shape, dtype, bytes, block and role. Reads no weights.

    Example: `dimscope inspect Qwen/Qwen2.5-0.5B`
    """
    from dimscope.checkpoints.budget import embedding_share, parameter_budget

    checkpoint = common.open(model)
    budget = parameter_budget(checkpoint)
    roles = budget.group_by("role").agg(pl.len().alias("tensors"), pl.sum("n_parameters"), pl.sum("n_bytes"))
    roles = roles.with_columns(share=pl.col("n_parameters") / pl.col("n_parameters").sum()).sort(
        "n_parameters", descending=True
    )
    facts = {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "architecture": checkpoint.architecture,
        "vocab_size": checkpoint.input_table.shape[0],
        "hidden_size": checkpoint.input_table.shape[1],
        "tied": checkpoint.tied,
        "n_parameters": int(budget["n_parameters"].sum()),
        "embedding_share": embedding_share(budget),
    }
    common.show(Output(facts, {"roles": roles, "tensors": budget}))


def tokens(
    model: str = BUILTIN,
    /,
    *,
    untrained: Annotated[bool, Parameter(negative=())] = False,
    duplicates: Annotated[bool, Parameter(negative=())] = False,
    vectors: Annotated[bool, Parameter(negative=())] = False,
    common: Common = DEFAULT,
) -> None:
    """Every row of the table: id, label, bytes, category, norm, under-trained score, duplicate group.

    Example: `dimscope tokens builtin --untrained`

    Parameters
    ----------
    untrained
        Only the rows that training hardly touched, nearest to the untrainable ones first, each with the reason.
    duplicates
        Only the rows that have near-duplicates, by group.
    vectors
        With --out: each token's vector too, as a fixed-size array column.
    """
    from dimscope.studies.embedding import token_table

    if vectors and common.out is None:
        raise InvalidArgument("--vectors goes with --out: vectors are written to Parquet, not printed")
    checkpoint = common.open(model)
    table = common.table(checkpoint)
    frame, groups = token_table(checkpoint, table, duplicates=duplicates)
    counts = {"rows": table.n_rows, **dict(frame.group_by("category").len().sort("len", descending=True).iter_rows())}
    if untrained:
        frame = frame.filter("untrained").sort("untrained_score")
    if duplicates:
        frame = frame.join(groups, on=["id", "label", "category"], maintain_order="left").sort("group", "id")
    if vectors:
        frame = frame.with_columns(
            vector=pl.Series(table.rows(_tensor(frame["id"])).numpy(), dtype=pl.Array(pl.Float32, table.dim))
        )
    hidden = ["piece", "bytes", "vector", *(c for c in frame.columns if c.startswith("pc"))]
    hidden += ["untrained", "reason"] if untrained else ["untrained_reason"]
    common.show(
        Output(
            {"model": checkpoint.name, "side": common.side, **counts, "shown": len(frame)}, {"tokens": frame}, hidden
        )
    )


def neighbors(
    *query: str,
    k: Annotated[int, Parameter(name=["-k", "--k"])] = 20,
    metric: Literal["cosine", "centred cosine", "euclidean"] = "cosine",
    components: int | None = None,
    combine: Literal["mean", "sum"] = "mean",
    common: Common = DEFAULT,
) -> None:
    """The nearest tokens of each query, in all dimensions and in the first components beside them.

    `dimscope neighbors MODEL QUERY ...`; with one argument it is the query, and the model is builtin. A query is a text
    (' water', with its leading space), an id ('#3015'), a phrase, or an expression ('king - man + woman').

    Example: `dimscope neighbors builtin ' water' ' king - man + woman'`

    Parameters
    ----------
    query
        MODEL and queries.
    k
        How many neighbours.
    metric
        How near is measured.
    components
        The projection shown beside all dimensions, 10 by default; 0 leaves it out.
    combine
        How the tokens of a phrase are combined. The sum grows with their number.
    """
    from dimscope.studies.lookup import neighbor_tables

    if not query:
        raise InvalidArgument("give a query: dimscope neighbors MODEL ' water'")
    model, texts = (query[0], query[1:]) if len(query) > 1 else (BUILTIN, query)
    if k < 1:
        raise InvalidArgument(f"-k counts neighbours: at least 1, not {k}")
    checkpoint = common.open(model)
    frames = neighbor_tables(
        checkpoint, common.table(checkpoint), texts, k=k, metric=metric, components=components, combine=combine
    )
    facts = {"model": checkpoint.name, "side": common.side, "metric": metric, "combine": combine}
    common.show(Output(facts, {"neighbors": pl.concat(frames.values())}))


def pairs(model: str = BUILTIN, /, *, radius: float | None = None, common: Common = DEFAULT) -> None:
    """All pairs of rows within a distance, exact in all dimensions, and the groups that they form.

    Example: `dimscope pairs builtin --radius 0.001`

    Parameters
    ----------
    radius
        Largest distance; by default 1% of the mean row norm.
    """
    from dimscope.studies.embedding import pair_tables

    checkpoint = common.open(model)
    found, groups, used = pair_tables(checkpoint, common.table(checkpoint), radius)
    facts = {
        "model": checkpoint.name,
        "side": common.side,
        "radius": used,
        "n_pairs": len(found),
        "n_groups": groups["group"].n_unique(),
    }
    common.show(Output(facts, {"groups": groups, "pairs": found}, hidden=["radius"]))


def correlate(model: str = BUILTIN, /, *, ids: str = "0:500", at_least: float = 0.99, common: Common = DEFAULT) -> None:
    """Pearson correlation of the tokens of an id range as a matrix, and the blocks of near-perfectly correlated ones.

    Example: `dimscope correlate builtin --ids 0:500 --out correlation`

    Parameters
    ----------
    ids
        Token ids START:STOP (STOP not included).
    at_least
        Correlation from which two tokens of the range count as one block.
    """
    from dimscope.studies.embedding import correlation_tables

    if not 0 < at_least < 1:
        raise InvalidArgument(f"--at-least is a correlation between 0 and 1, not {at_least}")
    checkpoint = common.open(model)
    table = common.table(checkpoint)
    matrix, blocks = correlation_tables(checkpoint, table, parse_range(ids, table.n_rows), at_least)
    facts = {
        "model": checkpoint.name,
        "side": common.side,
        "ids": ids,
        "n_tokens": len(matrix),
        "n_blocks": blocks["block"].n_unique(),
    }
    common.show(Output(facts, {"blocks": blocks}, files_only={"correlation": matrix}))


def spectrum(model: str = BUILTIN, /, *, permutations: int = 3, seed: int = 0, common: Common = DEFAULT) -> None:
    """Singular values and every linear dimension, centred and not, beside noise of the same shape.

    Example: `dimscope spectrum builtin --json`

    Parameters
    ----------
    permutations
        Draws of the column-permuted null.
    seed
        Seed of those draws.
    """
    from dimscope.studies.embedding import moments_of
    from dimscope.studies.embedding_tables import dimensions_frame, spectrum_frame

    check_seed(seed)
    if permutations < 1:
        raise InvalidArgument(f"--permutations is at least 1, not {permutations}")
    checkpoint = common.open(model)
    table = common.table(checkpoint)
    values = spectrum_frame(common.side, table, moments_of(table), permutations, seed)
    family = dimensions_frame(common.side, values, table.n_used, table.dim)
    facts = {
        "model": checkpoint.name,
        "side": common.side,
        "rows": table.n_used,
        "hidden_size": table.dim,
        "seed": seed,
    }
    common.show(
        Output(facts, {"dimensions": family, "spectrum": values}, hidden=["table", "n_tokens", "dim", "permuted_sd"])
    )


def report(
    model: str = BUILTIN,
    /,
    *,
    with_: Annotated[tuple[Literal["embedding"], ...], Parameter(name="--with", negative=())] = ("embedding",),
    full_knn: Annotated[bool, Parameter(negative=())] = False,
    sample: int = 5000,
    seed: int = 0,
    common: Common = DEFAULT,
) -> None:
    """One self-contained page with every figure, its reading and its caveats, and the tables behind it.

    The page is DIR/index.html, the tables DIR/tables/*.parquet. Finished tables in DIR are used again, so that an interrupted
    report goes on where it stopped.

    Example: `dimscope report builtin -o report`

    Parameters
    ----------
    with_
        Studies to run.
    full_knn
        Precompute the neighbours of every token for the map, not of a sample. V x V x d work: minutes for 150,000 tokens.
    sample
        Tokens whose neighbours are precomputed.
    seed
        Seed of the sample and of the nulls.
    """
    from dimscope.report.run import run_report
    from dimscope.studies.embedding import EmbeddingSettings

    if common.out is None:
        raise InvalidArgument("give the folder of the report: dimscope report MODEL -o DIR")
    check_seed(seed)
    if sample < 1:
        raise InvalidArgument(f"--sample is at least 1, not {sample}")
    checkpoint = common.open(model)
    settings = EmbeddingSettings(
        side=common.side, sample=sample, full_knn=full_knn, seed=seed, skip_nonfinite=common.skip_nonfinite
    )
    page, facts = run_report(checkpoint, common.out, settings)
    output = Output({"page": page, "model": facts["model"], "seconds": facts["seconds"]})
    if common.json:
        print_json(output)
    else:
        print_tables(output, common.limit)


def check_seed(seed: int) -> None:
    """Raises InvalidArgument for what torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise InvalidArgument(f"--seed goes from 0 to 2^63 - 1, not {seed}")


def parse_range(text: str, n_rows: int) -> tuple[int, int]:
    """START:STOP as two ids inside the table. Raises InvalidArgument."""
    start, colon, stop = text.partition(":")
    try:
        first, last = int(start or 0), int(stop or n_rows)
    except ValueError:
        first, last = 0, -1
    if not colon or not 0 <= first < last:
        raise InvalidArgument(f"--ids is a range START:STOP such as 0:500, not {text!r}")
    if last > n_rows:
        raise InvalidArgument(f"--ids {text}: the table has rows 0 to {n_rows - 1}, so STOP is at most {n_rows}")
    return first, last


def _tensor(ids: pl.Series):
    import torch

    return torch.from_numpy(ids.to_numpy().copy())
