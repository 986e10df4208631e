"""Sections about depth: what was read, how many dimensions every layer uses, and how one layer spreads its variance."""

import math

import polars as pl

from dimscope.geometry.dimension import percent
from dimscope.geometry.metrics import NUMERICAL_RANK
from dimscope.page.section import Facts, Grid, Plot, Section, Tables, finite, table
from dimscope.page.wording import count, listed, number, sentence, share
from dimscope.studies.layers import figures, state_figures
from dimscope.studies.layers.comparisons import beyond, extremes, margin
from dimscope.studies.layers.context import (
    Selection,
    figure_names,
    layer_choice,
    location,
    nearest_layer,
    raw_centred,
    rows_of,
    select,
    select_counts,
    spread,
    subject,
)
from dimscope.studies.layers.profiles import conditions, locations, metric_label, profile, sites

NOT_SMALL = (
    "Every count grows with the number of tokens until it settles, and white noise of the same shape shows how far that "
    "limit alone reaches."
)


def sample_section(tables: Tables, facts: Facts) -> Section | None:
    """Describe the texts, their lengths, and what the hidden states are compared with."""
    selection, texts = select(tables, facts), table(tables, "texts")
    if selection is None or texts is None:
        return None
    rows = rows_of(texts, selection.model)
    real = rows.filter(pl.col("condition") == "real")
    if real.is_empty():
        return None
    layers = rows_of(tables["layers"], selection.model)
    return Section(
        anchor="layers-sample",
        name="Texts and comparisons",
        title=_sample_finding(real, layers, selection),
        blocks=(_texts_grid(rows, selection),),
        how_to_read=(
            "A language model carries one vector per token through its blocks, the hidden state; every block adds to it. "
            "The states of all tokens at one layer are a cloud of points, and the sections below measure how many "
            f"dimensions each cloud fills. Comparisons show what the number means. {_comparisons(layers)}White noise has no "
            "structure: as many points with as many coordinates, all independent."
        ),
        caveat=(
            "Shuffling preserves how often each token occurs: within each window, or over all windows where the text is "
            "“shuffled across” them. What real and shuffled text share may come from these frequencies. A few windows are a "
            "sample of one kind of text, and other texts may fill other dimensions."
        ),
        tables=("texts", "layers"),
    )


def _comparisons(layers: pl.DataFrame) -> str:
    explanations = {
        "shuffled": "Shuffled text has the same tokens in random order, so only their order is lost. ",
        "random weights": "Random weights are the same architecture before any training, on the same text. ",
    }
    return "".join(text for name, text in explanations.items() if name in conditions(layers))


def _sample_finding(real: pl.DataFrame, layers: pl.DataFrame, selection: Selection) -> str:
    first = real.filter(pl.col("text") == selection.text).row(0, named=True)
    start = ", each with a start token" if first["bos"] else ""
    windows = f"{count(first['n_windows'], 'window')} of {first['window_length']:,}{start}"
    others = {"shuffled": _draws(layers, "shuffled"), "shuffled across": _draws(layers, "shuffled across")}
    named = {"shuffled": "", "shuffled across": " across windows"}
    comparisons = [count(n, "shuffle") + named[name] for name, n in others.items() if n]
    comparisons += ["random weights"] if "random weights" in conditions(layers) else []
    against = f", compared with {listed(comparisons)}" if comparisons else ""
    n_layers = count(layers["layer"].n_unique(), "layer")
    return f"{count(first['n_tokens'], 'token')} of {selection.text} ({windows}), read at {n_layers}{against}"


def _draws(layers: pl.DataFrame, condition: str) -> int:
    return layers.filter(pl.col("condition") == condition)["seed"].n_unique()


