"""The study of an embedding table: from an opened checkpoint to the finished tables of its report section."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from dimscope.checkpoints.budget import parameter_budget
from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.vocabulary import Vocabulary, read_vocabulary
from dimscope.errors import InvalidArgument
from dimscope.geometry.correlation import correlated_blocks, correlation_matrix
from dimscope.geometry.neighbors import NeighborIndex, build_index, hubness
from dimscope.geometry.pairs import LEADING, connected_groups, pairs_within
from dimscope.geometry.spectrum import moments_of, principal_components
from dimscope.geometry.untrained import UntrainedScores
from dimscope.storage import Store
from dimscope.studies.embedding import tables
from dimscope.studies.embedding.neighbors import NEIGHBORS, find_neighbors, parse_query, project, query_vector
from dimscope.studies.embedding.settings import EmbeddingSettings
from dimscope.studies.study import Monitor, RunOutput
from dimscope.vectors.embedding import open_table
from dimscope.vectors.moments import Moments
from dimscope.vectors.table import VectorTable

PROBES = (" water", " king", " London", " Monday", " red", " he", "1", "A", "$", "**")
CORRELATED = 0.99  # Pearson correlation from which two tokens count as near-perfectly correlated
NEAR = 0.01  # radius of duplicates in units of the mean row norm
LARGEST_MATRIX = 4096  # tokens
PROBED_ROWS = 256  # whose nearest neighbours bound the closest distance


class EmbeddingWork:
    """What several tables need, computed when the first of them asks: a resumed study pays for what is missing only."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: EmbeddingSettings,
        table: VectorTable,
        other: VectorTable | None = None,
    ) -> None:
        self.checkpoint, self.settings, self.table, self.other = checkpoint, settings, table, other

    @cached_property
    def sides(self) -> list[tuple[str, VectorTable, Moments]]:
        """The studied table, and the other one of an untied model too."""
        sides = [(self.settings.side, self.table, self.moments)]
        if self.other is not None:
            sides.append((_other_side(self.settings.side), self.other, moments_of(self.other)))
        return sides

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Read the tokens of the studied table."""
        return read_vocabulary(self.checkpoint.source, self.table.n_rows)

    @cached_property
    def moments(self) -> Moments:
        """Compute the moments of the studied table."""
        return moments_of(self.table)

    @cached_property
    def untrained(self) -> UntrainedScores:
        """Score how likely each token was never trained."""
        return tables.score_untrained(self.vocabulary, self.table)

    @cached_property
    def loaded(self) -> tuple[Int[Tensor, " n"], Float[Tensor, "n d"]]:
        """Load the ids and rows of the studied table."""
        return self.table.load()

    @cached_property
    def index(self) -> NeighborIndex:
        """Build the index of nearest neighbors of all rows."""
        return build_index(*self.loaded)

    def correlation(self) -> pl.DataFrame:
        """Correlate the rows of the first ids."""
        ids = self.loaded[0][: self.settings.first_ids]
        labels = [self.vocabulary.tokens[i].label for i in ids.tolist()]
        return tables.correlation_frame(ids.tolist(), labels, correlation_matrix(self.loaded[1][: len(ids)]))

    def correlation_blocks(self) -> pl.DataFrame:
        """Find the blocks of strongly correlated rows."""
        groups, pairs = correlated_blocks(self.loaded[1], CORRELATED, progress=True)
        return tables.blocks_frame(groups, pairs, self.loaded[0], self.vocabulary)

    def default_radius(self) -> float:
        """Return the distance within which rows count as duplicates: a share of the mean norm."""
        return NEAR * float(self.loaded[1].norm(dim=1).double().mean())

    def duplicates(self) -> pl.DataFrame:
        """Find the groups of rows that are duplicates."""
        ids, rows = self.loaded
        radius = self.default_radius()
        pairs = pairs_within(rows, principal_components(self.moments, LEADING), radius, progress=True)
        return tables.duplicates_frame(connected_groups(pairs, len(rows)), ids, rows, self.vocabulary, radius)

    def tokens(self, duplicates: pl.DataFrame) -> pl.DataFrame:
        """Describe every token, with the group of its duplicates."""
        frame = tables.tokens_frame(self.vocabulary, self.table, self.moments, self.untrained)
        group = duplicates.select("id", duplicate_group="group")
        return frame.join(group, on="id", how="left", maintain_order="left")

    def sample(self) -> Int[Tensor, " s"]:
        """Places of the tokens whose neighbours are precomputed, in order."""
        n = self.table.n_used
        generator = torch.Generator().manual_seed(self.settings.seed)
        return torch.randperm(n, generator=generator)[: self.settings.knn_sample].sort().values

    def knn(self) -> pl.DataFrame:
        """Find the nearest neighbors of all tokens, or of the sample."""
        ids, rows = self.loaded
        places = torch.arange(len(ids)) if self.settings.full_knn else self.sample()
        return tables.knn_frame(self.index, ids[places], rows[places], self.settings.neighbors)

    def hubs(self, knn: pl.DataFrame) -> pl.DataFrame:
        """In-degrees in the graph of all tokens where `knn` is that, else in the graph among the sample."""
        ids, rows = self.loaded
        if self.settings.full_knn:
            counts = torch.bincount(torch.from_numpy(knn["neighbor"].to_numpy().copy()), minlength=self.table.n_rows)
            return tables.hubs_frame(ids, counts[ids], self.vocabulary)
        places = self.sample()
        degrees = tables.in_degrees(build_index(ids[places], rows[places]), self.settings.neighbors)
        return tables.hubs_frame(ids[places], degrees, self.vocabulary)

    def measures(self, hubs: pl.DataFrame) -> pl.DataFrame:
        """Compute the scalar measures of each table, and hubness."""
        null = None
        if not self.settings.full_knn:
            noise = torch.randn(len(hubs), self.table.dim, generator=torch.Generator().manual_seed(self.settings.seed))
            null = hubness(
                tables.in_degrees(build_index(torch.arange(len(hubs)), noise), self.settings.neighbors).numpy()
            )
        return pl.concat(
            [
                *(tables.measures_frame(*side) for side in self.sides),
                tables.untrained_measures(self.settings.side, self.untrained, self.table.n_used),
                tables.hubness_measure(self.settings.side, hubs, null),
            ]
        )

    def probes(self) -> pl.DataFrame:
        """Neighbours of a few words and signs that are single tokens, in all dimensions and in the leading components."""
        ids, rows = self.loaded
        projected = project(self.moments, rows, tables.COMPONENTS)
        small = build_index(ids, projected.rows)
        queries = [parse_query(text, self.vocabulary) for text in PROBES] if self.vocabulary.encode else []
        frames = [pl.DataFrame(schema=NEIGHBORS | {"cosine": pl.Float64})]
        for query in queries:
            if len(query.ids) == 1 and query.ids[0] not in self.table.excluded:
                vector = query_vector(query, self.table)
                frames.append(find_neighbors(query, vector, self.index, self.vocabulary, 8, "all d dimensions"))
                space = f"first {tables.COMPONENTS} components"
                frames.append(find_neighbors(query, projected.apply(vector), small, self.vocabulary, 8, space))
        return pl.concat(frames).with_columns(query=pl.col("query").str.replace("^ ", "␣"))


def run_embedding(checkpoint: Checkpoint, settings: EmbeddingSettings, store: Store, monitor: Monitor) -> RunOutput:
    """Runs the study table by table.

    Raises NonFiniteRows where the table has NaN or Inf and they are not to be skipped.
    """
    sides = [settings.side] if checkpoint.output_table is None else [settings.side, _other_side(settings.side)]
    work = EmbeddingWork(
        checkpoint, settings, *(open_table(checkpoint, s, skip_nonfinite=settings.skip_nonfinite) for s in sides)
    )
    given = asdict(settings)

    def both(compute: Callable[[str, VectorTable, Moments], pl.DataFrame]) -> pl.DataFrame:
        return pl.concat(compute(*side) for side in work.sides)

    table, null, graph = (
        ("side", "skip_nonfinite"),
        ("permutations", "seed"),
        ("neighbors", "knn_sample", "full_knn", "seed"),
    )
    # Each table with the settings that it depends on: it is computed again only where one of those has changed.
    units: Mapping[str, tuple[Sequence[str], Callable[[], pl.DataFrame]]] = {
        "budget": ((), lambda: parameter_budget(checkpoint)),
        "spectrum": (
            table + null,
            lambda: both(lambda s, t, m: tables.spectrum_frame(s, t, m, settings.permutations, settings.seed)),
        ),
        "dimensions": (
            table + null,
            lambda: both(lambda s, t, _: tables.dimensions_frame(s, done["spectrum"], t.n_used, t.dim)),
        ),
        "duplicates": (table, work.duplicates),
        "tokens": (table, lambda: work.tokens(done["duplicates"])),
        "correlation": ((*table, "first_ids"), work.correlation),
        "correlation_blocks": (table, work.correlation_blocks),
        "probes": (table, work.probes),
        "knn": (table + graph, work.knn),
        "hubs": (table + graph, lambda: work.hubs(done["knn"])),
        "measures": (table + graph, lambda: work.measures(done["hubs"])),
    }
    done: dict[str, pl.DataFrame] = {}
    progress = tqdm(units.items(), desc="embedding study", unit="table", disable=None)
    for name, (depends_on, compute) in progress:
        progress.set_postfix_str(name)
        done[name] = store.table(name, {key: given[key] for key in depends_on}, compute)
    return _output(work, done, given)


def token_table(checkpoint: Checkpoint, table: VectorTable, *, duplicates: bool) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The tokens of a table, and, where asked for, their groups of near-duplicates: `tokens_frame`, `duplicates_frame`."""
    work = EmbeddingWork(checkpoint, EmbeddingSettings(), table)
    tokens = tables.tokens_frame(work.vocabulary, table, work.moments, work.untrained)
    if not duplicates:
        return tokens, pl.DataFrame()
    groups = work.duplicates()
    return tokens.filter(pl.col("id").is_in(groups["id"].to_list())), groups


