"""The plan of a narrowing as the report, the command line and the library know it. Imports no torch."""

from dimscope.studies.narrowing.settings import NarrowSettings
from dimscope.studies.study import Study, StudyCode


def _load() -> StudyCode:
    from dimscope.checkpoints.families import layout_of
    from dimscope.studies.narrowing import sections
    from dimscope.studies.narrowing.plan import run_plan
    from dimscope.studies.narrowing.summary import summarise

    makers = (sections.plan_section, sections.before_after_section)
    return StudyCode(run_plan, makers, summarise, check=layout_of)


NARROWING = Study(
    "narrowing",
    "What every smaller hidden size would cost and save, compared with dropping layers and with rounding weights.",
    NarrowSettings,
    _load,
    example="dimscope narrow builtin --plan -o plan",
    definition=4,
)
