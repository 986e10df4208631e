"""Which study tells what: the one place where a study joins the report."""

from collections.abc import Callable

from dimscope.report.section import Facts, Section, SectionMaker, Tables
from dimscope.report.sections import (
    answers,
    clouds,
    contrasts,
    damage,
    directions,
    errors,
    layers,
    narrowing,
    rows,
)

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

_LAYERS: tuple[SectionMaker, ...] = (
    layers.sample_section,
    layers.profile_section,
    layers.scree_section,
    clouds.preprocess_section,
    clouds.intrinsic_section,
    clouds.curve_section,
    contrasts.confidence_section,
    contrasts.similarity_section,
    contrasts.alignment_section,
    contrasts.texts_section,
    contrasts.models_section,
)

_DAMAGE: tuple[SectionMaker, ...] = (
    damage.breaking_section,
    damage.claims_section,
    errors.error_section,
    errors.strength_section,
    errors.operator_section,
    answers.texts_section,
)


_NARROWING: tuple[SectionMaker, ...] = (narrowing.plan_section, narrowing.before_after_section)


def embedding_sections(tables: Tables, facts: Facts) -> list[Section]:
    """Tell the embedding study; a section whose tables are missing is left out."""
    return _told(_EMBEDDING, tables, facts)


def layer_sections(tables: Tables, facts: Facts) -> list[Section]:
    """Tell the study of hidden states; a section whose tables are missing or empty is left out."""
    return _told(_LAYERS, tables, facts)


def damage_sections(tables: Tables, facts: Facts) -> list[Section]:
    """Tell the study of damage; a section whose tables are missing or empty is left out."""
    return _told(_DAMAGE, tables, facts)


def narrowing_sections(tables: Tables, facts: Facts) -> list[Section]:
    """Tell the plan of a narrowing; a section whose tables are missing or empty is left out."""
    return _told(_NARROWING, tables, facts)


def _told(makers: tuple[SectionMaker, ...], tables: Tables, facts: Facts) -> list[Section]:
    made = (make(tables, facts) for make in makers)
    return [section for section in made if section is not None]


STUDIES: dict[str, Callable[[Tables, Facts], list[Section]]] = {
    "embedding": embedding_sections,
    "layers": layer_sections,
    "damage": damage_sections,
    "narrowing": narrowing_sections,
}
