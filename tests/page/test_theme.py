"""The palette's promises: legible on both pages, one colour for one meaning."""

import itertools

import pytest

from dimscope.page import theme


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


DATA_COLOURS = {
    *(mark.colour for mark in theme.CATEGORY_MARKS.values()),
    *(mark.colour for mark in (theme.MEASURED, theme.GAUSSIAN_NULL, theme.PERMUTED_NULL, theme.HIGHLIGHT)),
    *theme.ROLE_COLOURS.values(),
    *(mark.colour for mark in (*theme.CONDITION_MARKS.values(), *theme.SERIES_MARKS)),
}


@pytest.mark.parametrize(("colour", "name"), list(itertools.product(sorted(DATA_COLOURS), theme.SURFACES)))
def test_data_colours_stand_out_on_both_pages(colour: str, name: theme.ThemeName) -> None:
    # WCAG 2 asks 3:1 of graphics.
    assert _contrast(colour, theme.SURFACES[name].background) >= 3


@pytest.mark.parametrize("name", list(theme.SURFACES))
def test_text_is_legible_on_page_and_panel(name: theme.ThemeName) -> None:
    surface = theme.SURFACES[name]
    for ground in (surface.background, surface.panel):
        # WCAG 2 asks 4.5:1 of text.
        assert min(_contrast(text, ground) for text in (surface.text, surface.muted, surface.accent)) >= 4.5


def test_categories_differ_in_colour_and_in_shape() -> None:
    marks = theme.CATEGORY_MARKS.values()
    assert len({mark.colour for mark in marks}) == len({mark.symbol for mark in marks}) == 6


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(2, 30, [1, 2, 5, 10, 20, 50, 100, 200, 500]), (1, 10_000, [1, 10, 100, 1000, 10_000])],
)
def test_log_ticks_thin_out_over_long_ranges(low: float, high: float, expected: list[float]) -> None:
    assert theme.log_ticks(low, high) == expected
