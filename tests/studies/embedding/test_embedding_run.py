"""The embedding study as a whole, on models in folders and on vectors, against numbers computed with numpy and scipy."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.spatial.distance import pdist
from scipy.stats import skew, spearmanr

import dimscope
from dimscope.errors import InvalidArgument, NonFiniteRows
from dimscope.geometry import metrics
from dimscope.storage import MemoryStore, ResultFolder
from dimscope.studies.embedding.facts import embedding_facts
from dimscope.studies.embedding.run import run_embedding
from dimscope.studies.embedding.settings import EmbeddingSettings
from dimscope.studies.study import SILENT, StudyResult
from dimscope.vectors.sources import vectors_of

N, D = 400, 12
VOCABULARY_SECTIONS = {"budget", "first-ids", "neighbours", "untrained"}


def planted() -> np.ndarray:
    """Return vectors with a mean, three wide directions, a duplicate, and norms that grow with the row number."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(N, 3)) @ rng.normal(size=(3, D)) + 0.1 * rng.normal(size=(N, D)) + 1
    rows *= np.linspace(1, 2, N)[:, None]
    rows[70] = rows[30]
    return rows


@pytest.fixture(scope="module")
def result() -> StudyResult:
    return dimscope.embedding(planted(), knn_sample=N, neighbors=5, first_ids=50)


def value(result: StudyResult, metric: str, preprocess: str, column: str = "value") -> float:
    table = "dimensions" if metric == metrics.PARTICIPATION_RATIO else "measures"
    return result.tables[table].filter(rows="all", metric=metric, preprocess=preprocess)[column].item()


def test_the_numbers_of_vectors_are_those_of_numpy(result: StudyResult) -> None:
    rows = planted()
    centred = rows - rows.mean(axis=0)
    variances = np.linalg.svd(centred, compute_uv=False) ** 2
    expected = variances.sum() ** 2 / (variances**2).sum()
    assert value(result, metrics.PARTICIPATION_RATIO, "centred") == pytest.approx(expected, rel=1e-9)
    norms = np.linalg.norm(rows, axis=1)
    assert value(result, metrics.MEAN_NORM, "uncentred") == pytest.approx(norms.mean(), rel=1e-6)
    assert value(result, metrics.MEAN_NORM, "uncentred", "stderr") == pytest.approx(
        norms.std(ddof=1) / np.sqrt(N), rel=1e-5
    )
    rank = spearmanr(np.arange(N), norms).statistic
    assert value(result, metrics.NORM_RANK_CORRELATION, "uncentred") == pytest.approx(rank, abs=1e-6)
    cosines = 1 - pdist(rows, "cosine")
    assert value(result, metrics.MEAN_COSINE, "uncentred") == pytest.approx(cosines.mean(), abs=1e-6)
    mean_share = N * (rows.mean(axis=0) ** 2).sum() / (rows**2).sum()
    assert value(result, metrics.ENERGY_OF_MEAN, "uncentred") == pytest.approx(mean_share, rel=1e-9)


def test_the_neighbour_graph_is_that_of_all_pairs(result: StudyResult) -> None:
    unit = planted() / np.linalg.norm(planted(), axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :5]
    in_degree = np.bincount(nearest.ravel(), minlength=N)
    hubs = result.tables["hubs"].sort("id")
    assert (hubs["in_degree"].to_numpy() == in_degree).mean() > 0.99  # ties of float32 may fall differently
    assert value(result, metrics.HUBNESS, "uncentred") == pytest.approx(skew(hubs["in_degree"].to_numpy()), rel=1e-6)


def test_planted_rows_are_listed(result: StudyResult) -> None:
    assert result.tables["duplicates"]["id"].to_list() == [30, 70]
    assert result.tables["duplicates"]["diameter"].max() == 0
    correlation = np.corrcoef(planted()[:50])
    measured = result.tables["correlation"]["r"].to_numpy()
    np.testing.assert_allclose(measured, correlation, atol=1e-6)


def test_vectors_have_no_sections_about_a_vocabulary(result: StudyResult) -> None:
    anchors = {section.anchor for section in result.study.load().make_sections(result.tables, result.facts)}
    assert not anchors & VOCABULARY_SECTIONS
    assert {"map", "spectrum", "dimensions", "isotropy", "hubness", "duplicates", "correlation"} <= anchors
    (warning,) = result.facts.warnings
    assert "parameter budget, id range, neighbors of probe words, under-trained tokens" in warning
    assert set(result.tables["dimensions"]["table"]) == {"vectors"}
    assert embedding_facts(result.facts).side == "vectors"


