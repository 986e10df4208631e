"""Sections about depth: what was read, how many dimensions every layer uses, and how one layer spreads its variance."""

import math

import polars as pl

from dimscope.geometry.dimension import percent
from dimscope.geometry.metrics import NUMERICAL_RANK
from dimscope.page.section import Facts, Grid, Plot, Section, Tables, finite, table
from dimscope.page.wording import count, listed, number, sentence, share
from dimscope.studies.layers import figures, state_figures
from dimscope.studies.layers.context import (
    Asked,
    asked,
    at,
    counted,
    layer_choice,
    of,
    shown_layer,
    spectral,
    spread,
    subject,
)
from dimscope.studies.layers.profiles import conditions, meaning, places, profile, sites

NOT_SMALL = (
    "Every count grows with the number of tokens until it settles, and white noise of the same shape shows how far that "
    "limit alone reaches."
)


def sample_section(tables: Tables, facts: Facts) -> Section | None:
    """Say which texts were read, how long they are, and against what they are held."""
    found, texts = asked(tables, facts), table(tables, "texts")
    if found is None or texts is None:
        return None
    rows = of(texts, found.model)
    real = rows.filter(pl.col("condition") == "real")
    if real.is_empty():
        return None
    layers = of(tables["layers"], found.model)
    return Section(
        anchor="layers-sample",
        name="What was read",
        title=_sample_finding(real, layers, found),
        blocks=(_texts_grid(rows, found),),
        how_to_read=(
            "A language model carries one vector per token through its blocks, the hidden state; every block adds to it. "
            "The states of all tokens at one layer are a cloud of points, and the sections below ask how many "
            f"dimensions each cloud fills. Comparisons tell what the number means. {_comparisons(layers)}White noise has no "
            "structure at all: as many points, as many coordinates, all independent."
        ),
        caveat=(
            "Shuffling keeps how often each token occurs, within each window or, where named “shuffled across”, over "
            "all windows: what real and shuffled text share may still come from these frequencies. A few windows are "
            "a sample of one kind of text, and other texts may fill other dimensions."
        ),
        tables=("texts", "layers"),
    )


def _comparisons(layers: pl.DataFrame) -> str:
    meant = {
        "shuffled": "Shuffled text holds the same tokens in random order, so only their order is gone. ",
        "random weights": "Random weights are the same architecture before any training, reading the same text. ",
    }
    return "".join(text for name, text in meant.items() if name in conditions(layers))


def _sample_finding(real: pl.DataFrame, layers: pl.DataFrame, found: Asked) -> str:
    first = real.filter(pl.col("text") == found.text).row(0, named=True)
    windows = f"{count(first['n_windows'], 'window')} of {first['window_length']:,}"
    others = {"shuffled": _draws(layers, "shuffled"), "shuffled across": _draws(layers, "shuffled across")}
    named = {"shuffled": "", "shuffled across": " across windows"}
    held = [count(n, "shuffle") + named[name] for name, n in others.items() if n]
    held += ["random weights"] if "random weights" in conditions(layers) else []
    against = f", beside {listed(held)}" if held else ""
    n_layers = count(layers["layer"].n_unique(), "layer")
    return f"{count(first['n_tokens'], 'token')} of {found.text} ({windows}), read at {n_layers}{against}"


def _draws(layers: pl.DataFrame, condition: str) -> int:
    return layers.filter(pl.col("condition") == condition)["seed"].n_unique()


def _texts_grid(rows: pl.DataFrame, found: Asked) -> Grid:
    # Shuffles hold the same tokens: one row per text says it all.
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
    return Grid(f"What {found.model} read", header, cells, frozenset({1, 2, 3, 4}))


