"""Queries and their neighbours: what a text means, what its vector is, and who is near."""

import math

import polars as pl
import pytest
import torch
from damage import remove_tokenizer, set_rows
from matrices import DTYPES, gaussian, table_without
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.checkpoints.vocabulary import Token, Vocabulary, read_vocabulary
from dimscope.errors import InvalidArgument, TokenizerMissing
from dimscope.geometry.neighbors import NEIGHBOR_METRICS, build_index
from dimscope.studies.embedding.neighbors import (
    Query,
    SearchSpace,
    find_neighbors,
    neighbor_tables,
    parse_query,
    project,
    query_vector,
)
from dimscope.studies.embedding.source import open_source
from dimscope.vectors.embedding import open_table
from dimscope.vectors.moments import moments
from dimscope.vectors.sources import vectors_of
from dimscope.vectors.table import table_from_tensor

PIECES = ["king", " king", " man", "man", " woman", " w", "at", "er", "+", "-", "#", " "]


def encode(text):
    """Split greedily into the longest pieces, as far as they go."""
    ids = []
    while text:
        piece = max((p for p in PIECES if text.startswith(p)), key=len, default=None)
        if piece is None:
            return ids
        ids.append(PIECES.index(piece))
        text = text[len(piece) :]
    return ids


VOCABULARY = Vocabulary(
    tuple(Token(i, p, p.encode(), p.replace(" ", "␣"), "ordinary") for i, p in enumerate(PIECES)), len(PIECES), encode
)
WITHOUT_TOKENIZER = Vocabulary(tuple(Token(i, None, None, f"#{i}", "ordinary") for i in range(12)), None, None)


def terms(text, vocabulary=VOCABULARY):
    return [(sign, list(ids)) for sign, ids in parse_query(text, vocabulary).terms]


# ---- queries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("king", [(1, [0])]),
        (" king", [(1, [1])]),
        ("#3", [(1, [3])]),
        ("#0", [(1, [0])]),
        ("#011", [(1, [11])]),
        ("king - man + woman", [(1, [1]), (-1, [2]), (1, [4])]),
        (" king - man", [(1, [1]), (-1, [2])]),
        ("#0 - #3 + man", [(1, [0]), (-1, [3]), (1, [2])]),
        (" water", [(1, [5, 6, 7])]),
        ("king + water", [(1, [1]), (1, [])]),
        ("king-man", [(1, [0, 9, 3])]),
        ("king -man", [(1, [0, 11, 9, 3])]),
        ("+", [(1, [8])]),
        (" ", [(1, [11])]),
        ("##", [(1, [10, 10])]),
    ],
)
def test_what_a_query_means(text, expected):
    if [] in [ids for _, ids in expected]:
        with pytest.raises(InvalidArgument, match="empty term"):
            parse_query(text, VOCABULARY)
    else:
        assert terms(text) == expected


def test_in_an_expression_a_word_of_several_tokens_is_taken_without_the_space():
    """`at` has no token with a space before it, so it stays as it is typed."""
    assert terms("at + er") == [(1, [6]), (1, [7])]


def test_a_query_knows_its_ids():
    assert parse_query("king - #7", VOCABULARY).ids == (1, 7)
    assert parse_query("king - #7", VOCABULARY).text == "king - #7"


@pytest.mark.parametrize("text", ["", "king + ", "king -  + man", " + king", "xyz"])
def test_an_empty_term_is_refused_with_the_query(text):
    with pytest.raises(InvalidArgument, match="empty term") as caught:
        parse_query(text, VOCABULARY)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["#12", "#99999", "king + #12"])
def test_a_row_outside_the_table_is_refused(text):
    with pytest.raises(InvalidArgument, match=r"rows 0 to 11; there is no row \d+"):
        parse_query(text, VOCABULARY)


def test_without_tokenizer_rows_can_be_named_and_text_cannot():
    assert terms("#3 - #4", WITHOUT_TOKENIZER) == [(1, [3]), (-1, [4])]
    with pytest.raises(TokenizerMissing, match="'#123'"):
        parse_query("king", WITHOUT_TOKENIZER)


