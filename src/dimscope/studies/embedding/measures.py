"""Single numbers about a table: noise fit, isotropy, norms, hubness."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.geometry import metrics
from dimscope.geometry.chance import chance_edge, chance_participation_ratio
from dimscope.geometry.dimension import isoscore
from dimscope.geometry.isotropy import RowStatistics, partition_isotropy, row_statistics
from dimscope.geometry.neighbors import build_index, hubness
from dimscope.geometry.nulls import gavish_donoho_rank, noise_edge, noise_scale
from dimscope.geometry.spectrum import Spectrum, spectrum
from dimscope.geometry.untrained import UntrainedScores
from dimscope.studies.embedding.populations import RowSet
from dimscope.studies.embedding.spectrum_tables import gaussian_like
from dimscope.studies.embedding.tables import in_degrees
from dimscope.vectors.moments import Moments
from dimscope.vectors.table import VectorTable

SCHEMA = {
    "table": pl.String, "rows": pl.String, "metric": pl.String, "preprocess": pl.String, "value": pl.Float64, "stderr": pl.Float64,
    "null": pl.Float64, "n_tokens": pl.Int64, "note": pl.String,
}  # fmt: skip
UNCENTRED, CENTRED = "uncentred", "centred"  # preprocessing, as in the tables of spectra


@dataclass(frozen=True, slots=True)
class Measure:
    """One number about a table, with its standard error and null where there are such."""

    metric: str
    preprocess: str
    value: float | None
    stderr: float | None = None
    null: float | None = None
    note: str | None = None


def measures_frame(population: RowSet) -> pl.DataFrame:
    """Return the noise fit, directions above chance, isotropy and norms of one population of rows."""
    table, moments = population.table, population.moments
    share = float(table.n_used * moments.mean.square().sum() / moments.gram.trace())
    energy = Measure(
        metrics.ENERGY_OF_MEAN, UNCENTRED, share, null=1 / table.n_used, note="share of the sum of squares"
    )
    centred, (raw, about_mean) = spectrum(moments, centred=True), row_statistics(table, moments.mean * 0, moments.mean)
    rows = [
        energy,
        *noise_measures(centred),
        *chance_measures(centred, moments, about_mean),
        *isotropy_measures(population, centred, raw, about_mean),
        *norm_measures(table, raw.norms),
    ]
    return _frame(population.table_name, population.rows, rows, table.n_used)


def noise_measures(centred: Spectrum) -> list[Measure]:
    """Fit white noise to the bulk of the centred spectrum, and count what exceeds it."""
    scale = noise_scale(centred)
    edge = noise_edge(centred, scale)
    spikes = float((centred.singular_values > edge).sum())
    scale_note = "standard deviation of the white noise with the same median singular value"
    return [
        Measure(metrics.NOISE_SCALE, CENTRED, scale, note=scale_note),
        Measure(metrics.NOISE_EDGE, CENTRED, edge, note="singular value; exceeded by one white-noise table in 100"),
        Measure(metrics.SPIKES, CENTRED, spikes, null=0.0, note="count"),
        Measure(metrics.GAVISH_DONOHO_RANK, CENTRED, float(gavish_donoho_rank(centred)), null=0.0, note="count"),
    ]


def chance_measures(centred: Spectrum, moments: Moments, about_mean: RowStatistics) -> list[Measure]:
    """Count the directions wider than the widest one of 95% of tables without structure, and return what these tables read."""
    squares, variances = (
        about_mean.norms.square(),
        moments.scatter(centred=True).diagonal().clamp_min(0) / moments.count,
    )
    edge = chance_edge(squares, variances)
    of_signs = chance_participation_ratio(squares, variances, about_mean.fourth_powers)
    edge_note = "singular value; entries are independent, rows keep their norms and columns their variances"
    above = float((centred.singular_values > edge).sum())
    return [
        Measure(metrics.CHANCE_EDGE, CENTRED, edge, note=edge_note),
        Measure(metrics.DIRECTIONS_ABOVE_CHANCE, CENTRED, above, null=0.0, note="count"),
        Measure(
            metrics.CHANCE_PARTICIPATION_RATIO, CENTRED, of_signs, note="entries keep their sizes, signs are random"
        ),
    ]


def isotropy_measures(
    population: RowSet, centred: Spectrum, raw: RowStatistics, about_mean: RowStatistics
) -> list[Measure]:
    """Measure how evenly the rows point in all directions, before and after the mean row is removed.

    Args:
        population: The rows.
        centred: Their centred spectrum.
        raw: What a pass tells about the rows as they are.
        about_mean: The same of the centred rows.
    """
    n, d = population.table.n_used, population.table.dim
    cosine_sd = math.sqrt(2 / (n * (n - 1) * d)) if n > 1 else None
    cosine, of_isotropic = metrics.MEAN_COSINE, "stderr: of isotropic rows"
    return [
        Measure(cosine, UNCENTRED, raw.mean_cosine, cosine_sd, 0.0, of_isotropic),
        Measure(cosine, CENTRED, about_mean.mean_cosine, cosine_sd, 0.0, of_isotropic),
        *partition_measures(population, raw, about_mean),
        Measure(metrics.ISOSCORE, CENTRED, isoscore(centred), null=isoscore(gaussian_like(centred))),
    ]


def partition_measures(population: RowSet, raw: RowStatistics, about_mean: RowStatistics) -> list[Measure]:
    """Return the partition isotropy of a population; none of the distinct rows, since two products of N x d x d are dear."""
    if population.rows == "distinct":
        return []
    rows = {UNCENTRED: raw, CENTRED: about_mean}
    values = {
        how: partition_isotropy(population.table, population.moments, float(of.norms.mean()), centred=how == CENTRED)
        for how, of in rows.items()
    }
    note = "rows scaled to mean norm 1"
    return [Measure(metrics.PARTITION_ISOTROPY, how, value, null=1.0, note=note) for how, value in values.items()]


def norm_measures(table: VectorTable, norms: Float[Tensor, " n"]) -> list[Measure]:
    """Measure the length of the rows, and whether it follows their number."""
    from scipy.stats import spearmanr

    n = table.n_used
    used = [i for i in range(table.n_rows) if i not in table.excluded]
    scatter = float(norms.std()) if n > 1 else 0.0
    correlation = float(spearmanr(used, norms.numpy()).statistic) if scatter > 0 else None
    sd, note = 1 / math.sqrt(max(n - 1, 1)), "Spearman, norm against token id"
    return [
        Measure(metrics.MEAN_NORM, UNCENTRED, float(norms.mean()), scatter / math.sqrt(n) if n > 1 else None),
        Measure(metrics.NORM_RANK_CORRELATION, UNCENTRED, correlation, sd, 0.0, note),
    ]


def untrained_measures(side: str, untrained: UntrainedScores, n_tokens: int) -> pl.DataFrame:
    """Return the number of seed rows, and the threshold of the score (null where seed rows do not stand apart)."""
    seeds, threshold = float(untrained.n_seed), untrained.threshold
    rows = [
        Measure(metrics.SEED_ROWS, UNCENTRED, seeds, note="rows beyond the tokenizer or unreachable"),
        Measure(metrics.UNTRAINED_THRESHOLD, UNCENTRED, threshold, note="score at or below which a row is flagged"),
    ]
    return _frame(side, "all", rows, n_tokens)


def hubness_measure(side: str, hubs: pl.DataFrame, null: float | None) -> pl.DataFrame:
    """Return the skewness of the in-degrees; `null` is that of Gaussian rows of the same shape, where it was computed."""
    note = "kNN graph among the rows counted; null: Gaussian rows of the same shape"
    skewness = Measure(metrics.HUBNESS, UNCENTRED, hubness(hubs["in_degree"].to_numpy()), null=null, note=note)
    return _frame(side, "all", [skewness], len(hubs))


def gaussian_hubness(n_rows: int, dim: int, k: int, seed: int) -> float:
    """Return the skewness of the in-degrees among Gaussian rows of this shape."""
    noise = torch.randn(n_rows, dim, generator=torch.Generator().manual_seed(seed))
    return hubness(in_degrees(build_index(torch.arange(n_rows), noise), k).numpy())


def _frame(table: str, rows: str, measures: list[Measure], n_tokens: int) -> pl.DataFrame:
    """Return measures as a tidy frame, in which a value that does not exist is null."""
    records = [(table, rows, *record[:-1], n_tokens, record[-1]) for record in map(astuple, measures)]
    return pl.DataFrame(records, schema=SCHEMA, orient="row").fill_nan(None)
