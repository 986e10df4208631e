"""Sections about what a dimension depends on: the preprocessing and the sample size."""

import math

import polars as pl

from dimscope.geometry.metrics import ANISOTROPY, PARTICIPATION_RATIO
from dimscope.page.section import Facts, Grid, Plot, Section, Tables, finite, table
from dimscope.page.wording import count, number, sentence, share
from dimscope.studies.layers import figures, state_figures
from dimscope.studies.layers.context import (
    layer_choice,
    location,
    nearest_layer,
    rows_of,
    select,
    select_counts,
)
from dimscope.studies.layers.profiles import metric_label, preferred_count, profile, sites
from dimscope.studies.layers.rows import RAW


def preprocess_section(tables: Tables, facts: Facts) -> Section | None:
    """Show how first tokens, massive tokens and uneven coordinates change the dimension."""
    ready = select_counts(tables, facts)
    if ready is None:
        return None
    selection, _, metric = ready
    real = rows_of(tables["layers"], selection.model, selection.text).filter(
        pl.col("centred") & (pl.col("condition") == "real")
    )
    metric = PARTICIPATION_RATIO if (real["metric"] == PARTICIPATION_RATIO).any() else metric
    rows = finite(real.filter((pl.col("metric") == metric) & pl.col("preprocess").is_in([RAW, *_VARIANTS])))
    if rows["preprocess"].n_unique() < 2:
        return None
    grid = _extremes_grid(rows_of(tables["layers"], selection.model, selection.text))
    plot = Plot("preprocessing-profile", figures.preprocessings(rows, metric), f"{metric} by layer and preprocessing")
    return Section(
        anchor="preprocessing",
        name="Preprocessing",
        title=_preprocess_finding(rows, metric),
        findings=tuple(_dropped(rows)),
        blocks=(plot, grid) if grid else (plot,),
        how_to_read=(
            "The same states are measured four times: as they are, without the first token of each window, without tokens "
            "whose states have massive activations, and with every coordinate scaled to the same standard deviation. Where "
            "the lines diverge, a few tokens or coordinates hold much of the variance, and the raw number describes them rather "
            "than the text. In the table, a massive activation is above 100 and above 1,000 times the median of its window; "
            "the rogue dimension share is the largest share of the variance of one coordinate, and anisotropy that of one "
            "component; the mean cosine is of the states as they are."
        ),
        caveat=(
            "No preprocessing is the right one: first and massive tokens are part of what the model computes, and z-scores "
            "change the distances. The participation ratio weighs the widest directions most, so it reacts more than a "
            "variance count. Dropping tokens also makes the sample slightly smaller."
        ),
        tables=("layers",),
    )


_VARIANTS = {
    "without first token": "Without the first token of each window",
    "without massive tokens": "Without massive tokens",
    "z-scored": "With every coordinate z-scored",
}


def _preprocess_finding(rows: pl.DataFrame, metric: str) -> str:
    raw = profile(rows.filter(pl.col("preprocess") == "raw"), metric).select("layer", "value")
    cleaned = rows.filter(pl.col("preprocess") != "raw").join(raw, on="layer", suffix="_raw")
    changes = cleaned.with_columns(change=(pl.col("value") / pl.col("value_raw")).log().abs())
    changes = finite(changes, "change").sort("change", descending=True, maintain_order=True)
    if changes.is_empty():
        return f"The {metric_label(metric)} by layer and preprocessing"
    row = changes.row(0, named=True)
    # A change of a tenth does not change the interpretation of a dimension.
    if row["change"] < math.log(1.1):
        most = share(math.expm1(row["change"]))
        return f"The preprocessing hardly matters: the {metric_label(metric)} changes by {most} at most"
    verb = "rises" if row["value"] > row["value_raw"] else "falls"
    how, where = _VARIANTS.get(row["preprocess"], sentence(row["preprocess"])), location(row["layer"], row["site"])
    return f"{how}, the {metric_label(metric)} {verb} from {number(row['value_raw'])} to {number(row['value'])} {where}"


