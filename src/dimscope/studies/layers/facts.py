"""What report.json says about a run of the study of hidden layers."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class LayersFacts:
    """What the page must know of a run beside its tables."""

    models: tuple[str, ...]  # the studied one first
    texts: tuple[str, ...]  # the main one first
    show_layer: int  # for figures that show a single layer
    thresholds: tuple[float, ...] = ()
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
