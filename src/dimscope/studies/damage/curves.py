"""Curves of the table `damage`: one value per change of a kind, averaged over its seeds."""

from dataclasses import dataclass

import polars as pl

from dimscope.interventions.perturbations import PERTURBATIONS, Mark
from dimscope.page.section import Tables, finite
from dimscope.page.theme import series_mark
from dimscope.studies.damage.losses import rows_about, sides_of, texts_of
from dimscope.studies.damage.plan import UNDAMAGED
from dimscope.studies.damage.tables import LOSS, RELATIVE
from dimscope.studies.reading import GENERATED


@dataclass(frozen=True, slots=True)
class Damage:
    """The damage on one text with one side changed.

    Attributes:
        rows: The rows of the table `damage` about them.
        text: Name of the text.
        side: The side that is changed.
    """

    rows: pl.DataFrame
    text: str
    side: str

    @property
    def base(self) -> float | None:
        """Return the loss of the undamaged model, or None where it is not finite."""
        rows = finite(self.rows.filter((pl.col("kind") == UNDAMAGED) & (pl.col("metric") == LOSS)))
        return rows["value"][0] if rows.height else None

    def curve(self, metric: str, kind: str) -> pl.DataFrame:
        """Return the changes of a kind, from the smallest strength on.

        Columns: strength, kept_share, `value` (the mean over the seeds), `spread` (their sample standard deviation, null
        for one seed), n_seeds, and `error`, the mean relative error of the table.
        """
        of_kind = finite(self.rows.filter((pl.col("kind") == kind) & pl.col("strength").is_not_null()))
        values = of_kind.filter(pl.col("metric") == metric).group_by("strength", "kept_share")
        means = values.agg(
            pl.col("value").mean(), pl.col("value").std(ddof=1).alias("spread"), pl.len().alias("n_seeds")
        )
        errors = (
            of_kind.filter(pl.col("metric") == RELATIVE).group_by("strength").agg(pl.col("value").mean().alias("error"))
        )
        return means.join(errors, on="strength", how="left").sort("strength")

    def kinds(self, unit: str | None = None) -> list[str]:
        """Return the kinds with a strength in the order in which they were requested: of one unit, or all."""
        strong = self.rows.filter(pl.col("strength").is_not_null())
        strong = strong if unit is None else strong.filter(pl.col("unit") == unit)
        return strong["kind"].unique(maintain_order=True).to_list()

    def kept_kinds(self) -> list[str]:
        """Return the kinds that keep a number of dimensions."""
        return self.rows.filter(pl.col("kept_share").is_not_null())["kind"].unique(maintain_order=True).to_list()


def damages(damage: pl.DataFrame) -> list[Damage]:
    """Return the damage on every text with every side; the page speaks of the first text and side."""
    return [
        Damage(rows_about(damage, text, side), text, side) for text in texts_of(damage) for side in sides_of(damage)
    ]


def shown_damages(tables: Tables) -> list[Damage]:
    """Return the damage of a run where the loss of the undamaged model is known; nothing without the table."""
    frame = tables.get("damage")
    return [] if frame is None else [damage for damage in damages(frame) if damage.base is not None]


def kind_name(kind: str) -> str:
    """Return the title of a kind of change, as in a sentence: "truncation by SVD"; of a chain its own name."""
    return PERTURBATIONS[kind].title if kind in PERTURBATIONS else kind


def kind_mark(kind: str) -> Mark:
    """Return how a kind of change is drawn; a chain of several gets a mark by its name."""
    return PERTURBATIONS[kind].mark if kind in PERTURBATIONS else series_mark(sum(kind.encode()))


def text_name(text: str) -> str:
    """Return a text as in a sentence: its name, or "text that the model generated"."""
    return "text that the model generated" if text == GENERATED else text
