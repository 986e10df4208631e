"""Every figure carries the numbers of its table, unchanged."""

import numpy as np
import polars as pl
import pytest

from dimscope.page import theme
from dimscope.page.section import Tables
from dimscope.studies.embedding import spectrum_figures, token_figures


def test_token_map_holds_every_token_once_under_its_category(tables: Tables) -> None:
    fig, frame = token_figures.token_map(tables["tokens"]), tables["tokens"]
    assert {trace.meta["category"] for trace in fig.data} == set(frame["category"])
    ids = np.concatenate([trace.customdata for trace in fig.data])
    points = frame[ids.tolist()]
    assert sorted(ids) == list(range(8))
    np.testing.assert_array_equal(np.concatenate([trace.x for trace in fig.data]), points["pc1"])
    np.testing.assert_array_equal(np.concatenate([trace.y for trace in fig.data]), points["pc2"])
    for trace in fig.data:
        assert trace.marker.color == theme.CATEGORY_MARKS[trace.meta["category"]].colour


def test_token_map_by_norm_colours_by_the_norms(tables: Tables) -> None:
    fig = token_figures.token_map(tables["tokens"], colour="norm")
    norms = np.concatenate([trace.marker.color for trace in fig.data])
    assert sorted(norms) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_labels_are_escaped_for_plotly(tables: Tables) -> None:
    texts = [text for trace in token_figures.token_map(tables["tokens"]).data for text in trace.text]
    assert not any("<" in text or ">" in text for text in texts)
    assert "&lt;b&gt;bold&lt;/b&gt;&lt;0xFF&gt;" in texts


def test_id_scatter_shows_the_range_on_the_components_asked_for(tables: Tables) -> None:
    fig = token_figures.id_scatter(tables["tokens"], 1, 4, "pc1", "pc3", explained=[0.5, 0.25, 0.125])
    assert sorted(i for trace in fig.data for i in trace.customdata) == [1, 2, 3]
    assert sorted(y for trace in fig.data for y in trace.y) == pytest.approx([0.1, 0.2, 0.3])
    assert fig.layout.yaxis.title.text == "component 3 (12.5% of the variance)"


def test_labels_that_would_collide_are_left_to_hovering() -> None:
    crowd = pl.DataFrame({"id": range(30), "pc1": [0.0] * 29 + [9.0], "pc3": [0.0] * 30})
    crowd = crowd.with_columns(label=pl.lit("word"), category=pl.lit("ordinary"))
    (trace,) = token_figures.id_scatter(crowd).data
    assert sum(text != "" for text in trace.text) < 6
    assert list(trace.hovertext) == ["word"] * 30


def test_correlation_is_the_matrix_on_a_fixed_scale(tables: Tables) -> None:
    fig = token_figures.correlation(tables["correlation"])
    np.testing.assert_array_equal(fig.data[0].z, tables["correlation"]["r"].to_numpy())
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (-1, 1)
    assert len(set(fig.data[0].x)) == 3


def test_spectrum_shows_table_and_both_nulls(tables: Tables) -> None:
    frame = tables["spectrum"]
    lines = {line.name: line for line in spectrum_figures.spectrum(frame).data}
    np.testing.assert_array_equal(lines["this table"].y, frame["singular_value"])
    np.testing.assert_array_equal(lines["random Gaussian table"].y, frame["gaussian_singular_value"])
    np.testing.assert_array_equal(lines["columns permuted"].y, frame["permuted_singular_value"])
    assert spectrum_figures.spectrum(frame, log=False).layout.yaxis.type == "linear"


def test_spectrum_leaves_out_a_null_that_was_not_computed(tables: Tables) -> None:
    frame = tables["spectrum"].with_columns(permuted_singular_value=pl.lit(None, dtype=pl.Float64))
    assert [line.name for line in spectrum_figures.spectrum(frame).data] == ["random Gaussian table", "this table"]


