"""What the page carries for its scripts: token columns, neighbours and figures, small enough for 152k tokens.

Numbers travel as base64 of typed arrays. Columns that are only drawn or listed are rounded to 1/65534 of their range.
"""

import base64
import gzip
import json
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.utils import PlotlyJSONEncoder

from dimscope.page.theme import CATEGORY_MARKS

MISSING = 65535
"""The code of a value that is null or not finite in a rounded column."""


def packed(values: np.ndarray) -> str:
    """Return the base64 of the little-endian bytes of an array."""
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode("ascii")


def rounded(values: np.ndarray) -> dict[str, Any]:
    """Return a float array as 16-bit steps between its extremes: {"low", "step", "codes"}, exact to half a step."""
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    step = (high - low) / (MISSING - 1) or 1.0
    codes = np.full(values.shape, MISSING, dtype=np.uint16)
    codes[finite] = np.rint((values[finite] - low) / step).astype(np.uint16)
    return {"low": float(low), "step": float(step), "codes": packed(codes.ravel())}


def token_columns(tokens: pl.DataFrame) -> dict[str, Any]:
    """Return every column of the token table that the page draws, searches or lists, in the order of the ids."""
    tokens = tokens.sort("id")
    ids, names = tokens["id"].to_numpy(), list(CATEGORY_MARKS)
    codes = tokens["category"].replace_strict(dict(zip(names, range(len(names)), strict=True)), return_dtype=pl.UInt8)
    reasons = tokens.filter(pl.col("reason").is_not_null()).select(pl.col("id").cast(pl.String), "reason")
    floats = [name for name in tokens.columns if name.startswith("pc")] + ["norm", "untrained_score"]
    return {
        # Ids are almost always 0, 1, 2, ...; they travel only where rows were left out.
        "ids": None if np.array_equal(ids, np.arange(len(ids))) else packed(ids.astype(np.int32)),
        "label": tokens["label"].to_list(),
        "categories": names,
        "category": packed(codes.to_numpy()),
        "reason": dict(reasons.iter_rows()),
        "floats": {name: rounded(tokens[name].to_numpy()) for name in floats},
    }


def neighbour_lists(knn: pl.DataFrame) -> dict[str, Any]:
    """Return the precomputed neighbours as one row of k per query; -1 fills lists shorter than k."""
    knn = knn.sort("id", "rank")
    queries, row = np.unique(knn["id"].to_numpy(), return_inverse=True)
    k = int(knn["rank"].to_numpy().max())
    neighbours = np.full((len(queries), k), -1, dtype=np.int32)
    cosines = np.full((len(queries), k), np.nan)
    place = (row, knn["rank"].to_numpy() - 1)
    neighbours[place], cosines[place] = knn["neighbor"].to_numpy(), knn["cosine"].to_numpy()
    return {
        "k": k,
        "ids": packed(queries.astype(np.int32)),
        "neighbours": packed(neighbours),
        "cosine": rounded(cosines),
    }


def figure_spec(figure: go.Figure) -> dict[str, Any]:
    """Return a figure for the page: without its template, and without points that the token columns already hold."""
    spec = figure.to_dict()
    spec["layout"].pop("template", None)
    for trace in spec["data"]:
        if "category" in trace.get("meta", {}):
            for column in ("x", "y", "text", "customdata"):
                trace.pop(column, None)
    return spec


def zipped_json(value: object) -> str:
    """Return the base64 of gzipped JSON: a fifth smaller, and no label can end the script element that holds it."""
    text = json.dumps(value, cls=PlotlyJSONEncoder, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("ascii"), 6, mtime=0)).decode("ascii")
