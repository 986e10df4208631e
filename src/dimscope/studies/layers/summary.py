"""The answer of the study of hidden layers in a few words and numbers."""

import polars as pl

from dimscope.activations.sites import FINAL_NORM
from dimscope.geometry.dimension import preferred_count
from dimscope.geometry.metrics import NUMERICAL_RANK, PARTICIPATION_RATIO_CORRECTED, TWO_NN, VARIANCE_COUNT
from dimscope.page.section import Facts, Tables
from dimscope.studies.layers.sections import layers_strip
from dimscope.studies.study import Summary

FILES = ("layers", "texts", "predictions", "similarity")  # that JSON has whole


def summarise(tables: Tables, facts: Facts) -> Summary:
    """Return the range of the variance count over the layers in a sentence, and one table per model and text."""
    [(_, value, note)] = layers_strip(tables, facts)
    parts = summary_frame(tables["layers"]).partition_by("model", "text", maintain_order=True)
    frames = {f"dimensions {i}": part for i, part in enumerate(parts, 1)}
    return Summary(f"{value} dimensions {note}.", frames, files=FILES)


def summary_frame(layers: pl.DataFrame) -> pl.DataFrame:
    """One row per model, text and layer from the table `layers`, narrow enough for a terminal; raw and centred numbers.

    The count of components for 95% of the variance (or for the largest share that was asked for) on real text, shuffled
    (mean and sd over the draws) and with random weights, and white noise's; rank, corrected participation ratio and TwoNN.
    """
    rows = layers.filter((pl.col("preprocess") == "raw") & pl.col("centred") & pl.col("scale").is_null())
    told = preferred_count(rows["metric"].unique())
    assert told is not None  # the command line asks for one threshold at least
    share = told.removeprefix(VARIANCE_COUNT).lstrip()
    place = ["model", "text", "layer", "site"]
    real = rows.filter(pl.col("condition") == "real")

    def column(metric: str, name: str, value: str = "value") -> pl.DataFrame:
        return real.filter(pl.col("metric") == metric).select(*place, pl.col(value).alias(name))

    found = column(told, "N", "n_tokens").join(column(told, share), on=place, maintain_order="left")
    beside = []
    for condition in ("shuffled", "random weights"):
        draws = rows.filter((pl.col("metric") == told) & (pl.col("condition") == condition))
        spread = [pl.col("value").std().alias("sd")] if condition == "shuffled" else []
        beside.append(draws.group_by(place).agg(pl.col("value").mean().alias(condition.split()[0]), *spread))
    beside += [
        column(told, "noise", "null"),
        column(NUMERICAL_RANK, "rank"),
        column(PARTICIPATION_RATIO_CORRECTED, "ratio"),
        column(TWO_NN, "TwoNN"),
    ]
    for frame in beside:
        found = found.join(frame, on=place, how="left", maintain_order="left")
    short = pl.col("site").replace({"embeddings": "emb", FINAL_NORM: "norm"}).str.replace(",.*", "")
    return found.with_columns(short).drop(c for c in found.columns if found[c].is_null().all())
