"""The numbers, layers and comparisons that the page names follow from the tables; test_golden_page.py has its sentences."""

import math
import re
from dataclasses import replace
from typing import Any

import layer_tables as made
import polars as pl
import pytest
from layer_tables import Model, Plan

from dimscope.geometry.metrics import SAME_TOKEN_NEIGHBORS, TWO_NN
from dimscope.page.section import Facts, Grid, Plot, Section, StudyFacts, Tables
from dimscope.studies.layers import comparison_sections as contrasts
from dimscope.studies.layers import intrinsic_sections, model_sections, type_sections
from dimscope.studies.layers import robustness_sections as clouds
from dimscope.studies.layers import sections as layers
from dimscope.studies.layers.context import figure_names, spread
from dimscope.studies.layers.state_measures import ONE_PER_TYPE
from dimscope.studies.layers.study import LAYERS as STUDY

COUNT = "variance count 95%"
ONE = Plan(models=(Model(blocks=3, dim=32),), texts=("prose",), windows=2, length=64)
TWO = replace(ONE, models=(*ONE.models, Model("toy-2", 2, 16)), texts=("prose", "html"), curve=True)


def _facts(plan: Plan = ONE, **changes: Any) -> Facts:
    own = StudyFacts(made.study_facts(plan, **{"show_layer": 2, **changes}), tables=())
    return Facts("toy-6", n_rows=4096, dim=32, n_parameters=100, tied=True, studies={"layers": own})


@pytest.fixture(scope="module")
def one() -> Tables:
    return made.layer_tables(ONE)


@pytest.fixture(scope="module")
def two() -> Tables:
    return made.layer_tables(TWO)


def _section(section: Section | None) -> Section:
    assert section is not None
    return section


def _numbers(text: str) -> list[float]:
    """Return the numbers of a sentence in their order; those of names such as toy-6 are left out."""
    return [float(number.replace(",", "")) for number in re.findall(r"(?<![\w-])\d[\d,]*(?:\.\d+)?", text)]


def _planted(tables: Tables, values: dict[str, list[list[float]]], null: float | None = 30.0) -> Tables:
    """Replace the counts: {condition: one list per draw of one value per layer}; conditions not named are dropped."""
    counts = {
        (c, None if c == "real" else d, i): v
        for c, draws in values.items()
        for d, row in enumerate(draws)
        for i, v in enumerate(row)
    }
    frame = tables["layers"].filter(pl.col("condition").is_in(list(values)))
    keys = pl.DataFrame(
        [(*key, float(value)) for key, value in counts.items()],
        schema={"condition": pl.String, "seed": pl.Int64, "layer": pl.Int64, "new": pl.Float64},
        orient="row",
    )
    frame = frame.join(keys, on=["condition", "seed", "layer"], nulls_equal=True)
    is_count = pl.col("metric") == COUNT
    changed = frame.with_columns(value=pl.when(is_count).then("new").otherwise("value"))
    noise = pl.lit(null, dtype=pl.Float64)
    return {**tables, "layers": changed.drop("new").with_columns(null=noise, share_of_null=pl.col("value") / noise)}


def test_every_section_says_how_to_read_it_and_what_it_does_not_say(two: Tables) -> None:
    for section in STUDY.load().make_sections(two, _facts(TWO)):
        assert section.title[0].isupper() or section.title[0].isdigit()
        assert len(section.how_to_read) > 80
        assert len(section.caveat) > 80
        assert not section.title.endswith(".")
        assert all(finding.endswith(".") for finding in section.findings)
        assert "nan" not in " ".join((section.title, *section.findings)).split()
        assert "None" not in " ".join((section.title, *section.findings, section.caveat))


@pytest.mark.parametrize(
    ("gone", "empty"),  # a table that is empty counts as missing: see page.section.table
    [("layers", False), ("layers", True), ("texts", False), ("confidence", True), ("predictions", False), ("scree", True),
     ("type_spectra", False), ("similarity", False), ("similarity", True), ("curve", False)],
)  # fmt: skip
def test_any_table_may_be_missing_or_empty(two: Tables, gone: str, empty: bool) -> None:
    left = {name: frame for name, frame in two.items() if name != gone}
    left |= {gone: two[gone].clear()} if empty else {}
    shown = STUDY.load().make_sections(left, _facts(TWO))
    assert len(shown) == {"layers": 0, "predictions": 12, "type_spectra": 12, "similarity": 10}.get(gone, 11)


def test_title_has_the_widest_layer_its_count_and_that_of_the_noise(one: Tables) -> None:
    tables = _planted(one, {"real": [[10, 20, 12, 14, 9]]})
    title = _section(layers.profile_section(tables, _facts())).title
    assert "9 (after the final norm) to 20 (in block 1)" in title
    assert _numbers(title) == [9, 20, 1, 32, 95, 30]  # the last are those of the noise


@pytest.mark.parametrize(
    ("values", "place", "numbers"),
    [
        (
            [20, 1, 1, 1, 1],
            "1 (in blocks 1 to 3 and after the final norm) to 20 (at the embeddings)",
            [1, 1, 3, 20, 32, 95],
        ),
        (
            [1, 1, 1, 1, 20],
            "1 (at the embeddings and in blocks 1 to 3) to 20 (after the final norm)",
            [1, 1, 3, 20, 32, 95],
        ),
        ([7, 7, 7, 7, 7], "All layers use 7 of", [7, 32, 95]),
    ],
)
def test_title_for_every_place(one: Tables, values: list[float], place: str, numbers: list[float]) -> None:
    title = _section(layers.profile_section(_planted(one, {"real": [values]}, null=None), _facts())).title
    assert place in title
    assert _numbers(title) == numbers


def test_layers_that_do_not_clearly_differ_are_a_range(one: Tables) -> None:
    tables = _planted(one, {"real": [[7, 8, 7, 7, 7]]}, null=None)
    without = tables["layers"].with_columns(halves=pl.lit(None, dtype=pl.List(pl.Float64)))
    title = _section(layers.profile_section({**tables, "layers": without}, _facts())).title
    assert (
        "Layers use 7 (at the embeddings, in blocks 2 and 3 and after the final norm) to 8 (in block 1) of 32" in title
    )
    assert "do not clearly differ" in title


def test_several_texts_have_a_captioned_figure_each(two: Tables) -> None:
    section = _section(layers.profile_section(two, _facts(TWO)))
    plots = [block for block in section.blocks if isinstance(block, Plot)]
    assert [(plot.anchor, plot.caption) for plot in plots] == [("profile", "prose"), ("profile-html", "html")]


def test_names_of_figures_are_words_and_differ() -> None:
    titles = ["builtin html", "old/a.txt", "Old a.txt", "文.txt"]
    names = ["profile-builtin-html", "profile-old-a-txt", "profile-old-a-txt-2", "profile-文-txt"]
    assert figure_names("profile", titles) == names


def _against_shuffled(one: Tables, real: list[float], draws: list[list[float]]) -> str:
    tables = _planted(one, {"real": [real], "shuffled": draws})
    return _section(layers.profile_section(tables, _facts())).findings[0]


STEADY = [[10.0, 20, 20, 20, 20], [10.0, 22, 20, 20, 20], [10.0, 18, 20, 20, 20]]


@pytest.mark.parametrize(
    ("real", "words", "numbers"),
    [
        # Blocks, the block with the widest gap, its counts, the confidence, the groups.
        ([10, 15, 12, 11, 13], "fewer components in blocks 1 to 3 and after", [1, 3, 3, 11, 20, 95, 8]),
        ([12, 25, 22, 23, 22], "more components at every layer", [1, 25, 20, 95, 8]),
        # The interval of a difference reaches 1.75 to both sides: t of 7 degrees at 1 - 0.05 / 5 / 2, times 0.5.
        ([10, 18.3, 20, 20, 20], "does not clearly need more or fewer", [95, 8]),
        (
            [10, 18.2, 20, 20, 20],
            "fewer components in block 1 (18.2 against 20); the difference is not clear at",
            [1, 18.2, 20, 2, 3, 95, 8],
        ),
    ],
)
def test_real_beside_shuffled(one: Tables, real: list[float], words: str, numbers: list[float]) -> None:
    finding = _against_shuffled(one, real, STEADY)
    assert words in finding
    assert _numbers(finding) == numbers


