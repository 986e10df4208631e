"""What the page says about narrowing follows from the plan; the whole text is in the golden page."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import narrowing_tables as planted
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
    return planted.healed(*STAR, kl)


PLANS: dict[str, Callable[[], pl.DataFrame]] = {
    "a usual one": planted.plan,
    "widths and layers in rising order": lambda: planted.plan((32, 48, 56), layers=dict(sorted(planted.DROPPED.items()))),
    "a healed candidate": lambda: planted.plan(planted.WIDTHS, planted.BASES, planted.DROPPED, _star()),
    "one width": lambda: planted.plan((48,)),
    "one basis": lambda: planted.plan(bases=("raw",)),
    "one candidate of a model of one layer": lambda: planted.plan((48,), ("raw",), {}),
    "no layer to drop": lambda: planted.plan(layers={}),
    "nothing timed": lambda: planted.frame(planted.narrow("raw", 48, 0.1) | UNTIMED, planted.dropped(5, 0.2) | UNTIMED),
    "some timed": lambda: planted.frame(planted.narrow("raw", 56, 0.1), planted.narrow("raw", 48, 0.2) | UNTIMED),
    "no KL at all": lambda: planted.frame(planted.narrow("raw", 56, 0.0), planted.dropped(5, 0.0), planted.healed("raw", 56, 0.0)),
    "KL below what is drawn": lambda: planted.frame(planted.narrow("raw", 56, 3e-6), planted.narrow("raw", 48, 2e-4)),
    "KL far apart": lambda: planted.frame(planted.narrow("raw", 56, 2e-4), planted.narrow("raw", 48, 9.7)),
    "widths that make it larger": lambda: planted.frame(planted.narrow("raw", 56, 0.02, parameters=230_000_000)),
    "KL of many nats": lambda: planted.frame(planted.narrow("raw", 56, 12.0), planted.narrow("raw", 48, 19.0)),
}  # fmt: skip


def _tables(plan: pl.DataFrame | None = None, texts: pl.DataFrame | None = None) -> dict[str, pl.DataFrame]:
    tables = {"plan": planted.plan() if plan is None else plan}
    return tables if texts is None else {**tables, "narrow_texts": texts}


def _section(section: Section | None) -> Section:
    assert section is not None
    return section


def _candidates(plan: pl.DataFrame) -> Grid:
    section = _section(narrowing.plan_section(_tables(plan), planted.facts(plan)))
    [grid] = [block for block in section.blocks if isinstance(block, Grid)]
    return grid


def _beside(tables: Tables, **changes: Any) -> tuple[Section, dict[str, tuple[Any, ...]], list[Grid]]:
    """Before and after: the section, its numbers by their name, and the other grids."""
    section = _section(narrowing.before_after_section(tables, planted.facts(tables["plan"], **changes)))
    sides, *rest = [block for block in section.blocks if isinstance(block, Grid)]
    return section, {str(row[0]): row[1:] for row in sides.rows}, rest


def _points(fig: go.Figure) -> dict[str, list[tuple[float, float]]]:
    """Points by trace, to 12 decimals; a trace without any draws nothing."""
    assert len({trace.name for trace in fig.data}) == len(fig.data)
    pairs = {trace.name: zip(trace.x, trace.y, strict=True) for trace in fig.data if len(trace.x)}
    return {name: [_rounded(*point) for point in points] for name, points in pairs.items()}


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
        value = row["parameters"] / planted.PARAMETERS if x == "parameters" else row[x]
        if name is not None and value is not None:
            points.setdefault(name, []).append(_rounded(value, max(row["kl"], 1e-4)))
    return points


# ---- which sections ------------------------------------------------------------------------------------------------


def test_a_plan_is_two_sections():
    sections = NARROWING.load().make_sections(_tables(texts=planted.texts()), planted.facts())
    assert [(s.anchor, s.tables) for s in sections] == [("narrowing", ("plan",)), ("narrow", ("plan", "narrow_texts"))]


@pytest.mark.parametrize(
    ("tables", "changes", "expected"),
    [
        ({}, {}, []),
        ({"narrow_texts": planted.texts()}, {}, []),
        (_tables(planted.plan().clear()), {}, []),
        (_tables(), {"advice": None}, ["narrow"]),
        (_tables(), {"advice": []}, ["narrow"]),
        (_tables(), {"shown": None}, ["narrowing"]),
        (_tables(), {"advice": None, "shown": None}, []),
        (_tables(), {}, ["narrowing", "narrow"]),
        (_tables(texts=planted.texts().clear()), {}, ["narrowing", "narrow"]),
    ],
)
def test_what_is_missing_leaves_its_section_out_and_the_other_in(tables, changes, expected):
    sections = NARROWING.load().make_sections(tables, planted.facts(**changes))
    assert [section.anchor for section in sections] == expected
    assert all(section.tables == ("plan",) for section in sections)


def test_a_run_that_planned_nothing_has_none_of_them():
    facts = replace(planted.facts(), studies={})
    assert NARROWING.load().make_sections(_tables(texts=planted.texts()), facts) == []


def test_the_first_sentence_of_the_advice_is_the_title_and_the_others_are_findings():
    section = _section(narrowing.plan_section(_tables(), planted.facts(advice=["Do this", "for that", "and that"])))
    assert (section.title, section.findings) == ("Do this", ("for that", "and that"))
    assert _section(narrowing.plan_section(_tables(), planted.facts(advice=["Alone"]))).findings == ()


def test_stars_are_explained_only_where_there_are_any():
    section = _section(narrowing.plan_section(_tables(), planted.facts()))
    assert "star" not in section.how_to_read


# ---- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", FIGURES)
@pytest.mark.parametrize("name", PLANS)
def test_the_points_of_a_figure_are_exactly_those_of_the_table_in_the_order_of_their_size(name, x):
    plan = PLANS[name]()
    assert _points(figures.narrowing_plan(plan, x)) == _expected(plan, x)


def test_planted_numbers_are_where_they_belong():
    by_size, by_speed = (_points(figures.narrowing_plan(planted.plan(), x)) for x in FIGURES)
    assert by_size.keys() == by_speed.keys() == {*planted.BASES, DROP}
    # 13 of 200 million parameters stay, the others go with the width.
    assert by_size["raw"] == [(0.883125, 0.02), (0.76625, 0.08), (0.5325, 0.75)]
    assert by_speed["raw"] == [_rounded(64 / 56, 0.02), _rounded(64 / 48, 0.08), (2.0, 0.75)]
    assert by_size[DROP] == [(0.85, 0.03), (0.7, 0.3), (0.55, 1.5)]


def test_what_is_not_timed_is_in_the_figure_by_size_only():
    plan = PLANS["some timed"]()
    assert [len(_points(figures.narrowing_plan(plan, x))["raw"]) for x in FIGURES] == [2, 1]
    assert _points(figures.narrowing_plan(PLANS["nothing timed"](), "prefill_ratio")) == {}


def test_points_say_which_candidate_they_are():
    fig = figures.narrowing_plan(planted.plan(planted.WIDTHS, planted.BASES, planted.DROPPED, _star()), "parameters")
    widths = [f"width {w} of the parameters" for w in ("56, 88%", "48, 77%", "32, 53%")]
    assert list(_trace(fig, "raw").customdata) == widths
    assert list(_trace(fig, DROP).customdata) == [
        f"{n} of the parameters" for n in ("5 layers, 85%", "4 layers, 70%", "3 layers, 55%")
    ]
    assert list(_trace(fig, "normalised, healed").customdata) == ["width 56, healed"]
    for trace in fig.data:
        assert "customdata" in trace.hovertemplate


def test_every_basis_is_a_line_of_its_own_in_its_own_look_and_dropped_layers_are_grey():
    plan = planted.frame(
        *(planted.narrow(basis, width, 0.1) for width in (56, 48) for basis in BASES), planted.dropped(5, 0.1)
    )
    fig = figures.narrowing_plan(plan, "parameters")
    assert [trace.name for trace in fig.data] == [*BASES, DROP]
    for trace in fig.data:
        mark = theme.GAUSSIAN_NULL if trace.name == DROP else theme.basis_mark(trace.name)
        look = (trace.line.color, trace.marker.color, trace.line.dash, trace.marker.symbol, trace.mode)
        assert look == (mark.colour, mark.colour, mark.dash, mark.symbol, "lines+markers")
    red, green, blue = (int(_trace(fig, DROP).line.color[i : i + 2], 16) for i in (1, 3, 5))
    assert max(red, green, blue) - min(red, green, blue) < 24


def test_a_healed_candidate_is_one_larger_star_in_the_colour_of_its_basis():
    fig = figures.narrowing_plan(planted.plan(planted.WIDTHS, planted.BASES, planted.DROPPED, _star()), "prefill_ratio")
    star, line = _trace(fig, "normalised, healed"), _trace(fig, "normalised")
    assert (star.marker.symbol, star.mode, star.marker.color) == ("star", "markers", line.marker.color)
    assert star.marker.size > line.marker.size
    assert _points(fig)["normalised, healed"] == [_rounded(64 / 56, 0.004)]
    assert _points(fig)["normalised"][0] == _rounded(64 / 56, 0.01)


@pytest.mark.parametrize("x", FIGURES)
@pytest.mark.parametrize("name", PLANS)
def test_every_point_and_every_tick_is_in_the_range_of_the_axes(name, x):
    fig = figures.narrowing_plan(PLANS[name](), x)
    drawn = [point for points in _points(fig).values() for point in points]
    if not drawn:  # nothing was timed
        return
    assert fig.layout.yaxis.type == "log"
    low, high = (10**end for end in fig.layout.yaxis.range)
    ticks = fig.layout.yaxis.tickvals
    assert ticks
    assert [float(text) for text in fig.layout.yaxis.ticktext] == pytest.approx(list(ticks), rel=0.06)
    assert list(ticks) == sorted(set(ticks))
    assert len(ticks) > 1
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
    assert all(low < y < high for _, y in drawn)
    if x == "parameters":
        left, right = fig.layout.xaxis.range
        assert left >= 1
        assert all(right < share < left for share, _ in drawn)  # further right it is smaller
    else:
        assert fig.layout.xaxis.range is None


def test_the_two_figures_of_the_page_are_by_size_and_by_speed():
    section = _section(narrowing.plan_section(_tables(), planted.facts()))
    plots = {block.anchor: _points(block.figure) for block in section.blocks if isinstance(block, Plot)}
    assert plots == {anchor: _expected(planted.plan(), x) for x, anchor in FIGURES.items()}


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
    for column, key in (("loss", "loss"), ("rise of the loss", "loss_rise"), ("KL", "kl")):
        for text, value in zip(columns[column], plan[key], strict=True):
            if text == "–":
                continue
            written = str(text).split(" ± ")[0]
            digits = len(written.partition(".")[2])
            assert float(written) == pytest.approx(value, abs=0.51 * 10**-digits)
        assert [text == "–" for text in columns[column]] == [
            column != "loss" and row == 0 for row in range(plan.height)
        ]
    missing = [text == "–" for text in columns["reading"]]
    assert missing == plan["prefill_ratio"].is_null().to_list()


# ---- before and after ----------------------------------------------------------------------------------------------


WIDE = {"basis": "normalised", "width": 56}


def test_the_candidate_of_the_facts_is_shown_healed_where_it_was_healed():
    tables = _tables(planted.plan(planted.WIDTHS, planted.BASES, planted.DROPPED, _star(0.25)))
    kl = "KL to the dense model (nats)"
    assert _beside(tables, shown=WIDE)[1][kl][1] == "0.25"
    assert _beside(tables, shown={"basis": "raw", "width": 56})[1][kl][1] == "0.020"
    assert _beside(tables, shown={"basis": "random", "width": 32})[1]["parameters"][1] == "106,500,000"


def test_the_dense_model_has_its_own_speed_and_not_the_quotient_of_two_medians():
    """It read 1,000 tokens per second by itself; 1,257 of the narrow model by a ratio of 1.14 are 1,100."""
    rows = _beside(_tables(), shown=WIDE)[1]
    assert rows["tokens of a prompt read per second"][:2] == ("1,000", "1,257")


def test_errors_have_two_digits_however_small_they_are():
    plan = planted.frame(
        planted.narrow("raw", 56, 0.00016, kl_stderr=0.000012, loss_rise=-0.0002, loss_rise_stderr=0.0004)
    )
    cells = dict(zip(_candidates(plan).header, _candidates(plan).rows[1], strict=True))
    assert cells["KL"] == "0.000160 ± 0.000012"
    assert cells["rise of the loss"] == "-0.00020 ± 0.00040"


def test_speeds_that_were_not_measured_are_no_rows():
    plan = planted.frame(planted.narrow("raw", 48, 0.1) | UNTIMED)
    rows = _beside(_tables(plan))[1]
    assert "parameters" in rows
    assert not [name for name in rows if "per second" in name]


def test_a_tie_is_explained_where_there_is_one():
    tied, untied = (_beside(_tables(), tied=tied)[0].caveat for tied in (True, False))
    assert tied != untied
    assert tied.endswith(untied)


def test_continuations_are_side_by_side_where_there_were_prompts():
    texts = [("The keeper", "counted ships", "counted bells"), ("In the winter", "it froze", "")]
    section, _, [grid] = _beside(_tables(texts=planted.texts(*texts)), shown=WIDE)
    assert grid.header == ("prompt", "dense", "width 56")
    assert list(grid.rows) == texts
    assert section.tables == ("plan", "narrow_texts")
    assert _beside(_tables(), shown=WIDE)[2] == []


def test_a_plan_without_the_shown_candidate_has_no_such_section():
    """As where a second plan stopped after its table."""
    assert narrowing.before_after_section(_tables(), planted.facts(shown={"basis": "learned", "width": 8})) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_candidate_whose_kl_is_no_number_is_left_out_of_the_figure(value):
    plan = planted.frame(planted.narrow("raw", 56, 0.02), planted.narrow("random", 56, value))
    fig = figures.narrowing_plan(plan, "parameters")
    assert "random" not in _points(fig)
    assert _points(fig)["raw"]
