"""Every perturbation against the table that it makes: exact errors, closed forms, identities, and strengths out of range."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import PROPERTY, gaussian

from dimscope.interventions.maps import GaussianNoise, LinearMap, exact_error
from dimscope.interventions.perturbations import PERTURBATIONS, make_map
from dimscope.interventions.table_summary import TableSummary
from dimscope.vectors.moments import moments

V, D = 400, 24
BY_DIMENSIONS = [name for name, kind in PERTURBATIONS.items() if kind.unit == "dimensions"]
LINEAR = [*BY_DIMENSIONS, "rotate", "scale"]
PROJECTIONS = ["project", "project-rescaled", "project-sparse"]


def rows_of(seed: int = 0, n: int = V, d: int = D) -> torch.Tensor:
    """Return rows with a mean and columns of unequal spread, float64."""
    return gaussian(n, d, seed, dtype=torch.float64) * torch.linspace(2, 0.2, d) + torch.linspace(-1, 1, d)


def table_of(rows: torch.Tensor) -> TableSummary:
    return TableSummary(moments([rows], dtype=torch.float64))


def measured(change, rows: torch.Tensor) -> float:
    return float((rows - change(rows, torch.arange(len(rows)))).norm())


def strength_of(name: str) -> float:
    return {"dimensions": 9.0, "factor": 0.4, "standard deviations": 0.5, "bits": 4.0, "": 0.0}[
        PERTURBATIONS[name].unit
    ]


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("seed", [0, 3])
def test_the_error_of_a_linear_map_from_moments_is_that_of_the_rows(name, seed):
    rows = rows_of(seed)
    change = make_map(name, table_of(rows), strength_of(name), seed)
    assert exact_error(change, table_of(rows).moments) == pytest.approx(measured(change, rows), rel=1e-10)


@PROPERTY
@given(k=st.integers(0, D), seed=st.integers(0, 50), name=st.sampled_from(LINEAR))
def test_the_error_is_exact_at_every_strength(k, seed, name):
    rows = rows_of(seed, n=60)
    strength = float(k) if PERTURBATIONS[name].unit == "dimensions" else k / 7
    change = make_map(name, table_of(rows), strength, seed)
    assert exact_error(change, table_of(rows).moments) == pytest.approx(
        measured(change, rows), rel=1e-9, abs=1e-11 * float(rows.norm())
    )


@pytest.mark.parametrize("name", ["truncate", "truncate-centred", "remove-leading", "coordinates", "scale"])
@pytest.mark.parametrize("strength", [1.0, 9.0, 20.0])
def test_closed_forms_of_what_is_not_random_are_exact(name, strength):
    rows = rows_of()
    found = PERTURBATIONS[name].expected(table_of(rows), strength)
    assert found == pytest.approx(measured(make_map(name, table_of(rows), strength), rows), rel=1e-10)


def test_truncation_is_that_of_numpys_svd_and_no_table_of_that_rank_is_nearer():
    rows = rows_of()
    left, values, right = np.linalg.svd(rows.numpy(), full_matrices=False)
    best = left[:, :9] * values[:9] @ right[:9]
    found = make_map("truncate", table_of(rows), 9)(rows, torch.arange(V))
    np.testing.assert_allclose(found.numpy(), best, atol=1e-11)
    mean = rows.numpy().mean(axis=0)
    left, values, right = np.linalg.svd(rows.numpy() - mean, full_matrices=False)
    around = left[:, :9] * values[:9] @ right[:9] + mean
    found = make_map("truncate-centred", table_of(rows), 9)(rows, torch.arange(V))
    np.testing.assert_allclose(found.numpy(), around, atol=1e-11)


def test_removing_and_keeping_the_leading_directions_add_up_to_the_table():
    rows, ids = rows_of(), torch.arange(V)
    kept, rest = (make_map(name, table_of(rows), 5)(rows, ids) for name in ("truncate", "remove-leading"))
    torch.testing.assert_close(kept + rest, rows, atol=1e-11, rtol=0)


def test_the_coordinates_that_are_kept_have_the_most_energy():
    rows = rows_of() * torch.tensor([1.0, 9.0, *[0.5] * (D - 2)])
    found = make_map("coordinates", table_of(rows), 2)(rows, torch.arange(V))
    assert torch.equal(found[:, :2], rows[:, :2])
    assert not found[:, 2:].any()


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("k", [3, 12, 21])
def test_random_projections_have_the_expected_error_on_average(name, k):
    """E ||W - W P||^2 is a linear form of P, so its mean over seeds is known; 5 standard errors of 300 draws."""
    rows = rows_of()
    table = table_of(rows)
    squares = np.array([exact_error(make_map(name, table, k, seed), table.moments) ** 2 for seed in range(300)])
    expected = PERTURBATIONS[name].expected(table, k) ** 2
    # Twice the projection on half of the dimensions is a reflection: its error is the same for every seed.
    assert (squares.std() > 1e-6 * expected) == ((name, k) != ("project-rescaled", D // 2))
    margin = 5 * squares.std() / math.sqrt(len(squares)) + 1e-10 * expected
    assert squares.mean() == pytest.approx(expected, abs=margin)


@pytest.mark.parametrize("name", ["project", "project-sparse"])
def test_a_random_projection_is_an_orthogonal_projector_of_rank_k(name):
    p = make_map(name, table_of(rows_of()), 7, 1).matrix
    torch.testing.assert_close(p @ p, p, atol=1e-12, rtol=0)
    torch.testing.assert_close(p, p.T, atol=1e-12, rtol=0)
    assert float(p.trace()) == pytest.approx(7)


def test_a_gaussian_projection_is_a_times_its_pseudo_inverse():
    a = torch.randn(D, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    p = make_map("project", table_of(rows_of()), 7, 5).matrix
    torch.testing.assert_close(p, a @ torch.linalg.pinv(a), atol=1e-12, rtol=0)


def test_rescaling_raises_the_error_and_keeps_inner_products_on_average():
    rows = rows_of()
    table = table_of(rows)
    maps = [make_map("project-rescaled", table, 8, seed) for seed in range(400)]
    plain = [make_map("project", table, 8, seed) for seed in range(20)]
    assert min(exact_error(m, table.moments) for m in maps) > max(exact_error(m, table.moments) for m in plain)
    mean = torch.stack([m.matrix for m in maps]).mean(dim=0)
    torch.testing.assert_close(mean, torch.eye(D, dtype=torch.float64), atol=0.25, rtol=0)


def test_a_rotation_keeps_distances_and_back_again_is_nothing():
    rows, ids = rows_of(), torch.arange(V)
    turn = make_map("rotate", table_of(rows), seed=2)
    turned = turn(rows, ids)
    torch.testing.assert_close(torch.cdist(turned, turned), torch.cdist(rows, rows), atol=1e-6, rtol=1e-9)
    assert float((turned - rows).norm()) > 0.5 * float(rows.norm())
    torch.testing.assert_close(LinearMap(turn.matrix.T.contiguous())(turned, ids), rows, atol=1e-12, rtol=0)
    assert PERTURBATIONS["rotate"].expected(table_of(rows), 0) == pytest.approx(
        math.sqrt(np.mean([exact_error(make_map("rotate", table_of(rows), 0, s), table_of(rows).moments) ** 2 for s in range(200)])),
        rel=0.02,
    )  # fmt: skip


NOTHING = [
    *((name, D) for name in BY_DIMENSIONS if name != "remove-leading"),
    ("remove-leading", 0),
    ("scale", 1),
    ("noise", 0),
]


@pytest.mark.parametrize(("name", "strength"), NOTHING)
def test_full_strength_of_keeping_and_none_of_spoiling_change_nothing(name, strength):
    rows = rows_of()
    change = make_map(name, table_of(rows), strength, 1)
    torch.testing.assert_close(change(rows, torch.arange(V)), rows, atol=1e-6 if name == "noise" else 1e-11, rtol=0)
    if isinstance(change, LinearMap):
        assert exact_error(change, table_of(rows).moments) <= 1e-12 * float(rows.norm())


def test_the_error_of_an_identity_is_not_what_rounding_leaves_of_energies():
    """A difference of energies is off by 1e-16 of them, whose root is 1e-8 of the norm."""
    for seed in range(30):
        rows = rows_of(seed)
        change = make_map("project", table_of(rows), D, seed)
        assert exact_error(change, table_of(rows).moments) <= 1e-12 * float(rows.norm())


@pytest.mark.parametrize("name", ["project", "project-sparse"])
def test_no_direction_is_preferred_by_random_projections(name):
    """The direction (1, ..., 1) keeps k / d of its energy on average: directions of one sign only would hold it always."""
    ones = torch.ones(D, dtype=torch.float64) / math.sqrt(D)
    kept = np.array([float(ones @ make_map(name, table_of(rows_of()), 8, seed).matrix @ ones) for seed in range(200)])
    assert kept.mean() == pytest.approx(8 / D, abs=5 * kept.std() / math.sqrt(200))


def test_a_strength_of_zero_dimensions_leaves_nothing_or_the_mean():
    rows, ids = rows_of(), torch.arange(V)
    for name in ("truncate", "coordinates", "project", "project-rescaled"):
        assert not make_map(name, table_of(rows), 0)(rows, ids).any()
    centred = make_map("truncate-centred", table_of(rows), 0)(rows, ids)
    torch.testing.assert_close(centred, rows.mean(dim=0).expand(V, D), atol=1e-12, rtol=0)


def test_noise_is_of_the_stated_size_and_belongs_to_the_token():
    rows = rows_of(n=3000)
    table = table_of(rows)
    assert table.std == pytest.approx(float(rows.std(correction=0)), rel=1e-12)
    change = make_map("noise", table, 0.5, 1)
    ids = torch.arange(3000)
    error = measured(change, rows)
    expected = PERTURBATIONS["noise"].expected(table, 0.5)
    assert error == pytest.approx(expected, rel=5 / math.sqrt(2 * rows.numel()))  # relative sd 1 / sqrt(2 V d)
    noise = change(rows, ids) - rows
    again = change(rows[[7, 2, 7]], torch.tensor([7, 2, 7])) - rows[[7, 2, 7]]
    torch.testing.assert_close(again, noise[[7, 2, 7]])
    assert not torch.equal(noise[0], noise[1])
    other = GaussianNoise(change.sd, 2)(rows, ids) - rows
    correlation = torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(rows.numel())
    beside = torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1]
    assert abs(float(beside)) < 5 / math.sqrt(rows.numel())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_rows_are_on_few_values_and_within_half_a_step(bits):
    rows = rows_of()
    found = make_map("quantise", table_of(rows), bits)(rows, torch.arange(V))
    step = rows.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert bool(((found - rows).abs() <= step / 2 * (1 + 1e-5)).all())
    assert max(len(row.unique()) for row in found) <= 2**bits - 1
    assert bool((found.abs().amax(dim=1) / rows.abs().amax(dim=1) > 1 - 1e-6).all())
    zero = torch.zeros(2, D)
    assert torch.equal(make_map("quantise", table_of(rows), bits)(zero, torch.arange(2)), zero)


@pytest.mark.parametrize("name", list(PERTURBATIONS))
def test_maps_keep_the_dtype_and_the_rows_that_they_are_given(name):
    rows = rows_of().bfloat16()
    before = rows.clone()
    change = make_map(name, table_of(rows), strength_of(name), 0)
    assert change(rows, torch.arange(V)).dtype == torch.bfloat16
    assert torch.equal(rows, before)
    assert PERTURBATIONS[name].about.endswith((".", ")"))


def test_every_perturbation_has_a_title_and_a_mark_of_its_own():
    kinds = PERTURBATIONS.values()
    assert len({kind.title for kind in kinds}) == len({kind.mark for kind in kinds}) == len(PERTURBATIONS)


def test_perturbations_are_listed_without_torch(run_python):
    code = "import sys; from dimscope.interventions.perturbations import PERTURBATIONS as p; print(len(p), 'torch' in sys.modules)"
    assert run_python("-c", code).stdout.split() == [str(len(PERTURBATIONS)), "False"]
