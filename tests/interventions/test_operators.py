"""The entries of random projectors are as theory has them."""

import math

import pytest
import torch

from dimscope.interventions.operators import operator_statistics
from dimscope.interventions.perturbations import make_map
from dimscope.interventions.table_summary import TableSummary
from dimscope.vectors.moments import Moments


def projector(d: int, k: int, seed: int) -> torch.Tensor:
    identity = Moments(d, torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64))
    return make_map("project", TableSummary(identity), k, seed).matrix


@pytest.mark.parametrize(("d", "k"), [(64, 16), (64, 48), (200, 150)])
def test_spreads_match_the_haar_measure(d, k):
    found = [operator_statistics(projector(d, k, seed), k) for seed in range(40)]
    for one in found:
        assert one.diagonal_mean == pytest.approx(k / d, abs=1e-12)
        assert one.expected_diagonal_mean == k / d
    for name in ("diagonal_sd", "off_diagonal_sd"):
        squares = torch.tensor([getattr(one, name) ** 2 for one in found], dtype=torch.float64)
        expected = getattr(found[0], f"expected_{name}") ** 2
        # within a draw the mean is the sample's own: for the diagonal exactly k/d, so nothing is lost
        assert float(squares.mean()) == pytest.approx(expected, abs=5 * float(squares.std()) / math.sqrt(len(found)))


def test_a_coordinate_projector_is_told_from_a_random_one():
    found = operator_statistics(torch.diag((torch.arange(64) < 16).double()), 16)
    assert found.diagonal_mean == 0.25
    assert found.off_diagonal_sd == 0
    assert found.diagonal_sd > 5 * found.expected_diagonal_sd


def test_the_squares_of_all_entries_add_up_to_the_rank():
    d, k = 50, 20
    of = operator_statistics(projector(d, k, 1), k)
    total = d * (of.diagonal_sd**2 + of.diagonal_mean**2) + d * (d - 1) * of.off_diagonal_sd**2
    assert total == pytest.approx(k)
    theory = d * (of.expected_diagonal_sd**2 + (k / d) ** 2) + d * (d - 1) * of.expected_off_diagonal_sd**2
    assert theory == pytest.approx(k)


def test_one_dimension_is_refused():
    with pytest.raises(ValueError, match="off its diagonal"):
        operator_statistics(torch.ones(1, 1, dtype=torch.float64), 1)
