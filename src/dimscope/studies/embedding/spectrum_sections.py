"""Sections about directions: where the parameters are, how many dimensions the table uses, how isotropic it is."""

import polars as pl

from dimscope.checkpoints.budget import embedding_share
from dimscope.geometry import metrics
from dimscope.page.section import Facts, Grid, Plot, Section, Tables, table
from dimscope.page.wording import count, number, sentence, share
from dimscope.studies.embedding import spectrum_figures, token_figures
from dimscope.studies.embedding.context import (
    NAMES,
    copy_ids,
    dimension,
    measure,
    of_rows,
    of_table,
    participation_ratio_against,
    rows_phrase,
    table_sides,
)


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
    if facts.tied is None:
        return "the token-embedding table (the model has no table that predicts tokens)"
    return "token-embedding tables (the tables that read and predict tokens are not tied)"


def spectrum_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell how many directions are wider than the largest one of a table without structure."""
    if "spectrum" not in tables:
        return None
    frame = of_rows(tables["spectrum"].filter(pl.col("preprocess") == "centred")).sort("index")
    blocks, edge = [], measure(tables, metrics.CHANCE_EDGE)
    for side in table_sides(frame):
        curves, suffix = of_table(frame, side), f" of the {NAMES[side]}"
        figure = spectrum_figures.spectrum(curves, edge=edge["value"] if edge and not blocks else None)
        blocks.append(Plot(f"spectrum-{side}", figure, f"singular values{suffix}", log_toggle=True))
        blocks.append(
            Plot(f"variance-{side}", spectrum_figures.cumulative_variance(curves), f"cumulative variance{suffix}")
        )
    return Section(
        anchor="spectrum",
        name="Spectrum",
        title=_spectrum_finding(tables, facts),
        findings=_spectrum_of_all_rows(tables),
        blocks=tuple(blocks),
        how_to_read=(
            f"Turn the cloud of {facts.row}s until its widest direction comes first, then the next widest, and so on: the "
            "first figure shows how wide each direction is (singular values, the mean row removed). The red line is the "
            "chance edge: 95% of tables without structure have no direction above it. The title counts the directions above "
            "it. The second figure adds the directions up: the share of the variance in the first k."
            + _both_sides(blocks)
        ),
        caveat=(
            "Grey is a table of independent Gaussian numbers of the same shape and standard deviation "
            "(Marchenko–Pastur). Brown permutes each column by itself: it keeps columns of unequal variance and "
            "destroys every relation between them. The chance edge is that of independent entries which give every row its "
            "norm and every column its variance, so neither of the two makes a direction stand out. "
            f"{_noise_note(tables)}Every number uses {rows_phrase(tables)}."
        ),
        tables=("spectrum", "measures"),
    )


def _spectrum_finding(tables: Tables, facts: Facts) -> str:
    above = measure(tables, metrics.DIRECTIONS_ABOVE_CHANCE)
    if above is None:
        return "How wide each direction of the table is"
    n = round(above["value"])
    who, verb = (f"{n:,}", "is" if n == 1 else "are") if n else ("None", "is")
    return f"{who} of {facts.dim:,} directions {verb} wider than chance explains, in {rows_phrase(tables)}"


def _spectrum_of_all_rows(tables: Tables) -> tuple[str, ...]:
    """Say how many directions stand out in all rows, where that is another number."""
    lead, whole = (measure(tables, metrics.DIRECTIONS_ABOVE_CHANCE, rows=rows) for rows in (None, "all"))
    if lead is None or whole is None or lead["value"] == whole["value"]:
        return ()
    n = round(whole["value"])
    verb = "is" if n == 1 else "are"
    return (f"In all {whole['n_tokens']:,} rows, {count(n, 'direction')} {verb} above the chance edge of these rows.",)


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
    """Tell the effective dimension of the leading rows, compare the family with its nulls, and show what rows change."""
    if "dimensions" not in tables:
        return None
    frame = of_rows(tables["dimensions"])
    blocks: list[Plot | Grid] = [
        Plot(
            f"dimensions-{side}",
            spectrum_figures.dimensions(of_table(frame, side), facts.dim),
            f"effective dimensions of the {NAMES[side]}",
        )
        for side in table_sides(frame)
    ]
    if grid := _influence_grid(tables):
        blocks.append(grid)
    return Section(
        anchor="dimensions",
        name="Dimension and chance",
        title=_dimension_finding(tables, facts),
        findings=_influence_findings(tables),
        blocks=tuple(blocks),
        how_to_read=(
            "Every row is one published way to count dimensions. Blue is this table, the grey diamond a random "
            "Gaussian table of the same shape, the brown square this table with each column permuted. The longer "
            "the grey line between blue and grey, the more structure. “Variance count 90%” is the number of "
            "components that hold 90% of the variance, the numerical rank that of components with any variance; the stable "
            "rank compares the sum of all with the widest, the others weigh all components. "
            "Sigma weighs by singular values, lambda by variances." + _both_sides_of(frame)
        ),
        caveat=(
            "The measures answer different questions and differ by design; a number without its name says nothing. "
            f"All use {rows_phrase(tables)}; the table dimensions also has those of all rows and of one row per group of "
            f"copies. By most measures even white noise of this shape falls short of {facts.dim:,}: compare with the nulls. "
            "The corrected participation ratio assumes independent Gaussian rows. None of them says how much quality a "
            "smaller table would cost."
        ),
        tables=("dimensions", "influence"),
    )


def _dimension_finding(tables: Tables, facts: Facts) -> str:
    row = dimension(tables, metrics.PARTICIPATION_RATIO)
    if row is None:
        return "The family of effective dimensions"
    comparison, who = participation_ratio_against(tables, row), rows_phrase(tables)
    return f"By the participation ratio {who} use {number(row['value'])} of {facts.dim:,} dimensions, {comparison}"


NOTABLE = 0.03  # relative change of the participation ratio that the page puts into words


def _influence_findings(tables: Tables) -> tuple[str, ...]:
    """Say what the untrained rows, and the copies, change."""
    frame = table(tables, "influence")
    if frame is None:
        return ()
    findings = []
    for row in frame.filter(pl.col("left_out").is_in(list(_NOUNS))).drop_nulls("value").iter_rows(named=True):
        if abs(row["value_all"] / row["value"] - 1) > NOTABLE:
            who, verb = count(row["n_tokens"], _NOUNS[row["left_out"]]), "moves" if row["n_tokens"] == 1 else "move"
            ends = f"from {number(row['value'])} to {number(row['value_all'])}"
            among = f" (all but one of each group{_untrained_copies(tables)})" if row["left_out"] == "copies" else ""
            findings.append(f"{sentence(who)}{among} {verb} the participation ratio {ends}.")
    return tuple(findings)


def _untrained_copies(tables: Tables) -> str:
    """Return how many duplicate rows are among the untrained ones: both findings are then partly about the same rows."""
    if "duplicates" not in tables or "tokens" not in tables:
        return ""
    copies = copy_ids(tables["duplicates"])
    n = tables["tokens"].filter(pl.col("untrained") & pl.col("id").is_in(copies)).height
    return f", {n:,} of them untrained" if n else ""


_NOUNS = {"untrained": "untrained row", "copies": "duplicate row"}


def _influence_grid(tables: Tables) -> Grid | None:
    frame = table(tables, "influence")
    if frame is None:
        return None
    rows = tuple(
        (row["left_out"], f"{row['n_tokens']:,}", number(row["value"]), number(row["value_all"]))
        for row in frame.iter_rows(named=True)
    )
    header = ("rows left out", "how many", "participation ratio without them", "of all rows")
    return Grid("Influence of each kind of row", header, rows, frozenset({1, 2, 3}))


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
            "Rows that point every way equally have a mean cosine of 0 and an isotropy of 1."
        ),
        caveat=(
            f"{_IDS_ARE_NOT_FREQUENCIES if facts.is_model else ''}"
            "A mean cosine far from 0 often comes from one shared offset alone: compare the value after centring."
            f" The figures show all rows; the numbers in the title and in the table use {rows_phrase(tables)}."
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
    raw, centred = (measure(tables, metrics.MEAN_COSINE, how) for how in ("uncentred", "centred"))
    if raw is None:
        return "How long the rows are"
    after = f" ({number(centred['value'])} after centring)" if centred else ""
    # 0.05 is far above the sampling error of a mean over all pairs and small enough to be called no shared direction.
    verdict = "Rows share a direction" if abs(raw["value"]) >= 0.05 else "Rows hardly share a direction"
    return f"{verdict}: their mean cosine is {number(raw['value'])}{after}"


def _norm_finding(tables: Tables, number_name: str) -> str:
    row = measure(tables, metrics.NORM_RANK_CORRELATION)
    if row is None:
        return f"whether norms follow the {number_name} was not measured"
    rho, error = row["value"], row["stderr"] or 0.0
    if abs(rho) < max(0.1, 2 * error):  # a weaker relation changes no reading of the figure
        return f"their norms do not follow the {number_name} (rank correlation {number(rho)})"
    return f"their norms {'rise' if rho > 0 else 'fall'} with the {number_name} (rank correlation {number(rho)})"


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
    frame = of_rows(tables["measures"].filter(pl.col("metric").is_in(_ISOTROPY)))
    rows = tuple(
        (sentence(row["metric"]), row["table"], row["preprocess"], number(row["value"]), number(row["null"]))
        for row in frame.iter_rows(named=True)
    )
    header = ("measure", "table", "preprocessing", "value", "random table")
    return Grid("Isotropy in numbers", header, rows, frozenset({3, 4})) if rows else None
