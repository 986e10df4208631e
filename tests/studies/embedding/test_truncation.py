"""How many dimensions are needed: the table against scikit-learn, the answers on planted tables, and what the page says."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy.stats import t as student
from sklearn.neighbors import NearestNeighbors

import dimscope
from dimscope.geometry.metrics import NEIGHBOR_OVERLAP, SIMILARITY_CORRELATION
from dimscope.geometry.truncation import COORDINATES, DRAWS, PCA, ROTATION, TRUNCATION, sizes_of
from dimscope.page.section import Facts, Tables
from dimscope.studies.embedding.study import EMBEDDING
from dimscope.studies.embedding.truncation_answers import Needed, answer, curve, difference, needed
from dimscope.studies.embedding.truncation_sections import truncation_section

D, N = 16, 1200


def decaying(base: float, *, mixed: bool, seed: int = 0) -> np.ndarray:
    """Return rows whose directions shrink by a factor, along the coordinates or mixed by a random rotation."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(N, D)) * base ** np.arange(D)
    return rows @ np.linalg.qr(rng.normal(size=(D, D)))[0] if mixed else rows


def table_of(rows: np.ndarray) -> pl.DataFrame:
    return dimscope.embedding(rows, knn_sample=50, permutations=1, first_ids=10).tables["truncation"]


@pytest.fixture(scope="module")
def mixed() -> pl.DataFrame:
    return table_of(decaying(0.7, mixed=True))


def test_the_table_has_every_method_size_and_seed(mixed: pl.DataFrame) -> None:
    n_draws = {PCA: 1, TRUNCATION: 1, **DRAWS}
    counts = dict(mixed.group_by("method").len().iter_rows())
    assert counts == {method: 2 * len(sizes_of(D)) * n for method, n in n_draws.items()}
    assert mixed["value"].is_between(-1, 1).all()
    assert set(mixed.select("n_tokens", "neighbors", "candidates", "fitted").unique().row(0)) == {500, 10, 600}


def test_the_overlap_is_that_of_all_rows_within_its_error(mixed: pl.DataFrame) -> None:
    rows = decaying(0.7, mixed=True)[:600]
    index = {k: NearestNeighbors(n_neighbors=11, metric="cosine").fit(rows[:, :k]) for k in (8, D)}
    few, full = (index[k].kneighbors(rows[:, :k], return_distance=False)[:, 1:] for k in (8, D))
    expected = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(few, full, strict=True)])
    row = mixed.filter(method=TRUNCATION, metric=NEIGHBOR_OVERLAP, size=8).row(0, named=True)
    assert 0 < row["stderr"] < 0.02
    assert row["value"] == pytest.approx(expected, abs=5 * row["stderr"])  # other rows of the same distribution


@pytest.mark.parametrize("mix", [True, False], ids=["mixed", "ordered"])
def test_pca_is_recommended_where_it_gains_and_truncation_where_it_does_as_well(mix: bool) -> None:
    frame = table_of(decaying(0.7, mixed=mix))
    pca, cut, between = (
        difference(frame, *pair) for pair in ((PCA, ROTATION), (TRUNCATION, ROTATION), (PCA, TRUNCATION))
    )
    assert pca.more
    assert (cut.more, between.more) == (not mix, mix)
    sizes = [needed(frame, method, NEIGHBOR_OVERLAP, 0.9, D).size for method in (PCA, TRUNCATION)]
    assert sizes[0] <= 12
    assert (sizes[0] < sizes[1]) == mix


def test_nothing_is_clear_where_all_directions_are_alike() -> None:
    frame = table_of(decaying(1.0, mixed=False, seed=3))
    for pair in ((PCA, ROTATION), (TRUNCATION, ROTATION), (PCA, TRUNCATION)):
        assert not difference(frame, *pair).clear
    assert needed(frame, PCA, NEIGHBOR_OVERLAP, 0.95, D).size == D


def test_copies_of_rows_change_nothing_but_the_sample() -> None:
    rows = decaying(0.7, mixed=True)[:300]
    frame = table_of(np.concatenate([rows, rows, rows]))
    assert frame["candidates"][0] == 150


def test_too_few_rows_for_neighbours_give_no_section() -> None:
    result = dimscope.embedding(decaying(0.7, mixed=True)[:60])
    assert result.tables["truncation"].is_empty()
    assert "truncation" not in {
        section.anchor for section in EMBEDDING.load().make_sections(result.tables, result.facts)
    }
    assert result.summary().answer


# ---- answers -------------------------------------------------------------------------------------------------------


