"""Every figure of the layers study carries the numbers of its table, whatever part of the table there is."""

import math
from dataclasses import replace
from typing import Any

import layer_tables as made
import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
from layer_tables import Model, Plan

from dimscope.page import theme
from dimscope.page.section import Tables
from dimscope.studies.layers import figures, profiles, state_figures
from dimscope.studies.layers.context import raw_centred, rows_of

COUNT = "variance count 95%"
SMALL = Plan(models=(Model(blocks=3, dim=32),), texts=("prose",), windows=2, length=64)


@pytest.fixture(scope="module")
def tables() -> Tables:
    two = replace(SMALL, models=(*SMALL.models, Model("toy-2", 2, 16)), texts=("prose", "html"), curve=True)
    return made.layer_tables(two)


@pytest.fixture
def rows(tables: Tables) -> pl.DataFrame:
    return raw_centred(rows_of(tables["layers"], "toy-6", "prose"))


def _trace(fig: go.Figure, name: str, axis: str | None = None, **meta: Any) -> Any:
    found = [t for t in fig.data if t.name and t.name.startswith(name) and t.yaxis == axis and (t.meta or {}) == meta]
    assert len(found) == 1, [(t.name, t.yaxis, t.meta) for t in fig.data]
    return found[0]


def _values(rows: pl.DataFrame, metric: str, condition: str, column: str = "value") -> list[float]:
    told = rows.filter((pl.col("metric") == metric) & (pl.col("condition") == condition))
    return told.group_by("layer").agg(pl.col(column).mean()).sort("layer")[column].to_list()


def test_profile_holds_counts_rank_and_noise(rows: pl.DataFrame) -> None:
    fig = figures.layer_profile(rows, COUNT)
    for condition in ("real", "shuffled", "random weights"):
        assert _trace(fig, condition).y.tolist() == pytest.approx(_values(rows, COUNT, condition))
    assert _trace(fig, "white noise").y.tolist() == _values(rows, COUNT, "real", "null")
    assert _trace(fig, "numerical rank").y.tolist() == [32.0] * 5
    for condition in ("real", "shuffled"):
        assert _trace(fig, condition, "y2").y.tolist() == pytest.approx(
            _values(rows, COUNT, condition, "share_of_null")
        )
    assert list(fig.layout.xaxis.ticktext) == ["emb", "1", "2", "3", "norm"]


def test_band_is_one_standard_deviation_of_the_draws(rows: pl.DataFrame) -> None:
    spread = rows.filter((pl.col("metric") == COUNT) & (pl.col("condition") == "shuffled")).with_columns(
        value=pl.col("layer") + pl.col("seed").fill_null(0).cast(pl.Float64)
    )
    outline = figures.layer_profile(spread, COUNT).data[0]
    sd = np.std([0, 1, 2, 3, 4], ddof=1)
    layers = np.arange(5)
    assert list(outline.y) == pytest.approx([*(layers + 2 + sd), *(layers + 2 - sd)[::-1]])
    assert outline.fill == "toself"


def test_rank_of_others_only_where_it_differs(rows: pl.DataFrame) -> None:
    lower = (pl.col("metric") == "numerical rank") & (pl.col("condition") == "shuffled")
    fig = figures.layer_profile(rows.with_columns(value=pl.when(lower).then(20.0).otherwise("value")), COUNT)
    ranks = [trace.name for trace in fig.data if trace.name and trace.name.startswith("numerical rank")]
    assert sorted(ranks) == ["numerical rank", "numerical rank, shuffled"]


@pytest.mark.parametrize("missing", [None, math.nan])
def test_without_noise_the_lower_panel_falls_back_on_the_rank(rows: pl.DataFrame, missing: float | None) -> None:
    silent = pl.lit(missing, dtype=pl.Float64)
    fig = figures.layer_profile(rows.with_columns(null=silent, share_of_null=silent), COUNT)
    assert not [trace for trace in fig.data if trace.name == "white noise"]
    assert fig.layout.yaxis2.title.text == "% of rank"
    assert _trace(fig, "real", "y2").y.tolist() == pytest.approx(_values(rows, COUNT, "real", "share_of_rank"))


def test_values_that_do_not_exist_are_left_out(rows: pl.DataFrame) -> None:
    broken = pl.when(pl.col("layer") == 1).then(math.nan).when(pl.col("layer") == 2).then(None).otherwise("value")
    fig = figures.layer_profile(rows.with_columns(value=broken), COUNT)
    assert _trace(fig, "real").x.tolist() == [0, 3, 4]


def test_one_layer_is_a_point(rows: pl.DataFrame) -> None:
    fig = figures.layer_profile(rows.filter(pl.col("layer") == 2), COUNT)
    assert _trace(fig, "white noise").mode == "markers"
    assert _trace(fig, "real").x.tolist() == [2]


