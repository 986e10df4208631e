"""Every type of encoder and encoder-decoder: as docs/families.md says, tiny and with random weights."""

from __future__ import annotations

import pytest
from documented import assert_as_documented
from stock import Case, cases_of


@pytest.mark.slow
@pytest.mark.parametrize("case", cases_of("encoder", "encoder-decoder"), ids=str)
def test_a_type_agrees_with_stock_transformers_or_is_refused_as_documented(case: Case):
    assert_as_documented(case)
