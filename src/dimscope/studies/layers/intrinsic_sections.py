"""The section about intrinsic dimension: of one state per token type, beside Gaussian states and all states."""

import polars as pl

from dimscope.geometry.metrics import GRIDE, SAME_TOKEN_NEIGHBORS, TWO_NN
from dimscope.page.section import Facts, Grid, Plot, Section, Tables, finite
from dimscope.page.wording import number, sentence, share
from dimscope.studies.layers import figures, state_figures
from dimscope.studies.layers.comparisons import clearly_below, extremes
from dimscope.studies.layers.context import (
    Selection,
    layer_choice,
    location,
    nearest_layer,
    rows_of,
    select,
    spread,
)
from dimscope.studies.layers.profiles import locations, profile, sites
from dimscope.studies.layers.rows import RAW
from dimscope.studies.layers.state_measures import ONE_PER_TYPE, WITHIN_TYPES

HIDDEN = 0.5  # a share of same-token neighbours from which the number of all states is one of tokens


def intrinsic_section(tables: Tables, facts: Facts) -> Section | None:
    """Show the intrinsic dimension of each layer, what explains it, and how it changes with scale."""
    selection = select(tables, facts)
    if selection is None:
        return None
    rows = rows_of(tables["layers"], selection.model, selection.text)
    measured = rows.filter(pl.col("metric").is_in([TWO_NN, GRIDE]))
    population = ONE_PER_TYPE if (measured["preprocess"] == ONE_PER_TYPE).any() else RAW
    leading = measured.filter(pl.col("preprocess") == population)
    real = profile(leading, TWO_NN)
    if real.is_empty():
        return None
    curves = finite(leading.filter((pl.col("metric") == GRIDE) & pl.col("scale").is_not_null()))
    return Section(
        anchor="intrinsic",
        name="Intrinsic dimension",
        title=_finding(real, selection, population),
        findings=tuple(_findings(real, rows, population)),
        blocks=(*_plots(leading, curves, selection), _grid(rows, real, population)),
        choice=layer_choice(curves, selection.layer, "Layer of the second figure") if curves.height else None,
        how_to_read=(
            "A crumpled sheet of paper is two-dimensional, although it extends in three directions. The intrinsic "
            "dimension counts the directions in which a point can move without leaving the sheet, estimated from the "
            "distances to its nearest neighbours (TwoNN); the variance counts above measure the space over which the sheet "
            "extends. A token that occurs often has many states near each other, which would be each other's neighbours, so "
            "one state of each token is measured, the same ones at every layer. Dotted grey is a Gaussian cloud with the "
            "same covariance: an estimate that it reaches too is explained by the spread alone. Bars, and ± in the title and the "
            "table, are standard errors. The second figure repeats the estimate with more distant neighbours (GRIDE)."
        ),
        caveat=(
            f"From {int(real['n_tokens'].to_numpy().max()):,} points, which are few for a high dimension: such estimates "
            "are too low, those of white noise and of Gaussian states too. Compare them with grey and between layers rather "
            "than as absolute numbers. Errors come from half-samples of windows: the text is a sample of one kind of text."
        ),
        tables=("layers",),
    )


def _plots(leading: pl.DataFrame, curves: pl.DataFrame, selection: Selection) -> tuple[Plot, ...]:
    by_layer, caption = figures.intrinsic_profile(leading), "From nearest neighbours (TwoNN)"
    nearest = Plot("intrinsic-profile", by_layer, "intrinsic dimension by layer", caption, log_toggle=True)
    if curves.is_empty():
        return (nearest,)
    by_scale = state_figures.scale_curve(curves, nearest_layer(curves, selection.layer))
    caption = "From more distant neighbours (GRIDE)"
    return nearest, Plot("intrinsic-scale", by_scale, "intrinsic dimension by scale", caption)


