"""The study of damage as the report, the command line and the library know it. Imports no torch."""

from dimscope.studies.damage.settings import PRESETS, DamageSettings
from dimscope.studies.study import Study, StudyCode


def _load() -> StudyCode:
    from dimscope.checkpoints.model import require_causal
    from dimscope.studies.damage import generation_sections, perturbation_error_sections, sections
    from dimscope.studies.damage.run import run_damage
    from dimscope.studies.damage.summary import summarise

    makers = (
        sections.breaking_section,
        sections.claims_section,
        perturbation_error_sections.error_section,
        perturbation_error_sections.strength_section,
        perturbation_error_sections.operator_section,
        generation_sections.generation_section,
    )
    return StudyCode(run_damage, makers, summarise, check=require_causal)


DAMAGE = Study(
    "damage",
    "What the model loses when its embedding table loses dimensions, or is changed otherwise.",
    DamageSettings,
    _load,
    example="dimscope damage builtin --truncate 75%,50% --noise 0.1,1 -o damage",
    presets=PRESETS,
    definition=8,
)
