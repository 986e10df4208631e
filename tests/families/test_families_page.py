"""docs/families.md lists every model type once, with counts that are those of its rows. No model is built."""

from __future__ import annotations

import pytest
import transformers
from documented import documented_counts, documented_reasons, documented_version
from stock import find_cases

LEAST = {"causal": 100, "multimodal": 40, "encoder": 10, "encoder-decoder": 10}


def test_the_page_has_a_row_for_every_type():
    if documented_version() != transformers.__version__:
        pytest.skip(f"the page is about transformers {documented_version()}, here is {transformers.__version__}")
    assert set(documented_reasons()) == set(find_cases())


@pytest.mark.parametrize("kind", LEAST)
def test_the_counts_are_those_of_the_rows(kind):
    reasons = [reason for case, reason in documented_reasons().items() if case.kind == kind]
    n_types, n_covered = documented_counts()[kind]
    assert (len(reasons), reasons.count(None)) == (n_types, n_covered)
    assert n_covered >= LEAST[kind]
