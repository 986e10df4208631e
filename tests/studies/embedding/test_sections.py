"""Findings are computed from the tables, grammatical for none, one and many, and silent about what was not measured."""

from dataclasses import replace

import polars as pl
import pytest

from dimscope.page.section import Facts, Section, Tables
from dimscope.studies.embedding import spectrum_sections as directions
from dimscope.studies.embedding import token_sections as rows
from dimscope.studies.embedding.correlation_sections import correlation_section
from dimscope.studies.embedding.study import EMBEDDING

embedding_sections = EMBEDDING.load().make_sections


def _section(made: Section | None) -> Section:
    assert made is not None
    return made


def _measured(tables: Tables, metric: str, value: float) -> Tables:
    changed = pl.when(pl.col("metric") == metric).then(value).otherwise("value").alias("value")
    return {**tables, "measures": tables["measures"].with_columns(changed)}


def test_all_sections_in_the_order_of_the_page(tables: Tables, facts: Facts) -> None:
    anchors = [section.anchor for section in embedding_sections(tables, facts)]
    assert anchors == ["intro", "budget", "map", "first-ids", "neighbours", "correlation", "duplicates", "untrained",
                       "spectrum", "dimensions", "truncation", "isotropy", "hubness"]  # fmt: skip


def test_every_section_says_how_to_read_it_and_what_it_does_not_say(tables: Tables, facts: Facts) -> None:
    for section in embedding_sections(tables, facts):
        assert section.title[0].isupper() or section.title[0].isdigit()
        assert len(section.how_to_read) > 80
        assert len(section.caveat) > 80
        assert not section.title.endswith(".")


@pytest.mark.parametrize(
    "gone",
    ["budget", "tokens", "spectrum", "dimensions", "measures", "correlation", "correlation_blocks", "duplicates", "knn",
     "hubs", "probes", "truncation"],
)  # fmt: skip
def test_any_table_may_be_missing(tables: Tables, facts: Facts, gone: str) -> None:
    left = {name: frame for name, frame in tables.items() if name != gone}
    full, fewer = embedding_sections(tables, facts), embedding_sections(left, facts)
    assert len(full) - 5 <= len(fewer) <= len(full)


def test_no_tables_leave_the_introduction(facts: Facts) -> None:
    assert [section.anchor for section in embedding_sections({}, facts)] == ["intro"]


def test_budget_names_the_share_and_the_tie(tables: Tables, facts: Facts) -> None:
    tied = _section(directions.budget_section(tables, facts)).title
    assert (
        tied == "32.0% of the 100 parameters are the embedding table, "
        "which is used twice: to read tokens and to predict them"
    )
    untied = _section(directions.budget_section(tables, replace(facts, tied=False))).title
    assert untied.startswith("32.0% of the 100 parameters are token-embedding tables")


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (0.0, "None of 4 directions is wider than chance explains, in the 5 trained rows"),
        (1.0, "1 of 4 directions is wider"),
        (3.0, "3 of 4 directions are wider"),
    ],
)
def test_spectrum_counts_the_directions_above_the_chance_edge(
    tables: Tables, facts: Facts, n: float, words: str
) -> None:
    assert _section(
        directions.spectrum_section(_measured(tables, "directions above chance", n), facts)
    ).title.startswith(words)


@pytest.mark.parametrize(
    ("model", "title"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("/data/models/tiny", "tiny"),
        ("../a/b/tiny/", "tiny"),
        ("builtin", "builtin"),
    ],
)
def test_title_is_the_hub_id_or_the_last_part_of_a_path(facts: Facts, model: str, title: str) -> None:
    assert replace(facts, name=model).title == title


