"""What the measured damage says: where each kind breaks the model, and which beliefs about it hold on this model.

The six beliefs are those of the notebook from which the study grew. They were formed on one model by reading a few texts;
here each is tested on the model in hand, and held to numbers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from dimscope.studies.damage.plan import UNDAMAGED
from dimscope.studies.damage.tables import LOSS, RELATIVE, TOP_1

THRESHOLDS = (0.1, 0.5)  # rises of the loss, as shares of the loss of the model as it is
HARMLESS = THRESHOLDS[0]
TWO_THIRDS, HUNDRED = 2 / 3, 100 / 896  # of the dimensions; the notebook's hundred are of 896
NEAR = {TWO_THIRDS: 0.05, HUNDRED: 0.03}  # how far from it a tested share may be
ERRORS = 2  # standard errors by which a difference over seeds must exceed nothing
HOLDS, FAILS, PARTLY, UNTESTED = "holds", "does not hold", "holds in part", "not tested"


@dataclass(frozen=True, slots=True)
class Draws:
    """The losses of one change over its seeds, in their order."""

    kind: str
    strength: float
    kept: float | None
    values: tuple[float, ...]
    seeds: tuple[int | None, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    def told(self) -> str:
        spread = f" ± {np.std(self.values, ddof=1):.2f}" if len(self.values) > 1 else ""
        return f"{self.mean:.2f}{spread}"


class Losses:
    """The losses on one text with one side changed, by kind; changes with losses that are no numbers are left out."""

    def __init__(self, damage: pl.DataFrame, on: str, side: str) -> None:
        self.rows = damage.filter((pl.col("side") == side) | (pl.col("kind") == UNDAMAGED))
        self.on = on

    @cached_property
    def base(self) -> float:
        return self._values(LOSS).filter(pl.col("kind") == UNDAMAGED)["value"][0]

    def _values(self, metric: str) -> pl.DataFrame:
        return self.rows.filter((pl.col("metric") == metric) & (pl.col("on") == self.on) & pl.col("value").is_finite())

    def of(self, kind: str, *, overflown: bool = False) -> list[Draws]:
        """The changes of a kind with a strength, weakest number first; with those whose loss is no number, as infinite."""
        losses = self.rows.filter((pl.col("metric") == LOSS) & (pl.col("on") == self.on))
        rows = losses.with_columns(pl.col("value").fill_null(math.inf)) if overflown else self._values(LOSS)
        rows = rows.filter((pl.col("kind") == kind) & pl.col("strength").is_not_null())
        groups = rows.sort("strength", "seed").group_by("strength", "kept", maintain_order=True).agg("value", "seed")
        return [Draws(kind, *place, tuple(values), tuple(seeds)) for *place, values, seeds in groups.iter_rows()]

    def kinds(self) -> list[str]:
        """All kinds with strengths, in the order in which they were asked."""
        strong = self.rows.filter(pl.col("strength").is_not_null())
        return strong["kind"].unique(maintain_order=True).to_list()

    def rise(self, draws: Draws) -> float:
        """The share by which the loss is higher than that of the model as it is."""
        return draws.mean / self.base - 1 if self.base else math.nan

    def agreement(self, draws: Draws) -> float | None:
        """How often the first choice is that of the model as it is."""
        rows = self._values(TOP_1).filter((pl.col("kind") == draws.kind) & (pl.col("strength") == draws.strength))
        return float(rows["value"].to_numpy().mean()) if rows.height else None

    def error(self, kind: str, strength: float) -> float | None:
        """The relative error of a change of the table."""
        rows = self.rows.filter(
            (pl.col("metric") == RELATIVE) & (pl.col("kind") == kind) & (pl.col("strength") == strength)
        )
        return float(rows["value"].to_numpy().mean()) if rows.height else None


def texts_of(damage: pl.DataFrame) -> list[str]:
    """The texts that were judged, in their order."""
    return damage.filter(pl.col("metric") == LOSS)["on"].unique(maintain_order=True).to_list()


def sides_of(damage: pl.DataFrame) -> list[str]:
    """The sides that were changed, in their order."""
    return damage.filter(pl.col("kind") != UNDAMAGED)["side"].unique(maintain_order=True).to_list()


# ---- where it breaks -----------------------------------------------------------------------------------------------


def breaking_frame(damage: pl.DataFrame) -> pl.DataFrame:
    """For each text, side, kind and threshold: the gentlest strength at which the loss has risen by that share.

    Strengths are gone through from the gentlest on: numbers of dimensions from many to few, standard deviations from few
    to many. `strength` is null where no tested one reaches the threshold; `safe` is the last before it, null where there is none.
    """
    rows = []
    for on in texts_of(damage):
        for side in sides_of(damage):
            found = Losses(damage, on, side)
            for kind in found.kinds():
                draws = found.of(kind, overflown=True)
                if draws and draws[0].kept is not None:
                    draws.reverse()
                elif not _grows(damage, kind):
                    continue
                rows += [_breaking(found, side, kind, draws, threshold) for threshold in THRESHOLDS]
    schema = {
        "on": pl.String, "side": pl.String, "kind": pl.String, "threshold": pl.Float64, "strength": pl.Float64,
        "kept": pl.Float64, "rise": pl.Float64, "safe": pl.Float64, "safe_kept": pl.Float64, "n_seeds": pl.Int64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema)


def _grows(damage: pl.DataFrame, kind: str) -> bool:
    """Whether more of it is more damage."""
    return damage.filter(pl.col("kind") == kind)["unit"][0] == "standard deviations"


def _breaking(found: Losses, side: str, kind: str, draws: Sequence[Draws], threshold: float) -> dict[str, Any]:
    n = next((n for n, d in enumerate(draws) if found.rise(d) >= threshold), None)
    broken = None if n is None else draws[n]
    safe = draws[-1] if n is None and draws else draws[n - 1] if n else None
    return {
        "on": found.on, "side": side, "kind": kind, "threshold": threshold,
        "strength": broken.strength if broken else None, "kept": broken.kept if broken else None,
        "rise": found.rise(broken) if broken and math.isfinite(broken.mean) else None, "safe": safe.strength if safe else None,
        "safe_kept": safe.kept if safe else None, "n_seeds": max((len(d.values) for d in draws), default=0),
    }  # fmt: skip


# ---- beliefs -------------------------------------------------------------------------------------------------------

Tested = tuple[str, str]  # verdict, evidence


def claims_frame(damage: pl.DataFrame) -> pl.DataFrame:
    """Each belief on each text, with the input side changed: a verdict and what it rests on.

    "Holds" says that it held in every comparison that was made, "does not hold" that it held in none. Where a change is
    random, a difference counts from two standard errors over its seeds on.
    """
    rows = []
    for on in texts_of(damage) if "input" in sides_of(damage) else []:
        found = Losses(damage, on, "input")
        for claim, test in CLAIMS.items():
            verdict, evidence = test(found)
            rows.append({"on": on, "claim": claim, "verdict": verdict, "evidence": evidence})
    return pl.DataFrame(rows, schema=dict.fromkeys(("on", "claim", "verdict", "evidence"), pl.String))


def _verdict(held: Sequence[bool]) -> str:
    if not held:
        return UNTESTED
    return HOLDS if all(held) else PARTLY if any(held) else FAILS


def _lower(better: Draws, worse: Draws) -> bool:
    """Whether a change costs less than another one, beyond the spread of their seeds."""
    gap = worse.mean - better.mean
    by_seed = dict(zip(better.seeds, better.values, strict=True))
    pairs = [
        value - by_seed[s] for s, value in zip(worse.seeds, worse.values, strict=True) if s is not None and s in by_seed
    ]
    if pairs:  # the same seeds: differences seed by seed
        error = float(np.std(pairs, ddof=1)) / math.sqrt(len(pairs)) if len(pairs) > 1 else 0.0
        return bool(np.mean(pairs) > ERRORS * error)
    variances = [np.var(d.values, ddof=1) / len(d.values) for d in (better, worse) if len(d.values) > 1]
    return bool(gap > ERRORS * math.sqrt(sum(variances)))


def _pairs(found: Losses, one: str, other: str) -> list[tuple[Draws, Draws]]:
    """Changes of two kinds at equal strength; where all dimensions are kept both change nothing."""
    others = {d.strength: d for d in found.of(other)}
    return [(d, others[d.strength]) for d in found.of(one) if d.strength in others and (d.kept or 0) < 1]


def _compared(pairs: Sequence[tuple[Draws, Draws]], unit: str) -> Tested:
    """Whether the first of each pair costs less than the second."""
    held = [_lower(better, worse) for better, worse in pairs]
    if not pairs:
        return UNTESTED, "the two were not measured at equal strength"
    a, b = pairs[len(pairs) // 2]
    middle = f"at {a.strength:g} {unit} {a.told()} against {b.told()} nats"
    return _verdict(held), f"lower loss at {sum(held)} of {len(held)} strengths; {middle}"


def _random_beats_svd(found: Losses) -> Tested:
    return _compared(_pairs(found, "project", "truncate"), "dimensions")


def _rescaling_helps(found: Losses) -> Tested:
    return _compared(_pairs(found, "project-rescaled", "project"), "dimensions")


def _noise_is_harmless(found: Losses) -> Tested:
    tried = [d for d in found.of("noise") if 0 < d.strength <= 1]
    if not tried or tried[-1].strength < 1:
        return UNTESTED, "noise of one standard deviation was not measured"
    told = "; ".join(f"{d.strength:g} sd: {found.rise(d):+.1%}" for d in tried)
    return _verdict([found.rise(d) < HARMLESS for d in tried]), f"rise of the loss by noise of {told}"


def _bias_hurts(found: Losses) -> Tested:
    shifted = [pair for pair in _pairs(found, "noise", "shift") if pair[0].strength > 0]
    truncated = _at_equal_error(found)
    held = [_lower(*pair) for pair in shifted], [free < cut for _, free, cut in truncated]
    if not shifted and not truncated:
        return UNTESTED, "noise was measured beside neither a shift nor a truncation of equal error"
    told = []
    if shifted:
        told.append(
            f"against one shift for all tokens of the same size, noise costs less at {sum(held[0])} of {len(held[0])} strengths"
        )
    if truncated:
        error, free, cut = truncated[len(truncated) // 2]
        told.append(
            f"against a truncation of the same relative error, at {sum(held[1])} of {len(held[1])} "
            f"(at {error:.2f}: {free:.2f} against {cut:.2f} nats)"
        )
    return _verdict([*held[0], *held[1]]), "; ".join(told)


def _at_equal_error(found: Losses) -> list[tuple[float, float, float]]:
    """Relative error, loss by noise of that error (linear between the tested ones), loss by truncation."""
    noise = [(found.error("noise", d.strength), d.mean) for d in found.of("noise")]
    known = sorted((error, loss) for error, loss in [(0.0, found.base), *noise] if error is not None)
    cut = [(found.error("truncate", d.strength), d.mean) for d in found.of("truncate") if (d.kept or 0) < 1]
    errors, losses = [e for e, _ in known], [loss for _, loss in known]
    return [(e, float(np.interp(e, errors, losses)), loss) for e, loss in cut if e is not None and 0 < e <= errors[-1]]


def _near(found: Losses, share: float) -> list[Draws]:
    """Of each kind the change that keeps nearest to a share of the dimensions."""
    nearest = []
    for kind in found.kinds():
        gaps = [(abs(d.kept - share), d) for d in found.of(kind) if d.kept is not None]
        gap, draws = min(gaps, key=lambda pair: pair[0], default=(math.inf, None))
        if draws is not None and gap <= NEAR[share]:
            nearest.append(draws)
    return nearest


def _answers_as_well(found: Losses, share: float, judged: Callable[[list[Draws]], list[Draws]]) -> Tested:
    near = _near(found, share)
    if not near:
        return UNTESTED, f"no change that keeps about {share:.0%} of the dimensions was measured"
    told = [
        f"{d.kind} {d.strength:g}: {found.rise(d):+.1%}, {found.agreement(d) or 0:.0%} same first choice" for d in near
    ]
    chosen = judged(near)
    return _verdict([any(found.rise(d) < HARMLESS for d in chosen)]), f"rise of the loss by {'; '.join(told)}"


def _two_thirds(found: Losses) -> Tested:
    # The notebook's two thirds were those of a rescaled random projection.
    def judged(near: list[Draws]) -> list[Draws]:
        return [d for d in near if d.kind == "project-rescaled"] or near

    return _answers_as_well(found, TWO_THIRDS, judged)


def _hundred(found: Losses) -> Tested:
    return _answers_as_well(found, HUNDRED, lambda near: near)


CLAIMS: dict[str, Callable[[Losses], Tested]] = {
    "A random projection does less damage than truncation by SVD": _random_beats_svd,
    "Rescaling a random projection by d/k helps": _rescaling_helps,
    "Noise is harmless up to the standard deviation of the table": _noise_is_harmless,
    "Attention averages unbiased noise away; a biased direction is what hurts": _bias_hurts,
    "Two thirds of the dimensions answer as well as all": _two_thirds,
    "A ninth of the dimensions (100 of 896) might do": _hundred,
}