def _texts_grid(rows: pl.DataFrame, selection: Selection) -> Grid:
    # Shuffles have the same tokens, so one row per text is enough.
    real = rows.filter(pl.col("condition") == "real").unique("text", keep="first", maintain_order=True)
    cells = tuple(
        (
            row["text"],
            f"{row['n_windows']:,} × {row['window_length']:,}",
            f"{row['n_tokens']:,}",
            spread(row["unique_tokens"], row["unique_tokens_sd"]),
            f"{row['unique_in_all']:,}",
            row["bos"] or "none",
        )
        for row in real.iter_rows(named=True)
    )
    header = ("text", "windows × length", "tokens N", "distinct per window", "distinct in all", "start token")
    return Grid(f"Texts of {selection.model}", header, cells, frozenset({1, 2, 3, 4}))


def profile_section(tables: Tables, facts: Facts) -> Section | None:
    """Show how many dimensions each layer uses, on real and shuffled text, and with random weights."""
    ready = select_counts(tables, facts)
    if ready is None:
        return None
    selection, rows, metric = ready
    frame = raw_centred(rows_of(tables["layers"], selection.model))
    groups = {text: rows_of(frame, selection.model, text) for text in selection.texts}
    top = figures.highest(list(groups.values()), metric)
    names = ["profile", *figure_names("profile", selection.texts[1:])]
    blocks = [
        Plot(
            name,
            figures.layer_profile(group, metric, top=top),
            f"{metric_label(metric)} by layer, {text}",
            text * (len(groups) > 1),
        )
        for name, (text, group) in zip(names, groups.items(), strict=True)
    ]
    n_tokens = int(rows["n_tokens"].to_numpy().max())
    return Section(
        anchor="layers",
        name="Dimensions by layer",
        title=_profile_finding(rows, metric, selection),
        findings=tuple(_profile_findings(rows, metric)),
        blocks=(*blocks, _profile_grid(rows, metric, selection)),
        how_to_read=_profile_reading(rows, metric),
        caveat=(
            f"Counted on {n_tokens:,} tokens per condition. {NOT_SMALL} Shuffled text keeps its token counts, so what it "
            "shares with real text needs no word order. In models with rotary positions layer 0 has the same "
            "points, shuffled or not, and the two coincide exactly. “norm” is what "
            "the output layer reads: the last of Hugging Face's hidden_states already is after the final norm, while "
            "here the last block is measured before it. The orange band is one standard deviation over shuffles, not over texts."
        ),
        tables=("layers",),
    )


def _profile_reading(rows: pl.DataFrame, metric: str) -> str:
    """Explain the figure; a comparison that was not run is not mentioned."""
    explanations = {
        "shuffled": "Where blue lies below orange, the order of the words makes the states simpler than the same words "
        "shuffled. ",
        "random weights": "Where it lies below purple, training does. ",
    }
    compared = "".join(text for name, text in explanations.items() if name in conditions(rows))
    lower = "The lower panel shows blue and orange" if "shuffled" in conditions(rows) else "The lower panel shows blue"
    return (
        "From left to right the x axis runs through the model: emb is the input of the first block, a number the output "
        f"of that block, norm the state after the final norm. Blue is real text: how many components (directions from PCA) "
        f"hold {percent(metric):g}% of the variance. {compared}Dashed grey is white noise of the same size, and the thin "
        f"dotted line is the numerical rank: the number of directions with any variance. {lower} as a share of grey."
    )


def _profile_finding(rows: pl.DataFrame, metric: str, selection: Selection) -> str:
    points = profile(rows, metric)
    top, bottom, apart = extremes(points)
    purpose = f"of {top['dim']:,} dimensions for {percent(metric):g}% of the variance"
    most, least = number(top["value"]), number(bottom["value"])
    who, ending = subject(top["layer"], top["site"])
    if top == bottom:
        words = f"{who} use{ending} {most} {purpose}"
    elif most == least:
        words = f"All layers use {most} {purpose}"
    else:
        ends = [_layers_with(points, end["value"], sites(rows)) for end in (bottom, top)]
        unclear = "" if apart else "; the two do not clearly differ"
        words = f"Layers use {least} ({ends[0]}) to {most} ({ends[1]}) {purpose}{unclear}"
    start = selection.prefix
    return (start + words[0].lower() + words[1:] if start else words) + _noise(top["null"])