def planted(values: dict[int, float], stderr: float = 0.01) -> pl.DataFrame:
    rows = [(PCA, size, NEIGHBOR_OVERLAP, None, value, stderr, 101) for size, value in values.items()]
    columns = ["method", "size", "metric", "seed", "value", "stderr", "n_tokens"]
    return pl.DataFrame(rows, schema=columns, orient="row", schema_overrides={"seed": pl.Int64})


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({2: 0.5, 4: 0.95, 6: 0.99}, Needed(4, 4)),
        ({2: 0.5, 4: 0.91, 6: 0.99}, Needed(6, 4)),  # 0.91 may be 0.9 by noise
        ({2: 0.5, 4: 0.89, 6: 0.99}, Needed(6, 4)),
        ({2: 0.5, 4: 0.86, 6: 0.99}, Needed(6, 6)),
        ({2: 0.5, 4: 0.6, 6: 0.7}, Needed(8, 8)),
        ({2: 0.95, 4: 0.5, 6: 0.99}, Needed(6, 6)),  # a smaller size does not count where a larger one fails
        ({2: 0.99, 4: 0.91, 6: 0.99}, Needed(6, 2)),
    ],
)
def test_a_size_is_needed_from_which_on_all_reach_the_target_beyond_noise(
    values: dict[int, float], found: Needed
) -> None:
    assert needed(planted(values), PCA, NEIGHBOR_OVERLAP, 0.9, 8) == found


def test_the_margin_is_that_of_student_for_nine_statements() -> None:
    margin = 0.01 * float(student.ppf(1 - 0.05 / 9, 100))
    for excess, size in ((1e-6, 4), (-1e-6, 8)):
        assert needed(planted({4: 0.9 + margin + excess}), PCA, NEIGHBOR_OVERLAP, 0.9, 8).size == size


def test_a_method_differs_from_random_rotations_beyond_the_interval_of_one_more() -> None:
    draws = [0.5, 0.52, 0.49, 0.51, 0.53]
    spread = float(np.std(draws, ddof=1) * (1 + 1 / 5) ** 0.5 * student.ppf(1 - 0.05 / 6, 4))
    for excess, clear in ((1e-4, True), (-1e-4, False)):
        values = [
            (PCA, None, float(np.mean(draws)) + spread + excess),
            *((ROTATION, i, v) for i, v in enumerate(draws)),
        ]
        rows = [(method, 4, NEIGHBOR_OVERLAP, seed, value, 0.01, 101) for method, seed, value in values]
        frame = pl.DataFrame(rows, schema=planted({2: 0.5}).schema, orient="row")
        assert difference(frame, PCA, ROTATION).more == clear
        assert not difference(frame, PCA, ROTATION).fewer


def test_errors_over_draws_and_over_queries_add_up(tables: Tables) -> None:
    row = curve(tables["truncation"], ROTATION, SIMILARITY_CORRELATION).row(1, named=True)
    assert row["value"] == pytest.approx(0.6)
    assert row["stderr"] == pytest.approx((0.01**2 / 3 + 0.005**2) ** 0.5)
    assert row["degrees"] == 2


# ---- the page ------------------------------------------------------------------------------------------------------


def test_the_title_names_the_sizes_of_both_methods(tables: Tables, facts: Facts) -> None:
    both = "PCA and truncation both keep 90% of the 10 nearest neighbours of a row in 3 of 4 dimensions"
    assert answer(tables, 4, "row") == both
    frame, at = tables["truncation"], (pl.col("method") == TRUNCATION) & (pl.col("size") == 3)

    def with_truncation(value: float) -> Tables:
        return {"truncation": frame.with_columns(value=pl.when(at).then(value).otherwise("value"))}

    assert answer(with_truncation(0.9), 4, "row").endswith("in 3 of 4 dimensions, truncation may need all")
    assert answer(with_truncation(0.8), 4, "row").endswith("in 3 of 4 dimensions, truncation needs more than 3")
    swapped = {
        "truncation": with_truncation(0.8)["truncation"].with_columns(
            pl.col("method").replace({PCA: TRUNCATION, TRUNCATION: PCA})
        )
    }
    assert answer(swapped, 4, "row").startswith("Truncation keeps 90% of the 10 nearest neighbours of a row in 3 of 4")
    for factor, verb in ((0.5, "keeps"), (0.9 / 0.97, "is certain to keep")):
        none = {"truncation": frame.with_columns(value=pl.col("value") * factor)}
        start = f"With up to 3 of 4 dimensions, neither PCA nor truncation {verb} 90%"
        assert answer(none, 4, "row").startswith(start)
    assert answer({}, 4, "row") == ""


def test_the_figures_end_at_all_dimensions_and_the_grid_at_what_is_needed(tables: Tables, facts: Facts) -> None:
    section = truncation_section(tables, facts)
    assert section is not None
    overlap, grid, _ = section.blocks
    curves = {trace.name: trace for trace in overlap.figure.data if trace.name}
    assert set(curves) == {"PCA", "truncation (first coordinates)", COORDINATES, ROTATION}
    assert list(curves["PCA"].x) == [1, 2, 3, 4]
    assert list(curves["PCA"].y) == [0.5, 0.85, 0.97, 1.0]
    assert [row[:2] for row in grid.rows] == [
        ("PCA", "3"),
        ("truncation (first coordinates)", "3"),
        (ROTATION, "all (perhaps 3)"),
    ]
    assert truncation_section({}, facts) is None


def test_vectors_have_the_answer_in_summary_and_head(tables: Tables, facts: Facts) -> None:
    vectors, code = replace(facts, n_parameters=None), EMBEDDING.load()
    assert "of a row in 3 of 4 dimensions." in code.summarise(tables, vectors).answer
    assert "nearest neighbours" not in code.summarise(tables, facts).answer
    assert ("dimensions for neighbours", "3") in {row[:2] for row in code.highlights(tables, vectors)}
