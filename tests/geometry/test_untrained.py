"""Untrained rows of three kinds are found, and nothing is flagged where there are none."""

import math

import numpy as np
import pytest
import torch
from matrices import gaussian, table_without

from dimscope.geometry.untrained import MIN_SEED, untrained_scores
from dimscope.vectors.table import table_from_tensor

N, D = 3000, 64
SEED = torch.arange(0, 120, 3)  # 40 rows that cannot have been trained
HIDDEN = torch.arange(1000, 1020)  # 20 tokens of the tokenizer that nobody trained either


def near_zero():
    """Untrained rows shrank under weight decay."""
    x = gaussian(N, D)
    rows = torch.cat([SEED, HIDDEN])
    x[rows] *= 1e-3
    return x


def frozen():
    """Untrained rows keep an initial value of standard deviation 0.02; the others grew."""
    x = (
        gaussian(N, D)
        * torch.linspace(0.3, 1, N)[torch.randperm(N, generator=torch.Generator().manual_seed(1))][:, None]
    )
    rows = torch.cat([SEED, HIDDEN])
    x[rows] = 0.02 * gaussian(len(rows), D, 2)
    return x


def pushed_together():
    """A tied softmax pushed them all the same way, away from the others and to a norm like theirs."""
    x = gaussian(N, D)
    rows = torch.cat([SEED, HIDDEN])
    x[rows] = gaussian(1, D, 3) + 0.05 * gaussian(len(rows), D, 2)
    return x


KINDS = [near_zero, frozen, pushed_together]


@pytest.mark.parametrize(
    ("make", "dtype"),
    [*((make, torch.float32) for make in KINDS), (frozen, torch.float16), (near_zero, torch.bfloat16)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_untrained_rows_are_found_and_no_others(make, dtype):
    found = untrained_scores(table_from_tensor(make().to(dtype)), SEED)
    assert found.n_seed == len(SEED)
    assert found.threshold is not None
    assert np.nonzero(found.flagged)[0].tolist() == sorted([*SEED.tolist(), *HIDDEN.tolist()])
    assert np.median(found.scores[~found.flagged]) == pytest.approx(1, rel=0.02)
    assert found.scores[HIDDEN].max() < 0.1 < found.scores[~found.flagged].min()
    np.testing.assert_array_equal(found.flagged, found.scores <= found.threshold)


@pytest.mark.parametrize("make", KINDS)
def test_trained_rows_among_the_seed_do_not_move_the_centroid(make):
    """Chat tokens, say: a quarter of the seed rows are long, and all on the same side."""
    x = make()
    x[SEED[::4]] = 3 * gaussian(len(SEED[::4]), D, 9) + 6
    found = untrained_scores(table_from_tensor(x), SEED)
    flagged = set(np.nonzero(found.flagged)[0].tolist())
    assert flagged == set(SEED.tolist()) - set(SEED[::4].tolist()) | set(HIDDEN.tolist())


@pytest.mark.parametrize("make", KINDS)
def test_scores_ignore_scale_and_rows_can_be_in_any_order(make):
    x = make()
    found = untrained_scores(table_from_tensor(x), SEED)
    scaled = untrained_scores(table_from_tensor(x * 40), SEED)
    np.testing.assert_allclose(scaled.scores, found.scores, rtol=1e-5)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    moved = untrained_scores(table_from_tensor(x[order]), torch.argsort(order)[SEED])
    np.testing.assert_array_equal(moved.flagged, found.flagged[order.numpy()])


@pytest.mark.parametrize(("d", "n_seed"), [(16, 3), (16, 200), (64, 20), (256, 5), (512, 3)])
def test_in_a_random_table_nothing_is_flagged(d, n_seed):
    """Seed rows lie nearer to their own centroid than others do; with few of them, that alone must not convict."""
    flagged = [
        int(untrained_scores(table_from_tensor(gaussian(1500, d, seed)), torch.arange(n_seed) * 7).flagged.sum())
        for seed in range(3)
    ]
    assert flagged == [0, 0, 0]


def test_rows_close_to_seed_rows_that_are_all_equal_are_flagged():
    """Seed rows without any scatter still have a neighbourhood: a tenth of an ordinary row's distance."""
    x = gaussian(N, D)
    x[SEED] = 0
    x[HIDDEN] *= 0.05
    found = untrained_scores(table_from_tensor(x), SEED)
    assert np.nonzero(found.flagged)[0].tolist() == sorted([*SEED.tolist(), *HIDDEN.tolist()])


@pytest.mark.parametrize("ids", [[], [1], [1, 2]])
def test_too_few_seed_rows_say_nothing(ids):
    assert len(ids) < MIN_SEED
    found = untrained_scores(table_from_tensor(near_zero()), torch.tensor(ids, dtype=torch.int64))
    assert found.scores is None
    assert found.threshold is None
    assert found.n_seed == len(ids)
    assert found.flagged.tolist() == [False] * N


@pytest.mark.parametrize("x", [torch.zeros(10, 4), torch.ones(10, 4)], ids=["zeros", "ones"])
def test_a_table_of_equal_rows_has_no_scores(x):
    found = untrained_scores(table_from_tensor(x), torch.arange(4))
    assert found.scores is None
    assert not found.flagged.any()


def test_a_table_of_seed_rows_only_has_no_scores():
    found = untrained_scores(table_from_tensor(gaussian(6, 4)), torch.arange(6))
    assert found.scores is None
    assert not found.flagged.any()


@pytest.mark.parametrize("make", KINDS)
def test_excluded_rows_have_no_score(make):
    x = make()
    excluded = {1, 1005, N - 1}
    x[list(excluded)] = math.nan
    found = untrained_scores(table_without(x, excluded), SEED)
    kept = [i for i in range(N) if i not in excluded]
    assert len(found.scores) == len(found.flagged) == len(kept)
    assert np.isfinite(found.scores).all()
    assert {kept[i] for i in np.nonzero(found.flagged)[0]} == {*SEED.tolist(), *HIDDEN.tolist()} - excluded


def test_the_table_is_left_as_it_was():
    x, ids = near_zero(), SEED.clone()
    before = x.clone()
    untrained_scores(table_from_tensor(x), ids)
    assert torch.equal(x, before)
    assert torch.equal(ids, SEED)