def _layers_with(points: pl.DataFrame, value: float, names: dict[int, str]) -> str:
    """Return all layers of this value: counts of neighbouring layers are often equal."""
    return locations(points.filter(pl.col("value") == value)["layer"].to_list(), names)


def _noise(null: float | None) -> str:
    if null is None or not math.isfinite(null):
        return ""
    return f"; white noise of the same sample needs {number(null)}"


def _profile_findings(rows: pl.DataFrame, metric: str) -> list[str]:
    """Compare real text with the other conditions and with white noise, in sentences."""
    real, names = profile(rows, metric), sites(rows)
    others = [name for name in conditions(rows) if name != "real"]
    compared = [_against(real, profile(rows, metric, other), other, names) for other in others]
    return [text for text in (*compared, _against_noise(real, names), _too_few(real)) if text]


def _against(real: pl.DataFrame, other: pl.DataFrame, condition: str, names: dict[int, str]) -> str:
    """Name the layers where real text needs fewer or more components than another condition."""
    if other.is_empty() or real.is_empty():
        return ""
    who, whom = _COMPARED[condition]
    fewer, more = beyond(real, other)
    if not fewer and not more:
        return f"{sentence(who)} does not clearly need more or fewer components than {whom} ({margin(real, other)})."
    level = [layer for layer in real["layer"] if layer not in {*fewer, *more}]
    sides = (("fewer components", fewer), ("more components", more))
    parts = [f"{word} {locations(where, names)}" for word, where in sides if where]
    unclear = f"; the difference is not clear {locations(level, names)}" if level else ""
    gap = _largest(real, other, names, [*fewer, *more])
    return f"Compared with {whom}, {who} needs {listed(parts)}{gap}{unclear} ({margin(real, other)})."


_COMPARED = {
    "shuffled": ("real text", "the same text shuffled"),
    "shuffled across": ("real text", "text shuffled across windows"),
    "random weights": ("the trained model", "the same model with random weights"),
}


def _largest(real: pl.DataFrame, other: pl.DataFrame, names: dict[int, str], clear: list[int]) -> str:
    """Return the widest gap of the layers where it is clear."""
    both = (
        real.filter(pl.col("layer").is_in(clear))
        .join(other, on="layer", suffix="_other")
        .with_columns(gap=(pl.col("value") - pl.col("value_other")).abs())
    )
    row = both.sort("gap", descending=True, maintain_order=True).row(0, named=True)
    if row["gap"] < 0.5:
        return ""
    here, there = number(row["value"]), number(row["value_other"])
    where = f"most {location(row['layer'], names[row['layer']])}: " if len(clear) > 1 else ""
    return f" ({where}{here} against {there})"


def _against_noise(real: pl.DataFrame, names: dict[int, str]) -> str:
    shares = finite(real, "share_of_null")
    if shares.is_empty():
        return ""
    low, high = (float(v) for v in (shares["share_of_null"].to_numpy().min(), shares["share_of_null"].to_numpy().max()))
    # The same 3% that the other comparisons with a null call "about as many".
    level = shares.filter(pl.col("share_of_null") >= 0.97)["layer"].to_list()
    if level:
        return f"Real text needs about as many components as white noise, or more, {locations(level, names)}."
    reach = share(low) if shares.height == 1 or high - low < 5e-4 else f"{share(low)} to {share(high)}"
    return f"Real text needs {reach} of the components that white noise needs."


def _too_few(real: pl.DataFrame) -> str:
    n, dim = int(real["n_tokens"].to_numpy().min()), int(real["dim"].to_numpy().max())
    if n > dim:
        return ""
    return f"Only {count(n, 'token')} for {dim:,} dimensions: no count here can exceed {max(n - 1, 0):,}, whatever the model."


