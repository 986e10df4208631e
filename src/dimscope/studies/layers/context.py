"""What a run of the layers study was asked, and the rows of its tables that the page speaks of."""

import math
from dataclasses import dataclass
from typing import Any

import polars as pl

from dimscope.page.section import Facts, LayerChoice, Tables, finite, table
from dimscope.page.wording import number
from dimscope.studies.layers.profiles import NORM, preferred_count


@dataclass(frozen=True, slots=True)
class Asked:
    """The studied model, its texts (the first is the main one) and the layer to show where there is room for one."""

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


def asked(tables: Tables, facts: Facts) -> Asked | None:
    """Return what was asked as far as the tables hold it, or None without a table of layers."""
    frame = table(tables, "layers")
    if frame is None:
        return None
    said = facts.of("layers")
    models = _present(said.get("models"), frame["model"])
    texts = _present(said.get("texts"), frame.filter(pl.col("model") == models[0])["text"])
    layers = frame.filter(pl.col("model") == models[0])["layer"].unique().sort().to_list()
    chosen = said.get("show_layer")
    return Asked(models[0], models, texts, layers[len(layers) // 2] if chosen is None else int(chosen))


def _present(said: Any, column: pl.Series) -> tuple[str, ...]:
    """Keep the order of report.json, leave out what has no rows, and add what it does not name."""
    held = column.unique(maintain_order=True).to_list()
    named = [name for name in said or () if name in held]
    return tuple(dict.fromkeys([*named, *held]))


def of(frame: pl.DataFrame, model: str, text: str | None = None) -> pl.DataFrame:
    """Return the rows of one model, and of one text where it is named."""
    rows = frame.filter(pl.col("model") == model)
    return rows if text is None else rows.filter(pl.col("text") == text)


def spectral(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the raw and centred rows: what the page speaks of unless it says otherwise."""
    return frame.filter((pl.col("preprocess") == "raw") & pl.col("centred"))


def counted(tables: Tables, facts: Facts) -> tuple[Asked, pl.DataFrame, str] | None:
    """Return what was asked, the spectral rows of the studied model and main text, and the count to tell."""
    found, frame = asked(tables, facts), table(tables, "layers")
    if found is None or frame is None:
        return None
    rows = spectral(of(frame, found.model, found.text))
    metric = preferred_count(finite(rows.filter(pl.col("condition") == "real")))
    return (found, rows, metric) if metric else None


def layer_choice(rows: pl.DataFrame, chosen: int, label: str = "Layer") -> LayerChoice | None:
    """Return the layers of a frame to choose from, or None where there is no choice."""
    names = dict(rows.select("layer", "site").unique().sort("layer").iter_rows())
    if len(names) < 2:
        return None
    return LayerChoice(tuple(names.items()), shown_layer(rows, chosen), label)


def shown_layer(rows: pl.DataFrame, chosen: int) -> int:
    """Return the chosen layer if the frame holds it, else the one nearest to it."""
    return min(rows["layer"].unique().sort().to_list(), key=lambda layer: abs(layer - chosen))


def subject(layer: int, site: str) -> tuple[str, str]:
    """Return a place as the subject of a sentence and the ending of its verb: ("Block 3", "s"), ("The embeddings", "")."""
    if site == "embeddings":
        return "The embeddings", ""
    return ("The state after the final norm", "s") if site == NORM else (f"Block {layer}", "s")


def at(layer: int, site: str) -> str:
    """Return a place as an adverb: "at the embeddings", "in block 3", "after the final norm"."""
    ends = {"embeddings": "at the embeddings", NORM: "after the final norm"}
    return ends.get(site, f"in block {layer}")


def spread(value: float | None, sd: float | None) -> str:
    """Return "155 ± 2.1", or the value alone where its spread is unknown."""
    if value is None or sd is None or not math.isfinite(sd):
        return number(value)
    # What rounding leaves of equal draws is no spread, and the second digit of one over five draws is already a guess.
    return f"{number(value)} ± {number(float(f'{sd:.2g}') if sd > 1e-9 * abs(value) else 0.0)}"
