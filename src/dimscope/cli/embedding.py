"""The commands about the embedding table: options in, one call into the library, frames out to the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import polars as pl
from cyclopts import Parameter

from dimscope.checkpoints import BUILTIN
from dimscope.cli.options import COMMON, TABLE, Common, TableOptions
from dimscope.cli.terminal import Output
from dimscope.errors import InvalidArgument

if TYPE_CHECKING:
    from torch import Tensor


def inspect(model: str = BUILTIN, /, *, common: Common = COMMON) -> None:
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
    which: TableOptions = TABLE,
    common: Common = COMMON,
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
    from dimscope.studies.embedding.run import token_table

    if vectors and common.out is None:
        raise InvalidArgument("--vectors goes with --out: vectors are written to Parquet, not printed")
    checkpoint = common.open(model)
    table = which.open(checkpoint)
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
        Output({"model": checkpoint.name, "side": which.side, **counts, "shown": len(frame)}, {"tokens": frame}, hidden)
    )


def neighbors(
    model: str,
    /,
    *query: str,
    k: Annotated[int, Parameter(name=["-k", "--k"])] = 20,
    metric: Literal["cosine", "centred cosine", "euclidean"] = "cosine",
    components: int | None = None,
    combine: Literal["mean", "sum"] = "mean",
    which: TableOptions = TABLE,
    common: Common = COMMON,
) -> None:
    """The nearest tokens of each query, in all dimensions and in the first components beside them.

    A query is a text (' water', with its leading space), an id ('#3015'), a phrase, or an expression
    ('king - man + woman').

    Example: `dimscope neighbors builtin ' water' ' king - man + woman'`

    Parameters
    ----------
    query
        One or more queries.
    k
        How many neighbours.
    metric
        How near is measured.
    components
        The projection shown beside all dimensions, 10 by default; 0 leaves it out.
    combine
        How the tokens of a phrase are combined. The sum grows with their number.
    """
    from dimscope.studies.embedding.neighbors import neighbor_tables

    if not query:
        hint = f"; to search the built-in model: dimscope neighbors builtin '{model}'" if _like_query(model) else ""
        raise InvalidArgument(f"give at least one query after MODEL, such as ' water'{hint}")
    if k < 1:
        raise InvalidArgument(f"-k counts neighbours: at least 1, not {k}")
    checkpoint = common.open(model)
    frames = neighbor_tables(
        checkpoint, which.open(checkpoint), query, k=k, metric=metric, components=components, combine=combine
    )
    facts = {"model": checkpoint.name, "side": which.side, "metric": metric, "combine": combine}
    frame = pl.concat(frames.values())
    closest = frame.group_by("query", maintain_order=True).first()
    answer = "; ".join(f"nearest to '{q}': '{label}'" for q, label in closest.select("query", "label").iter_rows())
    answer = answer[:1].upper() + answer[1:] + "." if answer else "No token is left to be a neighbour."
    common.show(Output(facts, {"neighbors": frame}, answer=answer, split_by={"neighbors": "query"}))


def pairs(
    model: str = BUILTIN, /, *, radius: float | None = None, which: TableOptions = TABLE, common: Common = COMMON
) -> None:
    """All pairs of rows within a distance, exact in all dimensions, and the groups that they form.

    Example: `dimscope pairs builtin --radius 0.001`

    Parameters
    ----------
    radius
        Largest distance; by default 1% of the mean row norm.
    """
    from dimscope.studies.embedding.run import pair_tables

    checkpoint = common.open(model)
    result = pair_tables(checkpoint, which.open(checkpoint), radius)
    n_groups = result.groups["group"].n_unique()
    facts = {
        "model": checkpoint.name,
        "side": which.side,
        "radius": result.radius,
        "closest": result.closest,
        "n_pairs": len(result.pairs),
        "n_groups": n_groups,
    }
    answer = f"{len(result.pairs):,} pairs of rows within {result.radius:.4g}, in {n_groups:,} groups."
    if not len(result.pairs):
        closest = "" if result.closest is None else f"; the closest are {result.closest:.4g} apart"
        answer = f"No pair of rows within {result.radius:.4g}{closest}."
    frames = {"groups": result.groups, "pairs": result.pairs}
    common.show(Output(facts, frames, hidden=["radius"], answer=answer))


def correlate(
    model: str = BUILTIN,
    /,
    *,
    ids: str = "0:500",
    at_least: float = 0.99,
    which: TableOptions = TABLE,
    common: Common = COMMON,
) -> None:
    """Pearson correlation of the tokens of an id range as a matrix, and the blocks of near-perfectly correlated ones.

    Example: `dimscope correlate builtin --ids 0:500 --out correlation`

    Parameters
    ----------
    ids
        Token ids START:STOP (STOP not included).
    at_least
        Correlation from which two tokens of the range count as one block.
    """
    from dimscope.studies.embedding.run import correlation_tables

    if not 0 < at_least < 1:
        raise InvalidArgument(f"--at-least is a correlation between 0 and 1, not {at_least}")
    checkpoint = common.open(model)
    table = which.open(checkpoint)
    matrix, blocks = correlation_tables(checkpoint, table, parse_range(ids, table.n_rows), at_least)
    facts = {
        "model": checkpoint.name,
        "side": which.side,
        "ids": ids,
        "n_tokens": len(matrix),
        "n_blocks": blocks["block"].n_unique(),
    }
    common.show(Output(facts, {"blocks": blocks}, files_only={"correlation": matrix}))


def spectrum(
    model: str = BUILTIN,
    /,
    *,
    permutations: int = 3,
    seed: int = 0,
    which: TableOptions = TABLE,
    common: Common = COMMON,
) -> None:
    """Singular values and every linear dimension, centred and not, beside noise of the same shape.

    Example: `dimscope spectrum builtin --json`

    Parameters
    ----------
    permutations
        Draws of the column-permuted null.
    seed
        Seed of those draws.
    """
    from dimscope.geometry.spectrum import moments_of
    from dimscope.studies.embedding.tables import dimensions_frame, spectrum_frame

    if permutations < 1:
        raise InvalidArgument(f"--permutations is at least 1, not {permutations}")
    checkpoint = common.open(model)
    table = which.open(checkpoint)
    values = spectrum_frame(which.side, table, moments_of(table), permutations, seed)
    family = dimensions_frame(which.side, values, table.n_used, table.dim)
    facts = {
        "model": checkpoint.name,
        "side": which.side,
        "rows": table.n_used,
        "hidden_size": table.dim,
        "seed": seed,
    }
    common.show(
        Output(
            facts,
            {"dimensions": family, "spectrum": values},
            hidden=["table", "n_tokens", "dim", "permuted_sd"],
            split_by={"dimensions": "preprocess", "spectrum": "preprocess"},
        )
    )


COMMANDS = (inspect, tokens, neighbors, pairs, correlate, spectrum)


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


def _like_query(text: str) -> bool:
    """Return whether a text can only be meant as a query: no path and no name of a model holds a space or starts with #."""
    return " " in text or text.startswith("#")


def _tensor(ids: pl.Series) -> Tensor:
    import torch

    return torch.from_numpy(ids.to_numpy().copy())