def test_a_sample_without_halves_tells_no_difference(one: Tables) -> None:
    tables = _planted(one, {"real": [[1, 2, 3, 4, 5]], "shuffled": STEADY[:1]})
    small = {**tables, "layers": tables["layers"].with_columns(halves=pl.lit(None, dtype=pl.List(pl.Float64)))}
    finding = _section(layers.profile_section(small, _facts())).findings[0]
    assert "does not clearly need" in finding
    assert "too small for an error" in finding


def test_random_weights_are_compared_or_absent(one: Tables) -> None:
    both = _planted(one, {"real": [[10] * 5], "random weights": [[25] * 5]})
    assert "random weights" in _section(layers.profile_section(both, _facts())).findings[0]
    alone = _section(layers.profile_section(_planted(one, {"real": [[10] * 5]}), _facts()))
    assert [_numbers(finding) for finding in alone.findings] == [[33.3]]  # percent of white noise, 10 of 30
    grid = alone.blocks[-1]
    assert isinstance(grid, Grid)
    assert grid.header == ("layer", "real", "white noise", "numerical rank", "tokens N")


def test_layers_that_reach_white_noise_are_named(one: Tables) -> None:
    [finding] = _section(layers.profile_section(_planted(one, {"real": [[10, 29.5, 31, 10, 10]]}), _facts())).findings
    assert "in blocks 1 and 2" in finding


def test_fewer_tokens_than_dimensions_bound_every_count() -> None:
    short = replace(ONE, windows=1, length=20)
    findings = _section(layers.profile_section(made.layer_tables(short), _facts(short))).findings
    assert _numbers(findings[-1]) == [20, 32, 19]


def test_another_threshold_where_95_is_not_measured(one: Tables) -> None:
    tables = {**one, "layers": one["layers"].filter(pl.col("metric") != COUNT)}
    assert 99 in _numbers(_section(layers.profile_section(tables, _facts())).title)


def test_sample_for_one_window_and_no_comparison() -> None:
    bare = replace(ONE, windows=1, shuffles=0, random_weights=False)
    title = _section(layers.sample_section(made.layer_tables(bare), _facts(bare))).title
    assert _numbers(title) == [64, 1, 64, 5]  # tokens, windows of a length, layers
    full = _section(layers.sample_section(made.layer_tables(ONE), _facts())).title
    assert _numbers(full) == [128, 2, 64, 5, 5]  # and shuffles


def test_single_layer_everywhere(two: Tables) -> None:
    both = two["similarity"].filter((pl.col("layer") == 2) & (pl.col("other_layer") == 2))
    only = {name: two[name].filter(pl.col("layer") == 2) for name in ("layers", "scree", "curve")}
    only = {**two, **only, "similarity": both}
    shown = {section.anchor: section for section in STUDY.load().make_sections(only, _facts(TWO))}
    assert "similarity" not in shown
    assert "block 2" in shown["layers"].title
    assert "most" not in shown["layers"].title
    assert shown["scree"].choice is None
    assert "block 2" in shown["intrinsic"].title
    assert "90.0%" in shown["types"].title


def test_show_layer_that_was_not_measured(two: Tables) -> None:
    section = _section(layers.scree_section(two, _facts(TWO, show_layer=99)))
    assert section.choice is not None
    assert section.choice.chosen == 4
    assert "after the final norm" in section.title


def test_model_without_final_norm() -> None:
    plan = replace(ONE, models=(Model(blocks=2, dim=16, final_norm=False),))
    shown = STUDY.load().make_sections(made.layer_tables(plan), _facts(plan))
    scree = next(section for section in shown if section.anchor == "scree")
    assert scree.choice is not None
    assert [name for _, name in scree.choice.layers] == ["embeddings", "block 1", "block 2"]


