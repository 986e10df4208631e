"""The study of a table of vectors: from an opened model or vectors to the finished tables of its report section."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import polars as pl
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from dimscope.checkpoints.budget import parameter_budget
from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.geometry.correlation import correlated_blocks, correlation_matrix
from dimscope.geometry.neighbors import build_index
from dimscope.storage import Store
from dimscope.studies.embedding import measures, tables
from dimscope.studies.embedding.context import copy_ids
from dimscope.studies.embedding.facts import EmbeddingFacts
from dimscope.studies.embedding.neighbors import NEIGHBORS, find_neighbors, parse_query, query_vector, search_spaces
from dimscope.studies.embedding.populations import RowSet, influence_frame, per_population, row_sets
from dimscope.studies.embedding.row_tables import duplicates_table, tokens_table
from dimscope.studies.embedding.settings import EmbeddingSettings
from dimscope.studies.embedding.source import EmbeddingSource, open_source
from dimscope.studies.embedding.spectrum_tables import dimensions_frame, spectra_frame
from dimscope.studies.embedding.truncation_tables import truncation_frame
from dimscope.studies.study import Monitor, RunOutput
from dimscope.vectors.table import VectorTable

PROBES = (" water", " king", " London", " Monday", " red", " he", "1", "A", "$", "**")
PROBE_NEIGHBORS = 8
CORRELATED = 0.99  # Pearson correlation from which two tokens count as near-perfectly correlated

TABLE = ("side", "skip_nonfinite")
NULL = (*TABLE, "permutations", "seed")
GRAPH = (*TABLE, "neighbors", "knn_sample", "full_knn", "seed")


@dataclass(frozen=True, slots=True)
class Unit:
    """A table of the study.

    Attributes:
        name: The name of the table.
        depends_on: The settings that its numbers depend on: where one of them changes, it is computed again.
        compute: Makes the table.
    """

    name: str
    depends_on: Sequence[str]
    compute: Callable[[], pl.DataFrame]


def run_embedding(
    origin: Checkpoint | VectorTable, settings: EmbeddingSettings, store: Store, monitor: Monitor
) -> RunOutput:
    """Run the study table by table.

    Raises:
        NonFiniteRows: The table has NaN or Inf, and such rows are not to be left out.
    """
    source = open_source(origin, settings.side, skip_nonfinite=settings.skip_nonfinite, both=True)
    table = source.table
    monitor.announce(f"{table.name}: the embedding study of {table.n_used:,} rows of {table.dim:,} dimensions")
    values, done = asdict(settings), dict[str, pl.DataFrame]()
    progress = tqdm(units_of(source, settings, done), desc="embedding study", unit="table", disable=None)
    for unit in progress:
        progress.set_postfix_str(unit.name)
        arguments = {name: values[name] for name in unit.depends_on}
        done[unit.name] = store.table(unit.name, arguments, unit.compute)
        monitor.stage(f"table {len(done)} of {progress.total} finished: {unit.name}")
    return RunOutput(done, asdict(_facts(source, settings, done)), _warnings(source))


def units_of(source: EmbeddingSource, settings: EmbeddingSettings, done: Mapping[str, pl.DataFrame]) -> list[Unit]:
    """Return the tables of the study in the order in which they are computed; `done` are those that are finished by then."""
    checkpoint = source.checkpoint

    @cache
    def populations() -> list[RowSet]:
        return row_sets(source, done["duplicates"])

    model_only = [] if checkpoint is None else [
        Unit("budget", (), lambda: parameter_budget(checkpoint)),
        Unit("probes", TABLE, lambda: probes_table(source)),
    ]  # fmt: skip
    return [
        *model_only,
        Unit("duplicates", TABLE, lambda: duplicates_table(source)),
        Unit("spectrum", NULL, lambda: spectra_frame(populations(), settings.permutations, settings.seed)),
        Unit("dimensions", NULL, lambda: dimensions_table(populations(), done["spectrum"])),
        Unit("influence", TABLE, lambda: influence_frame(source, done["duplicates"])),
        Unit("tokens", TABLE, lambda: tokens_with_groups(source, done["duplicates"])),
        Unit("correlation", (*TABLE, "first_ids"), lambda: first_correlations(source, settings.first_ids)),
        Unit("correlation_blocks", TABLE, lambda: blocks_table(source)),
        Unit("knn", GRAPH, lambda: knn_table(source, settings)),
        Unit("hubs", GRAPH, lambda: hubs_table(source, settings, done["knn"])),
        Unit(
            "truncation",
            (*TABLE, "neighbors", "seed"),
            lambda: truncation_table(source, settings, populations(), done["duplicates"]),
        ),
        Unit("measures", GRAPH, lambda: measures_table(source, settings, populations(), done["hubs"])),
    ]


def dimensions_table(populations: Sequence[RowSet], spectra: pl.DataFrame) -> pl.DataFrame:
    """Return the linear dimensions of each population of rows beside their nulls."""
    return pl.concat(dimensions_frame(rows, spectra) for rows in populations)


def tokens_with_groups(source: EmbeddingSource, duplicates: pl.DataFrame) -> pl.DataFrame:
    """Describe every row, with the group of its duplicates."""
    group = duplicates.select("id", duplicate_group="group")
    return tokens_table(source).join(group, on="id", how="left", maintain_order="left")


def first_correlations(source: EmbeddingSource, n: int) -> pl.DataFrame:
    """Correlate the first n rows."""
    ids = source.loaded.ids[:n]
    labels = [source.vocabulary.tokens[i].label for i in ids.tolist()]
    return tables.correlation_frame(ids.tolist(), labels, correlation_matrix(source.loaded.rows[: len(ids)]))


def blocks_table(source: EmbeddingSource) -> pl.DataFrame:
    """Find the blocks of strongly correlated rows in the whole table."""
    ids, rows = source.loaded
    groups = correlated_blocks(rows, CORRELATED, progress=True).groups
    return tables.blocks_frame(groups, ids, rows, source.vocabulary)


def probes_table(source: EmbeddingSource) -> pl.DataFrame:
    """Find the neighbors of a few words and signs that are single tokens, in all dimensions and in the leading components."""
    vocabulary, table = source.vocabulary, source.table
    queries = [parse_query(text, vocabulary) for text in PROBES] if vocabulary.encode else []
    single = [query for query in queries if len(query.ids) == 1 and query.ids[0] not in table.excluded]
    spaces = search_spaces(source, tables.COMPONENTS, name="all d dimensions")
    frames = [pl.DataFrame(schema=NEIGHBORS | {"cosine": pl.Float64})]
    for query in single:
        frames.append(find_neighbors(query, query_vector(query, table), spaces, vocabulary, PROBE_NEIGHBORS))
    return pl.concat(frames).with_columns(query=pl.col("query").str.replace("^ ", "␣"))


def knn_table(source: EmbeddingSource, settings: EmbeddingSettings) -> pl.DataFrame:
    """Find the nearest neighbors of all rows, or of a random sample."""
    ids, rows = source.loaded
    positions = torch.arange(len(ids)) if settings.full_knn else sample_positions(source, settings)
    return tables.knn_frame(source.index, ids[positions], rows[positions], settings.neighbors)


def sample_positions(source: EmbeddingSource, settings: EmbeddingSettings) -> Int[Tensor, " s"]:
    """Draw the positions of the rows whose neighbors are computed, in order."""
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randperm(source.table.n_used, generator=generator)[: settings.knn_sample].sort().values


def hubs_table(source: EmbeddingSource, settings: EmbeddingSettings, knn: pl.DataFrame) -> pl.DataFrame:
    """Count in-degrees in the graph of all rows where `knn` is that, else in the graph among the sample."""
    ids, rows = source.loaded
    if settings.full_knn:
        neighbors = torch.from_numpy(knn["neighbor"].to_numpy().copy())
        return tables.hubs_frame(ids, torch.bincount(neighbors, minlength=source.table.n_rows)[ids], source.vocabulary)
    positions = sample_positions(source, settings)
    degrees = tables.in_degrees(build_index(ids[positions], rows[positions]), settings.neighbors)
    return tables.hubs_frame(ids[positions], degrees, source.vocabulary)


def truncation_table(
    source: EmbeddingSource, settings: EmbeddingSettings, populations: Sequence[RowSet], duplicates: pl.DataFrame
) -> pl.DataFrame:
    """Compute what fewer dimensions keep of the leading table."""
    lead = next(rows for rows in populations if rows.table_name == source.side)
    return truncation_frame(lead, copy_ids(duplicates), settings.neighbors, settings.seed)


def measures_table(
    source: EmbeddingSource, settings: EmbeddingSettings, populations: Sequence[RowSet], hubs: pl.DataFrame
) -> pl.DataFrame:
    """Compute the single numbers about each population of rows, and hubness."""
    null = None
    if not settings.full_knn:
        null = measures.gaussian_hubness(len(hubs), source.table.dim, settings.neighbors, settings.seed)
    frames = [per_population(populations, measures.measures_frame)]
    if source.checkpoint is not None:
        frames.append(measures.untrained_measures(source.side, source.untrained, source.table.n_used))
    return pl.concat([*frames, measures.hubness_measure(source.side, hubs, null)])


def _facts(source: EmbeddingSource, settings: EmbeddingSettings, done: Mapping[str, pl.DataFrame]) -> EmbeddingFacts:
    return EmbeddingFacts(
        side=source.side,
        radius=source.near,
        neighbors=settings.neighbors,
        n_queries=done["knn"]["id"].n_unique(),
        full_knn=settings.full_knn,
        tokenizer_size=source.vocabulary.tokenizer_size,
        knn_sample=settings.knn_sample,
        permutations=settings.permutations,
        seed=settings.seed,
    )


def _warnings(source: EmbeddingSource) -> list[str]:
    table = source.table
    warnings = [f"{len(table.excluded)} rows with NaN or Inf were left out"] if table.excluded else []
    if source.checkpoint is None:
        warnings.append(
            f"{table.name} holds vectors, not a model: the sections that need a vocabulary or a model are left out "
            "(parameter budget, id range, neighbors of probe words, under-trained tokens)"
        )
    elif source.vocabulary.missing:
        missing = source.vocabulary.missing
        warnings.append(f"{missing}: tokens are shown by id, and which are unreachable is not known")
    return warnings
