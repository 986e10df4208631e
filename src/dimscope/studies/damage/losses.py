"""What changes cost on one text, by kind and strength, and the strength at which each kind of change breaks the model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.evaluation.evaluate import Evaluation, evaluation_of, mean_of
from dimscope.evaluation.replicates import Replicates, replicates
from dimscope.evaluation.unigrams import reads_context
from dimscope.evaluation.yardstick import MARKS, Mark, upper_end
from dimscope.interventions.perturbations import PERTURBATIONS
from dimscope.page.section import finite
from dimscope.studies.damage.plan import UNDAMAGED
from dimscope.studies.damage.tables import LOSS, RELATIVE, UNIGRAMS, window_sums
from dimscope.texts.window_sums import Interval

THRESHOLDS = MARKS[1:]
"""Marks of the KL at which a change is said to break the model; the first is what the page calls harmless."""


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """One change with all its seeds, on the windows of one text.

    Attributes:
        kind: Kind of change.
        strength: Its strength.
        kept_share: Share of the dimensions that it keeps; None where it drops none.
        seeds: Its seeds; None where nothing is random.
        sums: The sums of every seed and window, NaN where the model overflows.
    """

    kind: str
    strength: float
    kept_share: float | None
    seeds: tuple[int | None, ...]
    sums: Float[Tensor, "s g 7"]

    def mean(self, name: str) -> Replicates:
        """Return a mean over positions ("loss", "kl", "top_1") of every seed for which it is finite."""
        return replicates(self.seeds, self.sums, mean_of(name))

    @property
    def kl(self) -> Interval:
        """Return the mean KL over the seeds with its 95% interval."""
        return self.kl_of()

    def kl_of(self, n_statements: int = 1) -> Interval:
        """Return the mean KL over the seeds with an interval that holds at once with others; see `interval`."""
        return self.interval("kl", n_statements)

    def interval(self, name: str, n_statements: int = 1) -> Interval:
        """Return a mean over positions and seeds; infinite where the model overflows for one of the seeds.

        One seed of a random change has no interval: it tells nothing about others.

        Args:
            name: Name of the mean, as in `mean`.
            n_statements: Intervals that have to hold at once.
        """
        of_seeds = self.mean(name)
        if len(of_seeds.seeds) < len(self.seeds):
            return Interval(math.inf, None, None, None, self.sums.shape[1])
        mean = of_seeds.interval(n_statements)
        return mean if of_seeds.repeated else Interval(mean.value, None, None, None, mean.n_groups)


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """What the changes of one side cost on one text.

    Attributes:
        rows: Its rows of the table `damage`: evaluations on the text, and errors of the tables.
        windows: Its rows of the table `windows`.
        text: Name of the text.
        side: The side that is changed.
    """

    rows: pl.DataFrame
    windows: pl.DataFrame
    text: str
    side: str

    @property
    def readable(self) -> bool:
        """Whether the loss of the undamaged model is a finite number."""
        return finite(self.rows.filter((pl.col("kind") == UNDAMAGED) & (pl.col("metric") == LOSS))).height > 0

    @property
    def undamaged(self) -> Evaluation:
        """Return the evaluation of the undamaged model."""
        return evaluation_of(window_sums(self.windows.filter(pl.col("kind") == UNDAMAGED)))

    @property
    def entropy(self) -> float | None:
        """Return the unigram entropy of the text."""
        rows = self.rows.filter((pl.col("metric") == UNIGRAMS) & pl.col("text").is_not_null())
        return rows["value"][0] if rows.height else None

    @property
    def unreadable(self) -> bool:
        """Whether the undamaged model predicts the text not clearly better than its token frequencies alone would.

        Such a text cannot tell what a change costs: the loss of a destroyed model may be lower there.
        """
        return self.entropy is not None and not reads_context(self.undamaged.loss, self.entropy)

    def kinds(self, unit: str | None = None) -> list[str]:
        """Return the kinds with strengths, in the order in which they were requested: of one unit, or all."""
        strong = self.rows.filter(pl.col("strength").is_not_null())
        strong = strong if unit is None else strong.filter(pl.col("unit") == unit)
        return strong["kind"].unique(maintain_order=True).to_list()

    def kept_kinds(self) -> list[str]:
        """Return the kinds that keep a number of dimensions."""
        return self.rows.filter(pl.col("kept_share").is_not_null())["kind"].unique(maintain_order=True).to_list()

    def curve(self, name: str, kind: str) -> pl.DataFrame:
        """Return a mean over positions after the changes of a kind, from the smallest strength on, for figures.

        Columns: strength, kept_share, `error` (the mean relative error of the tables), `value`, and the ends of its 95%
        interval, `low` and `high`, null where there is none. Changes after which the model overflows are left out.
        """
        rows = [
            (d.strength, d.kept_share, self.error(d), mean.value, mean.low, mean.high)
            for d in self.draws(kind)
            if math.isfinite((mean := d.interval(name)).value)
        ]
        columns = ("strength", "kept_share", "error", "value", "low", "high")
        return pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.Float64), orient="row")

    def draws(self, kind: str, *, overflown: bool = False) -> list[Draws]:
        """Return the changes of a kind, by increasing strength.

        Args:
            kind: Kind of change.
            overflown: Keep changes after which the model overflows for every seed; else they are left out.
        """
        rows = self.windows.filter((pl.col("kind") == kind) & pl.col("strength").is_not_null())
        rows = rows.sort("strength", "seed", "window")
        series = []
        for (strength, kept_share), of_strength in rows.group_by("strength", "kept_share", maintain_order=True):
            by_seed = of_strength.partition_by("seed", maintain_order=True)
            seeds = tuple(of_seed["seed"][0] for of_seed in by_seed)
            draws = Draws(kind, strength, kept_share, seeds, torch.stack([window_sums(of_seed) for of_seed in by_seed]))
            if overflown or draws.mean("kl").seeds:
                series.append(draws)
        return series

    def error(self, draws: Draws) -> float | None:
        """Return the relative error of the tables that a change makes, averaged over the seeds."""
        rows = self.rows.filter(
            (pl.col("metric") == RELATIVE) & (pl.col("kind") == draws.kind) & (pl.col("strength") == draws.strength)
        )
        return float(rows["value"].to_numpy().mean()) if rows.height else None


def texts_of(damage: pl.DataFrame) -> list[str]:
    """Return the texts that the model was evaluated on, in their order."""
    return damage["text"].drop_nulls().unique(maintain_order=True).to_list()


def sides_of(damage: pl.DataFrame) -> list[str]:
    """Return the sides that were changed, in their order."""
    return damage.filter(pl.col("kind") != UNDAMAGED)["side"].unique(maintain_order=True).to_list()


def losses_on(damage: pl.DataFrame, windows: pl.DataFrame, text: str, side: str) -> Losses:
    """Return what the changes of one side cost on one text."""
    evaluated = windows.filter(_of_side(side) & (pl.col("text") == text))
    return Losses(rows_about(damage, text, side), evaluated, text, side)


def all_losses(damage: pl.DataFrame, windows: pl.DataFrame) -> list[Losses]:
    """Return what the changes of each side cost on each text; the page speaks of the first text and side."""
    return [losses_on(damage, windows, text, side) for text in texts_of(damage) for side in sides_of(damage)]


def rows_about(damage: pl.DataFrame, text: str, side: str) -> pl.DataFrame:
    """Return the rows of the table `damage` about one text with one side changed."""
    about_text = (pl.col("text") == text) | pl.col("text").is_null()  # errors of tables have no text
    return damage.filter(_of_side(side) & about_text)


def _of_side(side: str) -> pl.Expr:
    return (pl.col("side") == side) | (pl.col("kind") == UNDAMAGED)


def breaking_frame(damage: pl.DataFrame, windows: pl.DataFrame) -> pl.DataFrame:
    """Return, for each text, side, kind and threshold, the gentlest strength whose KL is not within it.

    Strengths are tried from the gentlest on; a KL is within a threshold with the upper end of its 95% interval.
    `strength` is null where no tested one exceeds the threshold; `kl` is its KL, and `kl_high` the upper end that decides.
    `safe` is the last strength before it, null where there is none. Kinds that are gentlest in the middle, such as scaling,
    are left out.
    """
    rows = [
        _breaking_row(losses, kind, draws, threshold)
        for losses in all_losses(damage, windows)
        for kind in losses.kinds()
        if (draws := _from_gentlest(losses, kind))
        for threshold in THRESHOLDS
    ]
    schema = {
        "text": pl.String, "side": pl.String, "kind": pl.String, "threshold": pl.Float64, "strength": pl.Float64,
        "kept_share": pl.Float64, "kl": pl.Float64, "kl_high": pl.Float64, "safe": pl.Float64,
        "safe_kept_share": pl.Float64, "n_seeds": pl.Int64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema)


def _from_gentlest(losses: Losses, kind: str) -> list[Draws]:
    """Return the changes of a kind from the gentlest to the harshest; none where strengths have no such order."""
    if kind not in PERTURBATIONS or PERTURBATIONS[kind].stronger not in ("harsher", "gentler"):
        return []
    draws = losses.draws(kind, overflown=True)
    return draws if PERTURBATIONS[kind].stronger == "harsher" else draws[::-1]


def _breaking_row(losses: Losses, kind: str, draws: Sequence[Draws], threshold: Mark) -> dict[str, Any]:
    n = next((n for n, d in enumerate(draws) if upper_end(d.kl) > threshold.kl), None)
    broken = None if n is None else draws[n]
    safe = draws[-1] if n is None else draws[n - 1] if n else None
    kl = broken.kl if broken and math.isfinite(broken.kl.value) else None
    return {
        "text": losses.text, "side": losses.side, "kind": kind, "threshold": threshold.kl,
        "strength": broken.strength if broken else None, "kept_share": broken.kept_share if broken else None,
        "kl": kl.value if kl else None, "kl_high": kl.high if kl else None,
        "safe": safe.strength if safe else None, "safe_kept_share": safe.kept_share if safe else None,
        "n_seeds": max(len(d.seeds) for d in draws),
    }  # fmt: skip
