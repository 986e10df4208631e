"""What the page carries: rounding within its promise, neighbours in order, no column twice."""

import base64
import gzip
import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimscope.page import payload
from dimscope.page.section import Tables
from dimscope.studies.embedding import token_figures


def _unrounded(column: dict[str, object]) -> np.ndarray:
    codes = np.frombuffer(base64.b64decode(str(column["codes"])), "<u2")
    values = column["low"] + column["step"] * codes  # type: ignore[operator]
    return np.where(codes == payload.MISSING, np.nan, values)


@given(st.lists(st.floats(-1e6, 1e6, width=32) | st.just(float("nan")), min_size=1, max_size=50))
def test_rounded_columns_are_exact_to_half_a_step(values: list[float]) -> None:
    given_values = np.array(values)
    column = payload.rounded(given_values)
    back = _unrounded(column)
    np.testing.assert_array_equal(np.isnan(back), np.isnan(given_values))
    assert np.nanmax(np.abs(back - given_values), initial=0) <= column["step"] * 0.5001


def test_rounded_column_of_nothing_but_gaps() -> None:
    assert np.isnan(_unrounded(payload.rounded(np.array([np.nan, np.inf])))).all()


def test_token_columns_follow_the_ids(tables: Tables) -> None:
    columns = payload.token_columns(tables["tokens"].reverse())
    assert columns["ids"] is None
    assert columns["label"] == tables["tokens"]["label"].to_list()
    np.testing.assert_allclose(_unrounded(columns["floats"]["norm"]), range(1, 9), atol=1e-4)
    assert columns["reason"] == {"7": "beyond the tokenizer"}
    codes = base64.b64decode(columns["category"])
    assert [columns["categories"][code] for code in codes] == tables["tokens"]["category"].to_list()


def test_ids_travel_where_rows_were_left_out(tables: Tables) -> None:
    columns = payload.token_columns(tables["tokens"].filter(pl.col("id") != 3))
    assert np.frombuffer(base64.b64decode(columns["ids"]), "<i4").tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_neighbour_lists_keep_order_and_fill_short_ones(tables: Tables) -> None:
    ragged = tables["knn"].filter(~((pl.col("id") == 3) & (pl.col("rank") == 2))).reverse()
    lists = payload.neighbour_lists(ragged)
    assert lists["k"] == 2
    assert np.frombuffer(base64.b64decode(lists["ids"]), "<i4").tolist() == [1, 3]
    assert np.frombuffer(base64.b64decode(lists["neighbours"]), "<i4").tolist() == [2, 3, 0, -1]
    assert _unrounded(lists["cosine"]) == pytest.approx([0.9, 0.5, 0.25, np.nan], abs=1e-4, nan_ok=True)


def test_points_of_tokens_travel_once(tables: Tables) -> None:
    spec = payload.figure_spec(token_figures.token_map(tables["tokens"]))
    assert not any({"x", "y", "text", "customdata"} & trace.keys() for trace in spec["data"])
    assert "template" not in spec["layout"]
    # The summary line of the norm figure is no column and stays.
    norms = payload.figure_spec(token_figures.norms_by_id(tables["tokens"]))
    assert "x" in norms["data"][-1]


def test_zipped_json_survives_any_text_and_is_reproducible() -> None:
    value = {"label": ["</script>", "\u202e", "\u0000", "😀", "\u2028"], "gap": float("nan")}
    packed = payload.zipped_json(value)
    assert packed == payload.zipped_json(value)
    assert json.loads(gzip.decompress(base64.b64decode(packed))) == {"label": value["label"], "gap": None}
