"""Sections about directions: where the parameters are, how many dimensions the table uses, how isotropic it is."""

import polars as pl

from dimscope.checkpoints.budget import embedding_share
from dimscope.geometry import metrics
from dimscope.page.section import Facts, Grid, Plot, Section, Tables
from dimscope.page.wording import against, count, number, sentence, share
from dimscope.studies.embedding import spectrum_figures, token_figures
from dimscope.studies.embedding.context import NAMES, dimension, measure, table_sides


def intro_section(tables: Tables, facts: Facts) -> Section:
    """Explain effective dimension with points on a line, near a line and in a round cloud."""
    names = ("on a line", "near a line", "in a round cloud")
    panels = zip(names, spectrum_figures.intro_panels(), strict=True)
    return Section(
        anchor="intro",
        name="Effective dimension",
        title="What is an effective dimension?",
        blocks=tuple(Plot(f"intro-{name.replace(' ', '-')}", fig, f"60 points {name}") for name, fig in panels),
        how_to_read=(
            "Every point has two coordinates, so each cloud lives in two dimensions. But in the first panel one number per "
            "point says everything: the cloud really has one dimension. In the second the points leave the line only "
            "a little: a bit more than one. In the third both directions matter equally: two. The number above each "
            "panel, the participation ratio, is computed from the points drawn. "
            f"{'An embedding table is such a cloud' if facts.is_model else 'The vectors are such a cloud'}: here "
            f"{facts.n_rows:,} points, one per {facts.row}, with {facts.dim:,} coordinates each."
        ),
        caveat=(
            "Near is not on: in the second panel the other direction is small but not empty. A small direction can "
            "still carry something that the model needs, so an effective dimension alone does not say how many "
            "dimensions could be removed."
        ),
    )


def budget_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell which share of all parameters the embedding tables own."""
    if "budget" not in tables:
        return None
    parameters = tables["budget"]
    total, biggest = parameters["n_parameters"].sum(), parameters.sort("n_parameters").tail(1)
    if not total:
        return None
    part, owner = embedding_share(parameters), _embedding_owner(facts)
    return Section(
        anchor="budget",
        name="Parameter budget",
        title=f"{share(part)} of the {total:,} parameters are {owner}",
        blocks=(Plot("budget-bars", spectrum_figures.budget(parameters), "parameters by block and role"),),
        how_to_read=(
            "Each bar is one part of the model, its colours say what the parameters do. The legend gives each role's "
            "share of the whole. The largest single tensor is "
            f"{biggest['name'][0]} ({biggest['shape'][0]}). Tied parameters are counted once, buffers not at all."
        ),
        caveat=(
            "Parameters are not work: reading the embedding table is a lookup of one row per token, while the "
            "blocks multiply every parameter for every token."
        ),
        tables=("budget",),
    )


def _embedding_owner(facts: Facts) -> str:
    if facts.tied:
        return "the embedding table, which is used twice: to read tokens and to predict them"
    return "token-embedding tables (the tables that read and predict tokens are not tied)"


def spectrum_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell how many directions rise above those of a random table of the same shape."""
    if "spectrum" not in tables:
        return None
    frame = tables["spectrum"].filter(pl.col("preprocess") == "centred").sort("index")
    blocks = []
    for side in table_sides(frame):
        curves, suffix = frame.filter(pl.col("table") == side), f" of the {NAMES[side]}"
        alt = f"singular values{suffix}"
        blocks.append(Plot(f"spectrum-{side}", spectrum_figures.spectrum(curves), alt, log_toggle=True))
        blocks.append(
            Plot(f"variance-{side}", spectrum_figures.cumulative_variance(curves), f"cumulative variance{suffix}")
        )
    return Section(
        anchor="spectrum",
        name="Spectrum",
        title=_spectrum_finding(frame, facts),
        blocks=tuple(blocks),
        how_to_read=(
            f"Turn the cloud of {facts.row}s until its widest direction comes first, then the next widest, and so on: the "
            "first figure shows how wide each direction is (singular values, the mean row removed). The title counts "
            "how far blue runs above brown, what chance makes of the same columns; since the variances add up to the "
            "same, wider ones at the front leave narrower ones behind. The second figure adds the directions up: how "
            "much of the variance the first k hold." + _both_sides(blocks)
        ),
        caveat=(
            "Grey is a table of independent Gaussian numbers of the same shape and standard deviation "
            "(Marchenko–Pastur). Brown permutes each column by itself: it keeps columns of unequal variance and "
            "destroys every relation between them, so what brown explains needs no relation between dimensions. "
            f"{_noise_note(tables)}Every number uses all {facts.n_rows:,} rows."
        ),
        tables=("spectrum", "measures"),
    )


