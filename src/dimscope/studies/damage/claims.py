"""Six beliefs about damage, tested on a model.

They are those of the notebook from which the study grew. There they were formed on one model by reading a few texts.
Damage is the KL from the undamaged model; what is harmless is within the tolerance of the yardstick of all studies.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl

from dimscope.evaluation.replicates import Replicates
from dimscope.evaluation.yardstick import compared, interval_name, judge
from dimscope.studies.damage.losses import Draws, Losses, losses_on, sides_of, texts_of
from dimscope.studies.damage.plan import UNDAMAGED
from dimscope.texts.window_sums import Interval

TWO_THIRDS, HUNDRED = 2 / 3, 100 / 896  # of the dimensions; the notebook's hundred are of 896
TOLERANCE = {TWO_THIRDS: 0.05, HUNDRED: 0.03}  # how far from it a tested share may be
HOLDS, FAILS, PARTLY, UNDECIDED, UNTESTED = "holds", "does not hold", "holds in part", "cannot tell", "not tested"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a test of a belief gives: a verdict, and the numbers it rests on."""

    verdict: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Measured:
    """What the beliefs are tested on: the cost of the changes, and the continuations of prompts where there are any."""

    losses: Losses
    generations: pl.DataFrame | None = None


def claims_frame(damage: pl.DataFrame, windows: pl.DataFrame, generations: pl.DataFrame | None = None) -> pl.DataFrame:
    """Return the outcome of each belief on each text, with the input side changed.

    "Holds" means in every comparison, "holds in part" in some, "does not hold" in none and against the belief in some.
    A comparison counts where its 95% interval over windows, and over seeds where a change is random, is on one side; the
    intervals of a belief hold at once (Bonferroni), because its verdict rests on all of them. A belief "cannot tell" where
    no comparison is decided. On a text that the undamaged model reads no better than its unigrams no belief can be tested.
    """
    rows = []
    for text in texts_of(damage) if "input" in sides_of(damage) else []:
        measured = Measured(losses_on(damage, windows, text, "input"), generations)
        unreadable = measured.losses.unreadable
        for claim, test in CLAIMS.items():
            outcome = test(measured)
            if unreadable is not None and outcome.verdict != UNTESTED:
                outcome = Outcome(UNDECIDED, unreadable)
            rows.append({"text": text, "claim": claim, "verdict": outcome.verdict, "evidence": outcome.evidence})
    return pl.DataFrame(rows, schema=dict.fromkeys(("text", "claim", "verdict", "evidence"), pl.String))


def _verdict(comparisons: Sequence[bool | None]) -> str:
    """Return the verdict of comparisons that are for a belief, against it, or undecided (None)."""
    if not comparisons:
        return UNTESTED
    if all(comparisons):
        return HOLDS
    return PARTLY if any(comparisons) else FAILS if False in comparisons else UNDECIDED


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


def lower_at_once(pairs: Sequence[tuple[Replicates, Replicates]], n_sets: int = 1) -> list[bool | None]:
    """Return for each pair of costs whether the first is the lower one, such that all answers hold at once in 95% of samples.

    By the steps of Holm (1979): each pair is compared by an interval for as many statements as there are pairs, then those
    that are left by intervals for as many statements as are left, until no further one is decided.

    Args:
        pairs: The pairs of costs.
        n_sets: Sets of pairs, such as those of several texts, whose answers have to hold at once.
    """
    lower: list[bool | None] = [None] * len(pairs)
    n_left = len(pairs) + 1
    while 0 < lower.count(None) < n_left:
        n_left = lower.count(None)
        lower = [
            costs_less(*pair, n_sets * n_left) if less is None else less
            for pair, less in zip(pairs, lower, strict=True)
        ]
    return lower


Pair = tuple[Draws, Draws]  # the change that a belief calls the better one, then the other


def _pairs(losses: Losses, better: str, worse: str) -> list[Pair]:
    """Return changes of two kinds at equal strength, without those that keep all dimensions: both change nothing."""
    others = {d.strength: d for d in losses.draws(worse)}
    return [(d, others[d.strength]) for d in losses.draws(better) if d.strength in others and (d.kept_share or 0) < 1]


