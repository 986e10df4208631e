"""What the token map of the page needs beside its figure: tokens, neighbours, and the command that finds more."""

import shlex
from collections.abc import Mapping
from typing import Any

from dimscope.page.payload import neighbour_lists, token_columns
from dimscope.page.section import Facts, Tables
from dimscope.studies.embedding.context import explained_variance


def page_data(tables: Tables, facts: Facts) -> Mapping[str, Any]:
    """Return the data of the token map as JSON can hold it."""
    tokens, knn = tables.get("tokens"), tables.get("knn")
    return {
        "components": [] if tokens is None else [name for name in tokens.columns if name.startswith("pc")],
        "tokens": None if tokens is None else token_columns(tokens),
        "knn": None if knn is None or knn.is_empty() else neighbour_lists(knn),
        "row": facts.row,
        "explained": explained_variance(tables)[:10],
        "command": f"dimscope neighbors {shlex.quote(facts.name)}",
    }
