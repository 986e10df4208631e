"""The answer of a plan of narrowing in a few words and numbers."""

import polars as pl

from dimscope.page.section import Facts, Tables
from dimscope.studies.narrowing.advice import candidate_name
from dimscope.studies.narrowing.facts import narrowing_facts
from dimscope.studies.study import Summary


def summarise(tables: Tables, facts: Facts) -> Summary:
    """Return the advice, and what every candidate costs and saves."""
    plan = tables["plan"]
    names = pl.Series("candidate", [candidate_name(row) for row in plan.iter_rows(named=True)])
    columns = ("parameters", "loss_rise", "kl", "top_1", "prefill_ratio", "kl_dropping")
    advice = ". ".join(line.rstrip(".") for line in narrowing_facts(facts).advice) + "."
    texts = {"narrow_texts": tables["narrow_texts"]} if "narrow_texts" in tables else {}
    return Summary(advice, {"candidates": plan.select(names, *columns), **texts})
