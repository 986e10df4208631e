"""Every type of causal language model: as docs/families.md says, tiny and with random weights."""

from __future__ import annotations

import pytest
from documented import assert_as_documented
from stock import Case, cases_of


@pytest.mark.slow
@pytest.mark.parametrize("case", cases_of("causal"), ids=str)
def test_a_type_agrees_with_stock_transformers_or_is_refused_as_documented(case: Case):
    assert_as_documented(case)
