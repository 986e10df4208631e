"""Rows of the layer tables as profiles: one value per layer and condition, shuffles averaged over their draws."""

from collections.abc import Sequence

import polars as pl

from dimscope.activations.sites import FINAL_NORM as NORM
from dimscope.geometry import dimension
from dimscope.geometry.metrics import VARIANCE_COUNT
from dimscope.page.section import finite
from dimscope.page.theme import CONDITION_MARKS
from dimscope.page.wording import listed

MOST_RUNS = 4
"""Ranges of blocks that a sentence lists; of more it names the number of layers."""


def preferred_count(rows: pl.DataFrame) -> str | None:
    """Return the variance count of a frame to show: that of 95% where it was measured, else of the largest threshold."""
    return dimension.preferred_count(rows["metric"].unique())


def metric_label(metric: str) -> str:
    """Return the label of a metric on an axis: "components for 95% of the variance"."""
    if metric.startswith(VARIANCE_COUNT):
        return f"components for {metric.removeprefix(VARIANCE_COUNT).lstrip()} of the variance"
    return metric


def axis_label(metric: str) -> str:
    """Return the label of a metric in two lines, which fit beside the y axis on a phone."""
    return metric_label(metric).replace(" for ", "<br>for ")


def conditions(rows: pl.DataFrame) -> list[str]:
    """Return the conditions of a frame in the order of legends; unknown ones are left out."""
    present = set(rows["condition"])
    return [name for name in CONDITION_MARKS if name in present]


def profile(rows: pl.DataFrame, metric: str, condition: str = "real") -> pl.DataFrame:
    """Return one row per layer, sorted: means over the draws, and their sample sd as `spread` (null for one draw)."""
    chosen = finite(rows.filter((pl.col("metric") == metric) & (pl.col("condition") == condition)))
    columns = ("value", "stderr", "low", "high", "null", "gaussian", "share_of_null", "share_of_rank", "share_of_dim")
    numbers = {name: pl.col(name).cast(pl.Float64).fill_nan(None) for name in columns}
    means = [numbers[name].mean().alias(name) for name in columns]
    spreads = [
        numbers["value"].std(ddof=1).alias("spread"),
        numbers["share_of_null"].std(ddof=1).alias("share_of_null_spread"),
        numbers["share_of_rank"].std(ddof=1).alias("share_of_rank_spread"),
    ]
    sizes = [pl.len().alias("n_draws"), pl.col("n_tokens", "n_dropped", "dim").max()]
    halves = pl.col("halves").drop_nulls().first()  # the first draw alone has them
    return chosen.group_by("layer", "site", maintain_order=True).agg(*means, *spreads, *sizes, halves).sort("layer")


def sites(rows: pl.DataFrame) -> dict[int, str]:
    """Return the name of each layer of a frame, in their order."""
    return dict(rows.select("layer", "site").unique().sort("layer").iter_rows())


def site_name(layer: int, site: str) -> str:
    """Return the name of a layer in a sentence: "the embeddings", "block 3", "the final norm"."""
    return {"embeddings": "the embeddings", NORM: "the final norm"}.get(site, f"block {layer}")


def locations(layers: Sequence[int], names: dict[int, str]) -> str:
    """Return layers as an adverb: "at every layer", "in block 1", "in blocks 2 to 5 and after the final norm"."""
    if len(layers) == len(names) > 1:
        return "at every layer"
    blocks = [layer for layer in layers if site_name(layer, names[layer]) == f"block {layer}"]
    runs = _runs(blocks)
    if len(runs) > MOST_RUNS:
        return f"at {len(layers)} of {len(names)} layers"
    named = [word for run in runs for word in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    named_blocks = [f"in block{'s' if len(blocks) > 1 else ''} {listed(named)}"] if blocks else []
    others = [site_name(layer, names[layer]) for layer in layers if layer not in blocks]
    before = ["at the embeddings"] if "the embeddings" in others else []
    after = ["after the final norm"] if "the final norm" in others else []
    return listed([*before, *named_blocks, *after])


def _runs(blocks: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs
