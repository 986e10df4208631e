"""Sections that compare states or predictions: with shuffled text, other layers and other texts."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import polars as pl

from dimscope.geometry.dimension import percent
from dimscope.page.section import Facts, Grid, Plot, Section, Tables, finite, table
from dimscope.page.wording import listed, number, sentence, share
from dimscope.studies.layers import figures, state_figures
from dimscope.studies.layers.comparisons import above_chance, beyond, intervals_apart, margin
from dimscope.studies.layers.context import (
    Selection,
    location,
    nearest_layer,
    raw_centred,
    rows_of,
    select,
    select_counts,
    spread,
)
from dimscope.studies.layers.profiles import conditions, locations, metric_label, profile, site_name, sites

OTHERS = ("real and shuffled", "real and random weights")


def confidence_section(tables: Tables, facts: Facts) -> Section | None:
    """Show how probable the first choice of the model is, on real and on shuffled text."""
    selection, frame = select(tables, facts), table(tables, "confidence")
    if selection is None or frame is None:
        return None
    bins = rows_of(frame, selection.model, selection.text)
    if bins.is_empty():
        return None
    stored = table(tables, "predictions")
    predictions = _predictions(stored, selection) if stored is not None else None
    plot = Plot("confidence-density", state_figures.confidence(bins), "probability of the model's first choice")
    grid = _predictions_grid(predictions) if predictions is not None else None
    return Section(
        anchor="confidence",
        name="Confidence",
        title=_confidence_finding(predictions),
        findings=_loss_finding(predictions),
        blocks=(plot, grid) if grid else (plot,),
        how_to_read=(
            "At every position the model gives each token of the vocabulary a probability. The figure shows the probability "
            "of the most probable token, its first choice: 100% at the right end, and at the left end that of a uniform "
            "guess. The area under a curve between two values is the share of positions between them."
            + _order_reading(bins)
        ),
        caveat=(
            "Confidence is not accuracy: this figure ignores which token came next; the loss in the table measures the "
            "probability of that token. The average in the title is a geometric mean, so a few positions of very low probability weigh "
            f"heavily. Measured on {selection.text} only."
        ),
        tables=("confidence", "predictions"),
    )


def _order_reading(bins: pl.DataFrame) -> str:
    if "shuffled" not in conditions(bins):
        return ""
    return " How much the model uses the order of words is told by the loss, not by this figure: it can be confident and wrong."


def _predictions(frame: pl.DataFrame, selection: Selection) -> pl.DataFrame | None:
    rows = finite(rows_of(frame, selection.model, selection.text))
    ends = (pl.col(name).cast(pl.Float64).mean() for name in ("low", "high"))
    sizes = pl.col("n_tokens").max()
    stats = (pl.col("value").mean(), pl.col("value").std(ddof=1).alias("spread"), pl.col("stderr").mean(), *ends, sizes)
    return rows.group_by("condition", "metric", maintain_order=True).agg(*stats) if rows.height else None


def _mean(predictions: pl.DataFrame | None, metric: str, condition: str) -> float | None:
    if predictions is None:
        return None
    rows = predictions.filter((pl.col("metric") == metric) & (pl.col("condition") == condition))
    return rows["value"][0] if rows.height else None


def _confidence_finding(predictions: pl.DataFrame | None) -> str:
    means = {name: _mean(predictions, "max log-softmax", name) for name in ("real", "shuffled", "random weights")}
    if means["real"] is None:
        return "The probability of the first choice of the model"
    names = {"shuffled": "on shuffled text", "random weights": "with random weights"}
    real = f"On real text the model gives its first choice a probability of {share(math.exp(means['real']))}"
    others = [f"{names[k]} {share(math.exp(v))}" for k, v in means.items() if k in names and v is not None]
    return ", ".join([real, *others]) + f" (geometric mean{'s' if others else ''})"


def _loss_finding(predictions: pl.DataFrame | None) -> tuple[str, ...]:
    """Compare the loss on real and on shuffled text."""
    rows = {} if predictions is None else {
        row["condition"]: row for row in predictions.filter(pl.col("metric") == "loss").iter_rows(named=True)
    }  # fmt: skip
    real, other = rows.get("real"), rows.get("shuffled")
    if real is None or other is None:
        return ()
    gap = other["value"] - real["value"]
    losses = f"{_with_interval(real)} on real text, {_with_interval(other)} on shuffled text"
    if not intervals_apart(real, other):
        return (f"Shuffling does not clearly change the loss: {losses} (nats per token).",)
    verb = "raises" if gap > 0 else "lowers"
    return (f"Shuffling {verb} the loss on {real['n_tokens']:,} predicted tokens, in nats per token: {losses}.",)


def _with_interval(row: Mapping[str, Any]) -> str:
    if row["low"] is None:
        return number(row["value"])
    return f"{number(row['value'])} (95% interval over windows: {number(row['low'])} to {number(row['high'])})"


_UNITS = {
    "loss": "loss (nats per token)",
    "entropy": "entropy (nats)",
    "max log-softmax": "log-probability of the first choice (nats)",
}


def _predictions_grid(predictions: pl.DataFrame) -> Grid:
    metrics = predictions["metric"].unique(maintain_order=True).to_list()
    rows = []
    for name in conditions(predictions):
        of_condition = predictions.filter(pl.col("condition") == name)
        values = {
            row["metric"]: (row["value"], row["stderr"] if row["spread"] is None else row["spread"])
            for row in of_condition.iter_rows(named=True)
        }
        rows.append((name, *(spread(*values.get(metric, (None, None))) for metric in metrics)))
    header = ("text and weights", *(_UNITS.get(metric, metric) for metric in metrics))
    n = predictions["n_tokens"].to_numpy().max()
    caption = f"Predictions at {n:,} positions (± standard deviation over shuffles, else standard error over windows)"
    return Grid(caption, header, tuple(rows), frozenset(range(1, len(header))))


def similarity_section(tables: Tables, facts: Facts) -> Section | None:
    """Show which layers have similar states, and where they change most."""
    selection, frame = select(tables, facts), table(tables, "similarity")
    if selection is None or frame is None:
        return None
    pairs = rows_of(frame, selection.model, selection.text).filter(pl.col("comparison") == "between layers")
    if finite(pairs, "cka").filter(pl.col("layer") != pl.col("other_layer")).is_empty():
        return None
    plot = Plot(
        "similarity-cka", state_figures.similarity_matrix(pairs), "CKA between all pairs of layers", square=True
    )
    return Section(
        anchor="similarity",
        name="Similarity of layers",
        title=_similarity_finding(pairs, selection),
        blocks=(plot,),
        how_to_read=(
            "Each cell compares the states of the same tokens at two layers. CKA is 1 where one cloud is a rotation and "
            "uniform scaling of the other, and 0 where distances between tokens in one say nothing about those in the other. "
            "A square of values near 1 is a range of layers with the same geometry; a sudden change from one row to the "
            "next is a block that changes it."
        ),
        caveat=(
            f"Linear CKA, debiased for the sample of {int(pairs['n_tokens'].to_numpy().max()):,} tokens, which can "
            "make it slightly negative. It weighs directions by their variance, so a few massive tokens can make "
            "layers look similar that differ otherwise. A high value does not mean that a block does nothing."
        ),
        tables=("similarity",),
    )


def _similarity_finding(pairs: pl.DataFrame, selection: Selection) -> str:
    cells = {(a, b): v for a, b, v in finite(pairs, "cka").select("layer", "other_layer", "cka").iter_rows()}
    cells = {(b, a): v for (a, b), v in cells.items()} | cells
    names = {**dict(pairs.select("other_layer", "other_site").iter_rows()), **sites(pairs)}
    order = sorted(names)
    steps = {(a, b): cells[a, b] for a, b in itertools.pairwise(order) if (a, b) in cells}
    if not steps:
        return "How similar the layers are"
    (a, b), low = min(steps.items(), key=lambda step: step[1])
    start = selection.prefix or ""
    ends = cells.get((order[0], order[-1]))
    far = f"; that of the first and the last layer is {ends:.2f}" if ends is not None and len(order) > 2 else ""
    step = f"from {site_name(a, names[a])} to {site_name(b, names[b])}"
    high = max(steps.values())
    reach = f"{low:.2f} ({step}) to {high:.2f}" if high - low >= 0.005 else f"{low:.2f}"
    return sentence(f"{start}neighbouring layers have a CKA of {reach}{far}").replace("-0.00", "0.00")


def alignment_section(tables: Tables, facts: Facts) -> Section | None:
    """Show at which layer shuffling, or the lack of training, changes the states most."""
    selection, frame = select(tables, facts), table(tables, "similarity")
    if selection is None or frame is None:
        return None
    pairs = rows_of(frame, selection.model, selection.text).filter(
        pl.col("comparison").is_in(OTHERS) & (pl.col("layer") == pl.col("other_layer"))
    )
    pairs = finite(pairs, "cka")
    if pairs.is_empty():
        return None
    plot = Plot("alignment-profile", figures.alignment(pairs), "CKA and overlap of real states with others, by layer")
    return Section(
        anchor="alignment",
        name="Real and shuffled text",
        title=_alignment_finding(pairs),
        findings=_chance_finding(pairs),
        blocks=(plot,),
        how_to_read=(
            "Each point compares the states of one layer on real text with those on shuffled text, or with those of "
            "the same architecture with random weights. The upper panel shows CKA: whether the clouds have the same shape, "
            "position by position. In shuffled text another token is at each position, so its CKA is near 0 unless positions "
            "alone determine the states; the grey band is two standard deviations of the CKA of randomly paired tokens. The "
            "lower panel shows the overlap: whether the widest directions of the two clouds span the same space, whichever "
            "token is where. The dashed line is the expected overlap of two random spaces of that size. 1 is the same space, "
            "which two samples do not reach: at the embeddings of a model with rotary positions shuffling changes nothing, so "
            "the overlap there is what this sample can show."
        ),
        caveat=(
            "Random weights also rotate every direction, so an overlap near chance is expected for them, and only its "
            f"excess is meaningful. The overlap weighs {int(pairs['k'].to_numpy().max())} components equally and ignores all "
            "others. "
            f"One draw of the shuffle, {int(pairs['n_tokens'].to_numpy().max()):,} tokens."
        ),
        tables=("similarity",),
    )


def _alignment_finding(pairs: pl.DataFrame) -> str:
    shuffled = pairs.filter(pl.col("other_condition") == "shuffled").drop_nulls("overlap")
    if shuffled.height:
        chance = f"; chance is {shuffled['overlap_null'][0]:.2f}" if shuffled["overlap_null"][0] is not None else ""
        of_overlap = f"The first {shuffled['k'][0]} components of real and shuffled text overlap by"
        return f"{of_overlap} {_range(shuffled, 'overlap')}{chance}"
    condition = pairs["other_condition"][0]
    whom = "with random weights" if condition == "random weights" else "on shuffled text"
    return f"The states of real text and those {whom} have a CKA of {_range(pairs, 'cka')}"


def _range(pairs: pl.DataFrame, column: str) -> str:
    """Return the lowest and the highest value of a column, with the layers that have them."""
    ordered = pairs.sort(column, maintain_order=True)
    ends = ordered.row(0, named=True), ordered.row(-1, named=True)
    low, high = (f"{row[column]:.2f}".replace("-0.00", "0.00") for row in ends)
    if low == high:
        return low
    there, where = (location(row["layer"], row["site"]) for row in ends)
    return f"{low} ({there}) to {high} ({where})"


def _chance_finding(pairs: pl.DataFrame) -> tuple[str, ...]:
    """Name the layers whose overlap is clearly above that of random spaces: in one case of 20 for all layers at once."""
    findings, names = [], sites(pairs)
    pairs = pairs.drop_nulls(["overlap", "overlap_null"])
    for condition in pairs["other_condition"].unique(maintain_order=True):
        rows = pairs.filter(pl.col("other_condition") == condition).sort("layer")
        above = above_chance(rows)
        whom = "random weights" if condition == "random weights" else f"{condition} text"
        where = locations(above, names) if above else "at no layer"
        findings.append(f"The overlap with {whom} is above chance {where}.")
    return tuple(findings)


def texts_section(tables: Tables, facts: Facts) -> Section | None:
    """Show how many components each text needs, layer by layer."""
    ready = select_counts(tables, facts)
    if ready is None:
        return None
    selection, _, metric = ready
    rows = raw_centred(rows_of(tables["layers"], selection.model)).filter(pl.col("condition") == "real")
    rows = finite(rows.filter(pl.col("metric") == metric))
    groups = {text: profile(rows.filter(pl.col("text") == text), metric) for text in selection.texts}
    groups = {text: points for text, points in groups.items() if points.height}
    if len(groups) < 2:
        return None
    plot = Plot("texts-profile", figures.texts_profile(rows, metric), f"{metric_label(metric)} by layer and text")
    return Section(
        anchor="texts",
        name="Comparison of texts",
        title=_texts_finding(groups, metric, selection),
        findings=_texts_order(groups, sites(rows)),
        blocks=(plot,),
        how_to_read=(
            "Each line is a text, read by the same model and counted in the same way. A text that needs more components "
            "makes the model use more of its dimensions. Lines that diverge only in some blocks show where the kind of text "
            "matters."
        ),
        caveat=(
            "Texts differ in their number of distinct tokens, and fewer distinct tokens mean fewer dimensions at the "
            f"embeddings already: compare the texts there first. Tokens per text: {_sizes(rows)}. One sample of each text, "
            "without a standard deviation over samples."
        ),
        tables=("layers",),
    )


def _sizes(rows: pl.DataFrame) -> str:
    sizes = rows.group_by("text", maintain_order=True).agg(pl.col("n_tokens").max())
    return listed([f"{n:,} of {text}" for text, n in sizes.iter_rows()])


def _texts_finding(groups: dict[str, pl.DataFrame], metric: str, selection: Selection) -> str:
    studied = next(iter(groups.values()))
    layer = nearest_layer(studied, selection.layer)
    at_layer = {text: points.filter(pl.col("layer") == layer) for text, points in groups.items()}
    counts = [(text, number(points["value"][0])) for text, points in at_layer.items() if points.height]
    where = sentence(location(layer, sites(studied)[layer]))
    components = f"components for {percent(metric):g}% of the variance"
    (first, needed), *others = counts
    return f"{where}, {first} needs {needed} {components}, {listed([f'{text} {needs}' for text, needs in others])}"


def _texts_order(groups: dict[str, pl.DataFrame], names: dict[int, str]) -> tuple[str, ...]:
    """Compare the first text with each of the others: where it clearly needs more, and where fewer components."""
    (first, own), *others = groups.items()
    findings = []
    for text, points in others:
        fewer, more = beyond(own, points)
        sides = (("more", more), ("fewer", fewer))
        parts = [f"{word} components {locations(layers, names)}" for word, layers in sides if layers]
        same = f"{sentence(first)} does not clearly need more or fewer components than {text}"
        compared = f"Compared with {text}, {first} needs {' and '.join(parts)}" if parts else same
        findings.append(f"{compared} ({margin(own, points)}).")
    return tuple(findings)