def _spectrum_finding(frame: pl.DataFrame, facts: Facts) -> str:
    """Parallel analysis: how many leading directions are wider than the same one of the column-permuted table."""
    studied = frame.filter(pl.col("table") == table_sides(frame)[0])
    wider = (studied["singular_value"] > studied["permuted_singular_value"]).to_list()
    n = wider.index(False) if False in wider else len(wider)
    verb = "is" if n == 1 else "are"
    who = f"{n:,}" if n else "None"
    return f"{who} of {facts.dim:,} directions {verb} wider than chance would make {'it' if n == 1 else 'them'}"


def _noise_note(tables: Tables) -> str:
    rank, spikes = measure(tables, metrics.GAVISH_DONOHO_RANK), measure(tables, metrics.SPIKES)
    if not rank or not spikes:
        return ""
    return (
        "Noise fitted to the bulk of the spectrum itself, a smaller scale than grey, leaves "
        f"{count(round(spikes['value']), 'direction')} above its edge; the Gavish–Donoho threshold would keep "
        f"{round(rank['value']):,}. "
    )


def _both_sides(blocks: list[Plot]) -> str:
    return " The first pair is the input table, the second the output table." if len(blocks) > 2 else ""


def dimension_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell the effective dimension and hold the whole family of measures against its nulls."""
    if "dimensions" not in tables:
        return None
    frame = tables["dimensions"]
    blocks = tuple(
        Plot(
            f"dimensions-{side}",
            spectrum_figures.dimensions(frame.filter(pl.col("table") == side), facts.dim),
            f"effective dimensions of the {NAMES[side]}",
        )
        for side in table_sides(frame)
    )
    return Section(
        anchor="dimensions",
        name="Dimension and chance",
        title=_dimension_finding(tables, facts),
        blocks=blocks,
        how_to_read=(
            "Every row is one published way to count dimensions. Blue is this table, the grey diamond a random "
            "Gaussian table of the same shape, the brown square this table with each column permuted. The longer "
            "the grey line between blue and grey, the more structure. “Variance count 90%” is the number of "
            "components that hold 90% of the variance; the others weigh all components smoothly. "
            "Sigma weighs by singular values, lambda by variances." + _both_sides_of(frame)
        ),
        caveat=(
            "The measures answer different questions and differ by design; a number without its name says nothing. "
            f"All use {facts.n_rows:,} rows. Even pure noise of this shape falls short of {facts.dim:,}, "
            "which is why a null stands beside each. The corrected participation ratio assumes independent Gaussian "
            "rows. None of them says how much quality a smaller table would cost."
        ),
        tables=("dimensions",),
    )


def _dimension_finding(tables: Tables, facts: Facts) -> str:
    row = dimension(tables, metrics.PARTICIPATION_RATIO)
    if row is None:
        return "The family of effective dimensions"
    comparison = against(row["value"], row["null_gaussian"])
    users = "table uses" if facts.is_model else "vectors use"
    return f"By the participation ratio the {users} {number(row['value'])} of {facts.dim:,} dimensions, {comparison}"


def _both_sides_of(frame: pl.DataFrame) -> str:
    return " The first figure is the input table, the second the output table." if len(table_sides(frame)) > 1 else ""


def isotropy_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell whether the rows point every way, and whether their length follows the token id."""
    if "tokens" not in tables:
        return None
    tokens = tables["tokens"]
    number_name = "token id" if facts.is_model else "row number"
    blocks: list[Plot | Grid] = [
        Plot("norms-id", token_figures.norms_by_id(tokens, number_name), f"norm of each row against its {number_name}")
    ]
    if facts.is_model:
        blocks.append(Plot("norms-category", token_figures.norms_by_category(tokens), "norms by category of token"))
    if grid := _isotropy_grid(tables):
        blocks.append(grid)
    boxes = "The boxes hold the middle half of each category, whiskers reach from 1% to 99%. "
    return Section(
        anchor="isotropy",
        name="Isotropy and norms",
        title=f"{_cosine_finding(tables)}; {_norm_finding(tables, number_name)}",
        blocks=tuple(blocks),
        how_to_read=(
            f"The norm is the length of a row. {_IDS_ARE_RANKS + boxes if facts.is_model else ''}"
            "A mean cosine of 0 and an isotropy of 1 mean that rows point every way equally."
        ),
        caveat=(
            f"{_IDS_ARE_NOT_FREQUENCIES if facts.is_model else ''}"
            "A mean cosine far from 0 often comes from one shared offset alone: compare the value after centring."
            f"{' Rows never trained pull all of these numbers.' if facts.is_model else ''}"
        ),
        tables=("measures", "tokens"),
    )


