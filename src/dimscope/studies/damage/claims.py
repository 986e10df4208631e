"""Six beliefs about damage, tested on a model.

They are those of the notebook from which the study grew. There they were formed on one model by reading a few texts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from dimscope.studies.damage.losses import HARMLESS, Draws, Losses, losses_on, sides_of, texts_of

TWO_THIRDS, HUNDRED = 2 / 3, 100 / 896  # of the dimensions; the notebook's hundred are of 896
TOLERANCE = {TWO_THIRDS: 0.05, HUNDRED: 0.03}  # how far from it a tested share may be
N_STDERR = 2  # standard errors by which a difference over seeds must exceed zero
HOLDS, FAILS, PARTLY, UNTESTED = "holds", "does not hold", "holds in part", "not tested"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a test of a belief gives: a verdict, and the numbers it rests on."""

    verdict: str
    evidence: str


def claims_frame(damage: pl.DataFrame) -> pl.DataFrame:
    """Return the outcome of each belief on each text, with the input side changed.

    "Holds" means in every comparison, "does not hold" in none. Where a change is random, a difference counts from two
    standard errors over its seeds on.
    """
    rows = []
    for text in texts_of(damage) if "input" in sides_of(damage) else []:
        losses = losses_on(damage, text, "input")
        for claim, test in CLAIMS.items():
            outcome = test(losses)
            rows.append({"text": text, "claim": claim, "verdict": outcome.verdict, "evidence": outcome.evidence})
    return pl.DataFrame(rows, schema=dict.fromkeys(("text", "claim", "verdict", "evidence"), pl.String))


def _verdict(comparisons: Sequence[bool]) -> str:
    if not comparisons:
        return UNTESTED
    return HOLDS if all(comparisons) else PARTLY if any(comparisons) else FAILS


def costs_less(better: Draws, worse: Draws) -> bool:
    """Whether a change has a lower loss than another one, beyond the spread over their seeds."""
    by_seed = dict(zip(better.seeds, better.values, strict=True))
    pairs = [
        value - by_seed[s] for s, value in zip(worse.seeds, worse.values, strict=True) if s is not None and s in by_seed
    ]
    if pairs:  # the same seeds: differences seed by seed
        stderr = float(np.std(pairs, ddof=1)) / math.sqrt(len(pairs)) if len(pairs) > 1 else 0.0
        return bool(np.mean(pairs) > N_STDERR * stderr)
    variances = [np.var(d.values, ddof=1) / len(d.values) for d in (better, worse) if len(d.values) > 1]
    return bool(worse.mean - better.mean > N_STDERR * math.sqrt(sum(variances)))


Pair = tuple[Draws, Draws]  # the change that a belief calls the better one, then the other


def _pairs(losses: Losses, better: str, worse: str) -> list[Pair]:
    """Return changes of two kinds at equal strength, without those that keep all dimensions: both change nothing."""
    others = {d.strength: d for d in losses.draws(worse)}
    return [(d, others[d.strength]) for d in losses.draws(better) if d.strength in others and (d.kept_share or 0) < 1]


