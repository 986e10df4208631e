"""Sections that hold states or predictions against others: shuffled text, other layers, other texts, other models."""

import itertools
import math

import polars as pl

from dimscope.geometry.dimension import percent
from dimscope.page.section import Facts, Grid, Plot, Section, Tables, finite, table
from dimscope.page.wording import listed, number, sentence, share
from dimscope.studies.layers import figures, state_figures
from dimscope.studies.layers.context import Asked, asked, at, counted, of, shown_layer, spectral, spread
from dimscope.studies.layers.profiles import conditions, meaning, places, profile, site_words, sites

OTHERS = ("real and shuffled", "real and random weights")


def confidence_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell how sure the model is of its first choice, on real and on shuffled text."""
    found, frame = asked(tables, facts), table(tables, "confidence")
    if found is None or frame is None:
        return None
    bins = of(frame, found.model, found.text)
    if bins.is_empty():
        return None
    said = table(tables, "predictions")
    predictions = _predictions(said, found) if said is not None else None
    plot = Plot("layer-confidence", state_figures.confidence(bins), "probability of the model's first choice")
    grid = _predictions_grid(predictions) if predictions is not None else None
    return Section(
        anchor="confidence",
        name="Confidence",
        title=_confidence_finding(predictions),
        findings=_loss_finding(predictions),
        blocks=(plot, grid) if grid else (plot,),
        how_to_read=(
            "At every position the model gives each token of the vocabulary a probability. The figure shows that of its "
            "first choice: at the right end it is certain, at the left end it spreads its bets over the whole "
            "vocabulary. The area under a curve between two values is the share of positions between them."
            + _order_reading(bins)
        ),
        caveat=(
            "Sure is not right: the figure does not ask whether the first choice came true, the loss in the table "
            "does. The average in the title is one of logarithms (a geometric mean), so a few very unsure positions weigh "
            f"much. Measured on {found.text} only."
        ),
        tables=("confidence", "predictions"),
    )


def _order_reading(bins: pl.DataFrame) -> str:
    told = " The further real text lies to the right of shuffled text, the more the model uses the order of words."
    return told if "shuffled" in conditions(bins) else ""


def _predictions(frame: pl.DataFrame, found: Asked) -> pl.DataFrame | None:
    rows = finite(of(frame, found.model, found.text))
    stats = (pl.col("value").mean(), pl.col("value").std(ddof=1).alias("spread"), pl.col("stderr").mean())
    return rows.group_by("condition", "metric", maintain_order=True).agg(*stats) if rows.height else None


def _told(predictions: pl.DataFrame | None, metric: str, condition: str) -> float | None:
    if predictions is None:
        return None
    rows = predictions.filter((pl.col("metric") == metric) & (pl.col("condition") == condition))
    return rows["value"][0] if rows.height else None


def _confidence_finding(predictions: pl.DataFrame | None) -> str:
    sure = {name: _told(predictions, "max log-softmax", name) for name in ("real", "shuffled", "random weights")}
    if sure["real"] is None:
        return "How sure the model is of its first choice"
    names = {"shuffled": "on shuffled text", "random weights": "with random weights"}
    real = f"On real text the model gives its first choice a probability of {share(math.exp(sure['real']))}"
    others = [f"{names[k]} {share(math.exp(v))}" for k, v in sure.items() if k in names and v is not None]
    return ", ".join([real, *others]) + f" (geometric mean{'s' if others else ''})"


def _loss_finding(predictions: pl.DataFrame | None) -> tuple[str, ...]:
    real, other = _told(predictions, "loss", "real"), _told(predictions, "loss", "shuffled")
    if real is None or other is None:
        return ()
    verb = "costs" if other > real else "saves"
    gap = number(abs(other - real))
    return (
        f"Shuffling {verb} {gap} nats of loss per token: {number(real)} on real text, {number(other)} on shuffled.",
    )


_UNITS = {"loss": "loss (nats per token)", "entropy": "entropy (nats)", "max log-softmax": "log-probability (nats)"}


def _predictions_grid(predictions: pl.DataFrame) -> Grid:
    metrics = predictions["metric"].unique(maintain_order=True).to_list()
    rows = []
    for name in conditions(predictions):
        of_condition = predictions.filter(pl.col("condition") == name)
        values = {
            metric: (value, sd if sd is not None else error) for _, metric, value, sd, error in of_condition.iter_rows()
        }
        rows.append((name, *(spread(*values.get(metric, (None, None))) for metric in metrics)))
    header = ("text and weights", *(_UNITS.get(metric, metric) for metric in metrics))
    caption = "Predictions (± standard deviation over shuffles, else standard error)"
    return Grid(caption, header, tuple(rows), frozenset(range(1, len(header))))


def similarity_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell which layers hold nearly the same states and where they change most."""
    found, frame = asked(tables, facts), table(tables, "similarity")
    if found is None or frame is None:
        return None
    pairs = of(frame, found.model, found.text).filter(pl.col("comparison") == "between layers")
    if finite(pairs, "cka").filter(pl.col("layer") != pl.col("other_layer")).is_empty():
        return None
    plot = Plot("layer-cka", state_figures.similarity_matrix(pairs), "CKA between all pairs of layers", square=True)
    return Section(
        anchor="similarity",
        name="Layer against layer",
        title=_similarity_finding(pairs, found),
        blocks=(plot,),
        how_to_read=(
            "Every cell compares the states of the same tokens at two layers. CKA is 1 where one cloud is the other "
            "turned and scaled as a whole, and 0 where knowing which tokens lie close in one says nothing about the other. "
            "A square of values near 1 is a stretch of layers that keep the same geometry; a sudden change from one row to the next is a "
            "block that rebuilds it."
        ),
        caveat=(
            f"Linear CKA, debiased for the sample of {int(pairs['n_tokens'].to_numpy().max()):,} tokens, which can "
            "make it slightly negative. It weighs directions by their variance, so a few massive tokens can make "
            "layers look alike that differ in everything else. A high value does not say that a block does nothing."
        ),
        tables=("similarity",),
    )