def test_preprocessing_names_the_largest_change(one: Tables) -> None:
    ratio = pl.col("metric") == "participation ratio"
    massive = (pl.col("preprocess") == "without massive tokens") & (pl.col("layer") == 2)
    value = pl.when(ratio & massive).then(24.0).when(ratio).then(3.0).otherwise("value")
    changed = {**one, "layers": one["layers"].with_columns(value=value)}
    title = _section(clouds.preprocess_section(changed, _facts())).title
    assert "massive tokens" in title
    assert _numbers(title) == [3, 24, 2]
    level = one["layers"].with_columns(value=pl.when(ratio).then(3.0).otherwise("value"))
    assert _numbers(_section(clouds.preprocess_section({**one, "layers": level}, _facts())).title) == [0]


def test_only_raw_states_leave_nothing_to_compare(one: Tables) -> None:
    raw = one["layers"].filter(pl.col("preprocess") == "raw")
    assert clouds.preprocess_section({**one, "layers": raw}, _facts()) is None


def test_extremes_are_listed_as_stored_uncentred(one: Tables) -> None:
    row = one["layers"].filter((pl.col("condition") == "real") & (pl.col("preprocess") == "raw")).unique("layer")
    extreme = row.with_columns(metric=pl.lit("massive activations"), value=pl.col("layer") + 0.0, centred=pl.lit(False))
    section = _section(clouds.preprocess_section({**one, "layers": pl.concat([one["layers"], extreme])}, _facts()))
    grid = section.blocks[-1]
    assert isinstance(grid, Grid)
    assert [row[1] for row in grid.rows] == ["0", "1", "2", "3", "4"]


def _intrinsic(one: Tables, values: list[float], halves: float = 0.6) -> Section:
    """Return the section where one state per type has these TwoNN by layer; halves differ between even and odd layers."""
    chosen = (pl.col("metric") == TWO_NN) & (pl.col("preprocess") == ONE_PER_TYPE) & (pl.col("condition") == "real")
    planted = pl.col("layer").replace_strict(dict(enumerate(map(float, values))), return_dtype=pl.Float64)
    signs = pl.when(pl.col("layer") % 2 == 0).then(halves).otherwise(-halves)
    rows = one["layers"].with_columns(
        value=pl.when(chosen).then(planted).otherwise("value"),
        halves=pl.when(chosen).then(pl.concat_list([signs * sign for sign in made.SIGNS])).otherwise("halves"),
    )
    return _section(intrinsic_sections.intrinsic_section({**one, "layers": rows}, _facts()))


def test_intrinsic_dimension_peaks_where_it_was_planted(one: Tables) -> None:
    section = _intrinsic(one, [9, 8, 9, 18, 9])
    assert section.title.startswith("One state per token: the intrinsic dimension is between 8")
    assert _numbers(section.title) == [8, 0.3, 1, 18, 0.3, 3, 32]
    without = one["layers"].filter(pl.col("metric") != "GRIDE")
    assert _section(intrinsic_sections.intrinsic_section({**one, "layers": without}, _facts())).choice is None


def test_layers_whose_intrinsic_dimensions_do_not_differ_beyond_their_error_are_said_not_to(one: Tables) -> None:
    """Halves that differ by 2.4 give the difference a standard error of 1.2, and 10 pairs of layers a margin of 4.8."""
    assert "do not clearly differ" in _intrinsic(one, [10, 11, 10, 14, 10], 1.2).title
    assert "clearly" not in _intrinsic(one, [10, 11, 10, 14.9, 10], 1.2).title


def test_neighbours_that_are_the_same_token_are_said_to_make_the_number_of_all_states(one: Tables) -> None:
    finding = _intrinsic(one, [9, 8, 9, 18, 9]).findings[-1]
    assert "the same token elsewhere" in finding
    few = one["layers"].with_columns(
        value=pl.when(pl.col("metric") == SAME_TOKEN_NEIGHBORS).then(0.3).otherwise("value")
    )
    findings = _section(intrinsic_sections.intrinsic_section({**one, "layers": few}, _facts())).findings
    assert not any("the same token elsewhere" in finding for finding in findings)


def test_gaussian_states_that_read_the_same_are_not_clearly_more(one: Tables) -> None:
    assert "clearly more at every layer" in _intrinsic(one, [9, 8, 9, 8, 9]).findings[0]
    level = {**one, "layers": one["layers"].with_columns(gaussian="value")}
    finding = _section(intrinsic_sections.intrinsic_section(level, _facts())).findings[0]
    assert "not clearly more at any layer" in finding