def profile_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell how many dimensions each layer uses, on real and shuffled text, and with random weights."""
    ready = counted(tables, facts)
    if ready is None:
        return None
    found, rows, metric = ready
    frame = spectral(of(tables["layers"], found.model))
    groups = {text: of(frame, found.model, text) for text in found.texts}
    top = figures.highest(list(groups.values()), metric)
    blocks = [
        Plot(
            f"layers-{i}",
            figures.layer_profile(group, metric, top=top),
            f"{meaning(metric)} by layer, {text}",
            text * (len(groups) > 1),
        )
        for i, (text, group) in enumerate(groups.items())
    ]
    n_tokens = int(rows["n_tokens"].to_numpy().max())
    return Section(
        anchor="layers",
        name="Dimensions by layer",
        title=_profile_finding(rows, metric, found),
        findings=tuple(_profile_findings(rows, metric)),
        blocks=(*blocks, _profile_grid(rows, metric, found)),
        how_to_read=_profile_reading(rows, metric),
        caveat=(
            f"Counted on {n_tokens:,} tokens per condition. {NOT_SMALL} Shuffled text keeps its token counts, so what it "
            "shares with real text needs no word order; in models with rotary positions layer 0 holds the same "
            "points, shuffled or not, and the two coincide exactly. “norm” is what "
            "the output layer reads: the last of Hugging Face's hidden_states already is after the final norm, while "
            "here the last block is measured before it. The orange band is one standard deviation over shuffles, not over texts."
        ),
        tables=("layers",),
    )


def _profile_reading(rows: pl.DataFrame, metric: str) -> str:
    """Explain what is drawn: a comparison that was not run is not mentioned."""
    meant = {
        "shuffled": "Where blue lies below orange, the order of the words makes the states simpler than the same words "
        "shuffled. ",
        "random weights": "Where it lies below purple, training does. ",
    }
    compared = "".join(text for name, text in meant.items() if name in conditions(rows))
    lower = "The lower panel shows blue and orange" if "shuffled" in conditions(rows) else "The lower panel shows blue"
    return (
        "Left to right is the way through the model: emb is the input of the first block, each number the output of "
        f"that block. Blue is real text: how many components (directions found by PCA) hold {percent(metric):g}% of the "
        f"variance. {compared}Dashed grey is white noise of the same size, the thin dotted line the number of "
        f"directions that are not exactly empty. {lower} as a share of grey."
    )


def _profile_finding(rows: pl.DataFrame, metric: str, found: Asked) -> str:
    real = profile(rows, metric)
    peak = real.sort("value", descending=True, maintain_order=True).row(0, named=True)
    who, ending = subject(peak["layer"], peak["site"])
    what = f"{number(peak['value'])} of {peak['dim']:,}"
    goal = f"for {percent(metric):g}% of the variance"
    noise = _noise(peak["null"])
    if real.height == 1:
        found_words = f"{who} use{ending} {what} dimensions {goal}"
    elif real["value"].n_unique() == 1:
        found_words = f"All {real.height} layers use {what} dimensions {goal}"
    else:
        found_words = f"{who} use{ending} the most dimensions: {what} {goal}"
    lower = found.prefix and found_words[0].lower() + found_words[1:]
    return (found.prefix + lower if lower else found_words) + noise


def _noise(null: float | None) -> str:
    known = null is not None and math.isfinite(null)
    return f"; white noise of the same sample needs {number(null)}" if known else ""


def _profile_findings(rows: pl.DataFrame, metric: str) -> list[str]:
    """Say in words what lies beyond its comparison and what does not."""
    real, names = profile(rows, metric), sites(rows)
    told = [_against(real, profile(rows, metric, other), other, names) for other in conditions(rows) if other != "real"]
    return [text for text in (*told, _against_noise(real, names), _too_few(rows)) if text]


def _against(real: pl.DataFrame, other: pl.DataFrame, condition: str, names: dict[int, str]) -> str:
    """Tell where real text needs fewer or more components than another condition."""
    if other.is_empty() or real.is_empty():
        return ""
    who, whom = _COMPARED[condition]
    fewer, more = beyond(real, other)
    level = [layer for layer in real["layer"] if layer not in {*fewer, *more}]
    sides = (("fewer components", fewer), ("more components", more), ("about as many", level))
    told = [f"{word} {places(where, names)}" for word, where in sides if where]
    gap = _largest(real, other, names) if fewer or more else ""
    return f"Compared with {whom}, {who} needs {listed(told)}{gap} ({_margin(other)})."


def _margin(other: pl.DataFrame) -> str:
    draws = int(other["n_draws"].to_numpy().max())
    if draws < 2:
        return "one draw, so its spread is unknown"
    return f"what differs does so by more than 2 standard deviations of the {draws} draws"


_COMPARED = {
    "shuffled": ("real text", "the same text shuffled"),
    "shuffled across": ("real text", "text shuffled across windows"),
    "random weights": ("the trained model", "the same model with random weights"),
}


def beyond(real: pl.DataFrame, other: pl.DataFrame) -> tuple[list[int], list[int]]:
    """Return the layers where `real` lies below and above `other` by 2 sd of its draws and by half a component."""
    both = real.join(other, on="layer", suffix="_other").sort("layer")
    gap, margin = pl.col("value") - pl.col("value_other"), 2 * pl.col("spread_other").fill_null(0.0)
    clear = (gap.abs() > margin) & (gap.abs() >= 0.5)
    return both.filter(clear & (gap < 0))["layer"].to_list(), both.filter(clear & (gap > 0))["layer"].to_list()


def _largest(real: pl.DataFrame, other: pl.DataFrame, names: dict[int, str]) -> str:
    both = real.join(other, on="layer", suffix="_other").with_columns(
        gap=(pl.col("value") - pl.col("value_other")).abs()
    )
    row = both.sort("gap", descending=True, maintain_order=True).row(0, named=True)
    if row["gap"] < 0.5:
        return ""
    there = spread(row["value_other"], row["spread_other"])
    return f"; the gap is widest {at(row['layer'], names[row['layer']])}, {number(row['value'])} against {there}"


def _against_noise(real: pl.DataFrame, names: dict[int, str]) -> str:
    known = finite(real, "share_of_null")
    if known.is_empty():
        return ""
    low, high = (float(v) for v in (known["share_of_null"].to_numpy().min(), known["share_of_null"].to_numpy().max()))
    # The same 3% that the other comparisons with a null call "about as many".
    level = known.filter(pl.col("share_of_null") >= 0.97)["layer"].to_list()
    if level:
        return f"Real text needs about as many components as white noise, or more, {places(level, names)}."
    reach = share(low) if known.height == 1 or high - low < 5e-4 else f"{share(low)} to {share(high)}"
    return f"Real text needs {reach} of the components that white noise needs."


def _too_few(rows: pl.DataFrame) -> str:
    n, dim = int(rows["n_tokens"].to_numpy().min()), int(rows["dim"].to_numpy().max())
    if n > dim:
        return ""
    return f"Only {count(n, 'token')} for {dim:,} dimensions: no count here can exceed {max(n - 1, 0):,}, whatever the model."


def _profile_grid(rows: pl.DataFrame, metric: str, found: Asked) -> Grid:
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
    return Grid(f"{sentence(meaning(metric))}, {found.text}", header, tuple(cells), frozenset(range(1, len(header))))


def _cell(points: pl.DataFrame) -> str:
    return spread(points["value"][0], points["spread"][0]) if points.height else "–"


def scree_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell how the variance of one layer spreads over its components."""
    ready, frame = counted(tables, facts), table(tables, "scree")
    if ready is None or frame is None:
        return None
    found, _, metric = ready
    spectra = of(frame, found.model, found.text)
    if finite(spectra.filter(pl.col("condition") == "real"), "share").is_empty():
        return None
    n_tokens = int(spectra["n_tokens"].to_numpy().max())
    layer, threshold = shown_layer(spectra, found.layer), percent(metric) / 100
    blocks = (
        Plot("layer-scree", state_figures.scree(spectra, layer), "share of variance per component", log_toggle=True),
        Plot(
            "layer-cumulative",
            state_figures.cumulative_scree(spectra, layer, threshold),
            "cumulative share of variance",
        ),
    )
    return Section(
        anchor="scree",
        name="Scree",
        title=_scree_finding(spectra, layer, threshold, found),
        blocks=blocks,
        choice=layer_choice(spectra, found.layer),
        how_to_read=(
            "Turn the cloud of states until its widest direction comes first. First figure: the share of the variance that "
            "each direction holds, the widest first. Second: the same shares added up. Where a curve crosses the dotted "
            f"line at {threshold:.0%}, its components are counted; the legend gives the counts. A curve "
            "that rises at once is a cloud of few dimensions. Choose another layer above the figures."
        ),
        caveat=(
            f"Mean removed, raw states of {found.text}, {n_tokens:,} tokens; of the shuffles the first is drawn. "
            "Variance is not importance: a direction with little of it can decide the next token. A few massive "
            "tokens can own most of the variance, which the section on preprocessing checks."
        ),
        tables=("scree",),
    )