def test_cumulative_variance_equals_the_table(tables: Tables) -> None:
    measured = spectrum_figures.cumulative_variance(tables["spectrum"]).data[-1]
    np.testing.assert_allclose(measured.y, tables["spectrum"]["cumulative"], rtol=1e-12)


def test_dimensions_stand_beside_their_nulls(tables: Tables) -> None:
    frame = tables["dimensions"].filter(rows="all")
    fig = spectrum_figures.dimensions(frame, 4)
    dots = {trace.name: trace for trace in fig.data if trace.mode == "markers"}
    np.testing.assert_array_equal(dots["this table"].x, frame["value"])
    np.testing.assert_array_equal(dots["random Gaussian table"].x, frame["null_gaussian"])
    assert list(dots["this table"].y) == ["variance count 90%", "participation ratio", "stable rank · uncentred"]


def test_budget_counts_every_parameter_once_and_no_buffer(tables: Tables) -> None:
    fig = spectrum_figures.budget(tables["budget"])
    assert {bar.name: int(sum(bar.x)) for bar in fig.data} == {
        "input embedding 32.0%": 32,
        "attention 60.0%": 60,
        "norm 8.0%": 8,
    }
    assert list(fig.data[0].y) == ["input embedding", "outside the blocks", "block 0"]


def test_norms_by_id_and_by_category(tables: Tables) -> None:
    by_id = token_figures.norms_by_id(tables["tokens"])
    points = {int(x): float(y) for trace in by_id.data[:-1] for x, y in zip(trace.x, trace.y, strict=True)}
    assert points == {i: i + 1.0 for i in range(8)}
    boxes = {box.name: box for box in token_figures.norms_by_category(tables["tokens"]).data}
    assert boxes["beyond (1)"].median == (8.0,)
    assert boxes["ordinary (4)"].median[0] == tables["tokens"].filter(category="ordinary")["norm"].quantile(0.5)


def test_untrained_scores_count_every_scored_token(tables: Tables) -> None:
    frame = tables["tokens"].with_columns(untrained_score=pl.when(pl.col("id") > 0).then("untrained_score"))
    fig = token_figures.untrained_scores(frame, 0.4)
    assert {bar.name: int(sum(bar.y)) for bar in fig.data}["ordinary (4)"] == 4
    assert sum(int(sum(bar.y)) for bar in fig.data) == 7
    assert fig.layout.shapes[0].x0 == 0.4
    assert not token_figures.untrained_scores(frame, None).layout.shapes


def test_hubness_counts_degrees(tables: Tables) -> None:
    measured = token_figures.hubness(tables["hubs"]).data[-1]
    assert dict(zip(measured.x.tolist(), measured.y.tolist(), strict=True)) == {0: 2, 6: 1}


def test_random_neighbours_are_poisson() -> None:
    hubs = pl.DataFrame({"id": range(1000), "label": ["x"] * 1000, "in_degree": [2] * 1000})
    random = token_figures.hubness(hubs).data[0]
    np.testing.assert_allclose(random.y, [1000 * np.exp(-2) * v for v in (1, 2, 2)], rtol=1e-12)


@pytest.mark.parametrize(("width", "expected"), [(0.0, 1.0), (1.0, 2.0)])
def test_participation_ratio_of_a_line_and_a_circle(width: float, expected: float) -> None:
    angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    points = np.stack([np.cos(angle), width * np.sin(angle)], axis=1) + 5.0
    assert spectrum_figures.participation_ratio(points) == pytest.approx(expected, abs=1e-9)


def test_participation_ratio_of_one_spot_is_zero() -> None:
    assert spectrum_figures.participation_ratio(np.ones((5, 2))) == 0


def test_intro_titles_are_measured_from_the_points_drawn() -> None:
    panels = spectrum_figures.intro_panels()
    for fig in panels:
        points = np.stack([fig.data[0].x, fig.data[0].y], axis=1)
        assert f"<b>{spectrum_figures.participation_ratio(points):.2f}</b>" in fig.layout.title.text
    assert [fig.layout.title.text.split(":")[0] for fig in panels] == [
        "on a line",
        "near a line",
        "round cloud",
    ]
