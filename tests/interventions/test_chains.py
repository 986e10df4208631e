"""Perturbations one after the other: as one map the same as step by step, each step for the table as it is by then."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import PROPERTY, gaussian

from dimscope.errors import InvalidArgument
from dimscope.interventions.maps import (
    Chain,
    GaussianNoise,
    LinearMap,
    RowQuantisation,
    compose,
    exact_error,
    mapped_moments,
)
from dimscope.interventions.perturbations import PERTURBATIONS, check_strength, find_perturbation, make_map
from dimscope.interventions.table_summary import TableSummary, make_chain, step_seed
from dimscope.vectors.moments import moments

V, D = 300, 20
IDS = torch.arange(V)
STEPS = {"project": 7, "truncate-centred": 9, "shift": 0.7, "scale": -0.6, "rotate": 0, "coordinates": 11}
FULL_RANK = ("shift", "scale", "rotate")
MORE = {**STEPS, "truncate": 5, "remove-leading": 4, "project-rescaled": 13, "project-sparse": 16}
# Each kind after one and before another: both of low rank, one of the two, neither; a shift before, after and in between.
IN_TURN = list(pairwise([*STEPS, "project"]))
MORE_IN_TURN = list(pairwise([*MORE, "project"]))


def rows_of(seed: int = 0, n: int = V) -> torch.Tensor:
    """Return rows with a mean and columns of unequal spread, float64."""
    return gaussian(n, D, seed, torch.float64) * torch.linspace(2, 0.2, D) + torch.linspace(-1, 1, D)


def table_of(rows: torch.Tensor) -> TableSummary:
    return TableSummary(moments([rows], dtype=torch.float64))


def close(found: torch.Tensor, expected: torch.Tensor, share: float = 1e-12) -> None:
    """Within a share of the largest entry: sums of D products in float64, in another order."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= share * max(float(expected.abs().max()), 1.0)