def test_vocabulary_and_context_are_told_by_their_shares(one: Tables) -> None:
    section = _section(type_sections.types_section(one, _facts()))
    assert _numbers(section.title) == [100, 80]
    grid = section.blocks[-1]
    assert isinstance(grid, Grid)
    assert grid.rows[0][:3] == ("embeddings", "100.0%", "98.0% to 100.0%")


@pytest.mark.parametrize(
    ("values", "verdict"), [([10, 20], "is still growing"), ([20, 20.5], "has settled"), ([20, 10], "is still falling")]
)
def test_curve_settles_or_grows(two: Tables, values: list[float], verdict: str) -> None:
    curve = two["curve"].filter(pl.col("n_tokens") >= 64).with_columns(
        value=pl.when(pl.col("n_tokens") == 64).then(float(values[0])).otherwise(float(values[1]))
    )  # fmt: skip
    title = _section(clouds.curve_section({**two, "curve": curve}, _facts(TWO))).title
    assert verdict in title
    assert _numbers(title) == [95, 2, values[0], 64, values[1], 128]


def test_curve_counts_growth_per_doubling(two: Tables) -> None:
    # 3% for a quarter more text is 10% for twice the text.
    sizes = pl.when(pl.col("n_tokens") == pl.col("n_tokens").max()).then(80).otherwise(64)
    curve = two["curve"].filter(pl.col("n_tokens") >= 64).with_columns(n_tokens=sizes)
    curve = curve.with_columns(value=pl.when(pl.col("n_tokens") == 80).then(103.0).otherwise(100.0))
    assert "is still growing" in _section(clouds.curve_section({**two, "curve": curve}, _facts(TWO))).title


def test_spread_of_equal_draws_is_nothing() -> None:
    assert spread(22.1, 1.8e-15) == "22.1 ± 0"
    assert spread(22.1, 0.0213) == "22.1 ± 0.021"
    assert spread(22.1, None) == "22.1"
    assert spread(None, 1.0) == "–"


def test_confidence_has_probabilities_and_the_price_of_shuffling(one: Tables) -> None:
    predictions = (
        one["predictions"]
        .with_columns(
            value=pl.col("metric").replace_strict({"max log-softmax": math.log(0.25), "loss": 2.0}, default=1.0)
            - pl.when(pl.col("condition") == "shuffled").then(math.log(2)).otherwise(0.0)
        )
        .with_columns(low=pl.col("value") - 0.1, high=pl.col("value") + 0.1)
    )
    section = _section(contrasts.confidence_section({**one, "predictions": predictions}, _facts()))
    assert _numbers(section.title) == [25.0, 12.5, 25.0]  # percent: real, shuffled, random weights
    assert "lowers" in section.findings[0]
    assert _numbers(section.findings[0]) == [128, 2, 95, 1.9, 2.1, 1.31, 95, 1.21, 1.41]  # the tokens, then the losses
    # Margins of 0.5 add up to 0.71, which is more than the difference.
    wide = predictions.with_columns(low=pl.col("value") - 0.5, high=pl.col("value") + 0.5)
    findings = _section(contrasts.confidence_section({**one, "predictions": wide}, _facts())).findings
    assert "does not clearly change the loss" in findings[0]
    alone = predictions.filter(pl.col("condition") == "real")
    section = _section(contrasts.confidence_section({**one, "predictions": alone}, _facts()))
    assert _numbers(section.title) == [25.0]
    assert section.findings == ()


def test_similarity_names_the_step_of_lowest_cka(one: Tables) -> None:
    broken = (pl.min_horizontal("layer", "other_layer") <= 1) & (pl.max_horizontal("layer", "other_layer") >= 2)
    cka = pl.when(broken).then(0.31).otherwise(0.97)
    pairs = one["similarity"].with_columns(cka=cka)
    title = _section(contrasts.similarity_section({**one, "similarity": pairs}, _facts())).title
    assert "from block 1 to block 2" in title
    assert _numbers(title) == [0.31, 1, 2, 0.97, 0.31]  # the last is that of the first and the last layer
    alike = one["similarity"].with_columns(cka=pl.lit(0.99))
    title = _section(contrasts.similarity_section({**one, "similarity": alike}, _facts())).title
    assert "from" not in title
    assert _numbers(title) == [0.99, 0.99]


