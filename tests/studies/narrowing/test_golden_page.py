"""The text of the whole page of a plan of narrowing; `pytest --snapshot-update` writes it anew."""

import narrowing_tables as planted
from golden import page_text

from dimscope.studies.narrowing.study import NARROWING


def test_the_page_reads_as_in_the_snapshot(snapshot) -> None:
    plan = planted.plan(planted.WIDTHS, planted.BASES, planted.DROPPED, planted.healed("normalised", 56, 0.004))
    tables = {"plan": plan, "narrow_texts": planted.texts()}
    assert page_text(NARROWING.load().make_sections(tables, planted.facts(plan, heal_steps=30))) == snapshot
