"""Errors measured on rows: numpy's on the same rows, a standard error that is the spread of samples, and norms that forgive."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import PROPERTY, gaussian, table_without
from transformers import AutoModelForCausalLM

from dimscope.activations.first_norm import first_norm
from dimscope.interventions.maps import GaussianNoise, LinearMap
from dimscope.interventions.perturbations import make_map
from dimscope.interventions.row_errors import Ratio, row_errors, token_errors
from dimscope.interventions.table_summary import TableSummary, make_chain
from dimscope.vectors.moments import moments
from dimscope.vectors.table import BLOCK, table_from_tensor

N, D = 240, 16
IDS = torch.arange(N)
CHAINS = [
    [("truncate", 6)],
    [("shift", 0.7)],
    [("noise", 0.4)],
    [("quantise", 4)],
    [("project", 9), ("quantise", 3)],
]


def rows_of(n: int = N, d: int = D, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return rows with a mean, whose norms are spread over a factor of ten."""
    lengths = torch.exp(0.4 * gaussian(n, 1, seed + 100, torch.float64))
    return ((gaussian(n, d, seed, torch.float64) * torch.linspace(2, 0.3, d) + 0.3) * lengths).to(dtype)


def change_of(steps, rows: torch.Tensor):
    return make_chain(steps, TableSummary(moments([rows], dtype=torch.float64)), 1)


def ratio(before: np.ndarray, after: np.ndarray) -> float:
    return np.linalg.norm(before - after) / np.linalg.norm(before)


def numbers(rows: torch.Tensor) -> np.ndarray:
    return rows.double().numpy()