@pytest.mark.parametrize(
    ("blocks", "final_norm", "ticks"),
    [
        (3, True, ["emb", "1", "2", "3", "norm"]),
        (3, False, ["emb", "1", "2", "3"]),
        (24, True, ["emb", "3", "6", "9", "12", "15", "18", "21", "norm"]),
        (24, False, ["emb", "2", "4", "6", "8", "10", "12", "14", "16", "18", "20", "22", "24"]),
    ],
)
def test_layer_axis_thins_out(blocks: int, final_norm: bool, ticks: list[str]) -> None:
    axis = figures.layer_axis(Model(blocks=blocks, final_norm=final_norm).sites())
    assert axis["ticktext"] == ticks


def test_preprocessings_texts_and_models(tables: Tables) -> None:
    layers = tables["layers"]
    real = rows_of(layers, "toy-6", "prose").filter(pl.col("condition") == "real")
    fig = figures.preprocessings(real, "participation ratio")
    for name in made.PREPROCESSINGS:
        expected = _values(real.filter(pl.col("preprocess") == name), "participation ratio", "real")
        assert _trace(fig, name).y.tolist() == pytest.approx(expected)
    raw = raw_centred(layers).filter(pl.col("condition") == "real")
    texts = figures.texts_profile(rows_of(raw, "toy-6"), COUNT)
    assert _trace(texts, "html").y.tolist() == _values(rows_of(raw, "toy-6", "html"), COUNT, "real")
    models = figures.models_profile(raw.filter(pl.col("text") == "prose"), COUNT)
    small = _trace(models, "toy-2 (d = 16)")
    assert small.x.tolist() == [0, 0.5, 1]
    assert small.y.tolist() == pytest.approx(_values(rows_of(raw, "toy-2", "prose"), COUNT, "real", "share_of_dim")[:3])


def test_intrinsic_dimension_with_errors_and_scale(tables: Tables) -> None:
    rows = rows_of(tables["layers"], "toy-6", "prose").filter(pl.col("preprocess") == "one state per type")
    gaussian = _trace(figures.intrinsic_profile(rows), "Gaussian, same covariance")
    assert gaussian.y.tolist() == pytest.approx(_values(rows, "TwoNN, maximum likelihood", "real", "gaussian"))
    real = _trace(figures.intrinsic_profile(rows), "real")
    assert real.y.tolist() == pytest.approx(_values(rows, "TwoNN, maximum likelihood", "real"))
    assert real.error_y.array.tolist() == pytest.approx([0.3] * 5)
    curve = _trace(state_figures.scale_curve(rows, 2), "real", layer=2)
    gride = rows.filter((pl.col("metric") == "GRIDE") & (pl.col("condition") == "real") & (pl.col("layer") == 2))
    assert curve.x.tolist() == [1, 2, 4, 8, 16, 32]
    assert curve.y.tolist() == pytest.approx(gride.sort("scale")["value"].to_list())


@pytest.mark.parametrize("layer", [0, 3])
def test_only_the_show_layer_is_seen(tables: Tables, layer: int) -> None:
    scree, curve = rows_of(tables["scree"], "toy-6", "prose"), rows_of(tables["curve"], "toy-6", "prose")
    gride = rows_of(tables["layers"], "toy-6", "prose").filter(pl.col("preprocess") == "one state per type")
    drawn = (state_figures.scree(scree, layer), state_figures.cumulative_scree(scree, layer, 0.95),
             state_figures.scale_curve(gride, layer), state_figures.sample_curve(curve, COUNT, layer))  # fmt: skip
    for fig in drawn:
        assert {trace.meta["layer"] for trace in fig.data} == {0, 1, 2, 3, 4}
        assert {trace.meta["layer"] for trace in fig.data if trace.visible} == {layer}


def test_scree_holds_shares_and_counts(tables: Tables) -> None:
    spectra = rows_of(tables["scree"], "toy-6", "prose")
    real = spectra.filter((pl.col("condition") == "real") & (pl.col("layer") == 2)).sort("index")
    assert _trace(state_figures.scree(spectra, 2), "real", layer=2).y.tolist() == real["share"].to_list()
    noise = _trace(state_figures.scree(spectra, 2), "white noise", layer=2)
    assert noise.y.tolist() == real["null_share"].to_list()[: len(noise.y)]
    cumulative = _trace(state_figures.cumulative_scree(spectra, 2, 0.95), "real", layer=2)
    expected = made.count(real["share"].to_numpy(), 0.95)
    assert cumulative.name == f"real: {expected}"
    assert cumulative.y.tolist() == real["cumulative"].to_list()


def test_threshold_that_is_never_reached(tables: Tables) -> None:
    short = rows_of(tables["scree"], "toy-6", "prose").filter(pl.col("index") <= 2)
    assert _trace(state_figures.cumulative_scree(short, 2, 0.95), "real", layer=2).name == "real: not reached"


def test_wide_spectra_are_thinned_but_keep_their_ends() -> None:
    wide = made.layer_tables(Plan((Model(blocks=1, dim=3000),), ("prose",), 0, random_weights=False))["scree"]
    cumulative = _trace(state_figures.cumulative_scree(wide, 1, 0.95), "real", layer=1)
    assert len(cumulative.x) < 150
    assert cumulative.x[[0, 1, -1]].tolist() == [1, 2, 3000]