def _profile_grid(rows: pl.DataFrame, metric: str, selection: Selection) -> Grid:
    real = profile(rows, metric)
    others = {name: profile(rows, metric, name) for name in conditions(rows) if name != "real"}
    ranks = dict(profile(rows, NUMERICAL_RANK).select("layer", "value").iter_rows())
    cells = []
    for row in real.iter_rows(named=True):
        layer = row["layer"]
        beside = [_cell(points.filter(pl.col("layer") == layer)) for points in others.values()]
        rank = number(ranks.get(layer))
        cells.append((row["site"], number(row["value"]), *beside, number(row["null"]), rank, f"{row['n_tokens']:,}"))
    header = ("layer", "real", *others, "white noise", NUMERICAL_RANK, "tokens N")
    return Grid(
        f"{sentence(metric_label(metric))}, {selection.text}", header, tuple(cells), frozenset(range(1, len(header)))
    )


def _cell(points: pl.DataFrame) -> str:
    return spread(points["value"][0], points["spread"][0]) if points.height else "–"


def scree_section(tables: Tables, facts: Facts) -> Section | None:
    """Show how the variance of one layer is distributed over its components."""
    ready, frame = select_counts(tables, facts), table(tables, "scree")
    if ready is None or frame is None:
        return None
    selection, _, metric = ready
    spectra = rows_of(frame, selection.model, selection.text)
    if finite(spectra.filter(pl.col("condition") == "real"), "share").is_empty():
        return None
    n_tokens = int(spectra["n_tokens"].to_numpy().max())
    layer, threshold = nearest_layer(spectra, selection.layer), percent(metric) / 100
    shares, cumulative = state_figures.scree(spectra, layer), state_figures.cumulative_scree(spectra, layer, threshold)
    shares_caption = "Share of the variance of each component"
    cumulative_caption = "Share of the variance of the first components together"
    return Section(
        anchor="scree",
        name="Scree",
        title=_scree_finding(spectra, layer, threshold, selection),
        blocks=(
            Plot("scree-shares", shares, "share of variance per component", shares_caption, log_toggle=True),
            Plot("scree-cumulative", cumulative, "cumulative share of variance", cumulative_caption),
        ),
        choice=layer_choice(spectra, selection.layer),
        how_to_read=(
            "PCA orders the directions of the cloud of states by their variance. The first figure shows the share of the "
            "variance in each direction, the widest first; the second shows the cumulative sum. Components are counted up to "
            f"where a curve crosses the dotted line at {threshold:.0%}; the legend lists the counts. A curve that rises "
            "steeply belongs to a cloud of few dimensions. The menu above the figures selects another layer."
        ),
        caveat=(
            f"Raw states of {selection.text} with the mean removed, {n_tokens:,} tokens; of several shuffles the first is "
            "shown. Variance is not importance: a direction with little variance can decide the next token. A few massive "
            "tokens can hold most of the variance; the section on preprocessing checks this."
        ),
        tables=("scree",),
    )


def _scree_finding(spectra: pl.DataFrame, layer: int, threshold: float, selection: Selection) -> str:
    real = spectra.filter((pl.col("condition") == "real") & (pl.col("layer") == layer)).sort("index")
    where = location(layer, real["site"][0]) if real.height else f"in block {layer}"
    if real.is_empty():
        return "How the variance is distributed over the components"
    reached = real.filter(pl.col("cumulative") >= threshold - 1e-12)["index"].to_list()
    verb = "holds" if reached[:1] == [1] else "hold"
    enough = f", and {count(reached[0], 'component')} {verb} {100 * threshold:g}%" if reached else ""
    start = f"on {selection.text}, {where}" if selection.prefix else where
    return f"{sentence(start)} the widest component holds {share(real['share'][0])} of the variance{enough}"


def layers_strip(tables: Tables, facts: Facts) -> list[tuple[str, str, str]]:
    """Return what the head of the page says about depth, as (name, value, note); nothing without a count."""
    ready = select_counts(tables, facts) if "layers" in facts.studies else None
    if ready is None:
        return []
    selection, rows, metric = ready
    real = profile(rows, metric)
    low, high = (number(float(end)) for end in (real["value"].to_numpy().min(), real["value"].to_numpy().max()))
    value = low if low == high else f"{low}–{high}"
    note = f"of {real['dim'][0]:,} hold {percent(metric):g}% of the variance on {selection.text}"
    return [("dimensions by layer", value, note)]
