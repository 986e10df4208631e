"""The section that compares models: the share of their dimensions, the similarity of their layers, their loss."""

import polars as pl

from dimscope.geometry.dimension import percent
from dimscope.page.section import Facts, Grid, Plot, Section, Tables, finite, table
from dimscope.page.wording import listed, share
from dimscope.studies.layers import figures, state_figures
from dimscope.studies.layers.context import Selection, figure_names, raw_centred, rows_of, select_counts
from dimscope.studies.layers.profiles import profile


def models_section(tables: Tables, facts: Facts) -> Section | None:
    """Show which share of its dimensions each model uses, and which of their layers are similar."""
    ready = select_counts(tables, facts)
    if ready is None or len(ready[0].models) < 2:
        return None
    selection, _, metric = ready
    rows = raw_centred(tables["layers"]).filter((pl.col("text") == selection.text) & (pl.col("condition") == "real"))
    rows = finite(rows.filter(pl.col("metric") == metric))
    if rows["model"].n_unique() < 2:
        return None
    losses = _losses(tables, selection)
    return Section(
        anchor="models",
        name="Comparison of models",
        title=_models_finding(rows, metric, selection),
        findings=_loss_finding(losses),
        blocks=(
            Plot(
                "models-profile",
                figures.models_profile(rows, metric),
                "share of dimensions used, by relative depth",
                "Share of dimensions by relative depth",
            ),
            *_model_matrices(tables, selection),
            *([_loss_grid(losses, selection)] if losses.height else []),
        ),
        how_to_read=(
            "Models differ in width and depth, so both axes are relative: the depth to the number of blocks, and the count to "
            "the dimensions of the model. The final norm is left out. The heat map compares the layers of two models on the "
            "same tokens: values near 1 along the diagonal mean that both models go through the same stages; low values "
            "everywhere mean that their geometries differ. Each window covers the same bytes in every model, as near as its "
            "tokens allow, so losses are compared in bits per byte of text."
        ),
        caveat=(
            "A wider model needs more tokens to fill its dimensions, so the same text lowers its share: "
            f"{_noise_shares(rows)}. Different tokenizers split the same bytes into different numbers of tokens, so losses per "
            "token are not comparable. A model without a start token does not predict the first token of a window."
        ),
        tables=("layers", "similarity", "predictions"),
    )


def _models_finding(rows: pl.DataFrame, metric: str, selection: Selection) -> str:
    peaks = []
    for model in selection.models:
        points = profile(rows.filter(pl.col("model") == model), metric)
        if points.height:
            peak = points.sort("share_of_dim", descending=True, maintain_order=True).row(0, named=True)
            peaks.append((model, share(peak["share_of_dim"]), f"{peak['dim']:,}"))
    (model, part, dim), *others = peaks
    first = f"At its widest layer {model} needs {part} of its {dim} dimensions for {percent(metric):g}% of the variance"
    return ", ".join([first, *(f"{name} {needs} of its {width}" for name, needs, width in others)])


def _noise_shares(rows: pl.DataFrame) -> str:
    nulls = finite(rows, "null").unique("model", keep="first", maintain_order=True)
    if nulls.is_empty():
        return "white noise was not measured"
    columns = nulls.select("model", "null", "dim")
    noise = (f"{share(null / dim)} for {model}" for model, null, dim in columns.iter_rows())
    return f"white noise of the same sample reaches {listed(list(noise))}"


def _model_matrices(tables: Tables, selection: Selection) -> list[Plot]:
    frame = table(tables, "similarity")
    if frame is None:
        return []
    pairs = finite(frame.filter(pl.col("comparison") == "between models"), "cka")
    pairs = rows_of(pairs, selection.model, selection.text)
    others = pairs["other_model"].unique(maintain_order=True).to_list()
    plots = []
    for name, other in zip(figure_names("models-cka", others), others, strict=True):
        fig = state_figures.similarity_matrix(pairs.filter(pl.col("other_model") == other), selection.model, other)
        alt = f"CKA between layers of {selection.model} and {other}"
        plots.append(Plot(name, fig, alt, alt, square=True))
    return plots


def _losses(tables: Tables, selection: Selection) -> pl.DataFrame:
    """Return `model`, `n_tokens`, `loss` and `bits per byte` of every model on real text; no rows without predictions."""
    schema = {"model": pl.String, "n_tokens": pl.Int64, "loss": pl.Float64, "bits per byte": pl.Float64}
    stored = table(tables, "predictions")
    if stored is None:
        return pl.DataFrame(schema=schema)
    rows = finite(stored.filter((pl.col("text") == selection.text) & (pl.col("condition") == "real")))
    metrics = {metric: rows.filter(pl.col("metric") == metric) for metric in ("loss", "bits per byte")}
    per_byte = metrics["bits per byte"].select("model", pl.col("value").alias("bits per byte"))
    losses = metrics["loss"].select("model", "n_tokens", pl.col("value").alias("loss"))
    return losses.join(per_byte, on="model", maintain_order="left").cast(schema)  # ty: ignore[invalid-argument-type]


def _loss_finding(losses: pl.DataFrame) -> tuple[str, ...]:
    if losses.height < 2:
        return ()
    needs = [f"{model} needs {bits:.3f}" for model, bits in losses.select("model", "bits per byte").iter_rows()]
    return (f"For the same bytes of text, {listed(needs)} bits per byte.",)


def _loss_grid(losses: pl.DataFrame, selection: Selection) -> Grid:
    cells = tuple(
        (row["model"], f"{row['bits per byte']:.3f}", f"{row['loss']:.3f}", f"{row['n_tokens']:,}")
        for row in losses.iter_rows(named=True)
    )
    header = ("model", "bits per byte", "loss (nats per token)", "predicted tokens")
    return Grid(f"Loss on the same bytes of {selection.text}", header, cells, frozenset({1, 2, 3}))
