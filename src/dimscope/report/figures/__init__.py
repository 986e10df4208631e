"""Figures: pure functions from polars frames to one plotly Figure each. They know nothing about pages or files."""

from dimscope.report.figures.dimensions import (
    budget,
    cumulative_variance,
    dimensions,
    intro_panels,
    participation_ratio,
    spectrum,
)
from dimscope.report.figures.tokens import (
    correlation,
    hubness,
    id_scatter,
    norms_by_category,
    norms_by_id,
    token_map,
    untrained_scores,
)

__all__ = [
    "budget",
    "correlation",
    "cumulative_variance",
    "dimensions",
    "hubness",
    "id_scatter",
    "intro_panels",
    "norms_by_category",
    "norms_by_id",
    "participation_ratio",
    "spectrum",
    "token_map",
    "untrained_scores",
]
