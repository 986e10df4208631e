"""The text of the whole page of the embedding study; `pytest --snapshot-update` writes it anew."""

from golden import page_text

from dimscope.page.section import Facts, Tables
from dimscope.studies.embedding.study import EMBEDDING


def test_the_page_reads_as_in_the_snapshot(tables: Tables, facts: Facts, snapshot) -> None:
    assert page_text(EMBEDDING.load().make_sections(tables, facts)) == snapshot
