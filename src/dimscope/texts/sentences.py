"""A text as sentences or lines, each of which becomes one vector."""

import re
from collections.abc import Iterator
from typing import Literal

from dimscope.errors import InvalidArgument
from dimscope.texts.texts import Text

Unit = Literal["sentence", "line"]
# The end of a sentence: closing punctuation, perhaps quotes, then white space before a capital, a digit or a quote.
SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-ZÀ-ÞА-Я0-9])")
SHORTEST = 3  # words of a sentence; shorter ones are headings, numbers and initials


def spread_units(text: Text, unit: Unit, count: int) -> list[str]:
    """Return sentences or lines of a text, `count` at most, evenly spread over it.

    White space within a sentence becomes one space, so that line breaks of the page do not matter.

    Raises:
        InvalidArgument: The text has fewer than two.
    """
    units = list(_lines(text) if unit == "line" else _sentences(text))
    if len(units) < 2:
        raise InvalidArgument(f"{text.name}: there are {len(units)} {unit}s in it, and vectors need 2 or more")
    chosen = min(count, len(units))
    return [units[i * len(units) // chosen] for i in range(chosen)]


def _lines(text: Text) -> Iterator[str]:
    rest = ""
    for piece in text.pieces():
        *whole, rest = (rest + piece).split("\n")
        yield from (line.strip() for line in whole if line.strip())
    if rest.strip():
        yield rest.strip()


def _sentences(text: Text) -> Iterator[str]:
    rest = ""
    for piece in text.pieces():
        *whole, rest = re.split(r"\n\s*\n", rest + piece)
        for paragraph in whole:
            yield from _of_paragraph(paragraph)
    yield from _of_paragraph(rest)


def _of_paragraph(paragraph: str) -> Iterator[str]:
    for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
        if len(sentence.split()) >= SHORTEST:
            yield sentence
