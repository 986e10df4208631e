"""The section about what the model answers after every change."""

import polars as pl

from dimscope.page.section import Answer, Facts, Gallery, Section, Tables, finite, table
from dimscope.page.wording import count
from dimscope.studies.damage.plan import UNDAMAGED

DECODINGS = {
    "greedy": "the likeliest token at every step",
    "sample": "a token drawn from the model's distribution at every step",
    "model": "tokens chosen as its generation config has it",
}


def texts_section(tables: Tables, facts: Facts) -> Section | None:
    """Show what the model answers after every change, beside what it answers undamaged."""
    frame = table(tables, "generations")
    if frame is None:
        return None
    numbers = frame["number"].unique(maintain_order=True).to_list()
    galleries = tuple(_gallery(frame.filter(pl.col("number") == n), n == numbers[0]) for n in numbers)
    said = facts.of("damage")
    damaged = frame.filter(pl.col("kind") != UNDAMAGED)
    same = damaged.filter(pl.col("n_same") >= pl.col("n_tokens")).height
    stay = "stays" if same < 2 else "stay"
    why = "" if said.get("template") else ", since the model has no chat template"
    given = "in the model's chat template" if frame["chat"].all() else f"as they are{why}"
    continued = DECODINGS.get(str(said.get("decoding")), "its tokens")
    return Section(
        anchor="answers",
        name="What the model says",
title=f"{same or 'None'} of {count(damaged.height, 'answer')} {stay} word for word that of the undamaged model",
        findings=_repetition(frame),
        blocks=galleries,
        how_to_read=(
            f"Prompts are given {given}, and continued with {continued}, "
            f"{said.get('max_new_tokens', 'some')} at most. “Same” counts the tokens from the first on that are those of the "
            "undamaged model; “repeated” is the share of stretches of four tokens that stood in the answer before."
        ),
        caveat=(
            "One early token that differs changes all that follow, so a different answer need not be a worse one: the loss "
            "above judges that over many positions. Of random changes one draw is shown unless more were asked for."
        ),
        tables=("generations",),
    )  # fmt: skip


def _gallery(rows: pl.DataFrame, opened: bool) -> Gallery:
    several = rows["side"].n_unique() > 1
    answers = tuple(
        Answer(
            row["change"] + (f", {row['side']} side" if several and row["kind"] != UNDAMAGED else "")
            + (f", draw {row['seed']}" if row["seed"] else ""),
            row["text"], "" if row["kind"] == UNDAMAGED else f"{row['n_same']} of {row['n_tokens']}",
            "–" if row["repetition"] is None else f"{row['repetition']:.0%}",
        )
        for row in rows.iter_rows(named=True)
    )  # fmt: skip
    return Gallery(rows["prompt"][0], answers, opened)


def _repetition(frame: pl.DataFrame) -> tuple[str, ...]:
    known = finite(frame, "repetition")
    own = known.filter(pl.col("kind") == UNDAMAGED)
    if own.is_empty() or known.height == own.height:
        return ()
    most = (
        known.filter(pl.col("kind") != UNDAMAGED)
        .group_by("change", maintain_order=True)
        .agg(pl.col("repetition").mean())
    )
    row = most.sort("repetition", descending=True, maintain_order=True).row(0, named=True)
    own_share = float(own["repetition"].to_numpy().mean())
    after = f"after {row['change']} it is {row['repetition']:.0%}"
    return (f"The undamaged model repeats {own_share:.0%} of its stretches of four tokens; {after}.",)
