"""Which study tells what: the one place where a study joins the report."""

from collections.abc import Callable

from dimscope.report.section import Facts, Section, SectionMaker, Tables
from dimscope.report.sections import directions, rows

# The order of the page. A maker returns None where its tables are missing.
_EMBEDDING: tuple[SectionMaker, ...] = (
    directions.intro_section,
    directions.budget_section,
    rows.map_section,
    rows.id_range_section,
    rows.neighbours_section,
    rows.correlation_section,
    rows.duplicates_section,
    rows.untrained_section,
    directions.spectrum_section,
    directions.dimension_section,
    directions.isotropy_section,
    rows.hubness_section,
)


def embedding_sections(tables: Tables, facts: Facts) -> list[Section]:
    """Tell the embedding study; a section whose tables are missing is left out."""
    made = (make(tables, facts) for make in _EMBEDDING)
    return [section for section in made if section is not None]


STUDIES: dict[str, Callable[[Tables, Facts], list[Section]]] = {"embedding": embedding_sections}
