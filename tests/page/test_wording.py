"""Words for numbers."""

import pytest

from dimscope.page import wording


@pytest.mark.parametrize(("n", "words"), [(0, "no tokens"), (1, "1 token"), (2300, "2,300 tokens")])
def test_count(n: int, words: str) -> None:
    assert wording.count(n, "token") == words


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (0, "0.0%"),
        (0.0001, "less than 0.1%"),
        (0.27556, "27.6%"),
        (0.99999, "more than 99.9%"),
        (1 - 1e-13, "100.0%"),
        (1, "100.0%"),
    ],
)
def test_share_never_rounds_something_away(part: float, words: str) -> None:
    assert wording.share(part) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (12345.6, "12,346"),
        (3.14159, "3.14"),
        (2.0, "2"),
        (-0.0004, "-0.0004"),
        (0, "0"),
    ],
)
def test_number(value: float | None, words: str) -> None:
    assert wording.number(value) == words


@pytest.mark.parametrize(
    ("n", "words"), [(260_032, "260,032"), (494_032_768, "494 million"), (1_540_000_000, "1.54 billion")]
)
def test_magnitude(n: int, words: str) -> None:
    assert wording.magnitude(n) == words


@pytest.mark.parametrize("null", [None, float("nan"), 0.0])
def test_against_nothing_compares_nothing(null: float | None) -> None:
    assert wording.against(3.0, null) == "no random table to compare with"
