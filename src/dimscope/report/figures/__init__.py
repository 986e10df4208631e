"""Figures: pure functions from polars frames to one plotly Figure each. They know nothing about pages or files."""

from dimscope.report.figures.damage import (
    closed_form,
    damage_by_error,
    damage_by_kept,
    damage_by_strength,
    operator_block,
    operator_histogram,
)
from dimscope.report.figures.dimensions import (
    budget,
    cumulative_variance,
    dimensions,
    intro_panels,
    participation_ratio,
    spectrum,
)
from dimscope.report.figures.layers import (
    alignment,
    highest,
    intrinsic_profile,
    layer_axis,
    layer_profile,
    models_profile,
    preprocessings,
    texts_profile,
)
from dimscope.report.figures.narrowing import narrowing_plan
from dimscope.report.figures.states import (
    confidence,
    cumulative_scree,
    sample_curve,
    scale_curve,
    scree,
    similarity_matrix,
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
    "alignment",
    "budget",
    "closed_form",
    "confidence",
    "correlation",
    "cumulative_scree",
    "cumulative_variance",
    "damage_by_error",
    "damage_by_kept",
    "damage_by_strength",
    "dimensions",
    "highest",
    "hubness",
    "id_scatter",
    "intrinsic_profile",
    "intro_panels",
    "layer_axis",
    "layer_profile",
    "models_profile",
    "narrowing_plan",
    "norms_by_category",
    "norms_by_id",
    "operator_block",
    "operator_histogram",
    "participation_ratio",
    "preprocessings",
    "sample_curve",
    "scale_curve",
    "scree",
    "similarity_matrix",
    "spectrum",
    "texts_profile",
    "token_map",
    "untrained_scores",
]
