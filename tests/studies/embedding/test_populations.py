"""Trained rows, all rows, one row per group of copies: numbers against tables from which the rows were really taken."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

import dimscope
from dimscope.geometry import metrics
from dimscope.studies.embedding.context import copy_ids
from dimscope.studies.embedding.populations import untrained_ids
from dimscope.studies.embedding.source import open_source
from dimscope.studies.study import StudyResult


@pytest.fixture(scope="module")
def result() -> StudyResult:
    return dimscope.embedding("builtin", knn_sample=50, first_ids=10, permutations=1)


def numbers(result: StudyResult, table: str, rows: str, preprocess: str = "centred") -> dict[str, float]:
    frame = result.tables[table].filter(rows=rows, preprocess=preprocess)
    return dict(frame.select("metric", "value").iter_rows())


def test_the_trained_rows_of_the_builtin_model_use_far_more_dimensions(result: StudyResult) -> None:
    source = open_source(dimscope.open("builtin"))
    left = sorted(set(range(4224)) - set(untrained_ids(source)))
    rows = source.table.rows(torch.tensor(left))
    trained, whole = numbers(result, "dimensions", "trained"), numbers(result, "dimensions", "all")
    oracle = dimscope.dimensions(rows.numpy())
    for measure in oracle.values():
        assert trained[measure.metric] == pytest.approx(measure.value, rel=1e-6)
    assert trained[metrics.PARTICIPATION_RATIO] > 70 > 20 > whole[metrics.PARTICIPATION_RATIO]
    norms = numbers(result, "measures", "trained", "uncentred")
    assert norms[metrics.MEAN_NORM] == pytest.approx(float(rows.double().norm(dim=1).mean()), rel=1e-6)


def test_the_trained_rows_lead_and_their_influence_is_stated(result: StudyResult) -> None:
    n = result.tables["dimensions"].filter(rows="trained")["n_tokens"][0]
    assert f"the {n:,} trained rows of the embedding table, centred, is 78" in result.summary().answer
    sections = {s.anchor: s for s in result.study.load().make_sections(result.tables, result.facts)}
    assert sections["dimensions"].findings == (
        f"{4224 - n} untrained rows move the participation ratio from 78.4 to 16.6.",
    )
    influence = dict(result.tables["influence"].select("left_out", "value").iter_rows())
    assert influence["untrained"] == pytest.approx(
        numbers(result, "dimensions", "trained")[metrics.PARTICIPATION_RATIO]
    )


def test_one_row_per_group_of_copies() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 8))
    rows[200:] = rows[0] * 5  # a hundred copies of one long row
    rows[0] = rows[0] * 5
    result = dimscope.embedding(rows, knn_sample=20, permutations=1)
    assert copy_ids(result.tables["duplicates"]) == list(range(200, 300))
    distinct, oracle = numbers(result, "dimensions", "distinct"), dimscope.dimensions(rows[:200])
    assert distinct[metrics.PARTICIPATION_RATIO] == pytest.approx(oracle["participation_ratio"].value, rel=1e-6)
    assert numbers(result, "dimensions", "all")[metrics.PARTICIPATION_RATIO] < 3
    assert result.tables["influence"].select("left_out", "n_tokens").rows() == [("copies", 100)]
    assert set(result.tables["dimensions"]["rows"]) == {"all", "distinct"}


def test_directions_above_chance_are_counted_where_rows_differ_in_norm() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(2000, 48)) * np.exp(0.7 * rng.normal(size=(2000, 1)))
    directions = np.linalg.qr(rng.normal(size=(48, 4)))[0]
    planted = noise + rng.normal(size=(2000, 4)) * 8 @ directions.T
    for rows, expected in ((noise, 0), (planted, 4)):
        result = dimscope.embedding(rows, knn_sample=20, permutations=1)
        assert numbers(result, "measures", "all")[metrics.DIRECTIONS_ABOVE_CHANCE] == expected
        title = next(
            s.title for s in result.study.load().make_sections(result.tables, result.facts) if s.anchor == "spectrum"
        )
        assert title.startswith("None of 48" if expected == 0 else "4 of 48")


def test_excluded_rows_are_in_no_population() -> None:
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(100, 6))
    rows[5] = np.nan
    result = dimscope.embedding(rows, skip_nonfinite=True, knn_sample=20, permutations=1)
    assert set(result.tables["dimensions"]["n_tokens"]) == {99}
    assert result.tables["measures"].filter(pl.col("value").is_nan()).is_empty()
