"""One scale for what a change of a model costs: the KL from the unchanged model, beside that of rounding its weights.

The marks are the KL of Llama-3-8B with rounded weights to itself in full precision, on WikiText-2, from the README of the
perplexity tool of llama.cpp: q8_0 0.0014, q4_K_M 0.031, q2_K 0.445 nats. Other models lie elsewhere on this scale.
"""

import math
from dataclasses import dataclass
from typing import Literal

from dimscope.texts.window_sums import Interval

Judgement = Literal["within", "above", "undecided"]


@dataclass(frozen=True, slots=True)
class Mark:
    """A KL in nats, and the rounding of weights that costs as much."""

    kl: float
    name: str


MARKS = (Mark(0.0015, "rounding to 8 bits"), Mark(0.03, "rounding to 4 bits"), Mark(0.45, "rounding to 2 bits"))
TOLERANCE = MARKS[1]
"""What every study calls harmless: a KL of no more than this, at the upper end of its 95% interval."""

SCALE_NOTE = (
    "The scale is the KL of Llama-3-8B with rounded weights (llama.cpp, WikiText-2): "
    + ", ".join(f"{mark.kl:g} nats for {mark.name}" for mark in MARKS)
    + ". Other models lie elsewhere on it."
)


def judge(kl: Interval, mark: Mark = TOLERANCE) -> Judgement:
    """Return whether a KL is within a mark, above it, or undecided: its 95% interval has to be on one side.

    Without an interval (one window, or one seed of a random change) it is undecided; a KL that is no number is above.

    >>> judge(Interval(0.02, 0.002, 0.015, 0.025, 8)), judge(Interval(0.02, 0.01, 0.0, 0.04, 8))
    ('within', 'undecided')
    """
    if not math.isfinite(kl.value):
        return "above"
    if kl.low is None or kl.high is None:
        return "undecided"
    return "within" if kl.high <= mark.kl else "above" if kl.low > mark.kl else "undecided"


def probability_within(kl: Interval, mark: Mark = TOLERANCE) -> float | None:
    """Return the probability that the mean KL on the text is within a mark, by Student's t; None for one window.

    >>> round(probability_within(Interval(0.02, 0.005, 0.004, 0.036, 4)), 3)
    0.930
    """
    from scipy.special import stdtr

    if kl.stderr is None or not math.isfinite(kl.value):
        return None
    if kl.stderr == 0:
        return float(kl.value <= mark.kl)
    return float(stdtr(kl.n_groups - 1, (mark.kl - kl.value) / kl.stderr))


def upper_end(kl: Interval) -> float:
    """Return the upper end of the interval of a KL; the KL itself where there is none, infinite where it is no number."""
    if not math.isfinite(kl.value):
        return math.inf
    return kl.value if kl.high is None else kl.high


def two_digits(value: float, *, sign: str = "") -> str:
    """Return a number with two significant digits, and all digits before the decimal point.

    Args:
        value: The number.
        sign: "+" writes the sign of a positive number too.

    >>> two_digits(1.0), two_digits(0.0995), two_digits(0.00002), two_digits(123.4)
    ('1.0', '0.10', '0.000020', '123')
    """
    return f"{value:{sign}.{_decimals(value)}f}"


def with_error(value: float, stderr: float | None, *, sign: str = "") -> str:
    """Return a number with its standard error, which has two significant digits; three digits of a number without one.

    Args:
        value: The number.
        stderr: Its standard error; None where there is none.
        sign: "+" writes the sign of a positive number too.

    >>> with_error(3.7749, 0.281), with_error(-0.0002, 0.000012), with_error(0.5, None, sign="+")
    ('3.77 ± 0.28', '-0.000200 ± 0.000012', '+0.500')
    """
    if not stderr or not math.isfinite(stderr):
        return f"{value:{sign}.{_decimals(value) + 1}f}"
    decimals = _decimals(stderr)
    return f"{value:{sign}.{decimals}f} ± {stderr:.{decimals}f}"


def _decimals(value: float) -> int:
    """Return how many decimals write two significant digits of a number."""
    if not value or not math.isfinite(value):
        return 0
    return max(0, 1 - int(f"{value:.1e}".split("e")[1]))


def with_interval(kl: Interval, n_statements: int = 1) -> str:
    """Return a KL with its interval in words; `n_statements` says how many intervals hold at once.

    >>> with_interval(Interval(0.0212, 0.002, 0.0181, 0.0243, 8))
    'KL 0.021 nats (95% interval 0.018 to 0.024)'
    >>> with_interval(Interval(0.0212, 0.002, 0.0171, 0.0253, 8), 3)
    'KL 0.021 nats (95% interval for 3 at once 0.017 to 0.025)'
    """
    if not math.isfinite(kl.value):
        return "KL not finite"
    if kl.low is None or kl.high is None:
        return f"KL {two_digits(kl.value)} nats (no interval: one window, or one seed)"
    ends = f"{two_digits(max(kl.low, 0.0))} to {two_digits(kl.high)}"
    return f"KL {two_digits(kl.value)} nats ({interval_name(n_statements)} {ends})"


def interval_name(n_statements: int) -> str:
    """Return what an interval is called that holds at once with others: "95% interval for 3 at once"."""
    return "95% interval" if n_statements == 1 else f"95% interval for {n_statements} at once"


def compared(kl: Interval, mark: Mark = TOLERANCE, *, n_statements: int = 1) -> str:
    """Return a KL with its interval, compared with a mark; `n_statements` says how many intervals hold at once.

    >>> compared(Interval(0.0212, 0.002, 0.0181, 0.0243, 8))
    'KL 0.021 nats (95% interval 0.018 to 0.024), within the 0.03 of rounding to 4 bits'
    """
    words = {"within": "within", "above": "above", "undecided": "neither clearly within nor above"}
    return f"{with_interval(kl, n_statements)}, {words[judge(kl, mark)]} the {mark.kl:g} of {mark.name}"
