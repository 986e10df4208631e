"""Every figure about damage carries the numbers of its table."""

import math
from typing import Any

import damage_tables as made
import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
from damage_tables import BASE, PLANTED

from dimscope.interventions.perturbations import PERTURBATIONS
from dimscope.studies.damage import figures
from dimscope.studies.damage.curves import Damage, damages, kind_mark


@pytest.fixture(scope="module")
def found() -> Damage:
    return damages(made.damage().damage)[0]


def _trace(fig: go.Figure, name: str, axis: str | None = None) -> Any:
    traces = [t for t in fig.data if t.name == name and t.yaxis == axis]
    assert len(traces) == 1, [(t.name, t.yaxis) for t in fig.data]
    return traces[0]


def _means(kind: str) -> dict[float, float]:
    return {strength: float(np.mean(values)) for (name, strength), values in PLANTED.items() if name == kind}


def test_the_loss_by_share_kept_is_the_mean_over_the_seeds_with_their_spread(found):
    fig = figures.damage_by_kept(found)
    line = _trace(fig, "project")
    assert dict(zip(line.x, line.y, strict=True)) == pytest.approx({k / 100: v for k, v in _means("project").items()})
    band = next(t for t in fig.data if t.fill == "toself" and t.yaxis is None and len(t.x) == 6 and t.y[0] > 5)
    assert band.y[0] == pytest.approx(np.mean([5.0, 5.2, 4.8]) + np.std([5.0, 5.2, 4.8], ddof=1))
    assert set(_trace(fig, "undamaged").y) == {BASE}
    assert {t.name for t in fig.data if t.name} == {"undamaged", "truncate", "project", "project-rescaled"}


def test_agreement_has_a_panel_of_its_own(found):
    line = _trace(figures.damage_by_kept(found), "truncate", "y2")
    assert dict(zip(line.x, line.y, strict=True)) == pytest.approx({0.75: 0.95, 0.5: 0.7, 0.25: 0.0})


def test_the_loss_by_error_is_sorted_by_the_error(found):
    line = _trace(figures.damage_by_error(found), "truncate")
    assert list(line.x) == pytest.approx([0.15, 0.3, 0.45])
    assert list(line.y) == pytest.approx([2.1, 2.6, 4.0])
    assert _trace(figures.damage_by_error(found), "scale").mode == "markers"


def test_huge_errors_do_not_squeeze_the_rest():
    found = damages(made.damage(dict(PLANTED) | {("scale", 50.0): (9.0,)}).damage)[0]
    fig = figures.damage_by_error(found)
    assert fig.layout.xaxis.range[1] < 3.2
    assert max(_trace(fig, "scale").x) <= 3


def test_a_factor_of_one_is_the_undamaged_model(found):
    line = _trace(figures.damage_by_strength(found, ["scale"], "factor"), "scale")
    assert dict(zip(line.x, line.y, strict=True)) == pytest.approx({0.5: 2.8, 1.0: BASE, 2.0: 2.1})


def test_closed_forms_and_measured_errors_share_their_axes():
    fig = figures.closed_form(made.damage().damage)
    points = _trace(fig, "project")
    assert sorted(points.x) == pytest.approx(sorted([math.sqrt(0.25), math.sqrt(0.5), math.sqrt(0.75)] * 3))
    assert fig.layout.xaxis.range == fig.layout.yaxis.range


def test_the_operator_is_drawn_row_by_row_and_its_entries_beside_the_normal_curve():
    tables = made.operators()
    block = figures.operator_block(tables["operator_block"], 0.05).data[0].z
    assert block.shape == (100, 100)
    assert np.allclose(block, block.T)
    assert np.trace(block) == pytest.approx(60)
    fig = figures.operator_histogram(tables["operator_histogram"])
    measured, normal = _trace(fig, "measured"), _trace(fig, "normal")
    width = measured.x[1] - measured.x[0]
    assert sum(measured.y) * width == pytest.approx(1, abs=0.01)
    assert max(abs(np.asarray(measured.y) - np.asarray(normal.y))) < 0.05  # 9,900 entries in 61 bins


def test_every_kind_has_its_mark_and_a_chain_always_the_same():
    assert all(kind_mark(name) == kind.mark for name, kind in PERTURBATIONS.items())
    assert kind_mark("truncate+noise") == kind_mark("truncate+noise")


@pytest.mark.parametrize("losses", [{}, {("truncate", 50): (2.5,)}, {("scale", 2.0): (2.5,)}, {("noise", 0.0): (2.0,)}])
def test_figures_of_little_are_drawn_all_the_same(losses):
    frame = made.damage(losses).damage
    for found in damages(frame):
        figures.damage_by_kept(found)
        figures.damage_by_error(found)
        figures.damage_by_strength(found, found.kinds(), "factor")
    assert isinstance(figures.closed_form(frame), go.Figure)
    assert pl.Series(damages(made.damage().damage)[0].kinds()).to_list()[0] == "truncate"