# ---- vectors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_vector_is_the_signed_sum_of_its_terms(dtype):
    x = gaussian(12, 5, dtype=dtype)
    before = x.clone()
    query = Query("", ((1, (0,)), (-1, (3,)), (1, (5, 6, 7))))
    rows = x.float().double()
    table = table_from_tensor(x)
    assert query_vector(query, table).dtype == torch.float64
    torch.testing.assert_close(query_vector(query, table), rows[0] - rows[3] + rows[5:8].mean(dim=0))
    torch.testing.assert_close(query_vector(query, table, "mean"), query_vector(query, table))
    torch.testing.assert_close(query_vector(query, table, "sum"), rows[0] - rows[3] + rows[5:8].sum(dim=0))
    assert torch.equal(x, before)


def test_for_single_tokens_mean_and_sum_are_the_row():
    table = table_from_tensor(gaussian(12, 5))
    query = parse_query("king", VOCABULARY)
    assert torch.equal(query_vector(query, table, "mean"), query_vector(query, table, "sum"))


def test_projection_is_that_of_scikit_learn():
    x = gaussian(200, 6) * torch.linspace(1, 3, 6) + 4
    found = project(moments([x], dtype=torch.float64), x, 3)
    oracle = PCA(3).fit(x.double().numpy())
    expected = torch.from_numpy(oracle.transform(x.double().numpy())).abs()
    torch.testing.assert_close(found.rows.double().abs(), expected, atol=1e-4, rtol=0)
    for i in (0, 7):
        torch.testing.assert_close(found.apply(x[i].double()), found.rows[i].double(), atol=1e-4, rtol=0)


# ---- neighbours ----------------------------------------------------------------------------------------------------


def test_a_query_is_not_its_own_neighbour():
    x = gaussian(12, 5)
    query = parse_query("king - #3", VOCABULARY)
    found = find_neighbors(
        query,
        query_vector(query, table_from_tensor(x)),
        [SearchSpace("all", build_index(torch.arange(12), x))],
        VOCABULARY,
        5,
    )
    assert len(found) == 5
    assert not {1, 3} & set(found["id"])
    assert found["rank"].to_list() == [1, 2, 3, 4, 5]
    assert found["cosine"].is_sorted(descending=True)
    assert found["label"].to_list() == [VOCABULARY.tokens[i].label for i in found["id"]]
    assert set(found["query"]) == {"king - #3"}
    assert set(found["space"]) == {"all"}


def test_more_neighbours_than_tokens_are_all_others():
    x = gaussian(12, 5)
    query = parse_query(" king", VOCABULARY)
    found = find_neighbors(
        query, x[1].double(), [SearchSpace("all", build_index(torch.arange(12), x, "euclidean"))], VOCABULARY, 50
    )
    assert sorted(found["id"]) == [i for i in range(12) if i != 1]
    assert found["distance"].is_sorted()
    assert found.schema["distance"] == pl.Float64


@pytest.mark.parametrize("metric", NEIGHBOR_METRICS)
def test_the_tables_are_those_of_scikit_learn_in_both_spaces(checkpoint, metric):
    opened = open_checkpoint(checkpoint("qwen2"))
    source = open_source(opened)
    rows = source.loaded.rows
    x = rows.double().numpy()
    found = neighbor_tables(source, ["#300", " the"], k=7, metric=metric, components=4)
    assert list(found) == ["#300", " the"]
    pca = PCA(4).fit(x)
    for space, points in (("all 32 dimensions", x), ("first 4 components", pca.transform(x))):
        points = points - points.mean(axis=0) if metric == "centred cosine" else points
        index = NearestNeighbors(
            n_neighbors=8, algorithm="brute", metric="euclidean" if metric == "euclidean" else "cosine"
        )
        distance, nearest = index.fit(points).kneighbors(points[300:301])
        part = found["#300"].filter(space=space)
        assert part["id"].to_list() == nearest[0][1:].tolist()
        value = part["distance"] if metric == "euclidean" else 1 - part["cosine"]
        assert value.to_list() == pytest.approx(distance[0][1:].tolist(), abs=1e-5)