def test_the_page_of_vectors_speaks_of_rows_and_not_of_tokens(result: StudyResult, tmp_path: Path) -> None:
    page = result.page(tmp_path).read_text(encoding="utf-8")
    body = page[page.index("<main") : page.index('id="provenance"')]
    text = re.sub(r"<[^>]*>", " ", body).replace("tokens.parquet", "")
    assert "one per row" in text
    assert not re.findall("token|vocabulary|parameter|tied", text)


def test_the_same_numbers_from_every_kind_of_file(result: StudyResult, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    rows = planted()
    np.save(tmp_path / "v.npy", rows)
    np.savez(tmp_path / "v.npz", rows=rows)
    save_file({"rows": rows}, tmp_path / "v.safetensors")
    pl.DataFrame({"vector": rows.tolist(), "word": [f"w{i}" for i in range(N)]}).write_parquet(tmp_path / "v.parquet")
    for name in ("v.npy", "v.npz", "v.safetensors", "v.parquet"):
        other = dimscope.embedding(tmp_path / name, knn_sample=N, neighbors=5, first_ids=50)
        assert other.tables["dimensions"].equals(result.tables["dimensions"])
    assert other.tables["tokens"]["label"][5] == "w5"
    assert other.facts.name == "v.parquet"


@pytest.mark.parametrize("rows", [np.ones((30, 4)), np.arange(5.0)[:, None], np.eye(2)], ids=["constant", "d=1", "N=2"])
def test_degenerate_vectors_give_a_page(rows: np.ndarray, tmp_path: Path) -> None:
    result = dimscope.embedding(rows, out=tmp_path)
    assert (tmp_path / "index.html").exists()
    assert result.summary().answer
    for frame in result.tables.values():
        floats = frame.select(pl.selectors.float())
        assert not any(column.is_nan().any() for column in floats)


def test_refusals(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InvalidArgument, match="has one row"):
        dimscope.embedding(np.ones((1, 4)))
    with pytest.raises(InvalidArgument, match="`side` picks one of the two tables of a model"):
        dimscope.embedding(planted(), side="output")
    with pytest.raises(InvalidArgument, match="layers runs a model, and array holds vectors"):
        dimscope.layers(vectors_of(planted(), name="array"))
    rows = planted()
    rows[3, 2] = np.nan
    with pytest.raises(NonFiniteRows, match="rows 3"):
        dimscope.embedding(rows, out=tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()
    without = dimscope.embedding(rows, skip_nonfinite=True, knn_sample=50)
    assert without.facts.warnings[0] == "1 rows with NaN or Inf were left out"
    assert without.tables["measures"].filter(rows="all", metric=metrics.MEAN_NORM)["n_tokens"].item() == N - 1


def test_a_table_is_computed_again_where_a_metric_has_another_definition(tmp_path: Path) -> None:
    numbers = {metrics.MEAN_NORM: 1}
    store = ResultFolder(tmp_path, {}, lambda name: numbers.get(name, 1))
    settings, source = EmbeddingSettings(knn_sample=20), vectors_of(planted())

    def times() -> dict[str, int]:
        run_embedding(source, settings, store, SILENT)
        return {path.stem: path.stat().st_mtime_ns for path in (tmp_path / "tables").glob("*.parquet")}

    first = times()
    assert times() == first
    numbers[metrics.MEAN_NORM] = 2
    again = times()
    assert {name for name in again if again[name] != first[name]} == {"measures"}


def test_an_untied_model_has_both_tables(checkpoint: Callable[..., Path]) -> None:
    opened = dimscope.open(str(checkpoint("gpt_neox")))
    output = run_embedding(opened, EmbeddingSettings(side="output", knn_sample=50), MemoryStore(), SILENT)
    assert set(output.tables["dimensions"]["table"]) == {"output", "input"}
    own = dimscope.dimensions(opened, side="output")["participation_ratio"].value
    frame = output.tables["dimensions"].filter(table="output", rows="all", preprocess="centred")
    row = frame.filter(metric=metrics.PARTICIPATION_RATIO)
    assert row["value"].item() == pytest.approx(own, rel=1e-12)
