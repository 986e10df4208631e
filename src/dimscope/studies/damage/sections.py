"""Sections about damage: how much the model stands, and which beliefs about it hold."""

from collections import Counter
from collections.abc import Sequence

import polars as pl

from dimscope.page.section import Facts, Grid, Plot, Section, Tables, table
from dimscope.page.wording import count, listed, number, sentence, share
from dimscope.studies.damage import figures
from dimscope.studies.damage.claims import FAILS, HOLDS, PARTLY, THRESHOLDS, UNTESTED
from dimscope.studies.damage.curves import Damage, kind_name, shown_damages, text_name
from dimscope.studies.damage.tables import LOSS

SIDES = {
    "input": "the table that tokens are read with",
    "output": "the table that predictions are made with",
    "both": "both tables",
}


def breaking_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell how far dimensions can be taken away before the loss rises, and which way is the gentlest."""
    found = [d for d in shown_damages(tables) if d.kept_kinds()]
    breaking = table(tables, "breaking")
    if not found:
        return None
    plots = tuple(
        Plot(f"damage-kept-{n}", figures.damage_by_kept(d), "loss by the share of dimensions kept", _caption(d, found))
        for n, d in enumerate(found)
    )
    grids = () if breaking is None else tuple(g for d in found if (g := _breaking_grid(d, breaking, facts, found)))
    seeds = int(max(found[0].curve(LOSS, kind)["n_seeds"].to_numpy().max(initial=1) for kind in found[0].kept_kinds()))
    return Section(
        anchor="damage",
        name="Damage",
        title=_gentlest(found[0]),
        findings=tuple(f for f in (_last_safe(found[0], breaking), _other_texts(found)) if f),
        blocks=(*plots, *grids),
        how_to_read=(
            f"Every point is the model after a change of {SIDES[found[0].side]}, judged on the same text. To the right all "
            "dimensions are kept; further left fewer remain. Above, the loss rises from the dashed line of the undamaged "
            "model; below, the share of positions at which the model's first choice is still the one it had. Bands are one "
            f"standard deviation over {count(seeds, 'draw')} of what is random."
        ),
        caveat=(
            "The rest of the model was not trained again after a change, so this tells what the model tolerates, not what a "
            f"model with fewer dimensions could do. Nothing becomes smaller or faster by it. Measured on {found[0].on}; other "
            "text, and other questions than the next token, may break earlier."
        ),
        tables=("damage", "breaking"),
    )  # fmt: skip


def breaking_answer(tables: Tables) -> str:
    """Return how many dimensions are enough on the first text, in one sentence."""
    shown = shown_damages(tables)
    known = [d for d in shown if d.kept_kinds()]
    answer = _last_safe(known[0], table(tables, "breaking")) if known else None
    return answer or f"The loss of the undamaged model is {number(shown[0].base if shown else None)} nats per token."


def _caption(damage: Damage, all_: Sequence[Damage]) -> str:
    sides = {d.side for d in all_}
    return sentence(text_name(damage.on)) + (f", {damage.side} side changed" if len(sides) > 1 else "")


def _lowest(damage: Damage) -> Counter[str]:
    """At how many numbers of dimensions each kind leaves the lowest loss, where several were tried."""
    wins: Counter[str] = Counter()
    curves = [damage.curve(LOSS, kind).with_columns(kind=pl.lit(kind)) for kind in damage.kept_kinds()]
    for _, tried in pl.concat(curves).filter(pl.col("kept") < 1).group_by("strength", maintain_order=True):
        if tried["kind"].n_unique() > 1:
            wins[tried.sort("value")["kind"][0]] += 1
    return wins


def _gentlest(damage: Damage) -> str:
    wins = _lowest(damage)
    if not wins:
        return f"What {listed([kind_name(kind) for kind in damage.kept_kinds()])} costs"
    kind, times = wins.most_common(1)[0]
    total = wins.total()
    where = "at every number of dimensions tried" if times == total else f"at {times} of {total} numbers of dimensions"
    return sentence(f"{kind_name(kind)} does the least damage {where}")


def _last_safe(damage: Damage, breaking: pl.DataFrame | None) -> str | None:
    if breaking is None:
        return None
    rows = breaking.filter(
        (pl.col("on") == damage.on) & (pl.col("side") == damage.side) & (pl.col("threshold") == THRESHOLDS[0])
        & pl.col("safe_kept").is_not_null()
    ).sort("safe_kept", maintain_order=True)  # fmt: skip
    if rows.is_empty():
        return f"Every change that takes dimensions away raises the loss by {THRESHOLDS[0]:.0%} or more."
    row = rows.row(0, named=True)
    return (
        f"With {kind_name(row['kind'])}, {row['safe']:,.0f} dimensions ({share(row['safe_kept'])} of them) are enough for a loss "
        f"less than {THRESHOLDS[0]:.0%} above the undamaged {number(damage.base)} nats per token."
    )


def _other_texts(found: Sequence[Damage]) -> str | None:
    first = found[0]
    others = [d for d in found[1:] if d.side == first.side]
    if not others:
        return None
    told = []
    for other in others:
        winner, here = _lowest(other).most_common(1), _lowest(first).most_common(1)
        same = bool(winner) and bool(here) and winner[0][0] == here[0][0]
        told.append(
            f"on {text_name(other.on)} (undamaged {number(other.base)} nats) {'the same kind is' if same else 'another kind is'} gentlest"
        )
    return sentence(f"{listed(told)}.")


def _breaking_grid(damage: Damage, breaking: pl.DataFrame, facts: Facts, all_: Sequence[Damage]) -> Grid | None:
    rows = breaking.filter((pl.col("on") == damage.on) & (pl.col("side") == damage.side))
    if rows.is_empty():
        return None
    told = []
    for (kind,), of_kind in rows.group_by("kind", maintain_order=True):
        cells = [_broken(row) for row in of_kind.sort("threshold").iter_rows(named=True)]
        told.append((kind_name(str(kind)), *cells, str(of_kind["n_seeds"][0])))
    header = ("change", *(f"loss +{threshold:.0%} from" for threshold in THRESHOLDS), "draws")
    place = _caption(damage, all_)
    return Grid(
        f"The gentlest tested strength that raises the loss so much. {place}", header, tuple(told), frozenset({3})
    )


def _broken(row: dict[str, float | None]) -> str:
    if row["strength"] is None:
        return f"not by {row['safe']:g}" if row["safe"] is not None else "–"
    unit = (
        f"{row['strength']:,.0f} dimensions ({row['kept']:.0%})"
        if row["kept"] is not None
        else f"{row['strength']:g} sd"
    )
    return f"{unit}: {row['rise']:+.0%}" if row["rise"] is not None else f"{unit}: no number"


# ---- beliefs -------------------------------------------------------------------------------------------------------


def claims_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell which beliefs about damage hold on this model."""
    frame = table(tables, "claims")
    if frame is None or (frame["verdict"] == UNTESTED).all():
        return None
    texts = frame["on"].unique(maintain_order=True).to_list()
    first = frame.filter(pl.col("on") == texts[0])
    verdicts = Counter(first["verdict"])
    others = [
        f"{verdicts[v]} {word}"
        for v, word in ((PARTLY, "in part"), (FAILS, "not"), (UNTESTED, "not tested"))
        if verdicts[v]
    ]
    rest = f" ({', '.join(others)})" if others else ""
    verb = "holds" if verdicts[HOLDS] == 1 else "hold"
    return Section(
        anchor="beliefs",
        name="Beliefs put to the test",
        title=f"{verdicts[HOLDS]} of {count(len(first), 'belief')} about damage {verb} on this model{rest}",
        blocks=(_claims_grid(frame, texts),),
        how_to_read=(
            "Each line is a belief from the notebook in which these experiments began, where it was formed by reading what one "
            "model wrote. Here it is tested on the model in hand: “holds” where every comparison agrees with it, “does not hold” "
            "where none does. Of random changes a difference counts from two standard errors over the draws on; “as well” and "
            f"“harmless” mean a loss less than {THRESHOLDS[0]:.0%} higher."
        ),
        caveat=(
            "A verdict is about this model, this text and these strengths, with the input table changed and nothing trained "
            "again. A belief that fails here may hold for another model, and the other way round. That attention averages noise "
            "away is tested by what it would lead to (independent noise costs less than the same error in one direction), not "
            "by looking into attention."
        ),
        tables=("claims", "damage"),
    )  # fmt: skip


def _claims_grid(frame: pl.DataFrame, texts: Sequence[str]) -> Grid:
    """One line for each belief: the verdict on every text, and what was measured on the first."""
    verdicts = {(on, claim): verdict for on, claim, verdict in frame.select("on", "claim", "verdict").iter_rows()}
    first = frame.filter(pl.col("on") == texts[0])
    rows = tuple(
        (claim, *(verdicts[on, claim] for on in texts), evidence)
        for claim, evidence in first.select("claim", "evidence").iter_rows()
    )
    several = len(texts) > 1
    heads = [f"on {text_name(on)}" for on in texts] if several else ["verdict"]
    measured = f"what was measured on {text_name(texts[0])}" if several else "what was measured"
    return Grid("Six beliefs", ("belief", *heads, measured), rows)
