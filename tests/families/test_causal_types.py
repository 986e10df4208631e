"""Every type of causal language model: as docs/families.md says, tiny and with random weights."""

from __future__ import annotations

import pytest
from documented import documented_reasons
from stock import Case, cases_of
from sweep import examine


@pytest.mark.slow
@pytest.mark.parametrize("case", cases_of("causal"), ids=str)
def test_a_type_agrees_with_stock_transformers_or_is_refused_as_documented(case: Case):
    outcome = examine(case)
    assert outcome.failed == {}
    assert (outcome.reason is None) == (documented_reasons()[case] is None), outcome.reason