def _compare_pairs(pairs: Sequence[Pair], unit: str) -> Outcome:
    if not pairs:
        return Outcome(UNTESTED, "the two kinds were not measured at equal strength")
    lower = [costs_less(*pair) for pair in pairs]
    better, worse = pairs[len(pairs) // 2]
    middle = f"at {better.strength:g} {unit}: {better} compared with {worse} nats per token"
    return Outcome(_verdict(lower), f"lower loss at {sum(lower)} of {len(lower)} strengths; {middle}")


def _random_beats_svd(losses: Losses) -> Outcome:
    return _compare_pairs(_pairs(losses, "project", "truncate"), "dimensions")


def _rescaling_helps(losses: Losses) -> Outcome:
    return _compare_pairs(_pairs(losses, "project-rescaled", "project"), "dimensions")


def _noise_is_harmless(losses: Losses) -> Outcome:
    noises = [d for d in losses.draws("noise") if 0 < d.strength <= 1]
    if not noises or noises[-1].strength < 1:
        return Outcome(UNTESTED, "noise of one standard deviation was not measured")
    rises = "; ".join(f"{d.strength:g} sd: {losses.rise(d):+.1%}" for d in noises)
    return Outcome(_verdict([losses.rise(d) < HARMLESS for d in noises]), f"change of the loss by noise of {rises}")


def _bias_hurts(losses: Losses) -> Outcome:
    shifts = [pair for pair in _pairs(losses, "noise", "shift") if pair[0].strength > 0]
    truncations = noise_at_equal_error(losses)
    if not shifts and not truncations:
        return Outcome(UNTESTED, "noise was compared with neither a shift nor a truncation of equal error")
    below_shift, below_truncation = (
        [costs_less(*pair) for pair in shifts],
        [t.noise < t.truncation for t in truncations],
    )
    evidence = []
    if shifts:
        evidence.append(
            f"noise costs less than one shift of the same size for all tokens at {sum(below_shift)} of "
            f"{len(below_shift)} strengths"
        )
    if truncations:
        middle = truncations[len(truncations) // 2]
        evidence.append(
            f"noise costs less than truncation of the same relative error at {sum(below_truncation)} of "
            f"{len(below_truncation)} errors (at {middle.error:.2f}: {middle.noise:.2f} compared with "
            f"{middle.truncation:.2f} nats per token)"
        )
    return Outcome(_verdict([*below_shift, *below_truncation]), "; ".join(evidence))


@dataclass(frozen=True, slots=True)
class EqualError:
    """The losses of noise and of a truncation at one relative error of the table."""

    error: float
    noise: float
    truncation: float


def noise_at_equal_error(losses: Losses) -> list[EqualError]:
    """Return every truncation beside noise of its error; noise is interpolated linearly between the tested strengths."""
    noises = [(losses.error(d), d.mean) for d in losses.draws("noise")]
    curve = sorted((error, loss) for error, loss in [(0.0, losses.base), *noises] if error is not None)
    errors, values = [error for error, _ in curve], [loss for _, loss in curve]
    truncations = [(losses.error(d), d.mean) for d in losses.draws("truncate") if (d.kept_share or 0) < 1]
    return [
        EqualError(error, float(np.interp(error, errors, values)), loss)
        for error, loss in truncations
        if error is not None and 0 < error <= errors[-1]
    ]


def _nearest(losses: Losses, share: float) -> list[Draws]:
    """Return of each kind the change that keeps nearest to a share of the dimensions."""
    nearest = []
    for kind in losses.kinds():
        gaps = [(abs(d.kept_share - share), d) for d in losses.draws(kind) if d.kept_share is not None]
        gap, draws = min(gaps, key=lambda pair: pair[0], default=(math.inf, None))
        if draws is not None and gap <= TOLERANCE[share]:
            nearest.append(draws)
    return nearest


def _as_good_as_all(losses: Losses, share: float, decisive: str | None = None) -> Outcome:
    """Test whether some change that keeps a share of the dimensions is harmless; only the decisive kind where it is there."""
    near = _nearest(losses, share)
    if not near:
        return Outcome(UNTESTED, f"no change that keeps about {share:.0%} of the dimensions was measured")
    rises = [
        f"{d.kind} {d.strength:g}: {losses.rise(d):+.1%}, {losses.agreement(d) or 0:.0%} same first choice"
        for d in near
    ]
    chosen = [d for d in near if d.kind == decisive] or near
    harmless = any(losses.rise(d) < HARMLESS for d in chosen)
    return Outcome(_verdict([harmless]), f"change of the loss by {'; '.join(rises)}")


def _two_thirds(losses: Losses) -> Outcome:
    # The notebook's two thirds were those of a rescaled random projection.
    return _as_good_as_all(losses, TWO_THIRDS, decisive="project-rescaled")


def _hundred(losses: Losses) -> Outcome:
    return _as_good_as_all(losses, HUNDRED)


CLAIMS: dict[str, Callable[[Losses], Outcome]] = {
    "A random projection does less damage than truncation by SVD": _random_beats_svd,
    "Rescaling a random projection by d/k helps": _rescaling_helps,
    "Noise is harmless up to the standard deviation of the table": _noise_is_harmless,
    "Attention averages unbiased noise away; a biased direction is what hurts": _bias_hurts,
    "Two thirds of the dimensions answer as well as all": _two_thirds,
    "A ninth of the dimensions (100 of 896) might do": _hundred,
}
