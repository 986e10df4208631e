"""Small result tables built by hand: eight tokens, four dimensions, labels as hostile as a vocabulary allows."""

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from dimscope.page.section import Facts, Tables
from dimscope.storage import FORMAT
from dimscope.studies.embedding.study import EMBEDDING

NEAR_SEED = "near a group of seed rows"
HOSTILE = "</script><script>alert(1)</script>"
LABELS = ["<s>", "␣water", "Water", HOSTILE, "\"'`&amp;", "\u202eשלום", "<b>bold</b><0xFF>", "#7"]
CATEGORIES = ["special", "ordinary", "ordinary", "ordinary", "undecodable", "ordinary", "unreachable", "beyond"]
TABLES = ["budget", "tokens", "spectrum", "dimensions", "measures", "correlation", "correlation_blocks", "duplicates", "knn", "hubs",
          "probes", "influence", "truncation"]  # fmt: skip
EMBEDDING_FACTS = {
    "side": "input",
    "radius": 0.001,
    "tokenizer_size": 7,
    "neighbors": 2,
    "n_queries": 2,
}
REPORT = {
    "model": "my model's <tiny>",
    "revision": None,
    "studies": {
        "embedding": {
            "facts": EMBEDDING_FACTS,
            "tables": TABLES,
            "warnings": ["a <warning>"],
            "seconds": 2.0,
            "definition": [FORMAT, EMBEDDING.definition],
        }
    },
    "architecture": "LlamaForCausalLM",
    "vocab_size": 8,
    "hidden_size": 4,
    "tied": True,
    "n_parameters": 100,
    "dtype": "float32",
    "versions": {"dimscope": "0.1.0"},
}


def budget() -> pl.DataFrame:
    rows = [
        ("embed", "8 x 4", 32, "input embedding", None),
        ("attn", "17 x 4", 60, "attention", 0),
        ("norm", "8", 8, "norm", None),
        ("mask", "4 x 4", 0, "buffer", 0),
    ]
    frame = pl.DataFrame(rows, schema=["name", "shape", "n_parameters", "role", "block"], orient="row")
    return frame.with_columns(dtype=pl.lit("float32"), n_bytes=pl.col("n_parameters") * 4)


def tokens() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "id": range(8),
            "label": LABELS,
            "category": CATEGORIES,
            "reason": [None] * 7 + ["beyond the tokenizer"],
            "norm": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
            "pc1": [0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 0.25, 3.0],
            "pc2": [1.0, 0.0, 0.5, -1.0, 1.5, -0.5, 0.75, -3.0],
            "pc3": [0.5, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8],
            "untrained_score": [1.0, 0.9, 1.1, 0.2, 1.0, 1.2, 0.0, 0.1],
            "untrained": [False, False, False, True, False, False, True, True],
            "untrained_sign": [None, None, None, NEAR_SEED, None, None, "zero vector", NEAR_SEED],
            "untrained_reason": [None, None, None, NEAR_SEED, None, None, "zero vector", NEAR_SEED],
        }
    ).with_columns(pl.col("norm", "pc1", "pc2", "pc3", "untrained_score").cast(pl.Float32))


def spectrum() -> pl.DataFrame:
    sigma = [4.0, 2.0, 1.0, 0.5]
    energy = [s * s / 21.25 for s in sigma]
    return pl.DataFrame(
        {
            "table": ["input"] * 4,
            "rows": ["all"] * 4,
            "preprocess": ["centred"] * 4,
            "index": [1, 2, 3, 4],
            "singular_value": sigma,
            "explained_variance_ratio": energy,
            "cumulative": pl.Series(energy).cum_sum(),
            "gaussian_singular_value": [2.6, 2.4, 2.2, 2.0],
            "permuted_singular_value": [2.8, 2.4, 2.1, 1.9],
        }
    )


def dimensions() -> pl.DataFrame:
    rows = [("variance count 90%", "centred", 2.0, 4.0, 4.0), ("participation ratio", "centred", 1.6, 3.9, 3.8),
            ("stable rank", "uncentred", 1.2, 3.0, 2.9)]  # fmt: skip
    schema = ["metric", "preprocess", "value", "null_gaussian", "null_permuted"]
    whole = pl.DataFrame(rows, schema=schema, orient="row").with_columns(table=pl.lit("input"))
    trained = whole.with_columns(
        value=pl.col("value") * 1.5, rows=pl.lit("trained"), n_tokens=pl.lit(5, dtype=pl.Int64)
    )
    return pl.concat([trained, whole.with_columns(rows=pl.lit("all"), n_tokens=pl.lit(8, dtype=pl.Int64))])