def _scree_finding(spectra: pl.DataFrame, layer: int, threshold: float, found: Asked) -> str:
    real = spectra.filter((pl.col("condition") == "real") & (pl.col("layer") == layer)).sort("index")
    where = at(layer, real["site"][0]) if real.height else f"in block {layer}"
    if real.is_empty():
        return "How the variance spreads over the components"
    reached = real.filter(pl.col("cumulative") >= threshold - 1e-12)["index"].to_list()
    verb = "holds" if reached[:1] == [1] else "hold"
    enough = f", and {count(reached[0], 'component')} {verb} {100 * threshold:g}%" if reached else ""
    start = f"on {found.text}, {where}" if found.prefix else where
    return f"{sentence(start)} the widest component holds {share(real['share'][0])} of the variance{enough}"


def layers_strip(tables: Tables, facts: Facts) -> list[tuple[str, str, str]]:
    """Return what the head of the page says about depth, as (name, value, note); nothing without a count."""
    ready = counted(tables, facts) if "layers" in facts.studies else None
    if ready is None:
        return []
    found, rows, metric = ready
    real = profile(rows, metric)
    low, high = (number(float(end)) for end in (real["value"].to_numpy().min(), real["value"].to_numpy().max()))
    value = low if low == high else f"{low}–{high}"
    note = f"of {real['dim'][0]:,} hold {percent(metric):g}% of the variance of {found.text}"
    return [("dimensions by layer", value, note)]