def test_untied_model_shows_both_tables(tables: Tables, facts: Facts) -> None:
    both = {
        name: pl.concat([tables[name], tables[name].with_columns(table=pl.lit("output"))])
        for name in ("spectrum", "dimensions")
    }
    changed = {**tables, **both}
    assert len(_section(directions.spectrum_section(changed, facts)).blocks) == 4
    plots = [block for block in _section(directions.dimension_section(changed, facts)).blocks if block.kind == "plot"]
    assert len(plots) == 2


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.0, "the 5 trained rows use 1 of 4 dimensions, far fewer than the 3.9"),
        (3.0, "fewer than the 3.9"),
        (3.9, "about as many as the 3.9"),
        (4.2, "more than the 3.9"),
    ],
)
def test_dimension_is_compared_with_its_null(tables: Tables, facts: Facts, value: float, words: str) -> None:
    frame = tables["dimensions"].with_columns(value=pl.lit(value))
    assert words in _section(directions.dimension_section({**tables, "dimensions": frame}, facts)).title


def test_the_null_of_the_title_keeps_norms_and_column_variances(tables: Tables, facts: Facts) -> None:
    of_trained = {**tables, "measures": tables["measures"].with_columns(rows=pl.lit("trained"))}
    title = _section(directions.dimension_section(of_trained, facts)).title
    assert "fewer than the 3 of a random table with the same norms and column variances" in title  # 2.4 of 4


def test_a_random_table_is_not_called_structured(tables: Tables, facts: Facts) -> None:
    frame = tables["dimensions"].with_columns(value="null_gaussian")
    title = _section(directions.dimension_section({**tables, "dimensions": frame}, facts)).title
    assert "about as many as" in title
    assert "fewer" not in title


def test_duplicate_rows_that_are_untrained_too_are_counted(tables: Tables, facts: Facts) -> None:
    frame = pl.DataFrame({"left_out": ["copies"], "n_tokens": [1], "value": [2.0], "value_all": [1.0]})
    (finding,) = _section(directions.dimension_section({**tables, "influence": frame}, facts)).findings
    assert (
        finding
        == "1 duplicate row (all but one of each group, 1 of them untrained) moves the participation ratio from 2 to 1."
    )


@pytest.mark.parametrize(("rho", "words"), [(0.5, "norms rise"), (-0.5, "norms fall"), (0.02, "do not follow")])
def test_norms_rise_fall_or_neither(tables: Tables, facts: Facts, rho: float, words: str) -> None:
    changed = _measured(tables, "norm-rank correlation", rho)
    title = _section(directions.isotropy_section(changed, facts)).title
    assert words in title
    assert "mean cosine is 0.31 (-0.001 after centring)" in title


def test_a_few_rows_show_no_relation_of_norm_and_id(tables: Tables, facts: Facts) -> None:
    few = _measured(tables, "norm-rank correlation", 0.5)
    few = {**few, "measures": few["measures"].with_columns(stderr=pl.lit(0.3))}
    assert "do not follow" in _section(directions.isotropy_section(few, facts)).title


def _with_queries(facts: Facts, n: int) -> Facts:
    study = facts.studies["embedding"]
    return replace(facts, studies={"embedding": replace(study, facts={**study.facts, "n_queries": n})})


def test_map_says_which_neighbours_it_has(tables: Tables, facts: Facts) -> None:
    sample = _section(rows.map_section(tables, facts)).how_to_read
    full = _section(rows.map_section(tables, _with_queries(facts, 8))).how_to_read
    none = _section(rows.map_section(tables, _with_queries(facts, 0))).how_to_read
    assert "random sample of 2 tokens" in sample
    assert "all 8 tokens were computed" in full
    assert "No neighbours were computed" in none


def test_neighbours_count_what_the_projection_keeps(tables: Tables, facts: Facts) -> None:
    wide = replace(facts, dim=64)
    title = _section(rows.neighbours_section(tables, wide)).title
    assert title == "Keeping 10 of 64 dimensions keeps 1 of 2 nearest neighbours, for one query"
    # With ten dimensions or fewer nothing is left out, so nothing is claimed.
    assert _section(rows.neighbours_section(tables, facts)).title == "Nearest neighbours of 1 query"