# ---- on a sample of rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("steps", CHAINS, ids=str)
def test_the_errors_of_all_rows_are_numpys(steps, dtype):
    rows = rows_of()
    change = change_of(steps, rows)
    found = row_errors(rows, IDS, change, dtype, torch.nn.RMSNorm(D, eps=0, dtype=dtype))
    before, after = numbers(rows), numbers(change(rows, IDS))
    assert found.n == N
    assert found.plain.value == pytest.approx(ratio(before, after), rel=1e-12)
    stored, cast = numbers(rows.to(dtype)), numbers(change(rows, IDS).to(dtype))
    assert found.cast.value == pytest.approx(ratio(before, cast), rel=1e-12)
    cosines = (before * after).sum(axis=1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    assert found.cosine == pytest.approx(cosines.mean(), rel=1e-12)
    # the norm is computed in the dtype of the model: within a few of its units, of numbers of order 1
    normed = [x / np.sqrt((x**2).mean(axis=1, keepdims=True)) for x in (stored, cast)]
    assert found.normed.value == pytest.approx(ratio(*normed), abs=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("steps", CHAINS, ids=str)
def test_the_standard_error_is_that_of_the_jackknife(steps):
    """To 5%: both are first order in 1 / n."""
    rows = rows_of()
    change = change_of(steps, rows)
    before, after = numbers(rows), numbers(change(rows, IDS))
    kept = [np.arange(N) != left_out for left_out in range(N)]
    values = np.array([ratio(before[k], after[k]) for k in kept])
    expected = math.sqrt((N - 1) / N * ((values - values.mean()) ** 2).sum())
    assert row_errors(rows, IDS, change, torch.float32).plain.stderr == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("steps", [[("truncate", 6)], [("shift", 0.7)]], ids=str)
def test_the_spread_over_samples_of_rows_is_the_standard_error(steps):
    """600 samples tell a spread to 3%; 15% leaves room for the bias of a sample of 300 rows of unequal length."""
    rows = rows_of(20_000)
    change = change_of(steps, rows)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(600):
        ids = torch.randint(len(rows), (300,), generator=generator)
        found.append(row_errors(rows[ids], ids, change, torch.float32).plain)
    values, stderrs = np.array([r.value for r in found]), np.array([r.stderr for r in found])
    assert values.std() == pytest.approx(stderrs.mean(), rel=0.15)
    whole = ratio(numbers(rows), numbers(change(rows, torch.arange(len(rows)))))
    assert values.mean() == pytest.approx(whole, abs=5 * values.std() / math.sqrt(600) + 0.02 * whole)
    inside = np.abs(values - whole) < 2 * stderrs
    assert 0.85 < inside.mean() < 0.99  # 95% of a normal one


@PROPERTY
@given(factor=st.floats(-3, 3), size=st.floats(1e-6, 1e6))
def test_neither_the_size_of_a_table_nor_that_of_a_ratio_matters(factor, size):
    """A scale has the same relative error on every row, so a sample tells it without error."""
    rows = rows_of() * size
    found = row_errors(rows, IDS, LinearMap(torch.eye(D, dtype=torch.float64) * factor), torch.float32).plain
    # The change is made in float32: 6e-8 of a row's numbers, not of their difference.
    assert found.value == pytest.approx(abs(factor - 1), rel=1e-5, abs=1e-7)
    assert found.stderr <= 1e-6 * max(found.value, 0.1)


def test_rounding_to_bfloat16_is_the_error_of_the_identity():
    """Numbers even in their logarithm over [1, 2): E x^2 = 3 / (2 ln 2), an error even over +-2^-8 has a third of its square.

    9,600 squares of relative spread 0.9 tell the root to 0.5%.
    """
    draws = torch.rand(600, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = (2**draws * torch.where(gaussian(600, D, 3) > 0, 1.0, -1.0)).float()
    nothing = LinearMap(torch.eye(D, dtype=torch.float64))
    found = row_errors(rows, torch.arange(600), nothing, torch.bfloat16)
    assert found.plain == Ratio(0.0, 0.0)
    assert found.cast.value == pytest.approx(2**-8 / math.sqrt(3) / math.sqrt(3 / (2 * math.log(2))), rel=0.025)
    assert found.cosine == pytest.approx(1, abs=1e-12)
    exact = row_errors(rows.bfloat16().float(), torch.arange(600), nothing, torch.bfloat16)
    assert exact.cast == Ratio(0.0, 0.0)
    assert row_errors(rows, torch.arange(600), nothing, torch.float32).cast == Ratio(0.0, 0.0)


def test_rows_of_zeros_alone_have_no_error_to_tell():
    found = row_errors(torch.zeros(5, D), torch.arange(5), GaussianNoise(1.0, 0), torch.float32)
    assert found.plain == found.cast == Ratio(0.0, 0.0)


# ---- after a norm --------------------------------------------------------------------------------------------------


def scaled(factor: float) -> LinearMap:
    return LinearMap(torch.eye(D, dtype=torch.float64) * factor)


@pytest.mark.parametrize("factor", [0.3, 4.0, 1e-3])
def test_a_scale_is_nothing_after_a_norm_of_the_rows(factor):
    """To rounding in float32: 1.2e-7 a number."""
    rows = rows_of()
    for norm in (torch.nn.RMSNorm(D, eps=0), torch.nn.LayerNorm(D, eps=0)):
        found = row_errors(rows, IDS, scaled(factor), torch.float32, norm)
        assert found.normed.value < 1e-6
        assert found.plain.value == pytest.approx(abs(1 - factor), rel=1e-6)


def test_a_change_of_sign_is_twice_a_row_after_a_norm():
    found = row_errors(rows_of(), IDS, scaled(-0.3), torch.float32, torch.nn.RMSNorm(D, eps=0))
    assert found.normed.value == pytest.approx(2, rel=1e-6)
    assert found.normed.stderr < 1e-6
    assert found.cosine == pytest.approx(-1)


def test_the_same_number_added_everywhere_is_nothing_after_a_layer_norm_alone():
    added = LinearMap(torch.eye(D, dtype=torch.float64), None, torch.full((D,), 0.7, dtype=torch.float64))
    layer = row_errors(rows_of(), IDS, added, torch.float32, torch.nn.LayerNorm(D, eps=0))
    assert layer.normed.value < 2e-6  # numbers of up to 60 are rounded before their mean of 0.3 is taken off
    root = row_errors(rows_of(), IDS, added, torch.float32, torch.nn.RMSNorm(D, eps=0))
    assert root.normed.value > 0.1


def test_without_a_norm_there_is_no_error_after_it():
    assert row_errors(rows_of(), IDS, scaled(2), torch.float32).normed is None


def test_the_first_norm_of_a_model_gets_the_rows_in_the_dtype_of_the_model(checkpoint):
    """A layer norm in bfloat16 takes no other rows; the error is numpy's, to the rounding of that format."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("gpt2"), dtype=torch.bfloat16)
    norm = first_norm(model)
    with torch.no_grad():
        weight, bias = gaussian(1, 32, 1)[0], gaussian(1, 32, 2)[0]
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    rows = model.get_input_embeddings().weight.detach()
    change, ids = change_of([("truncate", 20)], rows), torch.arange(len(rows))
    found = row_errors(rows, ids, change, torch.bfloat16, norm)
    normed = []
    for x in (numbers(rows), numbers(change(rows.float(), ids).bfloat16())):
        around = x - x.mean(axis=1, keepdims=True)
        rooted = around / np.sqrt((around**2).mean(axis=1, keepdims=True) + norm.eps)
        normed.append(rooted * norm.weight.detach().double().numpy() + norm.bias.detach().double().numpy())
    assert found.normed.value == pytest.approx(ratio(*normed), rel=2**-7)
    assert found.normed.value > 0.1


# ---- token by token ------------------------------------------------------------------------------------------------


def by_numpy(rows: torch.Tensor, changed: torch.Tensor) -> dict[str, np.ndarray]:
    before, after = numbers(rows), numbers(changed)
    norms, errors = np.linalg.norm(before, axis=1), np.linalg.norm(before - after, axis=1)
    return {"norm": norms, "error": errors, "product": norms * np.linalg.norm(after, axis=1),
            "inner": np.einsum("nd,nd->n", before, after)}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("steps", CHAINS, ids=str)
def test_the_error_of_every_token_is_numpys_whatever_the_blocks(steps, dtype):
    """Over two blocks and a half; the rows are changed at once here, and in float32 a block's products round otherwise."""
    n = 2 * BLOCK + BLOCK // 2 if steps != [("noise", 0.4)] else BLOCK + 50  # noise draws token by token
    rows = rows_of(n, 4, dtype=dtype)
    change = change_of(
        [(name, min(strength, 2) if name in ("truncate", "project") else strength) for name, strength in steps], rows
    )
    found = token_errors(table_from_tensor(rows), change)
    wide = rows if dtype == torch.float64 else rows.float()
    expected = by_numpy(wide, change(wide, torch.arange(n)))
    assert found.schema == {"id": pl.Int64, "norm": pl.Float64, "error": pl.Float64, "cosine": pl.Float64}
    assert found["id"].to_list() == list(range(n))
    np.testing.assert_allclose(found["norm"].to_numpy(), expected["norm"], rtol=1e-12)
    limit = 1e-6 * expected["norm"]
    assert bool((np.abs(found["error"].to_numpy() - expected["error"]) <= limit).all())
    # rows that 3 bits round to nothing have none
    known = expected["product"] > 0
    assert (found["cosine"].is_null().to_numpy() == ~known).all()
    cosines = expected["inner"][known] / expected["product"][known]
    np.testing.assert_allclose(found["cosine"].drop_nulls().to_numpy(), cosines, rtol=0, atol=1e-6)


def test_rows_of_zeros_before_or_after_have_no_cosine():
    rows = torch.tensor([[0.0, 0.0], [0.0, 3.0], [4.0, 3.0], [1.0, 0.0]])
    first = LinearMap(torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    found = token_errors(table_from_tensor(rows), first)
    assert found["norm"].to_list() == [0, 3, 5, 1]
    assert found["error"].to_list() == [0, 3, 3, 0]
    assert found["cosine"].to_list() == [None, None, pytest.approx(0.8), 1]


def test_a_row_of_zeros_that_is_moved_has_an_error_and_no_cosine():
    moved = LinearMap(torch.eye(2, dtype=torch.float64), None, torch.tensor([3.0, 4.0], dtype=torch.float64))
    found = token_errors(table_from_tensor(torch.zeros(1, 2)), moved)
    assert found.rows() == [(0, 0.0, 5.0, None)]


def test_rows_that_do_not_take_part_are_left_out():
    rows = rows_of(12, 4)
    change = change_of([("noise", 0.3)], rows)
    some = token_errors(table_without(rows, {0, 5, 11}), change)
    assert some["id"].to_list() == [i for i in range(12) if i not in (0, 5, 11)]
    everything = token_errors(table_from_tensor(rows), change)
    assert some.equals(everything.filter(pl.col("id").is_in(some["id"].to_list())))


def test_the_errors_of_all_tokens_add_up_to_that_of_the_sample_of_all():
    rows = rows_of()
    change = change_of([("truncate", 6)], rows)
    tokens = token_errors(table_from_tensor(rows), change)
    whole = row_errors(rows, IDS, change, torch.float32)
    squares = tokens.select(pl.col("error", "norm").pow(2).sum())
    assert whole.plain.value == pytest.approx(math.sqrt(squares["error"][0] / squares["norm"][0]), rel=1e-10)
    assert whole.cosine == pytest.approx(tokens["cosine"].mean(), rel=1e-10)


def test_a_map_by_name_has_the_error_that_theory_has_for_it():
    rows = rows_of(4000)
    table = TableSummary(moments([rows], dtype=torch.float64))
    found = row_errors(rows, torch.arange(4000), make_map("shift", table, 0.5, 2), torch.float32)
    expected = 0.5 * table.std * math.sqrt(rows.numel()) / table.norm
    assert found.plain.value == pytest.approx(expected, rel=1e-5)  # float32 rows plus a vector of their size
