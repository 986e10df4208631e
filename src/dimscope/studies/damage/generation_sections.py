"""The section about how the model continues the prompts after every change."""

import polars as pl

from dimscope.page.section import Answer, Facts, Gallery, Section, Tables, finite, table
from dimscope.page.wording import count, listed
from dimscope.studies.damage.facts import DamageFacts, damage_facts
from dimscope.studies.damage.plan import UNDAMAGED

MOST_CHANGES = 3  # that a sentence lists

DECODINGS = {
    "greedy": "with the most likely token at every step",
    "sample": "with a token sampled from the model's distribution at every step",
    "model": "as the model's generation config says",
}


def generation_section(tables: Tables, facts: Facts) -> Section | None:
    """Return the continuations after every change, beside those of the undamaged model."""
    frame = table(tables, "generations")
    if frame is None:
        return None
    numbers = frame["number"].unique(maintain_order=True).to_list()
    damaged = frame.filter(pl.col("kind") != UNDAMAGED)
    same = damaged.filter(pl.col("n_same") >= pl.col("n_tokens")).height
    verb = "is" if same < 2 else "are"
    return Section(
        anchor="generations",
        name="Generations",
        title=f"{same or 'None'} of {count(damaged.height, 'continuation')} {verb} the same as without damage",
        findings=_repetition(frame),
        blocks=tuple(_gallery(frame.filter(pl.col("number") == n), opened=n == numbers[0]) for n in numbers),
        how_to_read=_how_to_read(damage_facts(facts), chat=bool(frame["chat"].all())),
        caveat=(
            "One early token that differs changes all that follow, so a different continuation need not be a worse one: "
            "the KL averages over many positions and is the better measure. Of a random change one seed is shown unless "
            "more were requested."
        ),
        tables=("generations",),
    )


def _how_to_read(facts: DamageFacts, *, chat: bool) -> str:
    why = "" if facts.template else ", because the model has no chat template"
    prompts = "in the model's chat template" if chat else f"as they are{why}"
    length = f"{facts.new_tokens} tokens at most" if facts.new_tokens else "a limited number of tokens"
    return (
        f"Prompts are passed {prompts}, and continued {DECODINGS[facts.decoding]}, by {length}. “Same” counts the tokens "
        "from the first on that are those of the undamaged model. “Repeated” is the share of sequences of four tokens "
        "that occurred earlier in the continuation."
    )


def _gallery(rows: pl.DataFrame, *, opened: bool) -> Gallery:
    several = rows["side"].n_unique() > 1
    answers = tuple(
        Answer(
            row["change"] + (f", {row['side']} side" if several and row["kind"] != UNDAMAGED else "")
            + (f", seed {row['seed']}" if row["seed"] else ""),
            row["continuation"], "" if row["kind"] == UNDAMAGED else f"{row['n_same']} of {row['n_tokens']}",
            "–" if row["repetition"] is None else f"{row['repetition']:.0%}",
        )
        for row in rows.iter_rows(named=True)
    )  # fmt: skip
    return Gallery(rows["prompt"][0], answers, opened)


def _repetition(frame: pl.DataFrame) -> tuple[str, ...]:
    """Return how much the undamaged model repeats itself, beside the change after which it does most."""
    repetitions = finite(frame, "repetition")
    own = repetitions.filter(pl.col("kind") == UNDAMAGED)
    damaged = repetitions.filter(pl.col("kind") != UNDAMAGED)
    if own.is_empty() or damaged.is_empty():
        return ()
    means = damaged.group_by("change", maintain_order=True).agg(pl.col("repetition").mean())
    most = float(means["repetition"].to_numpy().max())
    changes = means.filter(pl.col("repetition") == most)["change"].to_list()
    own_share = float(own["repetition"].to_numpy().mean())
    return (
        f"The undamaged model repeats {own_share:.0%} of its sequences of four tokens; the most repetition is "
        f"{most:.0%}, after {listed(changes) if len(changes) <= MOST_CHANGES else count(len(changes), 'change')}.",
    )