def test_alignment_with_shuffled_else_with_random_weights(one: Tables) -> None:
    title = _section(contrasts.alignment_section(one, _facts())).title
    assert "0.54 (after the final norm)" in title
    assert _numbers(title) == [16, 0.54, 0.9, 0.5]  # components, their lowest and highest overlap, chance
    random = one["similarity"].filter(pl.col("other_condition") != "shuffled")
    section = _section(contrasts.alignment_section({**one, "similarity": random}, _facts()))
    assert _numbers(section.title) == [0.17, 1]
    assert section.findings == ("The overlap with random weights is above chance at the embeddings and in block 1.",)


def test_texts_side_by_side(one: Tables, two: Tables) -> None:
    assert contrasts.texts_section(one, _facts()) is None
    counts = {"prose": [10.0, 20, 20, 20, 20], "html": [10.0, 15, 25, 25, 25]}
    value = pl.lit(0.0)
    for text, values in counts.items():
        here = pl.col("layer").replace_strict(dict(enumerate(values)), default=None, return_dtype=pl.Float64)
        value = pl.when(pl.col("text") == text).then(here).otherwise(value)
    planted = {**two, "layers": two["layers"].with_columns(value=value)}
    section = _section(contrasts.texts_section(planted, _facts(TWO)))
    assert _numbers(section.title) == [2, 20, 95, 25]
    assert "more components in block 1" in section.findings[0]
    assert "fewer components in blocks 2 and 3 and after the final norm" in section.findings[0]
    renamed = {**planted, "layers": planted["layers"].with_columns(text=pl.lit("my ") + pl.col("text"))}
    title = _section(contrasts.texts_section(renamed, _facts(TWO))).title  # report.json names other texts
    assert "my prose needs 20" in title
    assert "my html 25" in title


def test_models_of_different_width(one: Tables, two: Tables) -> None:
    assert model_sections.models_section(one, _facts()) is None
    share = pl.when(pl.col("model") == "toy-6").then(0.25).otherwise(0.5)
    planted = {**two, "layers": two["layers"].with_columns(share_of_dim=share)}
    title = _section(model_sections.models_section(planted, _facts(TWO))).title
    assert _numbers(title) == [25.0, 32, 95, 50.0, 16]


def test_models_are_compared_in_bits_per_byte_of_the_same_text(two: Tables) -> None:
    first, bits = pl.col("model") == "toy-6", pl.col("metric") == "bits per byte"
    value = pl.when(bits & first).then(1.25).when(bits).then(2.5).otherwise("value")
    planted = {**two, "predictions": two["predictions"].with_columns(value=value)}
    section = _section(model_sections.models_section(planted, _facts(TWO)))
    assert [number for finding in section.findings for number in _numbers(finding)] == [1.25, 2.5]
    grid = next(block for block in section.blocks if isinstance(block, Grid))
    assert [row[:2] for row in grid.rows] == [("toy-6", "1.250"), ("toy-2", "2.500")]
    without = {name: frame for name, frame in two.items() if name != "predictions"}
    section = _section(model_sections.models_section(without, _facts(TWO)))
    assert not section.findings
    assert not any(isinstance(block, Grid) for block in section.blocks)


def test_head_of_the_page_has_the_range_of_counts(one: Tables) -> None:
    [(_, value, note)] = layers.layers_strip(_planted(one, {"real": [[10, 20, 12, 14, 9]]}), _facts())
    assert value == "9–20"
    assert _numbers(note) == [32, 95]


def test_comparisons_that_were_not_run_are_not_explained() -> None:
    bare = replace(ONE, shuffles=0, random_weights=False)
    shown = {section.anchor: section for section in STUDY.load().make_sections(made.layer_tables(bare), _facts(bare))}
    assert "alignment" not in shown
    for anchor in ("layers-sample", "layers", "confidence"):
        assert not {"orange", "purple", "Random", "Shuffled"} & set(shown[anchor].how_to_read.split())
        assert "shuffled text" not in shown[anchor].how_to_read
