"""The embedding study as the report, the command line and the library know it. Imports no torch."""

from dimscope.studies.embedding.settings import EmbeddingSettings
from dimscope.studies.study import Study, StudyCode


def _load() -> StudyCode:
    from dimscope.studies.embedding import correlation_sections, spectrum_sections, token_sections, truncation_sections
    from dimscope.studies.embedding.page_data import page_data
    from dimscope.studies.embedding.run import run_embedding
    from dimscope.studies.embedding.summary import highlights, summarise

    sections = (
        spectrum_sections.intro_section,
        spectrum_sections.budget_section,
        token_sections.map_section,
        token_sections.id_range_section,
        token_sections.neighbours_section,
        correlation_sections.correlation_section,
        token_sections.duplicates_section,
        token_sections.untrained_section,
        spectrum_sections.spectrum_section,
        spectrum_sections.dimension_section,
        truncation_sections.truncation_section,
        spectrum_sections.isotropy_section,
        token_sections.hubness_section,
    )
    return StudyCode(run_embedding, sections, summarise, highlights=highlights, page_data=page_data)


EMBEDDING = Study(
    "embedding",
    "How many dimensions the embedding table uses, and which tokens stand out in it.",
    EmbeddingSettings,
    _load,
    example="dimscope embedding builtin -o report",
    definition=5,
    takes_vectors=True,
)
