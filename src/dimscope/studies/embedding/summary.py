"""The answer of the embedding study in a few words and numbers."""

import polars as pl

from dimscope.checkpoints.budget import embedding_share
from dimscope.geometry.metrics import NEIGHBOR_OVERLAP, PARTICIPATION_RATIO
from dimscope.geometry.truncation import PCA
from dimscope.page.section import Facts, Tables
from dimscope.page.wording import number, share
from dimscope.studies.embedding import truncation_answers
from dimscope.studies.embedding.context import LEADING, dimension, participation_ratio_against, rows_phrase
from dimscope.studies.embedding.facts import embedding_facts
from dimscope.studies.study import Highlight, Summary


def highlights(tables: Tables, facts: Facts) -> list[Highlight]:
    """Return the share of the parameters in embedding tables, and the effective dimension of the table."""
    highlights: list[Highlight] = []
    if "budget" in tables:
        highlights.append(("embedding share", share(embedding_share(tables["budget"])), "of all parameters"))
    row = dimension(tables, PARTICIPATION_RATIO)
    if row:
        note = f"of {rows_phrase(tables)}, {participation_ratio_against(tables, row)}"
        highlights.append(("effective dimension", number(row["value"]), note))
    frame = None if facts.is_model else truncation_answers.truncation_of(tables)
    if frame is not None:
        size = truncation_answers.needed(frame, PCA, NEIGHBOR_OVERLAP, 0.9, facts.dim).size
        note = f"of {facts.dim:,} keep 90% of the nearest neighbours, after PCA"
        highlights.append(("dimensions for neighbours", f"{size:,}", note))
    return highlights


def summarise(tables: Tables, facts: Facts) -> Summary:
    """Return the participation ratio of the centred table in a sentence, and every linear dimension."""
    side = embedding_facts(facts).side
    row = dimension(tables, PARTICIPATION_RATIO, side)
    subject = "embedding table" if facts.is_model else "vectors"
    answer = f"No effective dimension: the rows of the {subject} do not vary."
    if row:
        answer = (
            f"The participation ratio of {rows_phrase(tables, side)} of the {subject}, centred, is {number(row['value'])} of "
            f"{facts.dim:,} dimensions: {participation_ratio_against(tables, row)}.{_of_all_rows(tables, side)}"
        )
    if not facts.is_model and (fewer := truncation_answers.answer(tables, facts.dim, facts.row)):
        answer = f"{answer} {fewer}."
    columns = ("table", "rows", "metric", "preprocess", "value", "null_gaussian", "null_permuted")
    dimensions = tables["dimensions"].filter(pl.col("rows").is_in(LEADING)).select(columns)
    return Summary(answer, {"dimensions": dimensions.sort(pl.col("preprocess") != "centred", maintain_order=True)})


def _of_all_rows(tables: Tables, side: str) -> str:
    """Return what the participation ratio is with the untrained rows, where that is another number."""
    lead, whole = (dimension(tables, PARTICIPATION_RATIO, side, rows) for rows in (None, "all"))
    if lead is None or whole is None or number(lead["value"]) == number(whole["value"]):
        return ""
    return f" With the {whole['n_tokens'] - lead['n_tokens']:,} untrained rows it is {number(whole['value'])}."
