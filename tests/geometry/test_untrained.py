"""Untrained rows of every kind and mixture are found, and nothing is flagged where there are none."""

import itertools
import math

import numpy as np
import pytest
import torch
from matrices import gaussian, table_without

from dimscope.geometry import untrained_groups
from dimscope.geometry.untrained import FEWEST_SEED, SHORT, ZERO, untrained_scores
from dimscope.geometry.untrained_groups import ALIKE
from dimscope.vectors.table import table_from_tensor

N, D = 2000, 64
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
    np.testing.assert_allclose(scaled.scores, found.scores, atol=1e-3)  # products are in float32
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    moved = untrained_scores(table_from_tensor(x[order]), torch.argsort(order)[SEED])
    np.testing.assert_array_equal(moved.flagged, found.flagged[order.numpy()])


def gaussian_rows(d, seed):
    return gaussian(N, d, seed)


def lognormal_norms(d, seed):
    return gaussian(N, d, seed) * torch.exp(0.5 * gaussian(N, 1, seed + 100))


def frequent_are_long(d, seed):
    """Norms fall with the logarithm of the rank, as they do with the frequency of tokens."""
    return gaussian(N, d, seed) * (1 + 0.25 * torch.arange(1, N + 1).log())[:, None]


def clusters(d, seed):
    """20 clusters of about 100 rows, as tight as rows that were pushed together."""
    return gaussian(20, d, seed)[torch.arange(N) * 7919 % 20] + 0.05 * gaussian(N, d, seed + 100)


def heavy_tails(d, seed):
    """Coordinates of Student's t distribution with 3 degrees of freedom."""
    return gaussian(N, d, seed) / gaussian(3 * N, d, seed + 100).view(3, N, d).square().mean(dim=0).sqrt()


def heavy_norms(d, seed):
    """Rows of a multivariate t distribution with 3 degrees of freedom."""
    return gaussian(N, d, seed) / gaussian(N, 3, seed + 100).square().mean(dim=1, keepdim=True).sqrt()


def pushed(n, d, seed):
    return gaussian(1, d, 999) + 0.05 * gaussian(n, d, seed)


def equal(n, d, seed):
    return gaussian(1, d, 999).expand(n, d)


def zero(n, d, seed):
    return torch.zeros(n, d)


def tiny(n, d, seed):
    return 1e-3 * gaussian(n, d, seed)


def initial(n, d, seed):
    return 0.2 * gaussian(n, d, seed)


def initial_half(n, d, seed):
    """Initial values half as long as the trained rows."""
    return 0.5 * gaussian(n, d, seed)


def plant(x, kinds, n_seed, seed, n_hidden):
    """Return a table with untrained rows of these kinds in turn, the ids of the seed rows and of all untrained rows.

    The rows are scaled to the median norm of the table, whose coordinates then have a standard deviation of about 1.
    """
    x = x.clone() * math.sqrt(x.shape[1]) / x.norm(dim=1).median()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed + 50))
    seeds, hidden = order[:n_seed].sort().values, order[n_seed : n_seed + n_hidden]
    for ids in (seeds, hidden):
        for i, kind in enumerate(kinds):
            x[ids[i :: len(kinds)]] = kind(len(ids[i :: len(kinds)]), x.shape[1], seed + 200 + i)
    return x, seeds, torch.cat([seeds, hidden])


def recall_and_precision(x, seeds, untrained):
    flagged = torch.from_numpy(untrained_scores(table_from_tensor(x), seeds).flagged)
    true = flagged[untrained].double()
    return float(true.mean()), float(true.sum()) / max(int(flagged.sum()), 1)


ALONE = [(pushed,), (equal,), (zero,), (tiny,), (initial,)]
MIXTURES = [*itertools.combinations((pushed, zero, tiny, initial), 2)]
ALL = (pushed, zero, tiny, initial)
PLANTINGS = [
    *((gaussian_rows, kinds, n) for kinds in [*ALONE, *MIXTURES] for n in (0, 2, 100)),
    *((gaussian_rows, kinds, n) for kinds in [ALL] for n in (10, 100)),
    *((gaussian_rows, kinds, 100) for kinds in [(initial_half,), (pushed, initial_half), (zero, initial_half)]),
    *((rows, (pushed, tiny), n) for rows in (lognormal_norms, heavy_tails, heavy_norms) for n in (0, 2)),
    *((rows, ALL, 100) for rows in (clusters, heavy_tails, heavy_norms, frequent_are_long)),
]  # fmt: skip