def _finding(real: pl.DataFrame, selection: Selection, population: str) -> str:
    top, bottom, apart = extremes(real)
    start = _population(population) + (f" of {selection.text}" if selection.prefix else "")
    highest, lowest = (
        f"{spread(end['value'], end['stderr'])} {location(end['layer'], end['site'])}" for end in (top, bottom)
    )
    coordinates = f"in {top['dim']:,} coordinates"
    if real.height == 1:
        return f"{start}: the intrinsic dimension is {highest}, {coordinates}"
    unclear = "" if apart else "; the two do not clearly differ"
    return f"{start}: the intrinsic dimension is between {lowest} and {highest}, {coordinates}{unclear}"


def _population(population: str) -> str:
    return "One state per token" if population == ONE_PER_TYPE else "All states"


def _findings(real: pl.DataFrame, rows: pl.DataFrame, population: str) -> list[str]:
    return [text for text in (_against_gaussian(real), _token_neighbors(real, rows, population)) if text]


def _against_gaussian(real: pl.DataFrame) -> str:
    """Say where the estimate is clearly below that of Gaussian states, and whether these have the same profile."""
    points = finite(real, "gaussian")
    if points.is_empty() or points["stderr"].is_null().all():
        return ""
    names = sites(points)
    clear = clearly_below(points, "gaussian")
    low, high = (number(float(v)) for v in (points["gaussian"].to_numpy().min(), points["gaussian"].to_numpy().max()))
    reach = low if low == high else f"{low} to {high}"
    text = f"For Gaussian states of the same covariance the estimate is {reach}"
    if not clear:
        return f"{text}, not clearly more at any layer."
    return (
        f"{text}; it is clearly more {locations(clear, names)}: there the states do not fill the space that they span."
    )


def _token_neighbors(real: pl.DataFrame, rows: pl.DataFrame, population: str) -> str:
    """Say what the estimate from all states would be, where their neighbours are mostly other states of the same token."""
    if population == RAW:
        return ""
    shares = profile(rows.filter(pl.col("preprocess") == RAW), SAME_TOKEN_NEIGHBORS).select("layer", share="value")
    every = profile(rows.filter(pl.col("preprocess") == RAW), TWO_NN)
    both = every.join(shares, on="layer").join(real.select("layer", one="value"), on="layer")
    both = both.filter(pl.col("share") > HIDDEN).sort(pl.col("value") / pl.col("one"), maintain_order=True)
    if both.is_empty():
        return ""
    row = both.row(0, named=True)
    where = location(row["layer"], row["site"])
    return (
        f"From all {row['n_tokens'] + row['n_dropped']:,} sampled states TwoNN reads {number(row['value'])} {where}, because the nearest "
        f"neighbour of {share(row['share'])} of them is the same token elsewhere in the text."
    )


def _grid(rows: pl.DataFrame, real: pl.DataFrame, population: str) -> Grid:
    of_real = rows.filter(pl.col("condition") == "real")
    columns = {_population(population).lower(): real}
    populations = {"all states": RAW, "type means removed": WITHIN_TYPES}
    columns |= {
        name: profile(of_real.filter(pl.col("preprocess") == preprocess), TWO_NN)
        for name, preprocess in populations.items()
        if preprocess != population
    }
    columns = {name: points for name, points in columns.items() if points.height}
    neighbors = dict(
        profile(of_real.filter(pl.col("preprocess") == RAW), SAME_TOKEN_NEIGHBORS).select("layer", "value").iter_rows()
    )
    cells = []
    for row in real.iter_rows(named=True):
        values = [_cell(points.filter(pl.col("layer") == row["layer"])) for points in columns.values()]
        chance = (number(row["gaussian"]), number(row["null"]))
        same = share(neighbors[row["layer"]]) if row["layer"] in neighbors else "–"
        cells.append((row["site"], *values, *chance, same))
    header = ("layer", *columns, "Gaussian", "white noise", "same-token neighbours")
    return Grid(sentence("intrinsic dimension (TwoNN)"), header, tuple(cells), frozenset(range(1, len(header))))


def _cell(points: pl.DataFrame) -> str:
    return spread(points["value"][0], points["stderr"][0]) if points.height else "–"
