"""The study of hidden layers as the report, the command line and the library know it. Imports no torch."""

from dimscope.studies.layers.settings import PRESETS, LayersSettings
from dimscope.studies.study import Study, StudyCode


def _load() -> StudyCode:
    from dimscope.checkpoints.model import require_runnable
    from dimscope.studies.layers import (
        comparison_sections,
        intrinsic_sections,
        model_sections,
        robustness_sections,
        sections,
        type_sections,
    )
    from dimscope.studies.layers.run import run_layers
    from dimscope.studies.layers.summary import summarise

    makers = (
        sections.sample_section,
        sections.profile_section,
        sections.scree_section,
        robustness_sections.preprocess_section,
        type_sections.types_section,
        intrinsic_sections.intrinsic_section,
        robustness_sections.curve_section,
        comparison_sections.confidence_section,
        comparison_sections.similarity_section,
        comparison_sections.alignment_section,
        comparison_sections.texts_section,
        model_sections.models_section,
    )
    return StudyCode(run_layers, makers, summarise, check=require_runnable, highlights=sections.layers_strip)


LAYERS = Study(
    "layers",
    "How many dimensions the hidden states of every layer use, compared with shuffled text, random weights and noise.",
    LayersSettings,
    _load,
    example="dimscope layers builtin --text book.txt page.html --shuffles 5 -o layers",
    presets=PRESETS,
    definition=5,
)