def test_confidence_is_the_density_and_the_mean_of_the_draws(tables: Tables) -> None:
    bins = rows_of(tables["confidence"], "toy-6", "prose")
    fig = state_figures.confidence(bins)
    real = bins.filter(pl.col("condition") == "real").sort("bin_left")
    assert list(_trace(fig, "real").y)[:-1] == pytest.approx(real["density"].to_list())
    shuffled = bins.filter(pl.col("condition") == "shuffled").group_by("bin_left").agg(pl.col("density").mean())
    drawn = _trace(fig, "shuffled (mean of 5)")
    assert list(drawn.y)[:-1] == pytest.approx(shuffled.sort("bin_left")["density"].to_list())
    widths = np.diff(np.array(drawn.x))
    assert (widths * np.array(drawn.y)[:-1]).sum() == pytest.approx(1)


def _between(cells: dict[tuple[int, int], float]) -> pl.DataFrame:
    sites = dict(Model(blocks=1).sites())
    rows = [("between layers", a, sites[a], b, sites[b], v) for (a, b), v in cells.items()]
    return pl.DataFrame(rows, ["comparison", "layer", "site", "other_layer", "other_site", "cka"], orient="row")


def test_half_a_matrix_is_enough_and_negative_values_stay() -> None:
    fig = state_figures.similarity_matrix(_between({(0, 1): 0.5, (1, 2): 0.25, (0, 2): -0.01}))
    assert list(fig.data[0].z) == [[1.0, 0.5, -0.01], [0.5, 1.0, 0.25], [-0.01, 0.25, 1.0]]
    assert list(fig.data[0].y) == ["emb", "1", "norm"]
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (0, 1)


def test_matrix_between_models_has_a_side_for_each(tables: Tables) -> None:
    pairs = tables["similarity"].filter(pl.col("comparison") == "between models")
    fig = state_figures.similarity_matrix(pairs, "toy-6", "toy-2")
    cells = {(row["layer"], row["other_layer"]): row["cka"] for row in pairs.iter_rows(named=True)}
    assert [list(row) for row in fig.data[0].z] == [[cells[a, b] for b in range(4)] for a in range(5)]


def test_alignment_beside_chance(tables: Tables) -> None:
    pairs = rows_of(tables["similarity"], "toy-6", "prose").filter(pl.col("comparison").str.starts_with("real and"))
    fig = figures.alignment(pairs)
    shuffled = pairs.filter(pl.col("other_condition") == "shuffled").sort("layer")
    assert _trace(fig, "real and shuffled").y.tolist() == shuffled["cka"].to_list()
    assert _trace(fig, "shuffled", "y2").y.tolist() == shuffled["overlap"].to_list()
    assert _trace(fig, "overlap by chance", "y2").y.tolist() == [0.5] * 5
    assert list(_trace(fig, "CKA by chance").y) == pytest.approx([2 / 128] * 5 + [-2 / 128] * 5)
    assert [sd for _, sd in _trace(fig, "real and shuffled").customdata] == [1 / 128] * 5
    assert "customdata[1]" in _trace(fig, "real and shuffled").hovertemplate
    negative = figures.alignment(pairs.with_columns(cka=pl.lit(-0.2)))
    assert negative.layout.yaxis.range[0] < -0.2
    bare = figures.alignment(pairs.with_columns(overlap=pl.lit(None, dtype=pl.Float64)))
    assert {trace.yaxis for trace in bare.data} == {None}


def test_curve_over_the_sample_with_its_noise(tables: Tables) -> None:
    rows = rows_of(tables["curve"], "toy-6", "prose")
    fig = state_figures.sample_curve(rows, COUNT, 1)
    real = rows.filter((pl.col("condition") == "real") & (pl.col("layer") == 1)).sort("n_tokens")
    assert _trace(fig, "real", layer=1).y.tolist() == real["value"].to_list()
    assert _trace(fig, "white noise", layer=1).y.tolist() == real["null"].to_list()


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([0], "at the embeddings"),
        ([1, 2, 3], "in blocks 1 to 3"),
        ([0, 1, 4], "at the embeddings, in block 1 and after the final norm"),
        ([1, 3], "in blocks 1 and 3"),
        ([0, 1, 2, 3, 4], "at every layer"),
    ],
)
def test_layers_in_words(layers: list[int], words: str) -> None:
    assert profiles.locations(layers, dict(Model(blocks=3).sites())) == words


@pytest.mark.parametrize(
    ("asked", "told"), [([80, 95, 99], "95%"), ([80, 90], "90%"), ([99.9, 50], "99.9%"), ([], None)]
)
def test_count_to_tell(asked: list[float], told: str | None) -> None:
    rows = pl.DataFrame({"metric": [f"variance count {t:g}%" for t in asked] + ["numerical rank"]})
    assert profiles.preferred_count(rows) == (f"variance count {told}" if told else None)


def test_marks_of_one_figure_differ_in_colour_shape_and_dash() -> None:
    for marks in ([*theme.CONDITION_MARKS.values(), theme.GAUSSIAN_NULL], theme.SERIES_MARKS):
        for what in ("colour", "symbol", "dash"):
            assert len({getattr(mark, what) for mark in marks}) == len(marks)
