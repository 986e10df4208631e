"""A list of layers selects sites, and what is no such list is refused in one line."""

from __future__ import annotations

import tracemalloc

import pytest
import transformers

from dimscope.activations.layer_selection import select_sites
from dimscope.activations.sites import Site, find_sites
from dimscope.errors import InvalidArgument


@pytest.fixture
def sites(checkpoint) -> list[Site]:
    """Return the sites of a model of six blocks: layers 0 to 7."""
    folder = checkpoint("llama", layers=6)
    return find_sites(transformers.AutoModelForCausalLM.from_pretrained(folder))


@pytest.fixture
def sites_without_norm(model_of) -> list[Site]:
    return find_sites(model_of("opt-350m"))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, range(8)),
        ("0", [0]),
        ("emb", [0]),
        ("norm", [7]),
        ("7", [7]),
        ("2:5", [2, 3, 4]),
        ("0:8", range(8)),
        ("norm,emb", [0, 7]),
        ("0,4:7,norm", [0, 4, 5, 6, 7]),
        (" 3 , 1 ,emb", [0, 1, 3]),
        ("3,3,2:4", [2, 3]),
        ("4:4,2", [2]),
        ("05", [5]),
    ],
)
def test_a_list_names_sites(sites, layers, expected):
    chosen = select_sites(sites, layers)
    assert chosen == [sites[layer] for layer in expected]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("", r"^`layers` must be a list such as 0,4:8,norm, got '' in it"),
        ("1,,2", r"^`layers` must be a list such as 0,4:8,norm, got '' in it"),
        ("one", r"^`layers` must be a list such as 0,4:8,norm, got 'one' in it"),
        ("-1", r"^`layers` must be a list such as 0,4:8,norm, got '-1' in it"),
        ("1-3", r"^`layers` must be a list such as 0,4:8,norm, got '1-3' in it"),
        ("2:", r"^`layers` must be a list such as 0,4:8,norm, got '2:' in it"),
        ("1:6:2", r"^`layers` must be a list such as 0,4:8,norm, got '1:6:2' in it"),
        ("emb:norm", r"^`layers` must be a list such as 0,4:8,norm, got 'emb:norm' in it"),
        ("1.5", r"^`layers` must be a list such as 0,4:8,norm, got '1\.5' in it"),
        ("8", r"there is no layer 8: this model has 0 \(embeddings\) to 7 \(after final norm\)$"),
        ("0,12,9", r"there is no layer 9: this model has 0 \(embeddings\) to 7 \(after final norm\)$"),
        ("6:10", r"there is no layer 8: this model has 0 \(embeddings\) to 7 \(after final norm\)$"),
        ("4:4", r"^`layers` 4:4 selects no layer; the end of a range is excluded"),
        ("5:2", r"^`layers` 5:2 selects no layer; the end of a range is excluded"),
    ],
)
def test_what_is_no_list_of_layers_gets_one_line(sites, layers, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        select_sites(sites, layers)


def test_a_model_without_a_final_norm_has_no_such_site(sites_without_norm):
    assert select_sites(sites_without_norm, "0:3") == sites_without_norm
    with pytest.raises(
        InvalidArgument, match=r"^there is no layer 3: this model has 0 \(embeddings\) to 2 \(block 2\)$"
    ):
        select_sites(sites_without_norm, "norm")


def test_a_range_far_beyond_the_model_is_refused_without_being_spelled_out(sites):
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument, match="there is no layer 8"):
            select_sites(sites, "0:500000")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