_IDS_ARE_RANKS = (
    "Ids of most tokenizers run from frequent to rare, so a slope of the red line means that frequent and rare tokens "
    "differ in length. "
)
_IDS_ARE_NOT_FREQUENCIES = (
    "An id is not a frequency: early merges are frequent in the text of the tokenizer, not necessarily in the model's. "
)


def _cosine_finding(tables: Tables) -> str:
    raw, centred = (measure(tables, metrics.MEAN_COSINE, how) for how in ("none", "centred"))
    if raw is None:
        return "How long the rows are"
    after = f" ({centred['value']:.2f} after centring)".replace("-0.00", "0.00") if centred else ""
    # 0.05 is far above the sampling error of a mean over all pairs and small enough to be called no shared direction.
    verdict = "Rows share a direction" if abs(raw["value"]) >= 0.05 else "Rows hardly share a direction"
    return f"{verdict}: their mean cosine is {raw['value']:.2f}{after}".replace("-0.00", "0.00")


def _norm_finding(tables: Tables, number_name: str) -> str:
    row = measure(tables, metrics.NORM_RANK_CORRELATION)
    if row is None:
        return f"whether norms follow the {number_name} was not measured"
    rho = row["value"]
    if abs(rho) < 0.1:
        return f"their norms do not follow the {number_name} (rank correlation {rho:.2f})"
    return f"their norms {'rise' if rho > 0 else 'fall'} with the {number_name} (rank correlation {rho:.2f})"


_ISOTROPY = (
    metrics.MEAN_COSINE,
    metrics.PARTITION_ISOTROPY,
    metrics.ISOSCORE,
    metrics.ENERGY_OF_MEAN,
    metrics.MEAN_NORM,
    metrics.NORM_RANK_CORRELATION,
)


def _isotropy_grid(tables: Tables) -> Grid | None:
    if "measures" not in tables:
        return None
    frame = tables["measures"].filter(pl.col("metric").is_in(_ISOTROPY))
    rows = tuple(
        (sentence(row["metric"]), row["table"], row["preprocess"], number(row["value"]), number(row["null"]))
        for row in frame.iter_rows(named=True)
    )
    header = ("measure", "table", "preprocessing", "value", "random table")
    return Grid("Isotropy in numbers", header, rows, frozenset({3, 4})) if rows else None
