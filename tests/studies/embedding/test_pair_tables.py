"""Pairs of rows within a radius, the distance of the closest pair where none is within it, and blocks of correlated rows."""

import numpy as np
import pytest
import torch
from matrices import gaussian

from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.geometry.pairs import LEADING
from dimscope.geometry.spectrum import principal_components
from dimscope.studies.embedding.row_tables import closest_distance, correlation_tables, pair_tables
from dimscope.studies.embedding.source import open_source
from dimscope.vectors.moments import moments
from dimscope.vectors.table import table_from_tensor


@pytest.mark.parametrize("n", [2, 40, 700])
def test_the_closest_distance_is_that_of_all_pairs(n):
    rows = gaussian(n, 24)
    components = principal_components(moments([rows], dtype=torch.float64), min(LEADING, 24))
    assert closest_distance(rows, components) == pytest.approx(float(torch.pdist(rows.double()).min()), rel=1e-5)
    assert closest_distance(rows[:1], components) is None


def test_the_closest_distance_of_copies_is_zero():
    rows = gaussian(600, 24)
    rows[599] = rows[1]
    components = principal_components(moments([rows], dtype=torch.float64), min(LEADING, 24))
    assert closest_distance(rows, components) == 0


def test_the_closest_pair_is_reported_where_none_is_within_the_radius():
    source = open_source(open_checkpoint("builtin"))
    none = pair_tables(source, 1e-4)
    assert none.pairs.is_empty()
    assert none.groups.is_empty()
    some = pair_tables(source, none.closest * 1.001)
    assert some.pairs["distance"][0] == some.closest == pytest.approx(none.closest)


def test_a_block_has_the_lowest_correlation_of_any_two_of_its_rows_linked_or_not():
    rows = gaussian(30, 64)
    rows[1] = rows[0] + 0.12 * gaussian(1, 64, 1)[0]  # a chain: neighbours correlate by more than 0.99, its ends do not
    rows[2] = rows[1] + 0.12 * gaussian(1, 64, 2)[0]
    exact = np.corrcoef(rows[:3].double().numpy())
    assert exact[0, 2] < 0.99 < min(exact[0, 1], exact[1, 2])
    blocks = correlation_tables(open_source(table_from_tensor(rows)), range(30), 0.99).blocks
    assert blocks["id"].to_list() == [0, 1, 2]
    assert blocks["min_r"].to_list() == pytest.approx([exact[0, 2]] * 3, abs=1e-6)
