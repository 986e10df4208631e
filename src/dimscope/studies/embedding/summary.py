"""The answer of the embedding study in a few words and numbers."""

import polars as pl

from dimscope.checkpoints.budget import embedding_share
from dimscope.geometry.metrics import PARTICIPATION_RATIO
from dimscope.page.section import Facts, Tables
from dimscope.page.wording import against, number, share
from dimscope.studies.embedding.context import dimension
from dimscope.studies.embedding.facts import embedding_facts
from dimscope.studies.study import Highlight, Summary


def highlights(tables: Tables, facts: Facts) -> list[Highlight]:
    """Return the share of the parameters in embedding tables, and the effective dimension of the table."""
    highlights: list[Highlight] = []
    if "budget" in tables:
        highlights.append(("embedding share", share(embedding_share(tables["budget"])), "of all parameters"))
    row = dimension(tables, PARTICIPATION_RATIO)
    if row:
        highlights.append(("effective dimension", number(row["value"]), against(row["value"], row["null_gaussian"])))
    return highlights


def summarise(tables: Tables, facts: Facts) -> Summary:
    """Return the participation ratio of the centred table in a sentence, and every linear dimension."""
    row = dimension(tables, PARTICIPATION_RATIO, embedding_facts(facts).side)
    subject = "centred embedding table" if facts.is_model else "centred vectors"
    answer = f"No effective dimension: the rows of the {subject} do not vary."
    if row:
        answer = (
            f"The participation ratio of the {subject} is {number(row['value'])} of {facts.dim:,} "
            f"dimensions: {against(row['value'], row['null_gaussian'])}."
        )
    dimensions = tables["dimensions"].select("table", "metric", "preprocess", "value", "null_gaussian", "null_permuted")
    return Summary(answer, {"dimensions": dimensions.sort(pl.col("preprocess") != "centred", maintain_order=True)})