@dataclass(frozen=True, slots=True, eq=False)
class PairTables:
    """Pairs of rows within a radius.

    Attributes:
        pairs: Ids, labels and distance of each pair, nearest first.
        groups: The groups that the pairs form, as `duplicates_frame` gives them.
        radius: The largest distance of a pair.
        closest: The smallest distance between two rows; None for fewer than two rows.
    """

    pairs: pl.DataFrame
    groups: pl.DataFrame
    radius: float
    closest: float | None


def pair_tables(checkpoint: Checkpoint, table: VectorTable, radius: float | None) -> PairTables:
    """Return the pairs of rows within a radius, which is 1% of the mean row norm where it is None."""
    work = EmbeddingWork(checkpoint, EmbeddingSettings(), table)
    ids, rows = work.loaded
    used = work.default_radius() if radius is None else radius
    components = principal_components(work.moments, LEADING)
    within = pairs_within(rows, components, used, progress=True)
    labels = pl.Series([t.label for t in work.vocabulary.tokens], dtype=pl.String)
    first, second = ids.numpy()[within.first], ids.numpy()[within.second]
    frame = pl.DataFrame({"first": first, "second": second, "distance": within.distance})
    frame = frame.with_columns(first_label=labels.gather(first), second_label=labels.gather(second)).sort(
        "distance", "first", "second"
    )
    closest = frame["distance"][0] if len(frame) else closest_distance(rows, components)
    groups = tables.duplicates_frame(connected_groups(within, len(rows)), ids, rows, work.vocabulary, used)
    return PairTables(frame, groups, used, closest)


