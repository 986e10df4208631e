"""The measures of geometry: their names in tables, what they are, where they come from, and the number of their definition.

A definition number grows by one when a change of the code changes what the name stands for. A table of another
definition is computed again. Nothing here imports torch.
"""

import re
from dataclasses import dataclass

NUMERICAL_RANK = "numerical rank"
PARTICIPATION_RATIO = "participation ratio"
PARTICIPATION_RATIO_CORRECTED = "participation ratio, corrected"
PARTICIPATION_RATIO_ACROSS = "participation ratio, across windows"
EFFECTIVE_RANK_SIGMA = "effective rank (entropy of sigma)"
EFFECTIVE_RANK_LAMBDA = "effective rank (entropy of lambda)"
EFFECTIVE_RANK_UNIT_ROWS = "effective rank (unit rows)"
STABLE_RANK = "stable rank"
VARIANCE_COUNT = "variance count"  # in tables followed by its threshold, e.g. "variance count 95%"

TWO_NN = "TwoNN, maximum likelihood"
TWO_NN_LEAST_SQUARES = "TwoNN, least squares"
GRIDE = "GRIDE"
LEVINA_BICKEL = "Levina-Bickel MLE"

MEAN_COSINE = "mean cosine"
PARTITION_ISOTROPY = "partition isotropy"
ISOSCORE = "IsoScore"
ENERGY_OF_MEAN = "energy of the mean"
MEAN_NORM = "mean norm"
MEDIAN_NORM = "median norm"
NORM_RANK_CORRELATION = "norm-rank correlation"
ANISOTROPY = "anisotropy"
MASSIVE_ACTIVATIONS = "massive activations"
LARGEST_ACTIVATION = "largest activation"
ROGUE_DIMENSION_SHARE = "rogue dimension share"
ROGUE_DIMENSION_INDEX = "rogue dimension index"

NOISE_SCALE = "noise scale"
NOISE_EDGE = "Marchenko-Pastur edge"
SPIKES = "spikes above the edge"
GAVISH_DONOHO_RANK = "Gavish-Donoho rank"
CHANCE_EDGE = "chance edge"
DIRECTIONS_ABOVE_CHANCE = "directions above chance"
CHANCE_PARTICIPATION_RATIO = "participation ratio by chance"

HUBNESS = "hubness skewness"
NEIGHBOR_OVERLAP = "neighbor overlap"
SIMILARITY_CORRELATION = "similarity rank correlation"
SAME_TOKEN_NEIGHBORS = "same-token nearest neighbors"
BETWEEN_TYPES = "variance between token types"
CKA = "CKA"
SUBSPACE_OVERLAP = "subspace overlap"
SEED_ROWS = "seed rows"
UNTRAINED_THRESHOLD = "untrained threshold"


@dataclass(frozen=True, slots=True)
class Metric:
    """A measure as it stands in tables.

    Attributes:
        name: The name in the column `metric`.
        definition: Number of the definition, from 1 on.
        summary: The definition in one line.
        source: The publication, or "" for what has none.
        unit: The unit, e.g. "dimensions".
        slug: The name as a Python identifier.
    """

    name: str
    definition: int
    summary: str
    source: str
    unit: str
    slug: str


DIMENSIONS, SHARE, COUNT, NORM = "dimensions", "share", "count", "norm of a row"


def _metric(name: str, unit: str, summary: str, source: str = "", *, definition: int = 1, slug: str = "") -> Metric:
    return Metric(name, definition, summary, source, unit, slug or re.sub(r"\W+", "_", name).strip("_").lower())


