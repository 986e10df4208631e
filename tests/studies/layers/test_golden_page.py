"""The text of the whole page of the layers study; `pytest --snapshot-update` writes it anew."""

import layer_tables as planted
from golden import page_text
from layer_tables import Model, Plan

from dimscope.page.section import Facts, StudyFacts
from dimscope.studies.layers.study import LAYERS

PLAN = Plan((Model(blocks=3, dim=32), Model("toy-2", 2, 16)), windows=2, length=64, curve=True)


def test_the_page_reads_as_in_the_snapshot(snapshot) -> None:
    own = StudyFacts(planted.study_facts(PLAN, show_layer=2), tables=())
    facts = Facts("toy-6", n_rows=4096, dim=32, n_parameters=100, tied=True, studies={"layers": own})
    assert page_text(LAYERS.load().make_sections(planted.layer_tables(PLAN), facts)) == snapshot
