"""Six beliefs about damage, tested on a model.

They are those of the notebook from which the study grew. There they were formed on one model by reading a few texts.
Damage is the KL from the undamaged model; what is harmless is within the tolerance of the yardstick of all studies.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl

from dimscope.evaluation.replicates import Replicates
from dimscope.evaluation.yardstick import compared, interval_name, two_digits
from dimscope.studies.damage.comparisons import (
    Decision,
    difference,
    harmless_at_once,
    lower_at_once,
    noise_at_equal_error,
)
from dimscope.studies.damage.losses import Draws, Losses, losses_on, sides_of, texts_of
from dimscope.studies.damage.plan import UNDAMAGED

TWO_THIRDS, HUNDRED = 2 / 3, 100 / 896  # of the dimensions; the notebook's hundred are of 896
TOLERANCE = {TWO_THIRDS: 0.05, HUNDRED: 0.03}  # how far from it a tested share may be
HOLDS, FAILS, PARTLY, UNDECIDED, UNTESTED = "holds", "does not hold", "holds in part", "undecided", "not tested"
UNREADABLE = "cannot tell"  # where the text is not predicted clearly better than by its token frequencies


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

    A belief about several comparisons "holds" if all agree with it, "holds in part" if some do, "does not hold" if none does
    and some are against it, and is "undecided" if none is decided. A belief about a share of the dimensions "holds" if one
    change that keeps it is harmless. A comparison is decided where its 95% interval over windows, and over seeds where a
    change is random, is on one side; the comparisons of a belief hold at once (the steps of Holm 1979). On a text that the
    undamaged model predicts no better than its token frequencies would, the verdict is "cannot tell".
    """
    rows = []
    for text in texts_of(damage) if "input" in sides_of(damage) else []:
        measured = Measured(losses_on(damage, windows, text, "input"), generations)
        for claim, test in CLAIMS.items():
            outcome = test(measured)
            if measured.losses.unreadable and outcome.verdict != UNTESTED:
                outcome = Outcome(
                    UNREADABLE, "the model predicts this text not clearly better than its token frequencies would"
                )
            rows.append({"text": text, "claim": claim, "verdict": outcome.verdict, "evidence": outcome.evidence})
    return pl.DataFrame(rows, schema=dict.fromkeys(("text", "claim", "verdict", "evidence"), pl.String))


def _verdict(comparisons: Sequence[bool | None]) -> str:
    """Return the verdict of comparisons that are for a belief, against it, or undecided (None)."""
    if not comparisons:
        return UNTESTED
    if all(comparisons):
        return HOLDS
    return PARTLY if any(comparisons) else FAILS if False in comparisons else UNDECIDED


Pair = tuple[Draws, Draws]  # the change that a belief calls the better one, then the other


def _pairs(losses: Losses, better: str, worse: str) -> list[Pair]:
    """Return changes of two kinds at equal strength, without those that keep all dimensions: both change nothing."""
    others = {d.strength: d for d in losses.draws(worse)}
    return [(d, others[d.strength]) for d in losses.draws(better) if d.strength in others and (d.kept_share or 0) < 1]


