"""What the page says about narrowing follows from the plan: figures, numbers, and the candidate that is shown."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import narrowing_tables as made
import plotly.graph_objects as go
import polars as pl
import pytest

from dimscope.narrowing.bases import BASES
from dimscope.page import theme
from dimscope.page.section import Grid, Plot, Section, Tables
from dimscope.studies.narrowing import figures
from dimscope.studies.narrowing import sections as narrowing
from dimscope.studies.narrowing.advice import DROP, HEALED, NARROW, SPEEDS
from dimscope.studies.narrowing.study import NARROWING

FIGURES = {"parameters": "narrowing-size", "prefill_ratio": "narrowing-speed"}
STAR = ("normalised", 56)  # which is shown and healed: of the best basis the widest that is a tenth smaller
UNTIMED: dict[str, Any] = dict.fromkeys(SPEEDS)


def _star(kl: float = 0.004) -> dict[str, Any]:
    return made.healed(*STAR, kl)


PLANS: dict[str, Callable[[], pl.DataFrame]] = {
    "a usual one": made.plan,
    "widths and layers in rising order": lambda: made.plan((32, 48, 56), layers=dict(sorted(made.DROPPED.items()))),
    "a healed candidate": lambda: made.plan(made.WIDTHS, made.BASES, made.DROPPED, _star()),
    "one width": lambda: made.plan((48,)),
    "one basis": lambda: made.plan(bases=("raw",)),
    "one candidate of a model of one layer": lambda: made.plan((48,), ("raw",), {}),
    "no layer to drop": lambda: made.plan(layers={}),
    "nothing timed": lambda: made.frame(made.narrow("raw", 48, 0.1) | UNTIMED, made.dropped(5, 0.2) | UNTIMED),
    "some timed": lambda: made.frame(made.narrow("raw", 56, 0.1), made.narrow("raw", 48, 0.2) | UNTIMED),
    "no KL at all": lambda: made.frame(made.narrow("raw", 56, 0.0), made.dropped(5, 0.0), made.healed("raw", 56, 0.0)),
    "KL below what is drawn": lambda: made.frame(made.narrow("raw", 56, 3e-6), made.narrow("raw", 48, 2e-4)),
    "KL far apart": lambda: made.frame(made.narrow("raw", 56, 2e-4), made.narrow("raw", 48, 9.7)),
    "widths that make it larger": lambda: made.frame(made.narrow("raw", 56, 0.02, parameters=230_000_000)),
    "KL of many nats": lambda: made.frame(made.narrow("raw", 56, 12.0), made.narrow("raw", 48, 19.0)),
}  # fmt: skip


def _tables(plan: pl.DataFrame | None = None, texts: pl.DataFrame | None = None) -> dict[str, pl.DataFrame]:
    tables = {"plan": made.plan() if plan is None else plan}
    return tables if texts is None else {**tables, "narrow_texts": texts}


def _section(section: Section | None) -> Section:
    assert section is not None
    return section


def _candidates(plan: pl.DataFrame) -> Grid:
    section = _section(narrowing.plan_section(_tables(plan), made.facts(plan)))
    [grid] = [block for block in section.blocks if isinstance(block, Grid)]
    return grid


def _beside(tables: Tables, **changes: Any) -> tuple[Section, dict[str, tuple[Any, ...]], list[Grid]]:
    """Before and after: the section, its numbers by their name, and the other grids."""
    section = _section(narrowing.before_after_section(tables, made.facts(tables["plan"], **changes)))
    sides, *rest = [block for block in section.blocks if isinstance(block, Grid)]
    return section, {str(row[0]): row[1:] for row in sides.rows}, rest


def _points(fig: go.Figure) -> dict[str, list[tuple[float, float]]]:
    """Points by trace, to 12 decimals; a trace without any draws nothing."""
    assert len({trace.name for trace in fig.data}) == len(fig.data)
    pairs = {trace.name: zip(trace.x, trace.y, strict=True) for trace in fig.data if len(trace.x)}
    return {name: [_rounded(*point) for point in found] for name, found in pairs.items()}


def _rounded(x: float, y: float) -> tuple[float, float]:
    return round(float(x), 12), round(float(y), 12)


def _trace(fig: go.Figure, name: str) -> Any:
    [trace] = [trace for trace in fig.data if trace.name == name]
    return trace


def _expected(plan: pl.DataFrame, x: str) -> dict[str, list[tuple[float, float]]]:
    """Every narrow, healed and shallower candidate of the table, from wide to narrow; KL is drawn as 1e-4 at least."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(plan.iter_rows(named=True), key=lambda row: -row["parameters"]):
        name = {NARROW: row["basis"], HEALED: f"{row['basis']}, healed", DROP: DROP}.get(row["method"])
        value = row["parameters"] / made.PARAMETERS if x == "parameters" else row[x]
        if name is not None and value is not None:
            points.setdefault(name, []).append(_rounded(value, max(row["kl"], 1e-4)))
    return points