def _similarity_finding(pairs: pl.DataFrame, found: Asked) -> str:
    cells = {(a, b): v for a, b, v in finite(pairs, "cka").select("layer", "other_layer", "cka").iter_rows()}
    cells = {(b, a): v for (a, b), v in cells.items()} | cells
    names = {**dict(pairs.select("other_layer", "other_site").iter_rows()), **sites(pairs)}
    order = sorted(names)
    steps = {(a, b): cells[a, b] for a, b in itertools.pairwise(order) if (a, b) in cells}
    if not steps:
        return "How alike the layers are"
    (a, b), low = min(steps.items(), key=lambda step: step[1])
    start = found.prefix or ""
    ends = cells.get((order[0], order[-1]))
    far = f"; the first and the last layer have {ends:.2f}" if ends is not None and len(order) > 2 else ""
    # The cut serves the wording only; the figure shows the values.
    if low >= 0.95:
        return sentence(f"{start}every layer is nearly the same as the one before it: CKA {low:.2f} or more{far}")
    step = f"from {site_words(a, names[a])} to {site_words(b, names[b])}"
    return sentence(f"{start}the states change most {step}: CKA {low:.2f}{far}")


def alignment_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell at which layer shuffling, or the lack of training, changes the states most."""
    found, frame = asked(tables, facts), table(tables, "similarity")
    if found is None or frame is None:
        return None
    pairs = of(frame, found.model, found.text).filter(
        pl.col("comparison").is_in(OTHERS) & (pl.col("layer") == pl.col("other_layer"))
    )
    pairs = finite(pairs, "cka")
    if pairs.is_empty():
        return None
    plot = Plot("layer-alignment", figures.alignment(pairs), "likeness of real states with others, by layer")
    return Section(
        anchor="alignment",
        name="Real against shuffled",
        title=_alignment_finding(pairs),
        findings=_chance_finding(pairs),
        blocks=(plot,),
        how_to_read=(
            "Each point compares the states of one layer on real text with those on shuffled text, or with those of "
            "the same architecture with random weights. Above, CKA asks whether the clouds have the same shape position by "
            "position. In shuffled text another token stands at each position, so there it is near 0 unless positions "
            "alone shape the states. Below, the overlap asks whether the widest directions of the clouds span the same space, "
            "whichever token is where: 1 is the same, the dashed line is what two random spaces of that size share."
        ),
        caveat=(
            "Weights drawn anew also turn every direction, so an overlap near chance with random weights is expected "
            "and only its excess means something. The overlap counts "
            f"{int(pairs['k'].to_numpy().max())} components as equals and ignores all others. "
            f"One draw of the shuffle, {int(pairs['n_tokens'].to_numpy().max()):,} tokens."
        ),
        tables=("similarity",),
    )


def _alignment_finding(pairs: pl.DataFrame) -> str:
    shuffled = pairs.filter((pl.col("other_condition") == "shuffled") & pl.col("overlap").is_not_null())
    if shuffled.height:
        row = shuffled.sort("overlap", maintain_order=True).row(0, named=True)
        least = ", the least of all layers" if shuffled.height > 1 else ""
        chance = f" (chance {row['overlap_null']:.2f})" if row["overlap_null"] is not None else ""
        where = at(row["layer"], row["site"])
        return f"The first {row['k']} components of real and shuffled text overlap by {row['overlap']:.2f} {where}{least}{chance}"
    row = pairs.sort("cka", maintain_order=True).row(0, named=True)
    what = "Taking the training away" if row["other_condition"] == "random weights" else "Shuffling the text"
    # Rounding to two digits hides what is above this.
    if row["cka"] >= 0.995:
        return f"{what} hardly changes the states at any layer: CKA {row['cka']:.2f} or more"
    where = at(row["layer"], row["site"])
    return f"{what} changes the states most {where}: CKA {row['cka']:.2f}".replace("-0.00", "0.00")


def _chance_finding(pairs: pl.DataFrame) -> tuple[str, ...]:
    """Say where the overlap is no more than chance: at most a quarter above k/d."""
    told, names = [], sites(pairs)
    known = pairs.drop_nulls(["overlap", "overlap_null"])
    for condition in known["other_condition"].unique(maintain_order=True):
        rows = known.filter(pl.col("other_condition") == condition).sort("layer")
        level = rows.filter(pl.col("overlap") <= 1.25 * pl.col("overlap_null"))["layer"].to_list()
        whom = "random weights" if condition == "random weights" else f"{condition} text"
        where = f"is close to chance {places(level, names)}" if level else "is above chance at every layer"
        told.append(f"The overlap with {whom} {where}.")
    return tuple(told)


def texts_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell how many components each text needs, layer by layer."""
    ready = counted(tables, facts)
    if ready is None:
        return None
    found, _, metric = ready
    rows = spectral(of(tables["layers"], found.model)).filter(pl.col("condition") == "real")
    rows = finite(rows.filter(pl.col("metric") == metric))
    groups = {text: profile(rows.filter(pl.col("text") == text), metric) for text in found.texts}
    groups = {text: points for text, points in groups.items() if points.height}
    if len(groups) < 2:
        return None
    plot = Plot("layer-texts", figures.texts_profile(rows, metric), f"{meaning(metric)} by layer and text")
    return Section(
        anchor="texts",
        name="Text against text",
        title=_texts_finding(groups, metric, found),
        findings=_texts_order(groups, sites(rows)),
        blocks=(plot,),
        how_to_read=(
            "One line per text, all through the same model and counted the same way. A text that needs more components "
            "makes the model use more of its dimensions; lines that part only in some blocks show where the kind of text matters."
        ),
        caveat=(
            "Texts differ in how many distinct tokens they hold, and fewer distinct tokens mean fewer dimensions "
            f"already at the embeddings: compare there first. Tokens per text: {_sizes(rows)}. One sample of each, without a spread "
            "over samples."
        ),
        tables=("layers",),
    )


