"""Which model, texts and layer the page of the layers study shows, the rows of its tables about them, and their names in sentences."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from dimscope.page.section import Facts, LayerChoice, Tables, finite, table
from dimscope.page.wording import number
from dimscope.studies.layers.facts import layers_facts
from dimscope.studies.layers.profiles import NORM, preferred_count


@dataclass(frozen=True, slots=True)
class Selection:
    """The studied model, all models and texts (the main one first), and the layer of figures that show a single one."""

    model: str
    models: tuple[str, ...]
    texts: tuple[str, ...]
    layer: int

    @property
    def text(self) -> str:
        """Return the main text."""
        return self.texts[0]

    @property
    def prefix(self) -> str:
        """Return "On prose, " where more than one text could be meant."""
        return f"On {self.text}, " if len(self.texts) > 1 else ""


def select(tables: Tables, facts: Facts) -> Selection | None:
    """Return the models, texts and layer of the page as far as the tables hold them, or None without a table of layers."""
    frame = table(tables, "layers")
    if frame is None:
        return None
    own = layers_facts(facts)
    models = _with_rows(own.models, frame["model"])
    rows = rows_of(frame, models[0])
    texts = _with_rows(own.texts, rows["text"])
    layers = rows["layer"].unique().sort().to_list()
    return Selection(models[0], models, texts, layers[len(layers) // 2] if own.show_layer is None else own.show_layer)


def _with_rows(names: Iterable[str], column: pl.Series) -> tuple[str, ...]:
    """Return the names that have rows, in their order, and then those of other rows."""
    present = column.unique(maintain_order=True).to_list()
    return tuple(dict.fromkeys([*(name for name in names if name in present), *present]))


def rows_of(frame: pl.DataFrame, model: str, text: str | None = None) -> pl.DataFrame:
    """Return the rows of one model, and of one text where it is named."""
    rows = frame.filter(pl.col("model") == model)
    return rows if text is None else rows.filter(pl.col("text") == text)


def raw_centred(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the rows without preprocessing and with the mean removed: the page shows them unless it names others."""
    return frame.filter((pl.col("preprocess") == "raw") & pl.col("centred"))


def select_counts(tables: Tables, facts: Facts) -> tuple[Selection, pl.DataFrame, str] | None:
    """Return the selection, the raw centred rows of the studied model and main text, and the variance count to show."""
    selection, frame = select(tables, facts), table(tables, "layers")
    if selection is None or frame is None:
        return None
    rows = raw_centred(rows_of(frame, selection.model, selection.text))
    metric = preferred_count(finite(rows.filter(pl.col("condition") == "real")))
    return (selection, rows, metric) if metric else None


def layer_choice(rows: pl.DataFrame, layer: int, label: str = "Layer") -> LayerChoice | None:
    """Return the layers of a frame to choose from, `layer` first selection, or None where there is no choice."""
    names = dict(rows.select("layer", "site").unique().sort("layer").iter_rows())
    if len(names) < 2:
        return None
    return LayerChoice(tuple(names.items()), nearest_layer(rows, layer), label)


def nearest_layer(rows: pl.DataFrame, layer: int) -> int:
    """Return the layer of the frame that is nearest to the chosen one."""
    return min(rows["layer"].unique().sort().to_list(), key=lambda present: abs(present - layer))


def subject(layer: int, site: str) -> tuple[str, str]:
    """Return a layer as the subject of a sentence and the ending of its verb: ("Block 3", "s"), ("The embeddings", "")."""
    if site == "embeddings":
        return "The embeddings", ""
    return ("The state after the final norm", "s") if site == NORM else (f"Block {layer}", "s")


def location(layer: int, site: str) -> str:
    """Return a layer as an adverb: "at the embeddings", "in block 3", "after the final norm"."""
    ends = {"embeddings": "at the embeddings", NORM: "after the final norm"}
    return ends.get(site, f"in block {layer}")


def spread(value: float | None, sd: float | None) -> str:
    """Return "155 ± 2.1", or the value alone where its standard deviation is unknown."""
    if value is None or sd is None or not math.isfinite(sd):
        return number(value)
    # Rounding errors of equal draws are no spread, and the second digit of a standard deviation of five draws is a guess.
    return f"{number(value)} ± {number(float(f'{sd:.2g}') if sd > 1e-9 * abs(value) else 0.0)}"


def figure_names(stem: str, titles: Sequence[str]) -> list[str]:
    """Return the name of a figure for each text or model: the stem and the words of the title, numbered if two are equal.

    >>> figure_names("profile", ["builtin html", "old/a.txt", "Old a.txt"])
    ['profile-builtin-html', 'profile-old-a-txt', 'profile-old-a-txt-2']
    """
    names = ["-".join([stem, *re.findall(r"[^\W_]+", title.lower())]) for title in titles]
    return [name if names.index(name) == i else f"{name}-{names[:i].count(name) + 1}" for i, name in enumerate(names)]
