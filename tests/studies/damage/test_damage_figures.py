"""Every figure about damage carries the numbers of its table."""

import math
from typing import Any

import damage_tables as made
import numpy as np
import plotly.graph_objects as go
import pytest
from damage_tables import BASE, KL_PER_LOSS, PLANTED

from dimscope.evaluation.yardstick import TOLERANCE
from dimscope.interventions.perturbations import PERTURBATIONS
from dimscope.studies.damage import figures
from dimscope.studies.damage.curves import kind_mark
from dimscope.studies.damage.losses import Losses, all_losses


@pytest.fixture(scope="module")
def found() -> Losses:
    return all_losses(*made.damage())[0]


def _trace(fig: go.Figure, name: str, axis: str | None = None) -> Any:
    traces = [t for t in fig.data if t.name == name and t.yaxis == axis]
    assert len(traces) == 1, [(t.name, t.yaxis) for t in fig.data]
    return traces[0]


def _means(kind: str) -> dict[float, float]:
    return {strength: float(np.mean(values)) for (name, strength), values in PLANTED.items() if name == kind}


def _kl(kind: str) -> dict[float, float]:
    return {strength: KL_PER_LOSS * (loss - BASE) for strength, loss in _means(kind).items()}


def test_the_kl_by_share_kept_is_the_mean_over_the_seeds_in_its_interval(found):
    fig = figures.damage_by_kept(found)
    line = _trace(fig, "project")
    assert dict(zip(line.x, line.y, strict=True)) == pytest.approx({k / 100: v for k, v in _kl("project").items()})
    band = next(t for t in fig.data if t.fill == "toself" and t.yaxis is None and max(t.y) > 0.45)
    kl = next(draws.kl for draws in found.draws("project") if draws.strength == 25)
    assert (band.y[0], band.y[-1]) == pytest.approx((kl.high, kl.low))
    assert kl.low < KL_PER_LOSS * 3 < kl.high
    assert {t.name for t in fig.data if t.showlegend is None} == {"truncate", "project", "project-rescaled"}


def test_the_tolerance_is_a_line_on_every_axis_of_the_kl(found):
    every = [
        figures.damage_by_kept(found), figures.damage_by_error(found), figures.damage_by_strength(found, ["noise"], "factor"),
    ]  # fmt: skip
    for fig in every:
        marks = {t.name: set(t.y) for t in fig.data if t.mode == "lines+text"}
        assert marks[TOLERANCE.name] == {TOLERANCE.kl}
        assert fig.layout.yaxis.type == "log"
        low, high = (10**end for end in fig.layout.yaxis.range)
        assert all(low < next(iter(kl)) < high for kl in marks.values())
        assert all(low <= y <= high for t in fig.data if t.yaxis is None for y in t.y)


def test_a_kl_of_zero_is_drawn_at_the_end_of_the_axis():
    losses = all_losses(*made.damage({("truncate", 100.0): (BASE,), ("truncate", 50.0): (2.5,)}))[0]
    assert list(_trace(figures.damage_by_kept(losses), "truncate").y) == pytest.approx([0.075, figures.LEAST_KL])


def test_agreement_has_a_panel_of_its_own(found):
    line = _trace(figures.damage_by_kept(found), "truncate", "y2")
    assert dict(zip(line.x, line.y, strict=True)) == pytest.approx({0.75: 0.95, 0.5: 0.7, 0.25: 0.0})


def test_the_kl_by_error_is_sorted_by_the_error(found):
    line = _trace(figures.damage_by_error(found), "truncate")
    assert list(line.x) == pytest.approx([0.15, 0.3, 0.45])
    assert list(line.y) == pytest.approx([0.015, 0.09, 0.3])
    assert _trace(figures.damage_by_error(found), "scale").mode == "markers"


def test_huge_errors_do_not_squeeze_the_rest():
    found = all_losses(*made.damage(dict(PLANTED) | {("scale", 50.0): (9.0,)}))[0]
    fig = figures.damage_by_error(found)
    assert fig.layout.xaxis.range[1] < 3.2
    assert max(_trace(fig, "scale").x) <= 3


def test_scaling_is_drawn_as_points_because_its_kl_is_zero_between_them(found):
    points = _trace(figures.damage_by_strength(found, ["scale"], "factor"), "scale")
    assert dict(zip(points.x, points.y, strict=True)) == pytest.approx({0.5: 0.12, 2.0: 0.015})
    assert points.mode == "markers"


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
    rows = made.damage(losses)
    for found in all_losses(*rows):
        figures.damage_by_kept(found)
        figures.damage_by_error(found)
        figures.damage_by_strength(found, found.kinds(), "factor")
    assert isinstance(figures.closed_form(rows.damage), go.Figure)
