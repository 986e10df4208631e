"""Numbers in words: counts, shares and comparisons that stay grammatical for none, one and many."""

import math
from collections.abc import Sequence


def count(n: int, noun: str, plural: str | None = None) -> str:
    """Return "no tokens", "1 token" or "2,300 tokens"; give `plural` where adding an s is wrong."""
    if n == 1:
        return f"1 {noun}"
    return f"{n:,} {plural or noun + 's'}" if n else f"no {plural or noun + 's'}"


def share(part: float) -> str:
    """Return a share of 1 as a percentage that never rounds something to 0% or a part to 100%."""
    if 0 < part < 0.001:
        return "less than 0.1%"
    if 0.999 < part < 1 - 1e-9:  # what rounding leaves of 1 is 1
        return "more than 99.9%"
    return f"{part:.1%}"


def number(value: float | None) -> str:
    """Return about three significant digits with thousands separators; "–" for a number that does not exist."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 100 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.2g}"


def magnitude(n: int) -> str:
    """Return a count of parameters in words: "494 million", "1.54 billion", "260,032"."""
    for size, name in ((1_000_000_000, "billion"), (1_000_000, "million")):
        if n >= size:
            return f"{n / size:.3g} {name}"
    return f"{n:,}"


def against(value: float, null: float | None, of: str = "a random table") -> str:
    """Compare a measurement with its null in words: "far fewer than the 889 of a random table"."""
    if null is None or not math.isfinite(null) or null <= 0:
        return "no random table to compare with"
    ratio, reference = value / null, f"the {number(null)} of {of}"
    if ratio < 0.5:
        return f"far fewer than {reference}"
    if ratio < 0.97:
        return f"fewer than {reference}"
    return f"about as many as {reference}" if ratio <= 1.03 else f"more than {reference}"


def sentence(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]


def listed(words: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
