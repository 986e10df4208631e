"""The answer of the study of damage in a few words and numbers."""

import polars as pl

from dimscope.page.section import Facts, Tables
from dimscope.studies.damage.claims import UNTESTED
from dimscope.studies.damage.plan import UNDAMAGED
from dimscope.studies.damage.sections import breaking_answer
from dimscope.studies.damage.tables import KL, LOSS, RELATIVE, TOP_1
from dimscope.studies.study import Summary


def summarise(tables: Tables, facts: Facts) -> Summary:
    """Return how many dimensions are enough in a sentence; the changes, where they break the model, claims and texts."""
    frames = {}
    for n, part in enumerate(summary_frame(tables["damage"]).partition_by("on", maintain_order=True), 1):
        frames["summary" if n == 1 else f"summary {n}"] = part
    if "breaking" in tables:
        frames["breaking"] = tables["breaking"]
    if "claims" in tables:
        frames["claims"] = tables["claims"].filter(pl.col("verdict") != UNTESTED)
    if "generations" in tables:
        columns = ("prompt", "change", "side", "seed", "text", "n_same", "repetition")
        frames["texts"] = tables["generations"].select(*columns)
    return Summary(breaking_answer(tables), {name: frame for name, frame in frames.items() if frame.height})


def summary_frame(damage: pl.DataFrame) -> pl.DataFrame:
    """One row per text, side and change from the table `damage`, narrow enough for a terminal: means over the seeds.

    `error` is relative, `expected` its closed form, `sd` the spread of the loss over the seeds.
    """
    place = ["on", "side", "change", "kept"]
    order = damage.select("side", "change").unique(maintain_order=True).with_row_index("order")
    means = damage.group_by(*place, "metric", maintain_order=True).agg(
        pl.col("value").mean(), pl.col("value").std(ddof=1).alias("sd"), pl.col("expected").mean(), pl.col("n").max()
    )
    errors = means.filter((pl.col("metric") == RELATIVE) & pl.col("on").str.ends_with(" table"))
    errors = errors.group_by("side", "change").agg(pl.col("value").mean().alias("error"), pl.col("expected").mean())
    judged = means.filter(pl.col("metric") == LOSS).select(
        *place, pl.col("value").alias("loss"), "sd", pl.col("n").alias("tokens")
    )
    for metric, name in ((KL, "KL"), (TOP_1, "same first choice")):
        other = means.filter(pl.col("metric") == metric).select("on", "side", "change", pl.col("value").alias(name))
        judged = judged.join(other, on=["on", "side", "change"], how="left", maintain_order="left")
    base = judged.filter(pl.col("change") == UNDAMAGED).select("on", pl.col("loss").alias("base"))
    found = judged.join(errors, on=["side", "change"], how="left", maintain_order="left")
    found = found.join(base, on="on", how="left", maintain_order="left").join(order, on=["side", "change"])
    rise = (100 * (pl.col("loss") / pl.col("base") - 1)).alias("rise %")
    texts = found["on"].unique(maintain_order=True)
    found = found.with_columns(pl.col("on").cast(pl.Enum(texts))).sort("on", "order", maintain_order=True)
    told = ("kept", "error", "expected", "loss", "sd", rise, "KL", "same first choice", "tokens")
    return found.select("on", "side", "change", *told).with_columns(pl.col("on").cast(pl.String))
