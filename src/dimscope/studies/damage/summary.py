"""The answer of the study of damage in a few words and numbers, narrow enough for 80 columns."""

import polars as pl

from dimscope.page.section import Facts, Tables
from dimscope.studies.damage.claims import UNTESTED
from dimscope.studies.damage.facts import damage_facts
from dimscope.studies.damage.losses import rows_about, sides_of, texts_of
from dimscope.studies.damage.plan import UNDAMAGED
from dimscope.studies.damage.sections import answer
from dimscope.studies.damage.tables import KL, LOSS, RELATIVE, TOP_1
from dimscope.studies.study import Summary


def summarise(tables: Tables, facts: Facts) -> Summary:
    """Return how many dimensions are enough in a sentence; then changes, where they break the model, beliefs, texts."""
    frames = {f"changes {n}": frame for n, frame in enumerate(change_frames(tables["damage"]), 1)}
    if "breaking" in tables:
        frames["breaking"] = _short_breaking(tables["breaking"])
    if "claims" in tables:
        tested = tables["claims"].filter(pl.col("verdict") != UNTESTED)
        frames["beliefs"] = tested.select("text", "verdict", belief="claim")
    if "generations" in tables:
        continued = tables["generations"].partition_by("number", maintain_order=True)
        frames |= {f"generations {n}": _short_generations(frame) for n, frame in enumerate(continued, 1)}
    shown = {name: frame for name, frame in frames.items() if frame.height}
    return Summary(answer(tables, damage_facts(facts).window_length), shown, files=tuple(tables))


def change_frames(damage: pl.DataFrame) -> list[pl.DataFrame]:
    """Return one frame per text and side, a row per change: means over the seeds.

    Columns: `kept`, the share of the dimensions; `error`, the relative error of the table, and `theory`, its closed form;
    the loss, its standard deviation `sd` over the seeds and its `rise` above the undamaged model in percent; KL from the
    undamaged model; `same`, the percentage of positions with the same top prediction.
    """
    sides = sides_of(damage) or ["input"]
    return [_changes(rows_about(damage, text, side), text, side) for text in texts_of(damage) for side in sides]


def _changes(rows: pl.DataFrame, text: str, side: str) -> pl.DataFrame:
    """Return one row per change of one side, evaluated on one text."""
    key = ["change", "kept_share"]
    means = rows.group_by(*key, "metric", maintain_order=True).agg(
        pl.col("value").mean(), pl.col("null").mean(), pl.col("value").std(ddof=1).alias("sd")
    )

    def column(metric: str, **columns: str) -> pl.DataFrame:
        named = [pl.col(source).alias(name) for name, source in columns.items()]
        return means.filter(pl.col("metric") == metric).select("change", *named)

    frame = means.select(key).unique(maintain_order=True)
    for part in (
        column(RELATIVE, error="value", theory="null"),
        column(LOSS, loss="value", sd="sd"),
        column(KL, KL="value"),
        column(TOP_1, same="value"),
    ):
        frame = frame.join(part, on="change", how="left", maintain_order="left")
    base = frame.filter(pl.col("change") == UNDAMAGED)["loss"]
    rise = 100 * (pl.col("loss") / (base[0] if len(base) else None) - 1)
    return frame.select(
        pl.lit(text).alias("text"), pl.lit(side).alias("side"), "change", pl.col("kept_share").round(3).alias("kept"),
        "error", "theory", "loss", "sd", rise.alias("rise %"), "KL", (100 * pl.col("same")).alias("same %"),
    )  # fmt: skip


def _short_breaking(breaking: pl.DataFrame) -> pl.DataFrame:
    """Return where each kind of change breaks the model: `safe at` is the last tested strength before it."""
    return breaking.select(
        "text", "side", "kind", pl.col("threshold").alias("KL limit"), pl.col("strength").alias("breaks at"),
        pl.col("kept_share").alias("kept"), pl.col("safe").alias("safe at"),
    )  # fmt: skip


def _short_generations(generations: pl.DataFrame) -> pl.DataFrame:
    """Return the continuations of one prompt, and how many tokens are the same as without damage."""
    return generations.select("prompt", "side", "change", "seed", pl.col("n_same").alias("same"), "continuation")
