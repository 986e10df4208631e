"""Sections about damage: how many dimensions the model needs, and which beliefs about damage hold."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from dimscope.interventions.perturbations import find_perturbation
from dimscope.page.section import Facts, Grid, Plot, Section, Tables, table
from dimscope.page.wording import count, listed, number, sentence, share
from dimscope.studies.damage import figures
from dimscope.studies.damage.claims import FAILS, HOLDS, PARTLY, UNTESTED
from dimscope.studies.damage.curves import Damage, kind_name, shown_damages, text_name
from dimscope.studies.damage.losses import HARMLESS, THRESHOLDS
from dimscope.studies.damage.tables import LOSS

SIDES = {
    "input": "the input embedding table",
    "output": "the output embedding table",
    "both": "the input and the output embedding table",
}


def breaking_section(tables: Tables, facts: Facts) -> Section | None:
    """Return how many dimensions can be removed before the loss rises, and which way is the gentlest."""
    shown = [damage for damage in shown_damages(tables) if damage.kept_kinds()]
    breaking = table(tables, "breaking")
    if not shown:
        return None
    first = shown[0]
    plots = tuple(
        Plot(f"damage-kept-{n}", figures.damage_by_kept(d), "loss by the share of dimensions kept", _caption(d, shown))
        for n, d in enumerate(shown)
    )
    grids = () if breaking is None else tuple(g for d in shown if (g := _breaking_grid(d, breaking, shown)))
    seeds = int(max(first.curve(LOSS, kind)["n_seeds"].to_numpy().max(initial=1) for kind in first.kept_kinds()))
    return Section(
        anchor="damage",
        name="Damage",
        title=_gentlest(first),
        findings=tuple(f for f in (fewest_dimensions(first, breaking), _other_texts(shown)) if f),
        blocks=(*plots, *grids),
        how_to_read=(
            f"Every point is the model after one change of {SIDES[first.side]}, evaluated on the same text. At the right "
            "edge all dimensions are kept; further left fewer are. The upper panel shows the loss; its dashed line is the "
            "undamaged model. The lower panel shows the share of positions at which the top prediction is that of the "
            f"undamaged model. Bands are one standard deviation over {count(seeds, 'seed')} of a random change."
        ),
        caveat=(
            "Nothing was trained after a change. The figure therefore shows what the model tolerates, not what a model "
            f"with fewer dimensions could do, and nothing becomes smaller or faster. The text is {text_name(first.text)}; "
            "on other text, and on other tasks than predicting the next token, the model may break earlier."
        ),
        tables=("damage", "breaking"),
    )


def answer(tables: Tables) -> str:
    """Return how many dimensions are enough on the first text, in one sentence."""
    shown = shown_damages(tables)
    with_dimensions = [damage for damage in shown if damage.kept_kinds()]
    if with_dimensions and (enough := fewest_dimensions(with_dimensions[0], table(tables, "breaking"))):
        return enough
    if not shown:
        return "The loss of the undamaged model is not a finite number."
    return f"The loss of the undamaged model is {number(shown[0].base)} nats per token on {text_name(shown[0].text)}."


def _caption(damage: Damage, shown: Sequence[Damage]) -> str:
    several = len({d.side for d in shown}) > 1
    return sentence(text_name(damage.text)) + (f", change of {SIDES[damage.side]}" if several else "")


@dataclass(frozen=True, slots=True)
class Gentlest:
    """The kind of change with the lowest loss most often, at how many numbers of dimensions, and of how many."""

    kind: str
    times: int
    total: int


def _gentlest_kind(damage: Damage) -> Gentlest | None:
    """Compare kinds at the numbers of dimensions where several were tried; None where there is no such number."""
    wins: Counter[str] = Counter()
    curves = [damage.curve(LOSS, kind).with_columns(kind=pl.lit(kind)) for kind in damage.kept_kinds()]
    for _, rows in pl.concat(curves).filter(pl.col("kept_share") < 1).group_by("strength", maintain_order=True):
        if rows["kind"].n_unique() > 1:
            wins[rows.sort("value")["kind"][0]] += 1
    return Gentlest(*wins.most_common(1)[0], wins.total()) if wins else None


def _gentlest(damage: Damage) -> str:
    best = _gentlest_kind(damage)
    if best is None:
        return sentence(f"the loss after {listed([kind_name(kind) for kind in damage.kept_kinds()])}")
    times = "every number" if best.times == best.total else f"{best.times} of {best.total} numbers"
    return sentence(f"{kind_name(best.kind)} does the least damage at {times} of dimensions tried")


def fewest_dimensions(damage: Damage, breaking: pl.DataFrame | None) -> str | None:
    """Return the fewest dimensions that keep the loss within the first threshold, in one sentence."""
    if breaking is None or damage.base is None:
        return None
    base = f"{number(damage.base)} nats per token"
    rows = _rows_about(damage, breaking).filter(
        (pl.col("threshold") == HARMLESS) & pl.col("safe_kept_share").is_not_null()
    )
    if rows.is_empty():
        return (
            f"Every tested removal of dimensions raises the loss by {HARMLESS:.0%} or more above the undamaged {base}."
        )
    row = rows.sort("safe_kept_share", maintain_order=True).row(0, named=True)
    dim = round(row["safe"] / row["safe_kept_share"]) if row["safe_kept_share"] else None
    of = f"of {dim:,} dimensions ({share(row['safe_kept_share'])})" if dim else "dimensions"
    change = sentence(f"{kind_name(row['kind'])} to {row['safe']:,.0f} {of}")
    return f"{change} keeps the loss within {HARMLESS:.0%} of the undamaged {base}."


def _rows_about(damage: Damage, breaking: pl.DataFrame) -> pl.DataFrame:
    return breaking.filter((pl.col("text") == damage.text) & (pl.col("side") == damage.side))


def _other_texts(shown: Sequence[Damage]) -> str | None:
    """Return whether the same kind of change is the gentlest on the other texts."""
    first, gentlest = shown[0], _gentlest_kind(shown[0])
    clauses = []
    for other in shown[1:]:
        best = _gentlest_kind(other)
        if other.side != first.side or best is None or gentlest is None:
            continue
        which = "the same kind" if best.kind == gentlest.kind else kind_name(best.kind)
        clauses.append(f"on {text_name(other.text)} (undamaged loss {number(other.base)}), {which} is the gentlest")
    return sentence(f"{listed(clauses)}.") if clauses else None


def _breaking_grid(damage: Damage, breaking: pl.DataFrame, shown: Sequence[Damage]) -> Grid | None:
    rows = _rows_about(damage, breaking)
    if rows.is_empty():
        return None
    lines = []
    for (kind,), of_kind in rows.group_by("kind", maintain_order=True):
        cells = [
            _strength(str(kind), row["strength"], row["kept_share"], row["safe"], row["rise"])
            for row in of_kind.sort("threshold").iter_rows(named=True)
        ]
        lines.append((kind_name(str(kind)), *cells, str(of_kind["n_seeds"][0])))
    header = ("change", *(f"loss +{threshold:.0%} from" for threshold in THRESHOLDS), "seeds")
    caption = f"The gentlest tested strength at which the loss has risen by a share. {_caption(damage, shown)}"
    return Grid(caption, header, tuple(lines), frozenset({3}))


def _strength(
    kind: str, strength: float | None, kept_share: float | None, safe: float | None, rise: float | None
) -> str:
    if strength is None:
        return f"not at {safe:g}" if safe is not None else "–"
    unit = find_perturbation(kind).unit.replace("standard deviations", "sd")
    amount = f"{strength:,.0f} {unit} ({kept_share:.0%})" if kept_share is not None else f"{strength:g} {unit}"
    return f"{amount}: {rise:+.0%}" if rise is not None else f"{amount}: loss not finite"


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
            "one model wrote, and is tested here on this model. “Holds” means that every comparison agrees with it, “does "
            "not hold” that none does. For random changes a difference counts from two standard errors over the seeds on. "
            f"“As well” and “harmless” mean a loss less than {HARMLESS:.0%} higher than that of the undamaged model."
        ),
        caveat=(
            "A verdict is about this model, this text and these strengths, with the input table changed and nothing trained "
            "afterwards. A belief that fails here may hold for another model, and the reverse. That attention averages "
            "noise away is tested by a consequence (independent noise costs less than an equal error in one direction), not "
            "by looking into attention."
        ),
        tables=("claims", "damage"),
    )


def _verdict_counts(claims: pl.DataFrame) -> str:
    verdicts = Counter(claims["verdict"])
    others = [
        f"{verdicts[verdict]} {word}"
        for verdict, word in ((PARTLY, "in part"), (FAILS, "not"), (UNTESTED, "not tested"))
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
