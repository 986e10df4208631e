"""The text of the whole page of damage; `pytest --snapshot-update` writes it anew."""

import damage_tables as planted
from golden import page_text

from dimscope.studies.damage.study import DAMAGE


def test_the_page_reads_as_in_the_snapshot(snapshot) -> None:
    tables, facts = planted.damage_tables(), planted.facts(decoding="sample")
    assert page_text(DAMAGE.load().make_sections(tables, facts)) == snapshot