_LINEAR = (
    _metric(VARIANCE_COUNT, DIMENSIONS, "least k with p_1 + ... + p_k >= threshold, p_i = sigma_i^2 / sum sigma^2"),
    _metric(NUMERICAL_RANK, DIMENSIONS, "number of sigma_i > tolerance sigma_1; the tolerance is d eps(float32) unless stated"),
    _metric(PARTICIPATION_RATIO, DIMENSIONS, "(sum lambda)^2 / sum lambda^2, the Hill number of lambda of order 2", "Hill 1973"),
    _metric(
        PARTICIPATION_RATIO_CORRECTED, DIMENSIONS, "participation ratio from unbiased estimates of tr(Sigma)^2 and tr(Sigma^2)",
        "moments of the Wishart distribution",
    ),
    _metric(
        PARTICIPATION_RATIO_ACROSS, DIMENSIONS,
        "participation ratio from products of rows of different windows, which need not be Gaussian or independent",
        "U-statistics of tr(Sigma)^2 and tr(Sigma^2)",
    ),
    _metric(
        EFFECTIVE_RANK_SIGMA, DIMENSIONS, "exp of the entropy of sigma_i / sum sigma", "Roy & Vetterli 2007",
        slug="effective_rank_sigma",
    ),
    _metric(
        EFFECTIVE_RANK_LAMBDA, DIMENSIONS, "exp of the entropy of lambda_i / sum lambda", "von Neumann entropy",
        slug="effective_rank_lambda",
    ),
    _metric(STABLE_RANK, DIMENSIONS, "sum lambda / lambda_1, the Hill number of lambda of order infinity", "Rudelson & Vershynin 2007"),
)  # fmt: skip
_INTRINSIC = (
    _metric(TWO_NN, DIMENSIONS, "(N - 1) / sum ln(r_2 / r_1)", "Facco et al. 2017", slug="two_nn", definition=2),
    _metric(
        TWO_NN_LEAST_SQUARES, DIMENSIONS, "slope of -ln(1 - i / N) on ln(r_2 / r_1), lowest 90%", "Facco et al. 2017",
        slug="two_nn_least_squares", definition=2,
    ),
    _metric(GRIDE, DIMENSIONS, "most likely d for r_{2 n1} / r_{n1}, n1 = 1, 2, 4, ...", "Denti et al. 2022", definition=2),
    _metric(
        LEVINA_BICKEL, DIMENSIONS, "1 over the mean of ln(T_k / T_j), j < k", "Levina & Bickel 2004; MacKay & Ghahramani 2005",
        slug="levina_bickel", definition=2,
    ),
    _metric(EFFECTIVE_RANK_UNIT_ROWS, DIMENSIONS, "effective rank (lambda) of centred rows of length 1", "Wei et al. 2024"),
)  # fmt: skip
_ROWS = (
    _metric(MEAN_COSINE, "cosine", "mean cosine over all pairs of different rows", "Ethayarajh 2019"),
    _metric(PARTITION_ISOTROPY, "ratio", "min Z(c) / max Z(c), Z(c) = sum exp(c . w_i), rows of mean norm 1", "Mu & Viswanath 2018"),
    _metric(ISOSCORE, SHARE, "(D_2 - 1) / (d - 1) of the centred spectrum", "Rudman et al. 2022"),
    _metric(ENERGY_OF_MEAN, SHARE, "N |mean|^2 / |X|_F^2"),
    _metric(MEAN_NORM, NORM, "mean Euclidean norm of the rows"),
    _metric(MEDIAN_NORM, NORM, "median Euclidean norm of the rows"),
    _metric(NORM_RANK_CORRELATION, "correlation", "Spearman correlation of row norm and token id"),
    _metric(ANISOTROPY, SHARE, "share of the variance of the widest component, 1 / stable rank", "Razzhigaev et al. 2024"),
    _metric(MASSIVE_ACTIVATIONS, COUNT, "activations above 100 and above 1,000 medians of their window and layer", "Sun et al. 2024"),
    _metric(LARGEST_ACTIVATION, "activation", "largest absolute value of a layer"),
    _metric(ROGUE_DIMENSION_SHARE, SHARE, "largest share of the variance of one coordinate", "Timkey & van Schijndel 2021"),
    _metric(ROGUE_DIMENSION_INDEX, "coordinate", "coordinate with the largest variance", "Timkey & van Schijndel 2021"),
)  # fmt: skip
_NOISE = (
    _metric(NOISE_SCALE, "standard deviation", "s of the white noise whose median singular value is the measured one"),
    _metric(NOISE_EDGE, "singular value", "singular value that white noise of the noise scale exceeds in 1% of tables", "Johnstone 2001"),
    _metric(SPIKES, COUNT, "singular values above the Marchenko-Pastur edge"),
    _metric(
        CHANCE_EDGE, "singular value",
        "95% quantile of the largest singular value of independent entries with the same row norms and column variances",
        "Paul & Silverstein 2009; Couillet & Hachem 2014",
    ),
    _metric(DIRECTIONS_ABOVE_CHANCE, COUNT, "centred singular values above the chance edge"),
    _metric(
        CHANCE_PARTICIPATION_RATIO, DIMENSIONS,
        "participation ratio expected of entries of the same sizes and random signs",
    ),
    _metric(GAVISH_DONOHO_RANK, DIMENSIONS, "singular values above omega(beta) times their median", "Gavish & Donoho 2014"),
)  # fmt: skip
_OTHERS = (
    _metric(HUBNESS, "skewness", "skewness of the in-degrees of the kNN graph", "Radovanovic et al. 2010"),
    _metric(NEIGHBOR_OVERLAP, SHARE, "share of the nearest neighbors in all dimensions that are the nearest in fewer"),
    _metric(
        SIMILARITY_CORRELATION, "correlation",
        "Spearman correlation of the cosines of a row with others, in fewer and in all dimensions; mean over rows",
    ),
    _metric(SAME_TOKEN_NEIGHBORS, SHARE, "share of states whose nearest neighbor is a state of the same token"),
    _metric(
        BETWEEN_TYPES, SHARE, "share of the variance between token types: 1 - (SS_within / (N - T)) / (SS_all / (N - 1))",
        "Kelley 1935",
    ),
    _metric(CKA, "similarity", "debiased linear CKA: HSIC_1(K, L) / sqrt(HSIC_1(K, K) HSIC_1(L, L))", "Song et al. 2007"),
    _metric(SUBSPACE_OVERLAP, SHARE, "mean squared cosine of the principal angles of the 16 leading components", "Bjorck & Golub 1973"),
    _metric(SEED_ROWS, COUNT, "rows beyond the tokenizer, or unreachable for it", definition=2),
    _metric(UNTRAINED_THRESHOLD, "median distance", "score at or below which a row looks untrained", "Land & Bartolo 2024", definition=3),
)  # fmt: skip
METRICS = {metric.name: metric for metric in (*_LINEAR, *_INTRINSIC, *_ROWS, *_NOISE, *_OTHERS)}


def metric_of(name: str) -> Metric:
    """Return the measure of a name in a table. All variance counts are one measure.

    Raises:
        KeyError: for a name that no measure has.

    >>> metric_of("variance count 95%").name
    'variance count'
    """
    return METRICS[VARIANCE_COUNT if name.startswith(f"{VARIANCE_COUNT} ") else name]


def slug_of(name: str) -> str:
    """Return a name in a table as a Python identifier.

    >>> slug_of("variance count 99.5%"), slug_of("effective rank (entropy of sigma)")
    ('variance_count_99_5', 'effective_rank_sigma')
    """
    threshold = name.removeprefix(VARIANCE_COUNT).strip(" %") if metric_of(name).name == VARIANCE_COUNT else ""
    return "_".join([metric_of(name).slug, *threshold.split(".")]).rstrip("_")


def variance_count_name(threshold: float) -> str:
    """Return the name of the variance count of a threshold (a share of the variance).

    >>> variance_count_name(0.995)
    'variance count 99.5%'
    """
    return f"{VARIANCE_COUNT} {100 * threshold:.6g}%"
