"""Untrained rows of every kind and mixture are found, and nothing is flagged where there are none."""

import functools
import math

import numpy as np
import pytest
import torch
from matrices import gaussian, table_without

import dimscope
from dimscope.geometry.seed_indicators import ALIKE, NEAR
from dimscope.geometry.untrained import MIN_SEED, SHORT, ZERO, untrained_scores
from dimscope.studies.embedding.source import open_source
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


def gaussian_rows(seed):
    return gaussian(N, D, seed)


def lognormal_norms(seed):
    return gaussian(N, D, seed) * torch.exp(0.5 * gaussian(N, 1, seed + 100))


def clusters(seed):
    """20 clusters of about 150 rows, as tight as rows that were pushed together."""
    return gaussian(20, D, seed)[torch.arange(N) * 7919 % 20] + 0.05 * gaussian(N, D, seed + 100)


def heavy_tails(seed):
    """Coordinates of Student's t distribution with 3 degrees of freedom."""
    return gaussian(N, D, seed) / gaussian(3 * N, D, seed + 100).view(3, N, D).square().mean(dim=0).sqrt()


def heavy_norms(seed):
    """Rows of a multivariate t distribution with 3 degrees of freedom."""
    return gaussian(N, D, seed) / gaussian(N, 3, seed + 100).square().mean(dim=1, keepdim=True).sqrt()


def trained_rows(seed):
    """The rows of the built-in model that training reached, in random order."""
    rows = builtin_rows()
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


@functools.cache
def builtin_rows():
    source = open_source(dimscope.open("builtin"))
    return source.loaded.rows[torch.from_numpy(source.untrained.scores > 0.4)]


def pushed(n, d, seed):
    return gaussian(1, d, 999) + 0.05 * gaussian(n, d, seed)


def zero(n, d, seed):
    return torch.zeros(n, d)


def tiny(n, d, seed):
    return 1e-3 * gaussian(n, d, seed)


def initial(n, d, seed):
    return 0.2 * gaussian(n, d, seed)


def initial_half(n, d, seed):
    """Initial values half as long as the trained rows: a ball around their centre would hold trained rows."""
    return 0.5 * gaussian(n, d, seed)


def plant(x, kinds, n_seed, seed, n_hidden=40):
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


ALL_NEAR_ZERO = [(zero,), (tiny,), (zero, tiny)]
MIXTURES = [(pushed, zero), (pushed, tiny), (pushed, initial), (initial, tiny), (pushed, zero, tiny, initial)]
ALONE = [(pushed,), (initial,), (initial_half,), (pushed, initial_half), (zero, initial_half)]
PLANTINGS = [
    *((gaussian_rows, kinds, n) for kinds in [*ALL_NEAR_ZERO, *ALONE, *MIXTURES] for n in (10, 300)),
    *((gaussian_rows, kinds, n) for kinds in ALL_NEAR_ZERO for n in (0, 3)),
    # Three seed rows: where two kinds need seed rows, one of them has a single row, which shows no scatter.
    *((gaussian_rows, kinds, 3) for kinds in [(pushed,), (initial,), (initial_half,), *MIXTURES[:2], MIXTURES[3]]),
    *((rows, (pushed, tiny), n) for rows in (lognormal_norms, clusters, heavy_tails, heavy_norms) for n in (3, 10, 300)),
    *((rows, MIXTURES[-1], 300) for rows in (clusters, heavy_tails, heavy_norms)),
    *((trained_rows, kinds, n) for kinds in [(initial,), MIXTURES[-1]] for n in (10, 300)),
]  # fmt: skip


def _names(value):
    return "-".join(kind.__name__ for kind in value) if isinstance(value, tuple) else getattr(value, "__name__", None)


@pytest.mark.parametrize(("rows", "kinds", "n_seed"), PLANTINGS, ids=_names)
def test_planted_rows_are_found(rows, kinds, n_seed):
    for seed in range(5):
        recall, precision = recall_and_precision(*plant(rows(seed), kinds, n_seed, seed))
        assert recall >= 0.95
        assert precision >= 0.98


@pytest.mark.parametrize("n_seed", [0, 3, 10, 300])
@pytest.mark.parametrize(
    "rows", [gaussian_rows, lognormal_norms, clusters, heavy_tails, heavy_norms, trained_rows], ids=_names
)
def test_trained_rows_in_place_of_seed_rows_raise_no_alarm(rows, n_seed):
    for seed in range(5):
        x, seeds, _ = plant(rows(seed), (), n_seed, seed)
        assert untrained_scores(table_from_tensor(x), seeds).flagged.mean() < 0.005


@pytest.mark.parametrize(("d", "n_seed"), [(16, 3), (16, 200), (64, 20), (256, 5), (512, 3)])
def test_in_a_random_table_nothing_is_flagged(d, n_seed):
    """In half as many rows as here there are 512 coordinates: directions that were fitted on a row must not favour it."""
    flagged = [
        int(untrained_scores(table_from_tensor(gaussian(1500, d, seed)), torch.arange(n_seed) * 7).flagged.sum())
        for seed in range(3)
    ]
    assert flagged == [0, 0, 0]


def test_initial_rows_as_long_as_trained_ones_are_found_by_direction():
    """Trained rows that share a mean and few directions differ from white noise of the same norm."""
    scale = torch.arange(1, D + 1) ** -0.7
    x = 2 * gaussian(N, D) * scale + gaussian(1, D, 3)
    x *= math.sqrt(D) / x.norm(dim=1, keepdim=True)
    rows = torch.cat([SEED, HIDDEN])
    x[rows] = gaussian(len(rows), D, 2)
    found = untrained_scores(table_from_tensor(x), SEED)
    assert np.nonzero(found.flagged)[0].tolist() == sorted(rows.tolist())
    assert {found.evidence[i] for i in rows} == {ALIKE}


def test_the_evidence_names_what_each_row_looks_like():
    x = gaussian(N, D)
    x[SEED] = pushed(len(SEED), D, 2)
    x[HIDDEN[:5]], x[HIDDEN[5:10]], x[HIDDEN[10:]] = pushed(5, D, 4), zero(5, D, 4), tiny(10, D, 4)
    found = untrained_scores(table_from_tensor(x), SEED)
    assert [found.evidence[i] for i in HIDDEN] == [NEAR] * 5 + [ZERO] * 5 + [SHORT] * 10
    assert {found.evidence[i] for i in np.nonzero(~found.flagged)[0]} == {""}
    assert found.median_norm == pytest.approx(math.sqrt(D), rel=0.02)


def test_scores_of_several_kinds_have_one_threshold_and_one_unit():
    x, seeds, _ = plant(gaussian_rows(0), (pushed, initial), 40, 0)
    found = untrained_scores(table_from_tensor(x), seeds)
    np.testing.assert_array_equal(found.flagged, found.scores <= found.threshold)
    assert np.median(found.scores[~found.flagged]) == pytest.approx(1, rel=1e-6)
    assert found.scores.min() >= 0


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
    found = untrained_scores(table_from_tensor(pushed_together()), torch.tensor(ids, dtype=torch.int64))
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