# ---- which sections ------------------------------------------------------------------------------------------------


def test_a_plan_is_two_sections():
    sections = NARROWING.load().make_sections(_tables(texts=made.texts()), made.facts())
    assert [(s.anchor, s.tables) for s in sections] == [("narrowing", ("plan",)), ("narrow", ("plan", "narrow_texts"))]


@pytest.mark.parametrize(
    ("tables", "changes", "expected"),
    [
        ({}, {}, []),
        ({"narrow_texts": made.texts()}, {}, []),
        (_tables(made.plan().clear()), {}, []),
        (_tables(), {"advice": None}, ["narrow"]),
        (_tables(), {"advice": []}, ["narrow"]),
        (_tables(), {"shown": None}, ["narrowing"]),
        (_tables(), {"advice": None, "shown": None}, []),
        (_tables(), {}, ["narrowing", "narrow"]),
        (_tables(texts=made.texts().clear()), {}, ["narrowing", "narrow"]),
    ],
)
def test_what_is_missing_leaves_its_section_out_and_the_other_in(tables, changes, expected):
    sections = NARROWING.load().make_sections(tables, made.facts(**changes))
    assert [section.anchor for section in sections] == expected
    assert all(section.tables == ("plan",) for section in sections)


def test_a_run_that_planned_nothing_has_none_of_them():
    facts = replace(made.facts(), studies={})
    assert NARROWING.load().make_sections(_tables(texts=made.texts()), facts) == []


def test_the_first_sentence_of_the_advice_is_the_title_and_the_others_stand_under_it():
    section = _section(narrowing.plan_section(_tables(), made.facts()))
    # Of width 48 the loss rises by half its KL, 0.02; of 32 by 0.25, which is more than 0.05.
    assert section.title == "Narrow it to 48: 23% fewer parameters, +0.020 nats of loss"
    assert len(section.findings) == 3
    own = _section(narrowing.plan_section(_tables(), made.facts(advice=["Do this", "for that", "and that"])))
    assert (own.title, own.findings) == ("Do this", ("for that", "and that"))
    assert _section(narrowing.plan_section(_tables(), made.facts(advice=["Alone"]))).findings == ()


def test_stars_are_explained_only_where_there_are_any():
    windows = {"calibration": 5, "evaluation": 1, "training": 7}
    section = _section(narrowing.plan_section(_tables(), made.facts(n_windows=windows, window_length=96)))
    assert "1 window of 96 tokens" in section.caveat
    assert "star" not in section.how_to_read
    healed = _section(narrowing.plan_section(_tables(), made.facts(heal_steps=30)))
    assert "star is a candidate after 30 steps" in healed.how_to_read


# ---- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", FIGURES)
@pytest.mark.parametrize("name", PLANS)
def test_the_points_of_a_figure_are_exactly_those_of_the_table_in_the_order_of_their_size(name, x):
    plan = PLANS[name]()
    assert _points(figures.narrowing_plan(plan, x)) == _expected(plan, x)


def test_planted_numbers_are_where_they_belong():
    by_size, by_speed = (_points(figures.narrowing_plan(made.plan(), x)) for x in FIGURES)
    assert by_size.keys() == by_speed.keys() == {*made.BASES, DROP}
    # 13 of 200 million parameters stay, the others go with the width.
    assert by_size["raw"] == [(0.883125, 0.02), (0.76625, 0.08), (0.5325, 0.75)]
    assert by_speed["raw"] == [_rounded(64 / 56, 0.02), _rounded(64 / 48, 0.08), (2.0, 0.75)]
    assert by_size[DROP] == [(0.85, 0.03), (0.7, 0.3), (0.55, 1.5)]


def test_what_is_not_timed_is_in_the_figure_by_size_only():
    plan = PLANS["some timed"]()
    assert [len(_points(figures.narrowing_plan(plan, x))["raw"]) for x in FIGURES] == [2, 1]
    assert _points(figures.narrowing_plan(PLANS["nothing timed"](), "prefill_ratio")) == {}


def test_points_say_which_candidate_they_are():
    fig = figures.narrowing_plan(made.plan(made.WIDTHS, made.BASES, made.DROPPED, _star()), "parameters")
    widths = [f"width {w} of the parameters" for w in ("56, 88%", "48, 77%", "32, 53%")]
    assert list(_trace(fig, "raw").customdata) == widths
    assert list(_trace(fig, DROP).customdata) == [
        f"{n} of the parameters" for n in ("5 layers, 85%", "4 layers, 70%", "3 layers, 55%")
    ]
    assert list(_trace(fig, "normalised, healed").customdata) == ["width 56, healed"]
    for trace in fig.data:
        assert "customdata" in trace.hovertemplate