def _compare_pairs(pairs: Sequence[Pair], unit: str) -> Outcome:
    if not pairs:
        return Outcome(UNTESTED, "the two kinds were not measured at equal strength")
    lower = _lower(pairs)
    better, worse = pairs[len(pairs) // 2]
    gap = _gap(better.mean("kl"), worse.mean("kl"), lower[len(pairs) // 2].n_statements)
    return Outcome(
        _verdict([d.answer for d in lower]), f"{_counts(lower, 'strengths')}; at {better.strength:g} {unit}: {gap}"
    )


def _lower(pairs: Sequence[Pair]) -> list[Decision]:
    return lower_at_once([(a.mean("kl"), b.mean("kl")) for a, b in pairs])


def _counts(lower: Sequence[Decision], noun: str) -> str:
    """Return at how many of several strengths the KL is lower, higher and undecided."""
    answers = [decision.answer for decision in lower]
    others = (("higher", answers.count(False)), ("undecided", answers.count(None)))
    rest = "".join(f", {word} at {n}" for word, n in others if n)
    return f"lower KL at {answers.count(True)} of {len(lower)} {noun}{rest}"


def _gap(better: Replicates, worse: Replicates, n_statements: int) -> str:
    """Return two costs and their difference in words, with the interval that decides, or leaves it undecided."""
    costs = " compared with ".join(two_digits(float(cost.values.mean())) for cost in (better, worse))
    gap = difference(worse, better, n_statements)
    if gap is None or gap.low is None or gap.high is None:
        return f"KL {costs} nats (no interval of the difference: one window, or one seed)"
    value, low, high = (two_digits(number, sign="+") for number in (gap.value, gap.low, gap.high))
    return f"KL {costs} nats (difference {value}, {interval_name(n_statements)} {low} to {high})"


def _random_beats_svd(measured: Measured) -> Outcome:
    return _compare_pairs(_pairs(measured.losses, "project", "truncate"), "dimensions")


def _rescaling_helps(measured: Measured) -> Outcome:
    return _compare_pairs(_pairs(measured.losses, "project-rescaled", "project"), "dimensions")


def _noise_is_harmless(measured: Measured) -> Outcome:
    noises = [d for d in measured.losses.draws("noise", overflown=True) if 0 < d.strength <= 1]
    if not noises or noises[-1].strength < 1:
        return Outcome(UNTESTED, "noise of one standard deviation was not measured")
    harmless = harmless_at_once(noises)
    evidence = [f"noise of {d.strength:g} sd: {_judged(d, of)}" for d, of in zip(noises, harmless, strict=True)]
    return Outcome(_verdict([of.answer for of in harmless]), "; ".join(evidence))


def _judged(draws: Draws, decision: Decision) -> str:
    """Return a KL compared with the tolerance, with the interval that decides, or leaves it undecided."""
    return compared(draws.kl_of(decision.n_statements), n_statements=decision.n_statements)


def _bias_hurts(measured: Measured) -> Outcome:
    losses = measured.losses
    shifts = [pair for pair in _pairs(losses, "noise", "shift") if pair[0].strength > 0]
    truncations = noise_at_equal_error(losses)
    if not shifts and not truncations:
        return Outcome(UNTESTED, "noise was compared with neither a shift nor a truncation of equal error")
    pairs = [*((a.mean("kl"), b.mean("kl")) for a, b in shifts), *((t.noise, t.truncation) for t in truncations)]
    lower = lower_at_once(pairs)
    below_shift, below_truncation = lower[: len(shifts)], lower[len(shifts) :]
    evidence = []
    if shifts:
        evidence.append(
            f"noise compared with one shift of the same size for all tokens: {_counts(below_shift, 'strengths')}"
        )
    if truncations:
        middle = len(truncations) // 2
        equal, decision = truncations[middle], below_truncation[middle]
        evidence.append(
            "noise, interpolated between its tested strengths, compared with truncation of the same relative error: "
            f"{_counts(below_truncation, 'errors')}; at a relative error of {equal.error:.2f}: "
            f"{_gap(equal.noise, equal.truncation, decision.n_statements)}"
        )
    return Outcome(_verdict([decision.answer for decision in lower]), "; ".join(evidence))


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
    harmless = harmless_at_once(judging)
    of_kind = {d.kind: decision for d, decision in zip(judging, harmless, strict=True)}
    evidence = [
        f"{d.kind} {d.strength:g}: {_judged(d, of_kind.get(d.kind, Decision(None, 1)))}, "
        f"{d.mean('top_1').interval().value:.0%} of first choices{_same_answers(measured, d)}"
        for d in near
    ]
    answers = [decision.answer for decision in harmless]
    verdict = HOLDS if True in answers else UNDECIDED if None in answers else FAILS
    return Outcome(verdict, "; ".join(evidence))


def _same_answers(measured: Measured, draws: Draws) -> str:
    """Return after "n% of first choices" that they are the same, and how many continuations of the prompts are."""
    if measured.generations is None:
        return " the same"
    frame = measured.generations.with_columns(text=pl.col("ids").list.eval(pl.element().cast(pl.String)).list.join(" "))
    own = frame.filter(pl.col("kind") == UNDAMAGED).select("number", own="text")
    answers = frame.filter(
        (pl.col("kind") == draws.kind) & (pl.col("strength") == draws.strength) & (pl.col("side") == "input")
    ).join(own, on="number")
    same = answers.filter(pl.col("text") == pl.col("own")).height
    if answers.height == 1:
        return f" the same, the continuation {'is the same' if same else 'differs'}"
    return f"{f' and {same} of {answers.height} continuations' if answers.height else ''} the same"


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
