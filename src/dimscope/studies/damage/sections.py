"""Sections about damage: how many dimensions the model needs, and which beliefs about damage hold."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import polars as pl

from dimscope.evaluation.yardstick import SCALE_NOTE, TOLERANCE, compared, judge, two_digits, upper_end, with_error
from dimscope.interventions.perturbations import find_perturbation
from dimscope.page.section import Facts, Grid, Plot, Section, Tables, table
from dimscope.page.wording import count, listed, number, sentence, share
from dimscope.studies.damage import figures
from dimscope.studies.damage.claims import FAILS, HOLDS, PARTLY, UNDECIDED, UNREADABLE, UNTESTED
from dimscope.studies.damage.comparisons import lower_at_once
from dimscope.studies.damage.curves import change_name, kind_name, shown_losses, text_name, tokens_read, unreadable_text
from dimscope.studies.damage.facts import damage_facts
from dimscope.studies.damage.losses import THRESHOLDS, Draws, Losses

SIDES = {
    "input": "the input embedding table",
    "output": "the output embedding table",
    "both": "the input and the output embedding table",
}


def breaking_section(tables: Tables, facts: Facts) -> Section | None:
    """Return how many dimensions can be removed within the tolerance, and which way is the gentlest."""
    shown = [losses for losses in shown_losses(tables) if losses.kept_kinds()]
    breaking = table(tables, "breaking")
    if not shown:
        return None
    first, window_length = shown[0], damage_facts(facts).window_length
    plots = tuple(
        Plot(f"damage-kept-{n}", figures.damage_by_kept(d), "KL by the share of dimensions kept", _caption(d, shown))
        for n, d in enumerate(shown)
    )
    grids = () if breaking is None else tuple(g for d in shown if (g := _breaking_grid(d, breaking, shown)))
    return Section(
        anchor="damage",
        name="Damage",
        title=_title(first, window_length),
        findings=_findings(shown, window_length),
        blocks=(*plots, *grids),
        how_to_read=(
            f"Every point is the model after one change of {SIDES[first.side]}, evaluated on the same text. At the right "
            "edge all dimensions are kept; further left fewer are. The upper panel shows the damage: the KL from the undamaged "
            "model; its dashed lines are the KL of rounding weights to so many bits. The lower panel shows the share of positions "
            "at which the top prediction is that of the undamaged model. Bands are 95% intervals over windows, and over seeds of a "
            "random change. A kind is called the least damaging at a number of dimensions if its KL is clearly below that of every "
            "other kind there; all comparisons hold at once in 95% of samples (the steps of Holm 1979). "
            f"{SCALE_NOTE}"
        ),
        caveat=(
            "Nothing was trained after a change. The figure therefore shows what the model tolerates, not what a model "
            f"with fewer dimensions could do, and nothing becomes smaller or faster. The text is {text_name(first.text)}; "
            "on other text, and on other tasks than predicting the next token, the model may break earlier."
        ),
        tables=("damage", "windows", "breaking"),
    )


def _findings(losses: Sequence[Losses], window_length: int | None) -> tuple[str, ...]:
    """Return how many dimensions are enough, on which windows that is, and whether other texts agree."""
    first = losses[0]
    if first.unreadable:
        return ()
    loss = first.undamaged.loss
    error = " (± one standard error)" if loss.stderr else ""
    read = (
        f"The undamaged model has a loss of {with_error(loss.value, loss.stderr)} nats per token{error} on "
        f"{tokens_read(first, window_length)}."
    )
    return tuple(f for f in (fewest_dimensions(first), read, _other_texts(losses, window_length)) if f)


def answer(tables: Tables, window_length: int | None = None) -> str:
    """Return how many dimensions are enough on the first text, in one sentence."""
    shown = shown_losses(tables)
    if with_dimensions := [losses for losses in shown if losses.kept_kinds()]:
        return fewest_dimensions(with_dimensions[0], window_length)
    if not shown:
        return "The loss of the undamaged model is not a finite number."
    if shown[0].unreadable:
        return f"{unreadable_text(shown[0], window_length)}."
    loss = shown[0].undamaged.loss.value
    return (
        f"The loss of the undamaged model is {number(loss)} nats per token on {tokens_read(shown[0], window_length)}."
    )


def _caption(losses: Losses, shown: Sequence[Losses]) -> str:
    several = len({other.side for other in shown}) > 1
    return f"On {text_name(losses.text)}" + (f", change of {SIDES[losses.side]}" if several else "")


@dataclass(frozen=True, slots=True)
class Gentlest:
    """The kind of change that clearly costs the least most often, at how many numbers of dimensions, and of how many."""

    kind: str
    times: int
    total: int

    @property
    def where(self) -> str:
        """Return at how many numbers of dimensions: "every number of dimensions tried"."""
        numbers = "every number" if self.times == self.total else f"{self.times} of {self.total} numbers"
        return f"{numbers} of dimensions tried"


def _gentlest_kind(losses: Losses, n_texts: int = 1) -> Gentlest | None:
    """Compare kinds at the numbers of dimensions where several were tried; None where no kind is clearly the gentlest.

    A kind is the gentlest where it costs less than every other one by the paired interval over windows and seeds. The
    comparisons of all kinds at all numbers of dimensions hold at once.

    Args:
        losses: What the changes cost.
        n_texts: Texts about which the same is stated in one sentence.
    """
    by_strength: dict[float, list[Draws]] = {}
    for kind in losses.kinds():
        for draws in losses.draws(kind):
            if draws.kept_share is not None and draws.kept_share < 1:
                by_strength.setdefault(draws.strength, []).append(draws)
    contests = [of_strength for of_strength in by_strength.values() if len(of_strength) > 1]
    pairs = [pair for contest in contests for pair in combinations(contest, 2)]
    lower = lower_at_once([(a.mean("kl"), b.mean("kl")) for a, b in pairs], n_texts)
    beaten = Counter(
        ((a if lower_of.answer else b).kind, a.strength)
        for (a, b), lower_of in zip(pairs, lower, strict=True)
        if lower_of.answer is not None
    )
    wins = Counter(kind for (kind, strength), n in beaten.items() if n == len(by_strength[strength]) - 1)
    return Gentlest(*wins.most_common(1)[0], len(contests)) if wins else None


def _title(losses: Losses, window_length: int | None = None) -> str:
    if losses.unreadable:
        return unreadable_text(losses, window_length)
    best = _gentlest_kind(losses)
    if best is None:  # the first finding adds the evidence
        return fewest_dimensions(losses).split(":")[0].removesuffix(".")
    return sentence(f"{kind_name(best.kind)} does the least damage at {best.where}")


def fewest_dimensions(losses: Losses, window_length: int | None = None) -> str:
    """Return the fewest dimensions that keep the KL within the tolerance, in one sentence.

    The intervals of all kinds hold at once. Those of one kind need no correction: strengths are tested from the gentlest on,
    up to the first that is not within (fixed-sequence testing).
    """
    if losses.unreadable:
        return f"{unreadable_text(losses, window_length)}."
    every = _all_kept(losses)
    n = len({draws.kind for draws in every})
    safe = [draws for kind in losses.kinds() if (draws := _fewest(losses, kind, n)) is not None]
    if not safe:
        gentlest = min(every, key=lambda d: upper_end(d.kl_of(n)), default=None)
        if gentlest is None:
            return "No dimensions were removed."
        return (
            f"No tested removal of dimensions is clearly harmless: the nearest is {change_name(gentlest)}, "
            f"{compared(gentlest.kl_of(n), n_statements=n)}."
        )
    fewest = min(safe, key=lambda d: d.kept_share or 0)
    dim = round(fewest.strength / fewest.kept_share) if fewest.kept_share else None
    of = f"of {dim:,} dimensions ({share(fewest.kept_share or 0)})" if dim else "dimensions"
    change = sentence(f"{kind_name(fewest.kind)} to {fewest.strength:,.0f} {of}")
    return f"{change} is harmless: {compared(fewest.kl_of(n), n_statements=n)}."


def _all_kept(losses: Losses) -> list[Draws]:
    """Return the changes that keep a number of dimensions, those that keep all aside."""
    every = [draws for kind in losses.kinds() for draws in losses.draws(kind, overflown=True)]
    return [d for d in every if d.kept_share is not None and d.kept_share < 1]


def _fewest(losses: Losses, kind: str, n_statements: int) -> Draws | None:
    """Return the fewest dimensions of a kind up to which every tested number of them is within the tolerance."""
    fewest = None
    for draws in sorted(losses.draws(kind, overflown=True), key=lambda d: -(d.kept_share or 0)):
        if draws.kept_share is None or judge(draws.kl_of(n_statements)) != "within":
            return fewest
        fewest = draws if draws.kept_share < 1 else fewest
    return fewest


def _other_texts(losses: Sequence[Losses], window_length: int | None) -> str | None:
    """Return whether the same kind of change is the gentlest on the other texts that can tell."""
    gentlest = _gentlest_kind(losses[0], len(losses))
    clauses = []
    for other in losses[1:]:
        best = None if other.unreadable else _gentlest_kind(other, len(losses))
        if other.side != losses[0].side or best is None or gentlest is None:
            continue
        which = "the same kind" if best.kind == gentlest.kind else kind_name(best.kind)
        base = f"undamaged loss {number(other.undamaged.loss.value)} nats per token"
        clauses.append(f"on {tokens_read(other, window_length)} ({base}), {which} is the gentlest at {best.where}")
    return sentence(f"{listed(clauses)}.") if clauses else None


def _breaking_grid(losses: Losses, breaking: pl.DataFrame, shown: Sequence[Losses]) -> Grid | None:
    rows = breaking.filter((pl.col("text") == losses.text) & (pl.col("side") == losses.side))
    if rows.is_empty():
        return None
    lines = []
    for (kind,), of_kind in rows.group_by("kind", maintain_order=True):
        cells = [_strength(row) for row in of_kind.sort("threshold").iter_rows(named=True)]
        lines.append((kind_name(str(kind)), *cells, str(of_kind["n_seeds"][0])))
    header = (
        "change",
        *(f"first strength not clearly below {mark.kl:g} ({mark.name.split('to ')[1]})" for mark in THRESHOLDS),
        "seeds",
    )
    caption = (
        "The gentlest tested strength whose KL is not clearly below a mark: the upper end of its 95% interval (“up to”) is above. "
        f"{_caption(losses, shown)}"
    )
    return Grid(caption, header, tuple(lines), frozenset({3}))


def _strength(row: Mapping[str, Any]) -> str:
    """Return a strength that is not clearly below a mark, with its KL and the upper end that decides."""
    unit = find_perturbation(row["kind"]).unit.replace("standard deviations", "sd")
    if row["strength"] is None:
        return f"none, not at {row['safe']:g} {unit}" if row["safe"] is not None else "–"
    kept, kl, high = row["kept_share"], row["kl"], row["kl_high"]
    amount = f"{row['strength']:,.0f} {unit} ({share(kept)})" if kept is not None else f"{row['strength']:g} {unit}"
    if kl is None:
        return f"{amount}: KL not finite"
    return f"{amount}: KL {two_digits(kl)}{'' if high is None else f', up to {number(high)}'}"


# ---- beliefs -------------------------------------------------------------------------------------------------------


def claims_section(tables: Tables, facts: Facts) -> Section | None:
    """Return which beliefs about damage hold on this model."""
    frame = table(tables, "claims")
    if frame is None or (frame["verdict"] == UNTESTED).all():
        return None
    texts = frame["text"].unique(maintain_order=True).to_list()
    return Section(
        anchor="beliefs",
        name="Beliefs tested",
        title=_verdict_counts(frame.filter(pl.col("text") == texts[0])),
        blocks=(_claims_grid(frame, texts),),
        how_to_read=(
            "Each row is a belief from the notebook in which these experiments began. It was formed there by reading what "
            "one model wrote, and is tested here on this model. Damage is the KL from the undamaged model. The first four beliefs "
            "rest on several comparisons: one “holds” if all agree with it, “holds in part” if some do, “does not hold” if none "
            "does and some are against it, and is “undecided” if none is decided. “Two thirds” is tested by the rescaled random "
            "projection where that was measured, else by all kinds, like “a ninth”: it holds if one of them is harmless. “Cannot "
            "tell” stands where the undamaged model predicts a text not clearly better than its token frequencies alone "
            "would. A comparison is decided by the paired 95% interval over windows, and over seeds for random changes. All "
            "comparisons of a belief hold at once, by the steps of Holm (1979): what is decided leaves fewer to decide, and each interval "
            "shown is that of the step that decided it, or left it undecided; changes that decide nothing have one of their own. "
            f"“As well” and “harmless” mean a KL within the {TOLERANCE.kl:g} nats of {TOLERANCE.name}, at the upper "
            f"end of its interval. {SCALE_NOTE}"
        ),
        caveat=(
            "A verdict is about this model, this text and these strengths, with the input table changed and nothing trained "
            "afterwards. A belief that fails here may hold for another model, and the reverse. That attention averages "
            "noise away is tested by a consequence (independent noise costs less than an equal error in one direction), not "
            "by looking into attention."
        ),
        tables=("claims", "windows", "damage"),
    )


def _verdict_counts(claims: pl.DataFrame) -> str:
    verdicts = Counter(claims["verdict"])
    if verdicts[UNREADABLE]:
        return "This text cannot test the beliefs about damage"
    others = [
        f"{verdicts[verdict]} {word}"
        for verdict, word in ((PARTLY, "in part"), (FAILS, "not"), (UNDECIDED, "undecided"), (UNTESTED, "not tested"))
        if verdicts[verdict]
    ]
    rest = f" ({', '.join(others)})" if others else ""
    verb = "holds" if verdicts[HOLDS] == 1 else "hold"
    return f"{verdicts[HOLDS]} of {count(len(claims), 'belief')} about damage {verb} on this model{rest}"


def _claims_grid(frame: pl.DataFrame, texts: Sequence[str]) -> Grid:
    """Return one row for each belief: the verdict on every text, and what was measured on the first."""
    verdicts = {(text, claim): verdict for text, claim, verdict in frame.select("text", "claim", "verdict").iter_rows()}
    first = frame.filter(pl.col("text") == texts[0])
    rows = tuple(
        (claim, *(verdicts[text, claim] for text in texts), evidence)
        for claim, evidence in first.select("claim", "evidence").iter_rows()
    )
    several = len(texts) > 1
    heads = [f"on {text_name(text)}" for text in texts] if several else ["verdict"]
    measured = f"measured on {text_name(texts[0])}" if several else "measured"
    return Grid("Six beliefs about damage", ("belief", *heads, measured), rows)