def test_every_basis_is_a_line_of_its_own_in_its_own_look_and_dropped_layers_are_grey():
    plan = made.frame(*(made.narrow(basis, width, 0.1) for width in (56, 48) for basis in BASES), made.dropped(5, 0.1))
    fig = figures.narrowing_plan(plan, "parameters")
    assert [trace.name for trace in fig.data] == [*BASES, DROP]
    for trace in fig.data:
        mark = theme.GAUSSIAN_NULL if trace.name == DROP else theme.basis_mark(trace.name)
        look = (trace.line.color, trace.marker.color, trace.line.dash, trace.marker.symbol, trace.mode)
        assert look == (mark.colour, mark.colour, mark.dash, mark.symbol, "lines+markers")
    red, green, blue = (int(_trace(fig, DROP).line.color[i : i + 2], 16) for i in (1, 3, 5))
    assert max(red, green, blue) - min(red, green, blue) < 24


def test_a_healed_candidate_is_one_larger_star_in_the_colour_of_its_basis():
    fig = figures.narrowing_plan(made.plan(made.WIDTHS, made.BASES, made.DROPPED, _star()), "prefill_ratio")
    star, line = _trace(fig, "normalised, healed"), _trace(fig, "normalised")
    assert (star.marker.symbol, star.mode, star.marker.color) == ("star", "markers", line.marker.color)
    assert star.marker.size > line.marker.size
    assert _points(fig)["normalised, healed"] == [_rounded(64 / 56, 0.004)]
    assert _points(fig)["normalised"][0] == _rounded(64 / 56, 0.01)


@pytest.mark.parametrize("x", FIGURES)
@pytest.mark.parametrize("name", PLANS)
def test_every_point_and_every_tick_is_in_the_range_of_the_axes(name, x):
    fig = figures.narrowing_plan(PLANS[name](), x)
    found = [point for points in _points(fig).values() for point in points]
    if not found:  # nothing was timed
        return
    assert fig.layout.yaxis.type == "log"
    low, high = (10**end for end in fig.layout.yaxis.range)
    ticks = fig.layout.yaxis.tickvals
    assert ticks
    assert [float(text) for text in fig.layout.yaxis.ticktext] == pytest.approx(list(ticks), rel=0.06)
    assert list(ticks) == sorted(set(ticks))
    assert len(ticks) > 1
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
    assert all(low < y < high for _, y in found)
    if x == "parameters":
        left, right = fig.layout.xaxis.range
        assert left >= 1
        assert all(right < share < left for share, _ in found)  # further right it is smaller
    else:
        assert fig.layout.xaxis.range is None


def test_the_two_figures_of_the_page_are_by_size_and_by_speed():
    section = _section(narrowing.plan_section(_tables(), made.facts()))
    plots = {block.anchor: _points(block.figure) for block in section.blocks if isinstance(block, Plot)}
    assert plots == {anchor: _expected(made.plan(), x) for x, anchor in FIGURES.items()}


def test_every_basis_has_a_mark_of_its_own_and_none_the_star_of_healing():
    assert set(theme.BASIS_MARKS) == set(BASES)
    marks = [theme.basis_mark(basis) for basis in BASES]
    assert "star" not in {mark.symbol for mark in marks}
    assert all(mark is theme.BASIS_MARKS[basis] for basis, mark in zip(BASES, marks, strict=True))
    assert (
        len({(mark.colour, mark.symbol) for mark in marks})
        == len({(mark.colour, mark.dash) for mark in marks})
        == len(BASES)
    )
    assert theme.GAUSSIAN_NULL.colour not in {mark.colour for mark in marks}
    assert theme.basis_mark("a new one") == theme.basis_mark("a new one")


# ---- all candidates ------------------------------------------------------------------------------------------------


def test_planted_candidates_stand_in_a_table():
    grid = _candidates(made.plan(made.WIDTHS, made.BASES, made.DROPPED, _star()))
    rows = {row[0]: row[1:] for row in grid.rows}
    assert rows["dense"] == ("200,000,000", "+0%", "400 MB", "1.00×", "1.00×", "2.500", "–", "–", "100.0%", "–")
    # Of as many parameters a model of layers is 0.779 of the way from the dense one to one with a layer less.
    assert rows["width 56, raw"] == (
        "176,625,000", "-12%", "353 MB", "1.14×", "1.07×", "2.510", "+0.010 ± 0.001", "0.0200 ± 0.0020", "98.0%", "0.0234",
    )  # fmt: skip
    assert rows["width 56, normalised, healed"][5:8] == ("2.502", "+0.002 ± 0.000", "0.0040 ± 0.0004")
    assert rows["width 32, raw"][-1] == "–"  # smaller than what dropping layers reaches
    assert rows["5 layers"][:3] == ("170,000,000", "-15%", "340 MB")
    assert rows["8-bit weights"][2:5] == ("202 MB", "–", "–")


