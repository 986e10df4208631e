"""The commands about a table of vectors: options in, one call into the library, frames out to the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import polars as pl
from cyclopts import Parameter

from dimscope.checkpoints import BUILTIN
from dimscope.cli.options import COMMON, Common
from dimscope.cli.terminal import Output
from dimscope.errors import InvalidArgument
from dimscope.geometry.metrics import PARTICIPATION_RATIO
from dimscope.page.wording import against, count, listed, number, sentence

if TYPE_CHECKING:
    from dimscope.studies.embedding.row_tables import CorrelationTables
    from dimscope.studies.embedding.source import EmbeddingSource


@Parameter(name="*")
@dataclass(frozen=True)
class TableOptions:
    """Options of every command about a table of vectors."""

    side: Literal["input", "output"] = "input"
    "Which table: the input embeddings, or the output embeddings of an untied model."
    skip_nonfinite: Annotated[bool, Parameter(negative=())] = False
    "Leave out rows with NaN or Inf instead of refusing the table."

    def open(self, model: str, common: Common) -> EmbeddingSource:
        """Open the chosen embedding table of a model, or vectors."""
        from dimscope.studies.embedding.source import open_source

        return open_source(common.open_source(model), self.side, skip_nonfinite=self.skip_nonfinite)


TABLE = TableOptions()
CORRELATED_ROWS = 500  # of a correlation matrix, unless a range is chosen


def inspect(model: str = BUILTIN, /, *, common: Common = COMMON) -> None:
    """List the tensors of a model with shape, dtype, bytes, block and role, and the parameters of each role. Reads no weights.

    Example: `dimscope inspect Qwen/Qwen2.5-0.5B`
    """
    from dimscope.checkpoints.budget import embedding_share, parameter_budget

    checkpoint = common.open(model)
    budget = parameter_budget(checkpoint)
    n_parameters, part = int(budget["n_parameters"].sum()), embedding_share(budget)
    roles = budget.group_by("role").agg(pl.len().alias("tensors"), pl.sum("n_parameters"), pl.sum("n_bytes"))
    roles = roles.with_columns(share=pl.col("n_parameters") / max(n_parameters, 1)).sort(
        "n_parameters", descending=True
    )
    facts = {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "architecture": checkpoint.architecture,
        "vocab_size": checkpoint.input_table.shape[0],
        "hidden_size": checkpoint.input_table.shape[1],
        "tied": checkpoint.shares_table,
        "n_parameters": n_parameters,
        "embedding_share": part,
    }
    answer = f"{n_parameters:,} parameters in {len(budget):,} tensors, {part:.1%} of them in token embeddings."
    common.show(Output(facts, {"roles": roles, "tensors": budget}, answer=answer))


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
    """List every row of the table: id, label, bytes, category, norm, under-trained score, duplicate group.

    Example: `dimscope tokens builtin --untrained`

    Parameters
    ----------
    untrained
        List only the rows that training hardly touched, the least trained first, each with the reason.
    duplicates
        List only the rows that have near-duplicates, by group.
    vectors
        With --out: write each token's vector too, as a fixed-size array column.
    """
    from dimscope.studies.embedding.row_tables import duplicates_table, tokens_table

    if vectors and common.out is None:
        raise InvalidArgument("`vectors` requires `out`: vectors are written to Parquet, not printed")
    source = which.open(model, common)
    frame = tokens_table(source)
    counts = dict(frame.group_by("category").len().sort("len", "category", descending=[True, False]).iter_rows())
    population = f"{source.table.n_rows:,} rows"
    answer = f"{population}: {', '.join(f'{n:,} {category}' for category, n in counts.items())}."
    if untrained:
        frame = frame.filter("untrained").sort("untrained_score")
        signs = frame["untrained_sign"].value_counts(sort=True).iter_rows()
        parts = listed([f"{sign} ({n:,})" for sign, n in signs])
        answer = f"{len(frame):,} of {population} look under-trained{': ' if parts else ''}{parts}."
    if duplicates:
        groups = duplicates_table(source)
        frame = frame.join(groups, on=["id", "label", "category"], maintain_order="left").sort("group", "id")
        answer = f"{len(frame):,} of {population} have near-duplicates, in {count(frame['group'].n_unique(), 'group')}."
    if vectors:
        frame = frame.with_columns(vector=_vectors(source, frame["id"]))
    facts = {**_source_facts(source), "rows": source.table.n_rows, **counts}
    common.show(Output(facts, {"tokens": frame}, _hidden(frame, untrained=untrained), answer=answer))


def _hidden(frame: pl.DataFrame, *, untrained: bool) -> list[str]:
    """Return the columns of the token table that a terminal does not show."""
    components = [column for column in frame.columns if column.startswith("pc")]
    reasons = ["untrained", "reason"] if untrained else ["untrained_reason"]
    reasons.append("untrained_sign")  # part of the reason
    return ["piece", "bytes", "vector", *components, *reasons]


def _vectors(source: EmbeddingSource, ids: pl.Series) -> pl.Series:
    import torch

    rows = source.table.rows(torch.from_numpy(ids.to_numpy().copy()))
    return pl.Series(rows.numpy(), dtype=pl.Array(pl.Float32, source.table.dim))


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
    """Find the nearest tokens of each query, in all dimensions and in the first principal components.

    A query is a text (' water', with its leading space), an id ('#3015'), a phrase, or an expression
    ('king - man + woman').

    Example: `dimscope neighbors builtin ' water' ' king - man + woman'`

    Parameters
    ----------
    query
        One or more queries.
    k
        Neighbors per query and space.
    metric
        Similarity or distance that ranks the neighbors.
    components
        Principal components of the second search [default: 10]; 0 leaves it out.
    combine
        How the vectors of the tokens of a phrase are combined. The sum grows with their number.
    """
    from dimscope.studies.embedding.neighbors import neighbor_tables

    _check_queries(model, query, k)
    source = which.open(model, common)
    frames = neighbor_tables(source, query, k=k, metric=metric, components=components, combine=combine)
    facts = {**_source_facts(source), "metric": metric, "combine": combine}
    frame = pl.concat(frames.values())
    answer = _nearest(frame, source.row)
    common.show(Output(facts, {"neighbors": frame}, answer=answer, split_by={"neighbors": "query"}))


def _check_queries(model: str, queries: Sequence[str], k: int) -> None:
    if not queries:
        hint = f"; to search the built-in model: dimscope neighbors builtin '{model}'" if _like_query(model) else ""
        raise InvalidArgument(f"give at least one query after MODEL, such as ' water'{hint}")
    if k < 1:
        raise InvalidArgument(f"-k must be 1 or more, got {k}")


def _nearest(frame: pl.DataFrame, row: str) -> str:
    """Return the nearest neighbor of each query as a sentence."""
    closest = frame.group_by("query", maintain_order=True).first()
    parts = [f"nearest to '{query}': '{label}'" for query, label in closest.select("query", "label").iter_rows()]
    return sentence("; ".join(parts)) + "." if parts else f"No {row} is left to be a neighbor."


def pairs(
    model: str = BUILTIN, /, *, radius: float | None = None, which: TableOptions = TABLE, common: Common = COMMON
) -> None:
    """Find all pairs of rows within a distance, exactly in all dimensions, and the groups that they form.

    Example: `dimscope pairs builtin --radius 0.001`

    Parameters
    ----------
    radius
        Largest Euclidean distance of a pair [default: 1% of the mean row norm].
    """
    from dimscope.studies.embedding.row_tables import pair_tables

    source = which.open(model, common)
    result = pair_tables(source, radius)
    n_pairs, n_groups = len(result.pairs), result.groups["group"].n_unique()
    facts = {
        **_source_facts(source),
        "radius": result.radius,
        "closest": result.closest,
        "n_pairs": n_pairs,
        "n_groups": n_groups,
    }
    answer = f"{count(n_pairs, 'pair')} of rows within {result.radius:.4g}, in {count(n_groups, 'group')}."
    if not n_pairs:
        closest = "" if result.closest is None else f"; the closest are {result.closest:.4g} apart"
        answer = f"No pair of rows within {result.radius:.4g}{closest}."
    frames = {"groups": result.groups, "pairs": result.pairs}
    common.show(Output(facts, frames, hidden=["radius"], answer=answer))


def correlate(
    model: str = BUILTIN,
    /,
    *,
    ids: str | None = None,
    at_least: float = 0.99,
    which: TableOptions = TABLE,
    common: Common = COMMON,
) -> None:
    """Compute the Pearson correlations of a range of rows, and find the blocks of near-perfectly correlated ones.

    Example: `dimscope correlate builtin --ids 0:500 --out correlation`

    Parameters
    ----------
    ids
        Row ids START:STOP, STOP not included [default: the first 500].
    at_least
        Correlation from which two rows of the range belong to one block.
    """
    from dimscope.studies.embedding.row_tables import correlation_tables

    if not 0 < at_least < 1:
        raise InvalidArgument(f"`at_least` must be a correlation between 0 and 1, got {at_least}")
    source = which.open(model, common)
    n_rows = source.table.n_rows
    chosen = range(min(CORRELATED_ROWS, n_rows)) if ids is None else parse_range(ids, n_rows)
    result = correlation_tables(source, chosen, at_least)
    n_blocks = result.blocks["block"].n_unique()
    facts = {
        **_source_facts(source),
        "ids": f"{chosen.start}:{chosen.stop}",
        "n_tokens": len(result.matrix),
        "n_blocks": n_blocks,
    }
    answer = _correlation_answer(result, at_least, source.row)
    common.show(Output(facts, {"blocks": result.blocks}, files_only={"correlation": result.matrix}, answer=answer))


def _correlation_answer(result: CorrelationTables, at_least: float, row: str) -> str:
    sizes = result.blocks.group_by("block").len()["len"]
    population = f"{len(result.matrix):,} {row}s"
    if len(sizes):
        blocks = count(len(sizes), "block")
        return f"{sentence(blocks)} among {population} with correlations of {at_least:g} or more; the largest has {sizes.max():,}."
    strongest = ""
    if result.strongest is not None:
        labels = dict(result.matrix.select("id", "label").iter_rows())
        first, second, r = result.strongest
        strongest = f"; the largest correlation is {r:.3f}, of '{labels[first]}' and '{labels[second]}'"
    return f"No two of {population} have a correlation of {at_least:g} or more{strongest}."


def spectrum(
    model: str = BUILTIN,
    /,
    *,
    permutations: int = 3,
    seed: int = 0,
    which: TableOptions = TABLE,
    common: Common = COMMON,
) -> None:
    """Compute the singular values and every linear dimension, centred and not, beside noise of the same shape.

    Example: `dimscope spectrum builtin --json`

    Parameters
    ----------
    permutations
        Random seeds of the column-permuted baseline.
    seed
        First of these seeds.
    """
    from dimscope.studies.embedding.populations import row_sets
    from dimscope.studies.embedding.spectrum_tables import dimensions_frame, spectra_frame

    if permutations < 1:
        raise InvalidArgument(f"`permutations` must be 1 or more, got {permutations}")
    source = which.open(model, common)
    table = source.table
    populations = [rows for rows in row_sets(source) if rows.table_name == source.side]
    values = spectra_frame(populations, permutations, seed)
    family = pl.concat(dimensions_frame(rows, values) for rows in populations)
    facts = {**_source_facts(source), "rows": table.n_used, "dim": table.dim, "seed": seed}
    common.show(
        Output(
            facts,
            {"dimensions": family, "spectrum": values},
            hidden=["table", "spectrum", "order", "n_tokens", "dim", "permuted_sd"],
            answer=_dimension_answer(family, table.dim),
            split_by={"dimensions": "preprocess", "spectrum": "preprocess"},
        )
    )


def _dimension_answer(family: pl.DataFrame, dim: int) -> str:
    """Return the participation ratio of the rows that lead, before and after centring, as a sentence."""
    lead = family.filter(metric=PARTICIPATION_RATIO, rows=family["rows"][0])
    rows = {row["preprocess"]: row for row in lead.iter_rows(named=True)}
    centred, raw = rows["centred"], rows["uncentred"]
    who = f"{centred['n_tokens']:,} {'' if centred['rows'] == 'all' else centred['rows'] + ' '}rows"
    return (
        f"The participation ratio of {who} is {number(centred['value'])} of {dim:,} dimensions after centring, "
        f"{against(centred['value'], centred['null_gaussian'])}, and {number(raw['value'])} before centring."
    )


COMMANDS = (inspect, tokens, neighbors, pairs, correlate, spectrum)


def parse_range(text: str, n_rows: int) -> range:
    """Return START:STOP as ids inside the table.

    Raises:
        InvalidArgument: It is no range, or it ends beyond the table.

    >>> parse_range("10:", 100)
    range(10, 100)
    """
    start, colon, stop = text.partition(":")
    try:
        first, last = int(start or 0), int(stop or n_rows)
    except ValueError:
        first, last = 0, -1
    if not colon or not 0 <= first < last:
        raise InvalidArgument(f"`ids` must be a range START:STOP such as 0:500, got {text!r}")
    if last > n_rows:
        raise InvalidArgument(f"`ids` must stop at {n_rows} or before, the number of rows, got {text}")
    return range(first, last)


def _source_facts(source: EmbeddingSource) -> dict[str, Any]:
    """Return the name of the model and the side of its table, or the name of the vectors."""
    if source.checkpoint is None:
        return {"vectors": source.table.name}
    return {"model": source.checkpoint.name, "side": source.side}


def _like_query(text: str) -> bool:
    """Return whether a text can only be meant as a query: no path and no name of a model holds a space or starts with #."""
    return " " in text or text.startswith("#")
