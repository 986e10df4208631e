"""Sections about what a dimension hangs on: the preprocessing, the scale of intrinsic dimension, the sample size."""

import math

import polars as pl

from dimscope.geometry.metrics import GRIDE, PARTICIPATION_RATIO, TWO_NN
from dimscope.page.section import Facts, Grid, Plot, Section, Tables, finite, table
from dimscope.page.wording import count, listed, number, sentence, share
from dimscope.studies.layers import figures, state_figures
from dimscope.studies.layers.context import Asked, asked, at, counted, layer_choice, of, shown_layer, spread, subject
from dimscope.studies.layers.profiles import conditions, meaning, preferred_count, profile, sites


def preprocess_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell what first tokens, massive tokens and uneven coordinates do to the dimension."""
    ready = counted(tables, facts)
    if ready is None:
        return None
    found, _, metric = ready
    real = of(tables["layers"], found.model, found.text).filter(pl.col("centred") & (pl.col("condition") == "real"))
    told = PARTICIPATION_RATIO if (real["metric"] == PARTICIPATION_RATIO).any() else metric
    rows = finite(real.filter(pl.col("metric") == told))
    if rows["preprocess"].n_unique() < 2:
        return None
    grid = _extremes_grid(of(tables["layers"], found.model, found.text))
    plot = Plot("layer-preprocess", figures.preprocessings(rows, told), f"{told} by layer and preprocessing")
    return Section(
        anchor="preprocessing",
        name="Preprocessing",
        title=_preprocess_finding(rows, told),
        findings=tuple(_dropped(rows)),
        blocks=(plot, grid) if grid else (plot,),
        how_to_read=(
            "The same states, counted four ways: as they are, without the first token of each window, without tokens whose "
            "states hold massive activations, and with every coordinate scaled to the same spread. Where the lines part, a "
            "few tokens or a few coordinates own the variance, and the raw number describes them rather than the text."
        ),
        caveat=(
            "No way is the right one: first and massive tokens are part of what the model computes, and z-scores "
            "change what a distance means. The participation ratio weighs the widest directions most and so reacts "
            "more than a variance count. Dropped tokens also make the sample a little smaller."
        ),
        tables=("layers",),
    )


_CLEANED = {
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
        return f"The {meaning(metric)} by layer and preprocessing"
    row = changes.row(0, named=True)
    # A tenth more or less changes no reading of a dimension.
    if row["change"] < math.log(1.1):
        most = share(math.expm1(row["change"]))
        return f"How the states are cleaned hardly matters: the {meaning(metric)} changes by {most} at most"
    verb = "rises" if row["value"] > row["value_raw"] else "falls"
    how, where = _CLEANED.get(row["preprocess"], sentence(row["preprocess"])), at(row["layer"], row["site"])
    return f"{how}, the {meaning(metric)} {verb} from {number(row['value_raw'])} to {number(row['value'])} {where}"


def _dropped(rows: pl.DataFrame) -> list[str]:
    dropped = rows.filter(pl.col("n_dropped") > 0).group_by("preprocess", maintain_order=True)
    most = dropped.agg(pl.col("n_dropped").max(), (pl.col("n_tokens") + pl.col("n_dropped")).max().alias("total"))
    return [
        f"{_CLEANED.get(name, sentence(name))}: {count(n, 'token')} of {total:,} left out"
        + (", at the layer with most" if name == "without massive tokens" else "")
        + "."
        for name, n, total in most.iter_rows()
    ]


_EXTREMES = ("massive activations", "largest activation", "rogue dimension share", "anisotropy", "mean cosine")


def _extremes_grid(rows: pl.DataFrame) -> Grid | None:
    """List what makes a cloud uneven, layer by layer, of the raw states of real text."""
    real = finite(rows.filter((pl.col("condition") == "real") & (pl.col("preprocess") == "raw")))
    # These speak about the states as they are; only where that was not measured, about the centred ones.
    real = real.sort("centred", maintain_order=True).unique(["layer", "metric"], keep="first", maintain_order=True)
    values = {(layer, metric): value for layer, metric, value in real.select("layer", "metric", "value").iter_rows()}
    held = [name for name in _EXTREMES if any(metric == name for _, metric in values)]
    if not held:
        return None
    cells = tuple((site, *(number(values.get((i, name))) for name in held)) for i, site in sites(real).items())
    return Grid("What makes the states uneven", ("layer", *held), cells, frozenset(range(1, len(held) + 1)))


def intrinsic_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell the intrinsic dimension of each layer and how it changes with scale."""
    found = asked(tables, facts)
    if found is None:
        return None
    rows = of(tables["layers"], found.model, found.text).filter(pl.col("preprocess") == "raw")
    # Distances do not change with the mean: where both were stored, one of them is enough.
    rows = rows.filter(pl.col("metric").is_in([TWO_NN, GRIDE])).unique(
        ["condition", "seed", "layer", "metric", "scale"], keep="first", maintain_order=True
    )
    real = profile(rows, TWO_NN)
    if real.is_empty():
        return None
    curves = finite(rows.filter((pl.col("metric") == GRIDE) & pl.col("scale").is_not_null()))
    plots = [Plot("layer-intrinsic", figures.intrinsic_profile(rows), "intrinsic dimension by layer", log_toggle=True)]
    if curves.height:
        layer = shown_layer(curves, found.layer)
        plots.append(Plot("layer-gride", state_figures.scale_curve(curves, layer), "intrinsic dimension by scale"))
    return Section(
        anchor="intrinsic",
        name="Intrinsic dimension",
        title=_intrinsic_finding(real, found),
        findings=tuple(_intrinsic_against(real, rows)),
        blocks=tuple(plots),
        choice=layer_choice(curves, found.layer, "Layer of the second figure") if curves.height else None,
        how_to_read=(
            "A sheet of paper crumpled in a room is two-dimensional, though it reaches in all three directions. The "
            "intrinsic dimension counts the directions in which a point can move without leaving the sheet, from "
            "the distances to its nearest neighbours (TwoNN); the variance counts above measure the room that the sheet "
            "reaches. Bars are standard errors. The second figure asks again with neighbours farther away "
            "(GRIDE): a dimension that holds over several scales is more than noise. Its layer can be chosen."
        ),
        caveat=(
            f"From {int(rows['n_tokens'].to_numpy().max()):,} points, few for a high dimension: such estimates "
            "come out too low, white noise too, so compare with grey and between layers "
            f"rather than reading absolute numbers. {_equal_states(rows)}Neighbouring tokens of one window are not independent points. "
            "The nearest neighbour of a state is often the same token elsewhere in the text, so small scales tell how one "
            "token varies with its context, larger ones how tokens differ."
        ),
        tables=("layers",),
    )