def measures() -> pl.DataFrame:
    rows = [("chance edge", "centred", 2.0, None), ("directions above chance", "centred", 2.0, 0.0),
            ("participation ratio by chance", "centred", 3.0, None),
            ("spikes above the edge", "centred", 1.0, None), ("mean cosine", "uncentred", 0.31, 0.0),
            ("mean cosine", "centred", -0.001, 0.0), ("norm-rank correlation", "uncentred", 0.5, 0.0),
            ("untrained threshold", "centred", 0.4, None), ("seed rows", "uncentred", 2.0, None)]  # fmt: skip
    frame = pl.DataFrame(rows, schema=["metric", "preprocess", "value", "null"], orient="row")
    return frame.with_columns(
        table=pl.lit("input"), rows=pl.lit("all"), n_tokens=pl.lit(8, dtype=pl.Int64), stderr=pl.lit(0.05)
    )


def correlation() -> pl.DataFrame:
    matrix = [[1.0, 0.2, -0.5], [0.2, 1.0, 0.9], [-0.5, 0.9, 1.0]]
    return pl.DataFrame({"id": [0, 1, 2], "label": LABELS[:3], "r": pl.Series(matrix, dtype=pl.Array(pl.Float32, 3))})


def groups(key: str, spread: str) -> pl.DataFrame:
    frame = pl.DataFrame({key: [0, 0], "id": [6, 7], "label": LABELS[6:], "category": CATEGORIES[6:], "size": [2, 2]})
    return frame.with_columns(pl.lit(0.999).alias(spread), radius=pl.lit(0.001))


def knn() -> pl.DataFrame:
    return pl.DataFrame(
        {"id": [1, 1, 3, 3], "rank": [1, 2, 1, 2], "neighbor": [2, 3, 0, 7], "cosine": [0.9, 0.5, 0.25, -0.5]}
    )


def probes() -> pl.DataFrame:
    spaces = ["all d dimensions"] * 2 + ["first 10 components"] * 2
    return pl.DataFrame(
        {"query": ["␣water"] * 4, "space": spaces, "rank": [1, 2, 1, 2], "id": [2, 3, 2, 5],
         "label": [LABELS[i] for i in (2, 3, 2, 5)], "category": ["ordinary"] * 4, "cosine": [0.9, 0.5, 0.99, 0.9]}
    )  # fmt: skip


def influence() -> pl.DataFrame:
    rows = [
        ("input", "beyond", 1, "participation ratio", 1.7, 1.6),
        ("input", "untrained", 3, "participation ratio", 2.4, 1.6),
    ]
    return pl.DataFrame(rows, schema=["table", "left_out", "n_tokens", "metric", "value", "value_all"], orient="row")


def truncation() -> pl.DataFrame:
    """Return what 1, 2 and 3 of four dimensions keep: PCA most, truncation as much as a random rotation."""
    kept = {"PCA": (0.5, 0.85, 0.97), "truncation": (0.3, 0.6, 0.93), "random coordinates": (0.3, 0.6, 0.8),
            "random rotation": (0.3, 0.6, 0.9)}  # fmt: skip
    rows = [
        (method, size, metric, seed if "random" in method else None, value + 0.01 * (seed - 1) * ("random" in method))
        for method, values in kept.items()
        for seed in ((0, 1, 2) if "random" in method else (0,))
        for size, value in enumerate(values, start=1)
        for metric in ("neighbor overlap", "similarity rank correlation")
    ]
    counts = {"n_tokens": 100, "neighbors": 10, "candidates": 200, "fitted": 300}
    frame = pl.DataFrame(rows, schema=["method", "size", "metric", "seed", "value"], orient="row")
    return frame.with_columns(table=pl.lit("input"), rows=pl.lit("trained"), stderr=pl.lit(0.005)).with_columns(
        pl.lit(n, dtype=pl.Int64).alias(name) for name, n in counts.items()
    )


def small_tables() -> Tables:
    return {
        "budget": budget(),
        "tokens": tokens(),
        "spectrum": spectrum(),
        "dimensions": dimensions(),
        "measures": measures(),
        "correlation": correlation(),
        "correlation_blocks": groups("block", "min_r"),
        "duplicates": groups("group", "diameter"),
        "knn": knn(),
        "hubs": pl.DataFrame({"id": [1, 2, 3], "label": LABELS[1:4], "in_degree": [6, 0, 0]}),
        "probes": probes(),
        "influence": influence(),
        "truncation": truncation(),
    }


@pytest.fixture
def tables() -> Tables:
    return small_tables()


@pytest.fixture
def facts() -> Facts:
    return Facts.from_json(REPORT)


def write_run(folder: Path, tables: Tables, changes: dict[str, object] | None = None) -> Path:
    (folder / "tables").mkdir()
    for name, frame in tables.items():
        frame.write_parquet(folder / "tables" / f"{name}.parquet")
    (folder / "report.json").write_text(json.dumps({**REPORT, **(changes or {})}), encoding="utf-8")
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[[Tables, dict[str, object]], Path]:
    """Return a function that writes tables and a report.json as a finished run leaves them."""

    def write(tables: Tables, changes: dict[str, object] | None = None) -> Path:
        return write_run(tmp_path, tables, changes)

    return write


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the small tables that the tests of one module share and only read."""
    return write_run(tmp_path_factory.mktemp("run"), small_tables())