def _names(value):
    return "-".join(kind.__name__ for kind in value) if isinstance(value, tuple) else getattr(value, "__name__", None)


@pytest.mark.parametrize(("rows", "kinds", "n_seed"), PLANTINGS, ids=_names)
def test_planted_rows_are_found(rows, kinds, n_seed):
    for seed, (d, n_hidden) in enumerate([(64, 40), (128, 5 * len(kinds))]):
        recall, precision = recall_and_precision(*plant(rows(d, seed), kinds, n_seed, seed, n_hidden))
        assert recall >= 0.95
        assert precision >= 0.98


@pytest.mark.parametrize("n_seed", [0, 2, 10, 100])
@pytest.mark.parametrize(
    "rows",
    [gaussian_rows, lognormal_norms, frequent_are_long, clusters, heavy_tails, heavy_norms],
    ids=_names,
)
def test_trained_rows_in_place_of_seed_rows_raise_no_alarm(rows, n_seed):
    for seed in range(2):
        x, seeds, _ = plant(rows(D, seed), (), n_seed, seed, 0)
        assert untrained_scores(table_from_tensor(x), seeds).flagged.mean() <= 0.001


@pytest.mark.parametrize(("d", "n_seed"), [(16, 3), (16, 200), (64, 20), (256, 5), (512, 3)])
def test_in_a_random_table_nothing_is_flagged(d, n_seed):
    """Rows that a mean is fitted on must not lie near it for that reason alone."""
    for seed in range(2):
        found = untrained_scores(table_from_tensor(gaussian(1000, d, seed)), torch.arange(n_seed) * 5)
        assert not found.flagged.any()
        assert found.threshold is None
        assert np.median(found.scores) == pytest.approx(1, rel=0.02)


def test_rows_are_not_flagged_where_most_of_a_ball_is_trained():
    """Initial values as long as many trained rows: a ball around them would flag hundreds of trained rows."""
    x, seeds, _ = plant(heavy_norms(D, 0), (initial_half,), 100, 0, 40)
    assert untrained_scores(table_from_tensor(x), seeds).flagged.mean() <= 0.001


def test_the_sign_names_what_each_row_looks_like():
    x = gaussian(N, D)
    x[SEED] = pushed(len(SEED), D, 2)
    x[HIDDEN[:5]], x[HIDDEN[5:10]], x[HIDDEN[10:]] = pushed(5, D, 4), zero(5, D, 4), tiny(10, D, 4)
    found = untrained_scores(table_from_tensor(x), SEED)
    assert [found.signs[i] for i in HIDDEN] == [untrained_groups.SEED] * 5 + [ZERO] * 5 + [SHORT] * 10
    assert {found.signs[i] for i in np.nonzero(~found.flagged)[0]} == {""}
    assert found.median_norm == pytest.approx(math.sqrt(D), rel=0.02)


def test_nearly_equal_rows_are_named_as_such_without_seed_rows():
    x, _, untrained = plant(gaussian_rows(D, 0), (pushed,), 0, 0, 8)
    found = untrained_scores(table_from_tensor(x), torch.tensor([], dtype=torch.int64))
    assert {found.signs[i] for i in untrained} == {ALIKE}
    assert found.n_seed == 0


def test_scores_of_several_kinds_have_one_threshold_and_one_unit():
    x, seeds, _ = plant(gaussian_rows(D, 0), (pushed, initial_half), 40, 0, 40)
    found = untrained_scores(table_from_tensor(x), seeds)
    np.testing.assert_array_equal(found.flagged, found.scores <= found.threshold)
    assert np.median(found.scores[~found.flagged]) == pytest.approx(1, rel=1e-6)
    assert found.scores.min() >= 0


def test_a_huge_row_is_neither_short_nor_near_a_group():
    x = pushed_together()
    x[500] *= 1e19  # its square is beyond float32
    found = untrained_scores(table_from_tensor(x), SEED)
    assert np.nonzero(found.flagged)[0].tolist() == sorted([*SEED.tolist(), *HIDDEN.tolist()])
    assert np.isfinite(found.scores).all()


@pytest.mark.parametrize("ids", [[], [1], [1, 2]])
def test_too_few_seed_rows_say_nothing(ids):
    assert len(ids) < FEWEST_SEED
    found = untrained_scores(table_from_tensor(gaussian(N, D)), torch.tensor(ids, dtype=torch.int64))
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
