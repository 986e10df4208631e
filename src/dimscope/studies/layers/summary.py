"""The summary of the study of hidden layers for a terminal."""

import polars as pl

from dimscope.activations.sites import FINAL_NORM
from dimscope.geometry.dimension import preferred_count
from dimscope.geometry.metrics import NUMERICAL_RANK, PARTICIPATION_RATIO_CORRECTED, TWO_NN, VARIANCE_COUNT
from dimscope.page.section import Facts, Tables
from dimscope.studies.layers.rows import RAW
from dimscope.studies.layers.sections import layers_strip
from dimscope.studies.layers.state_measures import ONE_PER_TYPE
from dimscope.studies.study import Summary

FILES = ("layers", "texts", "predictions", "similarity")  # that JSON has whole
KEYS = ("model", "text", "layer", "site")


def summarise(tables: Tables, facts: Facts) -> Summary:
    """Return the range of the variance count over the layers in a sentence, and one table per model and text."""
    [(_, value, note)] = layers_strip(tables, facts)
    parts = summary_frame(tables["layers"]).partition_by("model", "text", maintain_order=True)
    frames = {f"dimensions {i}": part for i, part in enumerate(parts, 1)}
    return Summary(f"{value} dimensions {note}.", frames, files=FILES)


def summary_frame(layers: pl.DataFrame) -> pl.DataFrame:
    """Return one row per model, text and layer of the table `layers`, for a terminal of 80 columns; raw and centred numbers.

    The columns are the number of tokens; the count of components for 95% of the variance (or for the largest share that
    was measured) on real text, on shuffled text (mean and standard deviation over the draws), with random weights and of
    white noise; the numerical rank, the corrected participation ratio, and TwoNN of one state per token.
    `layer` is "emb", "1", "2", ..., "norm".
    """
    whole = layers.filter(pl.col("centred") & pl.col("scale").is_null())
    rows = whole.filter(pl.col("preprocess") == RAW)
    metric = preferred_count(rows["metric"].unique())
    assert metric is not None  # the settings have one threshold at least
    real = rows.filter(pl.col("condition") == "real")
    # Neighbours of a state are mostly states of the same token, so one state of each is measured where there are enough.
    one = whole.filter((pl.col("condition") == "real") & (pl.col("preprocess") == ONE_PER_TYPE))
    apart = one if (one["metric"] == TWO_NN).any() else real

    def column(name: str, label: str, value: str = "value", of: pl.DataFrame = real) -> pl.DataFrame:
        return of.filter(pl.col("metric") == name).select(*KEYS, pl.col(value).alias(label))

    counts = rows.filter(pl.col("metric") == metric)
    frame = column(metric, "N", "n_tokens")
    for other in (
        column(metric, metric.removeprefix(VARIANCE_COUNT).lstrip()),
        _over_draws(counts, "shuffled", pl.col("value").std().alias("sd")),
        _over_draws(counts, "random weights"),
        column(metric, "noise", "null"),
        column(NUMERICAL_RANK, "rank"),
        column(PARTICIPATION_RATIO_CORRECTED, "ratio"),
        column(TWO_NN, "TwoNN", of=apart),
    ):
        frame = frame.join(other, on=KEYS, how="left", maintain_order="left")
    frame = frame.drop(name for name in frame.columns if frame[name].is_null().all())
    return frame.with_columns(layer=_short_name()).drop("site")


def _over_draws(counts: pl.DataFrame, condition: str, *further: pl.Expr) -> pl.DataFrame:
    """Return the mean of a condition over its draws, under the first word of its name."""
    draws = counts.filter(pl.col("condition") == condition)
    return draws.group_by(*KEYS).agg(pl.col("value").mean().alias(condition.split()[0]), *further)


def _short_name() -> pl.Expr:
    """Return the name of a layer as the option `layers` takes it, and as the figures show it."""
    ends = {"embeddings": "emb", FINAL_NORM: "norm"}
    return pl.col("site").replace_strict(ends, default=pl.col("layer").cast(pl.String), return_dtype=pl.String)
