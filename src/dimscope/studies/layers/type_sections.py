"""The section about vocabulary and context: how much of a layer's variance and dimension is the token itself."""

import polars as pl

from dimscope.geometry.metrics import BETWEEN_TYPES
from dimscope.page.section import Facts, Grid, LayerChoice, Plot, Section, Tables, finite, table
from dimscope.page.wording import number, sentence, share
from dimscope.studies.layers import figures, type_figures
from dimscope.studies.layers.comparisons import extremes
from dimscope.studies.layers.context import (
    Selection,
    layer_choice,
    location,
    nearest_layer,
    rows_of,
    select_counts,
)
from dimscope.studies.layers.profiles import conditions, metric_label, profile
from dimscope.studies.layers.state_measures import ONE_PER_TYPE, TYPE_MEANS, WITHIN_TYPES

POPULATIONS = {TYPE_MEANS: "vocabulary", WITHIN_TYPES: "context", ONE_PER_TYPE: "one state per token"}


def types_section(tables: Tables, facts: Facts) -> Section | None:
    """Show how much of the variance of a layer is between token types, and how many dimensions each part has."""
    ready = select_counts(tables, facts)
    if ready is None:
        return None
    selection, raw, metric = ready
    shares = finite(raw.filter(pl.col("metric") == BETWEEN_TYPES))
    real = profile(shares, BETWEEN_TYPES)
    if real.is_empty():
        return None
    rows = rows_of(tables["layers"], selection.model, selection.text)
    counts = finite(rows.filter((pl.col("metric") == metric) & pl.col("preprocess").is_in(list(POPULATIONS))))
    return Section(
        anchor="types",
        name="Vocabulary and context",
        title=_finding(real, selection),
        blocks=(*_plots(shares, tables, selection), _grid(real, counts, metric)),
        choice=_choice(tables, selection),
        how_to_read=(
            "The states of one token differ only by their context; the means over the states of each token differ by the "
            "token, and by its contexts where it is rare. The variance of a layer is the sum of both parts: vocabulary "
            "(between tokens) and context (within tokens). The share is corrected for chance: it is 0 where states have "
            "nothing to do with their token, and 100% where a token always has the same state, as at the embeddings of a "
            "model with rotary positions. The second figure gives the variance of each component of both parts, as a share "
            "of the variance of all states." + _compared(shares)
        ),
        caveat=(
            f"From {int(real['n_tokens'].to_numpy().max()):,} sampled states. A token that occurs once has its context in its "
            "mean, so the dimensions of the vocabulary include some of the context; the corrected share does not. First tokens "
            "of windows are left out. Intervals come from half-samples of windows."
        ),
        tables=("layers", "type_spectra"),
    )


def _compared(shares: pl.DataFrame) -> str:
    return " Shuffled text has the same tokens in random contexts." if "shuffled" in conditions(shares) else ""


def _choice(tables: Tables, selection: Selection) -> LayerChoice | None:
    spectra = _spectra(tables, selection)
    return None if spectra is None else layer_choice(spectra, selection.layer, "Layer of the second figure")


def _spectra(tables: Tables, selection: Selection) -> pl.DataFrame | None:
    frame = table(tables, "type_spectra")
    rows = None if frame is None else finite(rows_of(frame, selection.model, selection.text), "share")
    return None if rows is None or rows.is_empty() else rows


def _plots(shares: pl.DataFrame, tables: Tables, selection: Selection) -> list[Plot]:
    caption = "Share of the variance between tokens"
    plots = [
        Plot("types-share", figures.shares_profile(shares, BETWEEN_TYPES, caption.lower()), caption.lower(), caption)
    ]
    if (spectra := _spectra(tables, selection)) is not None:
        figure = type_figures.type_scree(spectra, nearest_layer(spectra, selection.layer))
        caption = "Variance of each component, between and within tokens"
        plots.append(Plot("types-scree", figure, caption.lower(), caption, log_toggle=True))
    return plots


def _finding(real: pl.DataFrame, selection: Selection) -> str:
    top, bottom, apart = extremes(real)
    start = selection.prefix
    if real.height == 1 or not apart:
        values = share(bottom["value"]) if real.height == 1 else f"{share(bottom['value'])} to {share(top['value'])}"
        text = f"the token alone accounts for {values} of the variance of its states, and context for the rest"
        return start + text if start else sentence(text)
    where, there = location(top["layer"], top["site"]), location(bottom["layer"], bottom["site"])
    text = f"the token alone accounts for {share(top['value'])} of the variance {where}, and for {share(bottom['value'])} {there}"
    return (start + text if start else sentence(text)) + "; the rest is context"


def _grid(real: pl.DataFrame, counts: pl.DataFrame, metric: str) -> Grid:
    profiles = {
        name: profile(counts.filter(pl.col("preprocess") == preprocess), metric)
        for preprocess, name in POPULATIONS.items()
    }
    profiles = {name: points for name, points in profiles.items() if points.height}
    cells = []
    for row in real.iter_rows(named=True):
        there = [_count(points.filter(pl.col("layer") == row["layer"])) for points in profiles.values()]
        low, high = row["low"], row["high"]
        ends = "–" if low is None or high is None else f"{share(max(low, 0.0))} to {share(min(high, 1.0))}"
        cells.append((row["site"], share(row["value"]), ends, *there))
    header = ("layer", "variance between tokens", "95% interval", *profiles)
    caption = f"Share of the variance, and {metric_label(metric)} beside those of white noise"
    return Grid(sentence(caption), header, tuple(cells), frozenset(range(1, len(header))))


def _count(points: pl.DataFrame) -> str:
    return f"{number(points['value'][0])} ({number(points['null'][0])})" if points.height else "–"