def step_by_step(steps, rows: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the rows after all steps, each map made from the rows as they are by then, not from mapped moments."""
    for number, (name, strength) in enumerate(steps):
        change = make_map(name, table_of(rows), strength, step_seed(seed, number))
        rows = change(rows, torch.arange(len(rows)))
    return rows


# ---- composing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", IN_TURN, ids="-then-".join)
def test_a_composed_map_is_its_maps_one_after_the_other(names):
    rows = rows_of()
    maps = [make_map(name, table_of(rows), STEPS[name], seed) for seed, name in enumerate(names)]
    assert [m.right is None for m in maps] == [name in FULL_RANK for name in names]
    both = compose(maps)
    assert isinstance(both, LinearMap)
    expected = maps[1](maps[0](rows, IDS), IDS)
    close(both(rows, IDS), expected)
    # a shift is there exactly where a zero row would move
    assert (both.shift is None) == (not any(name in ("shift", "truncate-centred") for name in names))
    close(both(torch.zeros(1, D, dtype=torch.float64), IDS[:1]), maps[1](maps[0](rows[:1] * 0, IDS[:1]), IDS[:1]))
    assert exact_error(both, table_of(rows).moments) == pytest.approx(float((rows - expected).norm()), rel=1e-10)


@pytest.mark.parametrize("names", MORE_IN_TURN, ids="-then-".join)
def test_a_composed_map_is_held_in_the_factors_of_the_smaller_rank(names):
    maps = [make_map(name, table_of(rows_of()), MORE[name], seed) for seed, name in enumerate(names)]
    both = compose(maps)
    assert both.left.shape == (D, min(m.left.shape[1] for m in maps))
    assert (both.right is None) == all(m.right is None for m in maps)
    close(both.matrix, maps[0].matrix @ maps[1].matrix)


@pytest.mark.parametrize("names", [*((name,) for name in MORE), *MORE_IN_TURN], ids="-then-".join)
def test_rows_that_are_promised_to_be_orthonormal_are(names):
    """Of each map alone, as many as it has, and of all that are composed of them."""
    change = compose([make_map(name, table_of(rows_of()), MORE[name], seed) for seed, name in enumerate(names)])
    if change.orthonormal:
        close(change.right @ change.right.T, torch.eye(len(change.right), dtype=torch.float64))
    assert change.orthonormal or len(names) == 2 or change.right is None


@pytest.mark.parametrize("names", IN_TURN, ids="-then-".join)
def test_what_an_output_table_is_multiplied_with_goes_through_the_maps_in_reverse(names):
    """h (W M1 M2)^T = ((h M2^T) M1^T) W^T."""
    hidden = gaussian(11, D, 5, torch.float64)
    first, second = (make_map(name, table_of(rows_of()), STEPS[name], seed) for seed, name in enumerate(names))
    close(compose([first, second]).transposed(hidden), first.transposed(second.transposed(hidden)))
    close(compose([first, second]).transposed(hidden), hidden @ (first.matrix @ second.matrix).T)


@PROPERTY
@given(names=st.lists(st.sampled_from(sorted(MORE)), min_size=1, max_size=5), seed=st.integers(0, 50))
def test_any_number_of_linear_maps_is_one_linear_map(names, seed):
    rows = rows_of(seed, n=60)
    ids = torch.arange(60)
    maps = [make_map(name, table_of(rows), MORE[name], seed + n) for n, name in enumerate(names)]
    expected = rows
    for change in maps:
        expected = change(expected, ids)
    found = compose(maps)
    assert isinstance(found, LinearMap)
    close(found(rows, ids), expected)
    assert exact_error(found, table_of(rows).moments) == pytest.approx(float((rows - expected).norm()), rel=1e-9)


def test_a_rotation_and_back_is_nothing_exactly_where_energies_would_leave_their_rounding():
    """The error is 0 to 1e-12 of the norm; a difference of energies would leave the root of their rounding, 1e-8."""
    rows = rows_of()
    turn = make_map("rotate", table_of(rows), seed=3)
    both = compose([turn, LinearMap(turn.matrix.T.contiguous())])
    assert exact_error(both, table_of(rows).moments) <= 1e-12 * float(rows.norm())


def test_nothing_to_compose_changes_nothing():
    for nothing in (compose([]), make_chain([], table_of(rows_of()))):
        assert nothing == Chain(())
        assert torch.equal(nothing(rows_of(), IDS), rows_of())


# ---- moments of what a map leaves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("seed", [0, 4])
def test_mapped_moments_are_the_moments_of_the_mapped_rows(name, seed):
    rows = rows_of(seed)
    change = make_map(name, table_of(rows), MORE[name], seed)
    found, expected = mapped_moments(change, table_of(rows).moments), table_of(change(rows, IDS)).moments
    assert found.count == V
    energy = float(rows.square().sum())
    torch.testing.assert_close(found.total, expected.total, rtol=0, atol=1e-12 * math.sqrt(V * energy))
    torch.testing.assert_close(found.gram, expected.gram, rtol=0, atol=1e-12 * energy)
    assert float(found.scatter(centred=True).diagonal().min()) >= -1e-12 * energy


def test_moments_mapped_twice_are_moments_mapped_by_both():
    rows = rows_of()
    maps = [make_map(name, table_of(rows), MORE[name], 1) for name in ("truncate-centred", "rotate", "shift")]
    found = table_of(rows).moments
    for change in maps:
        found = mapped_moments(change, found)
    expected = mapped_moments(compose(maps), table_of(rows).moments)
    close(found.gram, expected.gram)
    close(found.total, expected.total)


# ---- chains by name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", MORE_IN_TURN, ids="-then-".join)
def test_each_linear_step_is_made_for_the_table_as_it_is_by_then(names):
    """Against maps made from the changed rows themselves; 1e-9: eigenvectors from products of mapped moments."""
    rows, steps = rows_of(), [(name, MORE[name]) for name in names]
    found = make_chain(steps, table_of(rows), 2)
    assert isinstance(found, LinearMap)
    expected = step_by_step(steps, rows, 2)
    close(found(rows, IDS), expected, 1e-9)
    assert exact_error(found, table_of(rows).moments) == pytest.approx(float((rows - expected).norm()), rel=1e-9)


def test_three_steps_are_made_one_for_the_other():
    rows = rows_of()
    for steps in (
        [("project", 14), ("shift", 1.5), ("truncate", 6)],
        [("coordinates", 15), ("rotate", 0), ("coordinates", 9)],
        [("shift", 2), ("project", 12), ("truncate-centred", 4)],
    ):
        close(make_chain(steps, table_of(rows), 1)(rows, IDS), step_by_step(steps, rows, 1), 1e-9)


def test_truncation_after_projection_is_numpys_svd_of_the_projected_table():
    rows = rows_of()
    normal = torch.randn(D, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).numpy()
    projected = rows.numpy() @ normal @ np.linalg.pinv(normal)
    left, values, right = np.linalg.svd(projected, full_matrices=False)
    expected = left[:, :5] * values[:5] @ right[:5]
    found = make_chain([("project", 12), ("truncate", 5)], table_of(rows), 3)
    np.testing.assert_allclose(found(rows, IDS).numpy(), expected, rtol=0, atol=1e-11)
    # and not the truncation of the table as it was
    other = compose([make_map("project", table_of(rows), 12, 3), make_map("truncate", table_of(rows), 5)])
    assert float((other(rows, IDS) - torch.from_numpy(expected)).norm()) > 0.1 * np.linalg.norm(expected)


def test_centred_truncation_after_a_shift_is_numpys_svd_around_the_mean_that_was_shifted():
    rows = rows_of()
    shifted = make_map("shift", table_of(rows), 3, 5)(rows, IDS).numpy()
    mean = shifted.mean(axis=0)
    left, values, right = np.linalg.svd(shifted - mean, full_matrices=False)
    found = make_chain([("shift", 3), ("truncate-centred", 6)], table_of(rows), 5)
    np.testing.assert_allclose(
        found(rows, IDS).numpy(), left[:, :6] * values[:6] @ right[:6] + mean, rtol=0, atol=1e-11
    )


def test_one_step_is_its_own_map():
    rows = rows_of()
    assert make_chain([("noise", 0.5)], table_of(rows), 4) == make_map("noise", table_of(rows), 0.5, 4)
    assert make_chain([("quantise", 4)], table_of(rows)) == RowQuantisation(4)
    found = make_chain([("project", 7)], table_of(rows), 4)
    assert torch.equal(found.matrix, make_map("project", table_of(rows), 7, 4).matrix)


def test_a_chain_with_noise_adds_it_to_the_projected_rows_in_their_own_standard_deviations():
    rows = rows_of()
    found = make_chain([("project", 7), ("noise", 0.5)], table_of(rows), 2)
    assert isinstance(found, Chain)
    projected = make_map("project", table_of(rows), 7, 2)(rows, IDS)
    noise = found.maps[1]
    assert isinstance(noise, GaussianNoise)
    assert noise.sd == pytest.approx(0.5 * float(projected.std(correction=0)), rel=1e-12)
    assert torch.equal(found(rows, IDS), GaussianNoise(noise.sd, step_seed(2, 1))(projected, IDS))
    # what is looked up later, in any order, gets the same
    some = torch.tensor([9, 3, 9])
    torch.testing.assert_close(found(rows[some], some), found(rows, IDS)[some], rtol=0, atol=1e-6)


def test_noise_after_a_scale_is_scaled_with_it():
    rows = rows_of()
    sd = make_map("noise", table_of(rows), 1.0).sd
    assert make_chain([("scale", -0.25), ("noise", 1.0)], table_of(rows)).maps[1].sd == pytest.approx(0.25 * sd)


@pytest.mark.parametrize(("name", "strength"), [("noise", 2.0), ("quantise", 3)])
def test_a_step_after_noise_or_rounding_is_made_for_the_table_without_them(name, strength):
    rows = rows_of()
    found = make_chain([("scale", 3), (name, strength), ("truncate", 5)], table_of(rows), 1)
    scaled = rows * 3
    spoilt = make_map(name, table_of(scaled), strength, step_seed(1, 1))(scaled, IDS)
    expected = make_map("truncate", table_of(scaled), 5)(spoilt, IDS)
    close(found(rows, IDS), expected)
    # a table with the noise in it has other leading directions
    other = make_map("truncate", table_of(spoilt), 5)(spoilt, IDS)
    assert float((other - expected).norm()) > 1e-3 * float(expected.norm())


@pytest.mark.parametrize("steps", [[("project", 7), ("shift", 1)], [("project", 7), ("noise", 1), ("quantise", 4)]])
def test_chains_keep_the_dtype_and_the_rows_that_they_are_given(steps):
    rows = rows_of().bfloat16()
    before = rows.clone()
    assert make_chain(steps, table_of(rows))(rows, IDS).dtype == torch.bfloat16
    assert torch.equal(rows, before)


# ---- shift ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.25, 1.0, 40.0])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_shift_adds_one_vector_as_long_as_noise_of_that_strength(strength, seed):
    rows = rows_of(seed)
    change = make_map("shift", table_of(rows), strength, seed)
    added = change(rows, IDS) - rows
    length = strength * float(rows.std(correction=0)) * math.sqrt(D)
    assert float(added[0].norm()) == pytest.approx(length, rel=1e-10)
    close(added, added[:1].expand(V, D))
    error = strength * float(rows.std(correction=0)) * math.sqrt(V * D)
    assert float(added.norm()) == pytest.approx(error, rel=1e-10)
    assert exact_error(change, table_of(rows).moments) == pytest.approx(error, rel=1e-10)
    assert PERTURBATIONS["shift"].expected(table_of(rows), strength) == pytest.approx(error, rel=1e-12)
    assert PERTURBATIONS["noise"].expected(table_of(rows), strength) == pytest.approx(error, rel=1e-12)


def test_seeds_shift_into_directions_that_have_nothing_in_common():
    """The cosine of two random directions has standard deviation 1 / sqrt(D); the mean of 435 pairs, five of them."""
    vectors = [make_map("shift", table_of(rows_of()), 1, seed).shift for seed in range(30)]
    units = torch.stack([v / v.norm() for v in vectors])
    cosines = (units @ units.T)[torch.triu(torch.ones(30, 30, dtype=torch.bool), 1)]
    assert float(cosines.abs().max()) < 0.9
    assert abs(float(cosines.mean())) < 5 / math.sqrt(D * len(cosines))
    assert float(cosines.std()) == pytest.approx(1 / math.sqrt(D), rel=0.25)  # five relative errors of 435 pairs: 0.17
    assert torch.equal(vectors[3], make_map("shift", table_of(rows_of()), 1, 3).shift)


def test_a_shift_of_no_strength_is_the_identity():
    rows = rows_of()
    change = make_map("shift", table_of(rows), 0, 1)
    assert torch.equal(change(rows, IDS), rows)
    assert exact_error(change, table_of(rows).moments) == 0


# ---- refusals ------------------------------------------------------------------------------------------------------

REFUSED = [
    *(
        (name, strength, f"{name} takes a number of dimensions from 0 to {D}, got {told}")
        for name, kind in PERTURBATIONS.items()
        if kind.unit == "dimensions"
        for strength, told in ((D + 1, "21"), (2.5, "2.5"))
    ),
    *(
        ("truncate", strength, f"truncate takes a number of dimensions from 0 to {D}, got {strength}")
        for strength in (-1, math.inf, math.nan)
    ),
    *(
        (name, strength, f"{name} takes standard deviations from 0 on, got {told}")
        for name in ("noise", "shift")
        for strength, told in ((-0.5, "-0.5"), (math.inf, "inf"), (math.nan, "nan"))
    ),
    *(
        ("quantise", strength, f"quantise takes a number of bits from 2 to 16, got {told}")
        for strength, told in ((1, "1"), (17, "17"), (4.5, "4.5"), (math.inf, "inf"), (math.nan, "nan"))
    ),
    ("scale", math.inf, "scale takes a finite number, got inf"),
    ("scale", math.nan, "scale takes a finite number, got nan"),
    ("rotate", math.inf, "rotate takes a finite number, got inf"),
]


@pytest.mark.parametrize(("name", "strength", "message"), REFUSED)
def test_a_strength_out_of_range_is_refused_with_the_range(name, strength, message):
    table = table_of(rows_of())
    for refused in (
        lambda: check_strength(name, strength, D),
        lambda: make_map(name, table, strength),
        lambda: make_chain([("scale", 2), (name, strength)], table),
    ):
        with pytest.raises(InvalidArgument) as caught:
            refused()
        assert str(caught.value) == message


def test_strengths_at_the_ends_of_the_range_are_taken():
    for name, kind in PERTURBATIONS.items():
        ends = {"dimensions": (0, D), "standard deviations": (0, 1e6), "bits": (2, 16), "factor": (-1e6, 0), "": (0,)}
        for strength in ends[kind.unit]:
            check_strength(name, strength, D)
            assert bool(torch.isfinite(make_map(name, table_of(rows_of()), strength)(rows_of(), IDS)).all())


def test_an_unknown_name_is_told_all_that_there_are():
    for refused in (
        lambda: find_perturbation("shrink"),
        lambda: check_strength("shrink", 1, D),
        lambda: make_chain([("project", 3), ("shrink", 1)], table_of(rows_of())),
    ):
        with pytest.raises(InvalidArgument) as caught:
            refused()
        assert str(caught.value) == f"a perturbation is one of {', '.join(PERTURBATIONS)}, got 'shrink'"
    assert all(find_perturbation(name).name == name for name in PERTURBATIONS)


def test_the_steps_of_a_chain_draw_from_streams_of_their_own():
    rows = rows_of(n=4000)
    table = table_of(rows)
    twice = make_chain([("noise", 1), ("noise", 1)], table, seed=3)(rows, torch.arange(len(rows))) - rows
    # 4,000 x 24 independent numbers: the root mean square is known to 0.2%.
    assert float(twice.square().mean().sqrt()) == pytest.approx(2**0.5 * table.std, rel=0.02)
    change = make_chain([("project", D // 2), ("project", D // 2)], table, seed=3)
    assert exact_error(change, table.moments) > 1.05 * exact_error(make_map("project", table, D // 2, 3), table.moments)
    assert step_seed(3, 0) == 3