def _compare_pairs(pairs: Sequence[Pair], unit: str) -> Outcome:
    if not pairs:
        return Outcome(UNTESTED, "the two kinds were not measured at equal strength")
    lower = [costs_less(a.mean("kl"), b.mean("kl"), len(pairs)) for a, b in pairs]
    better, worse = pairs[len(pairs) // 2]
    middle = f"at {better.strength:g} {unit}: {_gap(better.mean('kl'), worse.mean('kl'), len(pairs))}"
    return Outcome(_verdict(lower), f"{_counts(lower, 'strengths')}; {middle}")


def _counts(lower: Sequence[bool | None], noun: str) -> str:
    undecided = f", undecided at {lower.count(None)}" if None in lower else ""
    return f"lower KL at {lower.count(True)} of {len(lower)} {noun}{undecided}"


def _gap(better: Replicates, worse: Replicates, n_statements: int) -> str:
    """Return two costs and their difference in words, with the interval that the verdict rests on."""
    costs = f"KL {float(better.values.mean()):.2g} compared with {float(worse.values.mean()):.2g} nats"
    gap = difference(worse, better, n_statements)
    if gap is None or gap.low is None or gap.high is None:
        return f"{costs} (no interval of the difference: one window, or one seed)"
    return f"{costs} (difference {gap.value:+.2g}, {interval_name(n_statements)} {gap.low:+.2g} to {gap.high:+.2g})"


def _random_beats_svd(measured: Measured) -> Outcome:
    return _compare_pairs(_pairs(measured.losses, "project", "truncate"), "dimensions")


def _rescaling_helps(measured: Measured) -> Outcome:
    return _compare_pairs(_pairs(measured.losses, "project-rescaled", "project"), "dimensions")


def _harmless(draws: Draws, n_statements: int) -> bool | None:
    return {"within": True, "above": False, "undecided": None}[judge(draws.kl_of(n_statements))]


def _noise_is_harmless(measured: Measured) -> Outcome:
    noises = [d for d in measured.losses.draws("noise", overflown=True) if 0 < d.strength <= 1]
    if not noises or noises[-1].strength < 1:
        return Outcome(UNTESTED, "noise of one standard deviation was not measured")
    n = len(noises)
    evidence = "; ".join(f"noise of {d.strength:g} sd: {compared(d.kl_of(n), n_statements=n)}" for d in noises)
    return Outcome(_verdict([_harmless(d, n) for d in noises]), evidence)


def _bias_hurts(measured: Measured) -> Outcome:
    losses = measured.losses
    shifts = [pair for pair in _pairs(losses, "noise", "shift") if pair[0].strength > 0]
    truncations = noise_at_equal_error(losses)
    if not shifts and not truncations:
        return Outcome(UNTESTED, "noise was compared with neither a shift nor a truncation of equal error")
    n = len(shifts) + len(truncations)
    below_shift = [costs_less(a.mean("kl"), b.mean("kl"), n) for a, b in shifts]
    below_truncation = [costs_less(t.noise, t.truncation, n) for t in truncations]
    evidence = []
    if shifts:
        evidence.append(
            f"noise compared with one shift of the same size for all tokens: {_counts(below_shift, 'strengths')}"
        )
    if truncations:
        middle = truncations[len(truncations) // 2]
        evidence.append(
            f"noise compared with truncation of the same relative error: {_counts(below_truncation, 'errors')} (at "
            f"{middle.error:.2f}: {_gap(middle.noise, middle.truncation, n)})"
        )
    return Outcome(_verdict([*below_shift, *below_truncation]), "; ".join(evidence))


@dataclass(frozen=True, slots=True)
class EqualError:
    """The KL of noise and of a truncation at one relative error of the table."""

    error: float
    noise: Replicates
    truncation: Replicates


def noise_at_equal_error(losses: Losses) -> list[EqualError]:
    """Return every truncation beside noise of its error; noise is interpolated linearly between the tested strengths."""
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
    """Return the KL at an error of a curve that begins at 0; None beyond its end."""
    after = next((n for n, (end, _) in enumerate(curve) if error <= end), None)
    if after is None or error <= 0:
        return None
    end, high = curve[after]
    if after == 0:
        return high.times(error / end)
    start, low = curve[after - 1]
    step = high.minus(low)
    return None if step is None else high.minus(step.times((end - error) / (end - start)))


def _nearest(losses: Losses, share: float) -> list[Draws]:
    """Return of each kind the change that keeps nearest to a share of the dimensions."""
    nearest = []
    for kind in losses.kinds():
        gaps = [(abs(d.kept_share - share), d) for d in losses.draws(kind) if d.kept_share is not None]
        gap, draws = min(gaps, key=lambda pair: pair[0], default=(math.inf, None))
        if draws is not None and gap <= TOLERANCE[share]:
            nearest.append(draws)
    return nearest


def _as_good_as_all(measured: Measured, share: float, decisive: str | None = None) -> Outcome:
    """Test whether some change that keeps a share of the dimensions is harmless; only the decisive kind where it is there."""
    near = _nearest(measured.losses, share)
    if not near:
        return Outcome(UNTESTED, f"no change that keeps about {share:.0%} of the dimensions was measured")
    judging = [d for d in near if d.kind == decisive] or near
    n = len(judging)
    evidence = [
        f"{d.kind} {d.strength:g}: {compared(d.kl_of(n), n_statements=n)}, "
        f"{d.mean('top_1').interval().value:.0%} of first choices{_same_answers(measured, d)} the same"
        for d in near
    ]
    judged = [_harmless(d, n) for d in judging]
    verdict = HOLDS if True in judged else UNDECIDED if None in judged else FAILS
    return Outcome(verdict, "; ".join(evidence))


def _same_answers(measured: Measured, draws: Draws) -> str:
    """Return how many continuations of the prompts are those of the undamaged model, after "n% of first choices"."""
    if measured.generations is None:
        return ""
    frame = measured.generations.with_columns(text=pl.col("ids").list.eval(pl.element().cast(pl.String)).list.join(" "))
    own = frame.filter(pl.col("kind") == UNDAMAGED).select("number", own="text")
    answers = frame.filter(
        (pl.col("kind") == draws.kind) & (pl.col("strength") == draws.strength) & (pl.col("side") == "input")
    ).join(own, on="number")
    same = answers.filter(pl.col("text") == pl.col("own")).height
    return f" and {same} of {answers.height} continuations" if answers.height else ""


def _two_thirds(measured: Measured) -> Outcome:
    # The notebook's two thirds were those of a rescaled random projection.
    return _as_good_as_all(measured, TWO_THIRDS, decisive="project-rescaled")


def _hundred(measured: Measured) -> Outcome:
    return _as_good_as_all(measured, HUNDRED)


CLAIMS: dict[str, Callable[[Measured], Outcome]] = {
    "A random projection does less damage than truncation by SVD": _random_beats_svd,
    "Rescaling a random projection by d/k helps": _rescaling_helps,
    "Noise is harmless up to the standard deviation of the table": _noise_is_harmless,
    "Attention averages unbiased noise away; a biased direction is what hurts": _bias_hurts,
    "Two thirds of the dimensions answer as well as all": _two_thirds,
    "A ninth of the dimensions (100 of 896) might do": _hundred,
}