def _intrinsic_finding(real: pl.DataFrame, found: Asked) -> str:
    row = real.sort("value", descending=True, maintain_order=True).row(0, named=True)
    who, _ = subject(row["layer"], row["site"])
    value = f"{spread(row['value'], row['stderr'])}, in {row['dim']:,} coordinates"
    have = "have" if who == "The embeddings" else "has"
    if real.height == 1:
        return f"{who} {have} an intrinsic dimension of {value}"
    low = real.sort("value", maintain_order=True).row(0, named=True)
    lowest = f"; the lowest is {number(low['value'])}, {at(low['layer'], low['site'])}"
    return f"{who} {have} the highest intrinsic dimension, {value}{lowest}"


def _equal_states(rows: pl.DataFrame) -> str:
    most = int(rows.filter(pl.col("metric") == TWO_NN)["n_dropped"].to_numpy().max(initial=0))
    return f"Up to {count(most, 'point')} that coincide with others were left out. " if most else ""


def _intrinsic_against(real: pl.DataFrame, rows: pl.DataFrame) -> list[str]:
    row = real.sort("value", descending=True, maintain_order=True).row(0, named=True)
    parts = []
    for condition in [name for name in conditions(rows) if name != "real"]:
        there = profile(rows, TWO_NN, condition).filter(pl.col("layer") == row["layer"])
        if there.height:
            sd = there["spread"][0] if there["spread"][0] is not None else there["stderr"][0]
            parts.append(f"{spread(there['value'][0], sd)} ({condition})")
    if row["null"] is not None and math.isfinite(row["null"]):
        parts.append(f"{number(row['null'])} (white noise)")
    here = f"{sentence(at(row['layer'], row['site']))}, the comparisons are {listed(parts)}."
    return [here] if parts else []


def curve_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell whether the number of tokens was enough for the count to settle."""
    found, frame = asked(tables, facts), table(tables, "curve")
    if found is None or frame is None:
        return None
    rows = finite(of(frame, found.model, found.text))
    metric = preferred_count(rows.filter(pl.col("condition") == "real")) or PARTICIPATION_RATIO
    real = rows.filter((pl.col("condition") == "real") & (pl.col("metric") == metric))
    if real["n_tokens"].n_unique() < 2:
        return None
    layer = shown_layer(real, found.layer)
    plot = Plot(
        "layer-curve", state_figures.sample_curve(rows, metric, layer), f"{meaning(metric)} by number of tokens"
    )
    return Section(
        anchor="sample-size",
        name="Sample size",
        title=_curve_finding(real.filter(pl.col("layer") == layer).sort("n_tokens"), metric),
        blocks=(plot,),
        choice=layer_choice(real, found.layer),
        how_to_read=(
            "The same count on the first part of the tokens, on twice as many, and so on. A curve that has become level has "
            "seen enough; one that still climbs would count more with more text. Grey is white noise, which climbs to "
            "its limit for want of samples only."
        ),
        caveat=(
            "Level here means level for more of the same text: another text may open further dimensions. The parts "
            "are nested, so neighbouring points of the curve are not independent."
        ),
        tables=("curve",),
    )


def _curve_finding(real: pl.DataFrame, metric: str) -> str:
    before, last = real.tail(2).row(0, named=True), real.tail(1).row(0, named=True)
    doublings = math.log2(last["n_tokens"] / before["n_tokens"])
    growth = (last["value"] / before["value"]) ** (1 / doublings) - 1 if before["value"] else math.inf
    where = at(last["layer"], last["site"])
    steps = (
        f"{number(before['value'])} on {before['n_tokens']:,} tokens, {number(last['value'])} on {last['n_tokens']:,}"
    )
    # A twentieth for twice the text is within what windows of one text differ by.
    verdict = "has settled" if abs(growth) < 0.05 else "is still growing" if growth > 0 else "is still falling"
    return f"The number of {meaning(metric)} {verdict} {where}: {steps}"