@pytest.mark.parametrize("name", PLANS)
def test_every_candidate_has_its_row_with_the_numbers_of_the_table(name):
    plan = PLANS[name]()
    grid = _candidates(plan)
    assert len(grid.rows) == plan.height == len({row[0] for row in grid.rows})
    assert grid.numeric == frozenset(range(1, len(grid.header)))
    columns = dict(zip(grid.header, zip(*grid.rows, strict=True), strict=True))
    for name, row in zip(columns["model"], plan.iter_rows(named=True), strict=True):
        for key in ("basis", "width", "layers", "bits"):
            assert row[key] is None or str(row[key]) in str(name)
        assert ("healed" in str(name)) == (row["method"] == HEALED)
    sizes = [float(str(text).replace(",", "")) for text in columns["parameters"]]
    assert sizes == plan["parameters"].to_list()
    for column, key, digits in (("loss", "loss", 3), ("rise of the loss", "loss_rise", 3), ("KL", "kl", 4)):
        values = [None if text == "–" else float(str(text).split(" ± ")[0]) for text in columns[column]]
        assert values[column != "loss" :] == pytest.approx(
            plan[key].to_list()[column != "loss" :], abs=0.51 * 10**-digits
        )
    missing = [text == "–" for text in columns["reading"]]
    assert missing == plan["prefill_ratio"].is_null().to_list()


# ---- before and after ----------------------------------------------------------------------------------------------


WIDE = {"basis": "normalised", "width": 56}


def test_the_shown_candidate_stands_beside_the_dense_model():
    section, rows, rest = _beside(_tables(), shown=WIDE)
    assert section.title.startswith("At 56 of 64 dimensions 99.0% of the top predictions stay the same, with 88%")
    assert rows["parameters"] == ("200,000,000", "176,625,000", "-12%")
    assert rows["loss (nats per token)"] == ("2.5", "2.5", "+0.005")
    assert rows["KL to the dense model (nats)"] == ("0", "0.0100", "")
    # The dense model read 1,100 and generated 110 beside it, whatever it did by itself.
    assert rows["tokens of a prompt read per second"] == ("1,100", "1,257", "1.14×")
    assert rows["tokens generated per second"] == ("110", "118", "1.07×")
    assert rest == []


def test_the_candidate_of_the_facts_is_shown_healed_where_it_was_healed():
    tables = _tables(made.plan(made.WIDTHS, made.BASES, made.DROPPED, _star(0.25)))
    kl = "KL to the dense model (nats)"
    assert _beside(tables, shown=WIDE)[1][kl][1] == "0.2500"
    assert _beside(tables, shown={"basis": "raw", "width": 56})[1][kl][1] == "0.0200"
    assert _beside(tables, shown={"basis": "random", "width": 32})[1]["parameters"][1] == "106,500,000"


def test_speeds_that_were_not_measured_are_no_rows():
    plan = made.frame(made.narrow("raw", 48, 0.1) | UNTIMED)
    rows = _beside(_tables(plan))[1]
    assert "parameters" in rows
    assert not [name for name in rows if "per second" in name]


def test_a_tie_is_explained_where_there_is_one():
    tied, untied = (_beside(_tables(), tied=tied)[0].caveat for tied in (True, False))
    assert tied != untied
    assert tied.endswith(untied)


def test_texts_stand_side_by_side_where_prompts_were_given():
    said = [("The keeper", "counted ships", "counted bells"), ("In the winter", "it froze", "")]
    section, _, rest = _beside(_tables(texts=made.texts(*said)), shown=WIDE)
    [grid] = rest
    assert grid.header == ("prompt", "dense", "width 56")
    assert list(grid.rows) == said
    assert not grid.numeric
    assert section.tables == ("plan", "narrow_texts")


def test_a_plan_that_no_longer_holds_what_was_shown_is_told_without_it():
    """As where a second plan stopped after its table."""
    assert narrowing.before_after_section(_tables(), made.facts(shown={"basis": "learned", "width": 8})) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_candidate_whose_kl_is_no_number_is_left_out_of_the_figure(value):
    plan = made.frame(made.narrow("raw", 56, 0.02), made.narrow("random", 56, value))
    fig = figures.narrowing_plan(plan, "parameters")
    assert "random" not in _points(fig)
    assert _points(fig)["raw"]
