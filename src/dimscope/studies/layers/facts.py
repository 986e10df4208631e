"""What report.json holds about a run of the study of hidden layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dimscope.page.section import Facts


@dataclass(frozen=True, slots=True)
class LayersFacts:
    """What the page must know of a run beside its tables.

    Attributes:
        models: Titles of the models, the studied one first.
        texts: Names of the texts, the main one first.
        show_layer: Layer of figures that show a single one; None for the middle.
        thresholds: Shares of the variance for which components are counted.
        shuffles: Random seeds of the text shuffled within each window.
        window_length: Tokens per window.
        bos: The special tokens before each window.
        rank_tolerance: Relative tolerance of the numerical rank, as a formula.
        dtype: Dtype of the computation.
        device: Where the model ran.
        preset: The preset that was chosen.
        windows: Windows per text; None for the default.
        reservoir: Token positions sampled per pass.
        seed: The first random seed.
        layers: The layers that were chosen; None for all.
    """

    models: Sequence[str] = ()
    texts: Sequence[str] = ()
    show_layer: int | None = None
    thresholds: Sequence[float] = ()
    shuffles: int = 0
    window_length: int | None = None
    bos: str | None = None
    rank_tolerance: str | None = None
    dtype: str | None = None
    device: str | None = None
    preset: str | None = None
    windows: int | Literal["all"] | None = None
    reservoir: int | None = None
    seed: int = 0
    layers: str | None = None


def layers_facts(facts: Facts) -> LayersFacts:
    """Return the facts of this study from those of the report."""
    return facts.typed("layers", LayersFacts)