@pytest.mark.parametrize(
    ("n_groups", "title"),
    [
        (0, "No two rows of the table are copies of each other (radius 0.001)"),
        (1, "2 tokens are practically one vector (radius 0.001)"),
        (2, "4 tokens share only 2 practically different vectors (radius 0.001)"),
    ],
)
def test_duplicates_for_none_one_and_many(tables: Tables, facts: Facts, n_groups: int, title: str) -> None:
    frame = tables["duplicates"]
    several = pl.concat([frame.with_columns(group=pl.lit(i)) for i in range(n_groups)] or [frame.clear()])
    assert _section(rows.duplicates_section({**tables, "duplicates": several}, facts)).title == title


def test_correlation_blocks_for_none_one_and_many(tables: Tables, facts: Facts) -> None:
    frame = tables["correlation_blocks"]
    two = pl.concat([frame, frame.with_columns(block=pl.lit(1, dtype=pl.Int64), size=pl.lit(3, dtype=pl.Int64))])
    titles = [
        _section(correlation_section({**tables, "correlation_blocks": blocks}, facts)).title
        for blocks in (frame.clear(), frame, two)
    ]
    assert titles == [
        "No two tokens of the table are near-perfectly correlated",
        "One block of 2 tokens is almost perfectly correlated (lowest r 0.999)",
        "2 blocks of tokens are almost perfectly correlated, the largest of 3 (lowest r 0.999)",
    ]


@pytest.mark.parametrize(
    ("flagged", "title"),
    [
        ([], "No row looks under-trained"),
        ([7], "1 row looks under-trained, and it is not ordinary text"),
        ([6, 7], "2 rows look under-trained, none of them ordinary text"),
        ([3], "1 row looks under-trained, though ordinary text can produce it"),
        ([1, 3], "2 rows look under-trained, though ordinary text can produce them"),
        ([3, 6, 7], "3 rows look under-trained, 1 of them ordinary text"),
    ],
)
def test_untrained_for_none_one_and_many(tables: Tables, facts: Facts, flagged: list[int], title: str) -> None:
    tokens = tables["tokens"].with_columns(untrained=pl.col("id").is_in(flagged))
    assert _section(rows.untrained_section({**tables, "tokens": tokens}, facts)).title == title


def test_no_threshold_no_claim_that_all_is_well(tables: Tables, facts: Facts) -> None:
    tokens = tables["tokens"].with_columns(untrained=False)
    measures = tables["measures"].filter(pl.col("metric") != "untrained threshold")
    section = _section(rows.untrained_section({**tables, "tokens": tokens, "measures": measures}, facts))
    assert section.title == "The seed rows do not stand apart from the rest, so no row is called under-trained"


def test_no_seed_no_claim_about_training(tables: Tables, facts: Facts) -> None:
    tokens = tables["tokens"].with_columns(untrained_score=pl.lit(None, dtype=pl.Float32))
    assert rows.untrained_section({**tables, "tokens": tokens}, facts) is None


def test_surprising_tokens_come_first(tables: Tables, facts: Facts) -> None:
    grid = _section(rows.untrained_section(tables, facts)).blocks[1]
    assert [row[0].id for row in grid.rows] == [3, 6, 7]  # type: ignore[union-attr]


def test_hubs_tell_the_largest_the_mean_and_the_unnamed(tables: Tables, facts: Facts) -> None:
    title = _section(rows.hubness_section(tables, facts)).title
    assert (
        title == "The largest hub is in the neighbour lists of 6 tokens, where 2 is the average; "
        "66.7% of tokens are in no list"
    )


def test_a_graph_where_everyone_is_named(tables: Tables, facts: Facts) -> None:
    hubs = tables["hubs"].with_columns(in_degree=pl.lit(2, dtype=pl.Int64))
    title = _section(rows.hubness_section({**tables, "hubs": hubs}, facts)).title
    assert title.endswith("every token is in a list")


def test_model_without_tokenizer(tables: Tables, facts: Facts) -> None:
    bare = tables["tokens"].with_columns(
        label=pl.format("#{}", "id"), category=pl.lit("ordinary"), reason=pl.lit(None, dtype=pl.String)
    )
    section = _section(rows.map_section({**tables, "tokens": bare}, facts))
    assert "not ordinary" not in section.how_to_read