def closest_distance(rows: Float[Tensor, "n d"], components: Float[Tensor, "d k"]) -> float | None:
    """Return the smallest distance between two rows, or None for fewer than two.

    The nearest neighbours of a few rows bound it from above. The exact search for pairs within that bound is then
    cheap, because few pairs are as close.
    """
    if len(rows) < 2:
        return None
    some = rows[:: max(1, len(rows) // PROBED_ROWS)]
    distances = build_index(torch.arange(len(rows)), rows, "euclidean").search(some, 2)[1]
    bound = float(distances[:, 1].min()) * (1 + 1e-4)  # the search rounds in float32
    within = pairs_within(rows, components, bound)
    return float(within.distance.min()) if len(within.distance) else bound


def correlation_tables(
    checkpoint: Checkpoint, table: VectorTable, span: tuple[int, int], at_least: float
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The correlation matrix of the ids of a range, and the blocks linked by correlations of at least `at_least`.

    Raises InvalidArgument for more than 4,096 ids: the matrix would not be readable, and large.
    """
    if span[1] - span[0] > LARGEST_MATRIX:
        raise InvalidArgument(
            f"a correlation matrix of {span[1] - span[0]:,} tokens: at most {LARGEST_MATRIX:,} at once"
        )
    ids = torch.tensor([i for i in range(*span) if i not in table.excluded], dtype=torch.int64)
    vocabulary = read_vocabulary(checkpoint.source, table.n_rows)
    if not len(ids):
        raise InvalidArgument(f"rows {span[0]} to {span[1] - 1} all hold NaN or Inf")
    rows = table.rows(ids)
    groups, found = correlated_blocks(rows, at_least)
    labels = [vocabulary.tokens[i].label for i in ids.tolist()]
    return tables.correlation_frame(ids.tolist(), labels, correlation_matrix(rows)), tables.blocks_frame(
        groups, found, ids, vocabulary
    )


def _other_side(side: str) -> str:
    return "input" if side == "output" else "output"


def _output(work: EmbeddingWork, done: dict[str, pl.DataFrame], given: dict[str, Any]) -> RunOutput:
    knn = done["knn"]
    warnings = [f"{len(work.table.excluded)} rows with NaN or Inf were left out"] if work.table.excluded else []
    if work.vocabulary.missing:
        warnings.append(f"{work.vocabulary.missing}: tokens are shown by id, and which are unreachable is not known")
    facts = given | {
        "radius": work.default_radius(),
        "tokenizer_size": work.vocabulary.tokenizer_size,
        "knn": {"k": work.settings.neighbors, "n_queries": knn["id"].n_unique(), "full": work.settings.full_knn},
    }
    return RunOutput(done, facts, warnings)