def _sizes(rows: pl.DataFrame) -> str:
    sizes = rows.group_by("text", maintain_order=True).agg(pl.col("n_tokens").max())
    return listed([f"{n:,} of {text}" for text, n in sizes.iter_rows()])


def _texts_finding(groups: dict[str, pl.DataFrame], metric: str, found: Asked) -> str:
    studied = next(iter(groups.values()))
    layer = shown_layer(studied, found.layer)
    at_layer = {text: points.filter(pl.col("layer") == layer) for text, points in groups.items()}
    counts = [(text, number(points["value"][0])) for text, points in at_layer.items() if points.height]
    where = sentence(at(layer, sites(studied)[layer]))
    goal = f"components for {percent(metric):g}% of the variance"
    (first, needed), *others = counts
    return f"{where}, {first} needs {needed} {goal}, {listed([f'{text} {needs}' for text, needs in others])}"


def _texts_order(groups: dict[str, pl.DataFrame], names: dict[int, str]) -> tuple[str, ...]:
    """Compare the first text with each other: where it needs more, and where fewer."""
    (first, own), *others = groups.items()
    told = []
    for text, points in others:
        both = own.join(points, on="layer", suffix="_other").sort("layer")
        gap = pl.col("value") - pl.col("value_other")
        sides = (("more", both.filter(gap >= 0.5)), ("fewer", both.filter(gap <= -0.5)))
        parts = [f"{word} components {places(side['layer'].to_list(), names)}" for word, side in sides if side.height]
        same = f"The texts {first} and {text} need equally many components at every layer."
        told.append(f"Compared with {text}, {first} needs {' and '.join(parts)}." if parts else same)
    return tuple(told)


