"""Comparisons of the KL of changes, and the steps by which several of them hold at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from dimscope.evaluation.replicates import Replicates
from dimscope.evaluation.yardstick import judge
from dimscope.studies.damage.losses import Draws, Losses
from dimscope.texts.window_sums import Interval


def difference(better: Replicates, worse: Replicates, n_statements: int = 1) -> Interval | None:
    """Return how much more one change costs than another, with its paired interval; None where that is not known.

    A random change needs several seeds: one tells nothing about others.

    Args:
        better: The cost of one change.
        worse: The cost of the other.
        n_statements: Comparisons whose intervals have to hold at once.
    """
    gap = worse.minus(better)
    return gap.interval(n_statements) if gap is not None and gap.repeated and len(gap.values) else None


def costs_less(better: Replicates, worse: Replicates, n_statements: int = 1) -> bool | None:
    """Whether a change costs less than another one; None where the interval of the difference has both signs.

    Args:
        better: The cost of one change.
        worse: The cost of the other.
        n_statements: Comparisons whose intervals have to hold at once.
    """
    gap = difference(better, worse, n_statements)
    if gap is None or gap.low is None or gap.high is None:
        return None
    return True if gap.low > 0 else False if gap.high < 0 else None


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to one of several questions whose answers hold at once.

    Attributes:
        answer: Yes or no; None where it is undecided.
        n_statements: For how many statements the interval is that decides, or that leaves it undecided.
    """

    answer: bool | None
    n_statements: int


def decided_at_once(questions: Sequence[Callable[[int], bool | None]], n_sets: int = 1) -> list[Decision]:
    """Answer questions such that all answers hold at once in 95% of samples.

    By the steps of Holm (1979): each question is answered by an interval for as many statements as there are questions,
    then those that are left by intervals for as many statements as are left, until no further one is decided.

    Args:
        questions: Answer by an interval for a number of statements; None where that leaves it undecided.
        n_sets: Sets of questions, such as those of several texts, whose answers have to hold at once.
    """
    decisions = [Decision(None, n_sets * len(questions))] * len(questions)
    n_left, n_before = len(questions), len(questions) + 1
    while 0 < n_left < n_before:
        n = n_sets * n_left
        decisions = [
            Decision(ask(n), n) if decision.answer is None else decision
            for ask, decision in zip(questions, decisions, strict=True)
        ]
        n_left, n_before = sum(decision.answer is None for decision in decisions), n_left
    return decisions


def lower_at_once(pairs: Sequence[tuple[Replicates, Replicates]], n_sets: int = 1) -> list[Decision]:
    """Decide for each pair of costs whether the first is the lower one; see `decided_at_once`."""
    return decided_at_once([partial(costs_less, *pair) for pair in pairs], n_sets)


def harmless_at_once(changes: Sequence[Draws]) -> list[Decision]:
    """Decide for each change whether its KL is within the tolerance; see `decided_at_once`."""
    return decided_at_once([partial(_harmless, draws) for draws in changes])


def _harmless(draws: Draws, n_statements: int) -> bool | None:
    return {"within": True, "above": False, "undecided": None}[judge(draws.kl_of(n_statements))]


# ---- noise beside a truncation ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EqualError:
    """The KL of noise and of a truncation at one relative error of the table."""

    error: float
    noise: Replicates
    truncation: Replicates


def noise_at_equal_error(losses: Losses) -> list[EqualError]:
    """Return every truncation beside noise of its error; noise is interpolated between the tested strengths."""
    noises = [(losses.error(d), d.mean("kl")) for d in losses.draws("noise") if d.strength > 0]
    curve = sorted(((error, kl) for error, kl in noises if error is not None), key=lambda point: point[0])
    equal = []
    for draws in losses.draws("truncate"):
        error = losses.error(draws)
        noise = None if error is None else _interpolated(curve, error)
        if error is not None and noise is not None and (draws.kept_share or 0) < 1:
            equal.append(EqualError(error, noise, draws.mean("kl")))
    return equal


def _interpolated(curve: Sequence[tuple[float, Replicates]], error: float) -> Replicates | None:
    """Return the KL at an error of a curve that begins at 0; None beyond its end.

    The KL of small changes grows as the square of the error, so it is interpolated linearly in that square.
    """
    after = next((n for n, (end, _) in enumerate(curve) if error <= end), None)
    if after is None or error <= 0:
        return None
    end, high = curve[after]
    if after == 0:
        return high.times((error / end) ** 2)
    start, low = curve[after - 1]
    step = high.minus(low)
    return None if step is None else high.minus(step.times((end**2 - error**2) / (end**2 - start**2)))
