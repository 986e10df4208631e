"""Losses after changes, by kind and strength, and the strength at which each kind of change breaks the model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from dimscope.interventions.perturbations import PERTURBATIONS
from dimscope.studies.damage.plan import UNDAMAGED
from dimscope.studies.damage.tables import LOSS, RELATIVE, TOP_1

THRESHOLDS = (0.1, 0.5)
"""Rises of the loss, as shares of the loss of the undamaged model; the first is what the page calls harmless."""
HARMLESS = THRESHOLDS[0]


@dataclass(frozen=True, slots=True)
class Draws:
    """The losses of one change over its seeds.

    Attributes:
        kind: Kind of change.
        strength: Its strength.
        kept_share: Share of the dimensions that it keeps; None where it drops none.
        values: A loss per seed, in nats per token.
        seeds: The seeds, in the same order.
    """

    kind: str
    strength: float
    kept_share: float | None
    values: tuple[float, ...]
    seeds: tuple[int | None, ...]

    @property
    def mean(self) -> float:
        """Return the mean over the seeds."""
        return float(np.mean(self.values))

    def __str__(self) -> str:
        spread = f" ± {np.std(self.values, ddof=1):.2f}" if len(self.values) > 1 else ""
        return f"{self.mean:.2f}{spread}"


@dataclass(frozen=True, slots=True)
class Losses:
    """The rows of the table `damage` about one text with one side changed.

    Attributes:
        rows: Evaluations on the text, and errors of the tables.
        text: Name of the text.
        side: The side that is changed.
    """

    rows: pl.DataFrame
    text: str
    side: str

    def _finite(self, metric: str) -> pl.DataFrame:
        return self.rows.filter((pl.col("metric") == metric) & pl.col("value").is_finite())

    @property
    def base(self) -> float:
        """Return the loss of the undamaged model."""
        return self._finite(LOSS).filter(pl.col("kind") == UNDAMAGED)["value"][0]

    def kinds(self) -> list[str]:
        """Return the kinds with strengths, in the order in which they were requested."""
        return self.rows.filter(pl.col("strength").is_not_null())["kind"].unique(maintain_order=True).to_list()

    def draws(self, kind: str, *, overflown: bool = False) -> list[Draws]:
        """Return the changes of a kind, by increasing strength.

        Args:
            kind: Kind of change.
            overflown: Keep changes whose loss is not finite, as infinite; else they are left out.
        """
        losses = self.rows.filter(pl.col("metric") == LOSS).with_columns(pl.col("value").fill_null(math.inf))
        rows = losses if overflown else self._finite(LOSS)
        rows = rows.filter((pl.col("kind") == kind) & pl.col("strength").is_not_null())
        groups = rows.sort("strength", "seed").group_by("strength", "kept_share", maintain_order=True)
        return [
            Draws(kind, strength, kept_share, tuple(values), tuple(seeds))
            for strength, kept_share, values, seeds in groups.agg("value", "seed").iter_rows()
        ]

    def rise(self, draws: Draws) -> float:
        """Return the rise of the mean loss, as a share of the loss of the undamaged model."""
        return draws.mean / self.base - 1 if self.base else math.nan

    def agreement(self, draws: Draws) -> float | None:
        """Return the share of positions with the first choice of the undamaged model, averaged over the seeds."""
        rows = self._finite(TOP_1).filter((pl.col("kind") == draws.kind) & (pl.col("strength") == draws.strength))
        return float(rows["value"].to_numpy().mean()) if rows.height else None

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


def losses_on(damage: pl.DataFrame, text: str, side: str) -> Losses:
    """Return the rows about one text with one side changed."""
    of_side = (pl.col("side") == side) | (pl.col("kind") == UNDAMAGED)
    about_text = (pl.col("text") == text) | pl.col("text").is_null()  # errors of tables have no text
    return Losses(damage.filter(of_side & about_text), text, side)


def all_losses(damage: pl.DataFrame) -> list[Losses]:
    """Return the rows about every text with every side changed; texts first, in their order."""
    return [losses_on(damage, text, side) for text in texts_of(damage) for side in sides_of(damage)]


def breaking_frame(damage: pl.DataFrame) -> pl.DataFrame:
    """Return, for each text, side, kind and threshold, the gentlest strength at which the loss has risen by that share.

    Strengths are tried from the gentlest on. `strength` is null where no tested one reaches the threshold; `safe` is the
    last one before it, null where there is none. Kinds that are gentlest in the middle, such as scaling, are left out.
    """
    rows = [
        _breaking_row(losses, kind, draws, threshold)
        for losses in all_losses(damage)
        for kind in losses.kinds()
        if (draws := _from_gentlest(losses, kind))
        for threshold in THRESHOLDS
    ]
    schema = {
        "text": pl.String, "side": pl.String, "kind": pl.String, "threshold": pl.Float64, "strength": pl.Float64,
        "kept_share": pl.Float64, "rise": pl.Float64, "safe": pl.Float64, "safe_kept_share": pl.Float64, "n_seeds": pl.Int64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema)


def _from_gentlest(losses: Losses, kind: str) -> list[Draws]:
    """Return the changes of a kind from the gentlest to the harshest; none where strengths have no such order."""
    stronger = PERTURBATIONS[kind].stronger
    draws = losses.draws(kind, overflown=True)
    return draws if stronger == "harsher" else draws[::-1] if stronger == "gentler" else []


def _breaking_row(losses: Losses, kind: str, draws: Sequence[Draws], threshold: float) -> dict[str, Any]:
    n = next((n for n, d in enumerate(draws) if losses.rise(d) >= threshold), None)
    broken = None if n is None else draws[n]
    safe = draws[-1] if n is None else draws[n - 1] if n else None
    return {
        "text": losses.text, "side": losses.side, "kind": kind, "threshold": threshold,
        "strength": broken.strength if broken else None, "kept_share": broken.kept_share if broken else None,
        "rise": losses.rise(broken) if broken and math.isfinite(broken.mean) else None,
        "safe": safe.strength if safe else None, "safe_kept_share": safe.kept_share if safe else None,
        "n_seeds": max(len(d.values) for d in draws),
    }  # fmt: skip