def test_neighbours_of_a_planted_copy_and_of_text(checkpoint, editable):
    folder = editable(checkpoint("llama"))
    opened = open_checkpoint(folder)
    vocabulary = read_vocabulary(opened.source, 512)
    (the,) = vocabulary.ids(" the")
    set_rows(folder, [400], open_table(opened).rows(torch.tensor([the]))[0] * 2)
    opened = open_checkpoint(folder)
    found = neighbor_tables(open_source(opened), [" the", f"#{the}"], k=3, components=0)
    for frame in found.values():
        assert frame["id"][0] == 400
        assert frame["cosine"][0] == pytest.approx(1, abs=1e-6)
        assert set(frame["space"]) == {"all 32 dimensions"}
        assert len(frame) == 3


def test_excluded_rows_are_nobodys_neighbours_and_cannot_be_asked_for(checkpoint, editable):
    folder = editable(checkpoint("qwen2"))
    set_rows(folder, [5, 300], math.nan)
    opened = open_checkpoint(folder)
    source = open_source(opened, skip_nonfinite=True)
    found = neighbor_tables(source, ["#6"], k=600, components=3)["#6"]
    assert not {5, 6, 300} & set(found["id"])
    assert len(found) == 2 * 509
    assert found["cosine"].is_finite().all()
    labels = dict(zip(found["id"], found["label"], strict=True))
    assert labels[301] == read_vocabulary(opened.source, 512).tokens[301].label
    with pytest.raises(InvalidArgument, match="row 300 holds NaN or Inf"):
        neighbor_tables(source, ["#6 - #300"])


@pytest.mark.parametrize("components", [-1, 33])
def test_components_outside_the_table_are_refused(checkpoint, components):
    opened = open_checkpoint(checkpoint("qwen2"))
    with pytest.raises(InvalidArgument, match=f"must be 0 to 32, got {components}"):
        neighbor_tables(open_source(opened), ["#1"], components=components)


@pytest.mark.parametrize(("hidden_size", "components"), [(32, 10), (8, 8)])
def test_the_projection_has_ten_components_or_all_there_are(checkpoint, hidden_size, components):
    opened = open_checkpoint(checkpoint("gpt2", hidden_size=hidden_size))
    found = neighbor_tables(open_source(opened), ["#300"])["#300"]
    assert set(found["space"]) == {f"all {hidden_size} dimensions", f"first {components} components"}


def test_a_checkpoint_without_tokenizer_answers_for_rows(checkpoint, editable):
    folder = editable(checkpoint("qwen2"))
    remove_tokenizer(folder)
    source = open_source(open_checkpoint(folder))
    assert neighbor_tables(source, ["#4 - #5"], k=2)["#4 - #5"]["label"][0].startswith("#")
    with pytest.raises(TokenizerMissing):
        neighbor_tables(source, ["the"])


def test_ids_of_a_table_with_gaps_are_kept():
    x = gaussian(12, 4)
    x[0] = math.nan
    ids, rows = table_without(x, {0}).load()
    query = parse_query("#3", VOCABULARY)
    found = find_neighbors(query, x[3].double(), [SearchSpace("all", build_index(ids, rows))], VOCABULARY, 3)
    expected = torch.nn.functional.cosine_similarity(x, x[3:4]).nan_to_num(-9)
    expected[3] = -9
    assert found["id"].to_list() == expected.topk(3).indices.tolist()


def test_a_lone_string_is_one_query():
    source = open_source(open_checkpoint("builtin"))
    alone = neighbor_tables(source, " water", k=2)
    assert list(alone) == [" water"]
    assert alone[" water"].equals(neighbor_tables(source, [" water"], k=2)[" water"])


def test_rows_of_vectors_are_searched_by_label_and_by_number():
    x = gaussian(30, 6)
    x[7] = 2 * x[3]
    source = open_source(vectors_of(x, labels=[f"word{i}" for i in range(30)]))
    tables = neighbor_tables(source, ["word3", "#3", "word3 - word5 + word5"], k=1, components=0)
    assert [frame["label"].to_list() for frame in tables.values()] == [["word7"]] * 3
    with pytest.raises(InvalidArgument, match="no row of vectors has the label 'word99'"):
        neighbor_tables(source, "word99")
    with pytest.raises(TokenizerMissing, match="has no labels"):
        neighbor_tables(open_source(vectors_of(x)), "word3")