def models_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell which share of its dimensions each model uses, and which of their layers are alike."""
    ready = counted(tables, facts)
    if ready is None or len(ready[0].models) < 2:
        return None
    found, _, metric = ready
    rows = spectral(tables["layers"]).filter((pl.col("text") == found.text) & (pl.col("condition") == "real"))
    rows = finite(rows.filter(pl.col("metric") == metric))
    if rows["model"].n_unique() < 2:
        return None
    return Section(
        anchor="models",
        name="Model against model",
        title=_models_finding(rows, metric, found),
        blocks=(
            Plot("layer-models", figures.models_profile(rows, metric), "share of dimensions used, by relative depth"),
            *_model_matrices(tables, found),
        ),
        how_to_read=(
            "Models differ in width and depth, so both axes are relative: how far through the blocks, and which share of the "
            "model's own dimensions the count is. The final norm is left out. The heat map compares the layers of "
            "two models on the same tokens: values near 1 along the diagonal mean that both "
            "models work through the same stages; low values everywhere, that their geometries differ."
        ),
        caveat=(
            "A wider model needs more tokens to fill its dimensions, so with the same text its share is pulled down: "
            f"{_noise_shares(rows)}. Models with different tokenizers read the same text in different pieces."
        ),
        tables=("layers", "similarity"),
    )


def _models_finding(rows: pl.DataFrame, metric: str, found: Asked) -> str:
    told = []
    for model in found.models:
        points = profile(rows.filter(pl.col("model") == model), metric)
        if points.height:
            peak = points.sort("share_of_dim", descending=True, maintain_order=True).row(0, named=True)
            told.append((model, share(peak["share_of_dim"]), f"{peak['dim']:,}"))
    (model, part, dim), *others = told
    first = f"At its widest layer {model} needs {part} of its {dim} dimensions for {percent(metric):g}% of the variance"
    return ", ".join([first, *(f"{name} {needs} of its {width}" for name, needs, width in others)])


def _noise_shares(rows: pl.DataFrame) -> str:
    known = finite(rows, "null").unique("model", keep="first", maintain_order=True)
    if known.is_empty():
        return "white noise was not measured"
    noise = (
        f"{share(null / dim)} for {model}" for model, null, dim in known.select("model", "null", "dim").iter_rows()
    )
    return f"white noise of the same sample reaches {listed(list(noise))}"


def _model_matrices(tables: Tables, found: Asked) -> list[Plot]:
    frame = table(tables, "similarity")
    if frame is None:
        return []
    pairs = finite(frame.filter(pl.col("comparison") == "between models"), "cka")
    pairs = of(pairs, found.model)
    plots = []
    for i, other in enumerate(pairs["other_model"].unique(maintain_order=True)):
        fig = state_figures.similarity_matrix(pairs.filter(pl.col("other_model") == other), found.model, other)
        plots.append(Plot(f"layer-models-{i}", fig, f"CKA between layers of {found.model} and {other}", square=True))
    return plots