def _dropped(rows: pl.DataFrame) -> list[str]:
    dropped = rows.filter(pl.col("n_dropped") > 0).group_by("preprocess", maintain_order=True)
    most = dropped.agg(pl.col("n_dropped").max(), (pl.col("n_tokens") + pl.col("n_dropped")).max().alias("total"))
    return [
        f"{_VARIANTS.get(name, sentence(name))}: {count(n, 'token')} of {total:,} left out"
        + (", at the layer with most" if name == "without massive tokens" else "")
        + "."
        for name, n, total in most.iter_rows()
    ]


_EXTREMES = ("massive activations", "largest activation", "rogue dimension share", ANISOTROPY, "mean cosine")


def _extremes_grid(rows: pl.DataFrame) -> Grid | None:
    """List the extreme activations and the anisotropy of each layer, of the raw states of real text."""
    real = finite(rows.filter((pl.col("condition") == "real") & (pl.col("preprocess") == "raw")))
    # The share of the widest component is that of the variance, as in the scree; the others describe the states as they are.
    real = real.filter(pl.col("centred") | (pl.col("metric") != ANISOTROPY))
    values = {(layer, metric): value for layer, metric, value in real.select("layer", "metric", "value").iter_rows()}
    names = [name for name in _EXTREMES if any(metric == name for _, metric in values)]
    if not names:
        return None
    cells = tuple((site, *(number(values.get((i, name))) for name in names)) for i, site in sites(real).items())
    return Grid("Extreme activations and anisotropy", ("layer", *names), cells, frozenset(range(1, len(names) + 1)))


def curve_section(tables: Tables, facts: Facts) -> Section | None:
    """Show whether the count stops growing within the number of tokens."""
    selection, frame = select(tables, facts), table(tables, "curve")
    if selection is None or frame is None:
        return None
    rows = finite(rows_of(frame, selection.model, selection.text))
    metric = preferred_count(rows.filter(pl.col("condition") == "real")) or PARTICIPATION_RATIO
    real = rows.filter((pl.col("condition") == "real") & (pl.col("metric") == metric))
    if real["n_tokens"].n_unique() < 2:
        return None
    layer = nearest_layer(real, selection.layer)
    plot = Plot(
        "sample-size-curve",
        state_figures.sample_curve(rows, metric, layer),
        f"{metric_label(metric)} by number of tokens",
    )
    return Section(
        anchor="sample-size",
        name="Sample size",
        title=_curve_finding(real.filter(pl.col("layer") == layer).sort("n_tokens"), metric),
        blocks=(plot,),
        choice=layer_choice(real, selection.layer),
        how_to_read=(
            "The count is repeated on a part of the tokens, on twice as many, and so on. A curve that is flat at its end has "
            "enough tokens; one that still rises would count more components with more text. Grey is white noise, whose "
            "count rises only because a small sample cannot show all its dimensions."
        ),
        caveat=(
            "A flat curve is flat for more of the same text: another text may use further dimensions. The parts are nested, "
            "so neighbouring points of the curve are not independent."
        ),
        tables=("curve",),
    )


def _curve_finding(real: pl.DataFrame, metric: str) -> str:
    before, last = real.tail(2).row(0, named=True), real.tail(1).row(0, named=True)
    doublings = math.log2(last["n_tokens"] / before["n_tokens"])
    growth = (last["value"] / before["value"]) ** (1 / doublings) - 1 if before["value"] else math.inf
    where = location(last["layer"], last["site"])
    steps = (
        f"{number(before['value'])} on {before['n_tokens']:,} tokens, {number(last['value'])} on {last['n_tokens']:,}"
    )
    # Windows of one text differ by as much as a twentieth for twice the text.
    verdict = "has settled" if abs(growth) < 0.05 else "is still growing" if growth > 0 else "is still falling"
    return f"The number of {metric_label(metric)} {verdict} {where}: {steps}"
