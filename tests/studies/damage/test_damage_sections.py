"""What the page says about damage follows from the tables; the whole text is in the golden page."""

import damage_tables as planted
import polars as pl
import pytest
from damage_tables import PLANTED

from dimscope.evaluation.evaluate import SUMS
from dimscope.page.render import render_page
from dimscope.page.section import Gallery, Grid, Plot, Section, Tables
from dimscope.studies.damage import generation_sections as generations
from dimscope.studies.damage import perturbation_error_sections as errors
from dimscope.studies.damage import sections as damage
from dimscope.studies.damage.study import DAMAGE
from dimscope.studies.study import page_of


def _sections(tables: Tables) -> list[Section]:
    return DAMAGE.load().make_sections(tables, planted.facts())


def _section(section: Section | None) -> Section:
    assert section is not None
    return section


def _grid(section: Section) -> Grid:
    return next(block for block in section.blocks if isinstance(block, Grid))


def _breaking(losses: planted.Losses = PLANTED) -> Section:
    return _section(damage.breaking_section(planted.damage_tables(planted.damage(losses)), planted.facts()))


def test_the_gentlest_kind_is_the_title():
    better = {key: (2.01, 2.01, 2.01) if key[0] == "project" else value for key, value in PLANTED.items()}
    assert _breaking(better).title == "Random projection does the least damage at every number of dimensions tried"


def test_kinds_are_compared_at_all_numbers_of_dimensions_at_once():
    """Alone the three seeds decide; among three pairs of kinds at three numbers they do not."""
    pair = {("project", 75): (2.269, 3.2, 4.131), ("project-rescaled", 75): (2.0, 3.0, 4.0)}
    assert _breaking(pair).title.startswith("Rescaled random projection does the least damage at every number")
    others = {(kind, k): (3.0, 3.0, 3.0) for kind in ("project", "project-rescaled") for k in (50, 25)}
    assert "least" not in _breaking(pair | others).title


def test_dimensions_are_harmless_by_the_intervals_of_all_kinds_at_once():
    alone = {("project", 75): (2.0654, 2.1, 2.1346)}
    assert "is harmless" in _breaking(alone).findings[0]
    both = _breaking(alone | {("truncate", 75): (9.0,)}).findings[0]
    assert both.startswith("No tested removal of dimensions is clearly harmless: the nearest is random projection")
    assert "95% interval for 2 at once" in both
    assert "neither clearly within nor above" in both


def test_one_kind_alone_is_not_called_the_gentlest():
    assert "least" not in _breaking({("truncate", 75): (2.1,)}).title


def test_the_fewest_harmless_dimensions_are_the_finding_and_the_answer():
    tables = planted.damage_tables()
    assert _breaking().findings[0] == damage.answer(tables)
    harmful = _breaking({("truncate", 75): (3.0,), ("truncate", 50): (4.0,)}).findings[0]
    assert harmful.startswith(
        "No tested removal of dimensions is clearly harmless: the nearest is truncation by SVD to 75"
    )
    assert "KL 0.15 nats" in harmful


def test_a_text_that_the_model_predicts_no_better_than_token_frequencies_tells_nothing():
    """Their entropy is planted at 6 nats. Only the first section says why, once, and no other one states a cost."""
    tables = planted.damage_tables(planted.damage(base=6.1))
    sections = {section.anchor: section for section in _sections(tables)}
    assert sections["damage"].title.startswith("This text cannot tell what the model loses")
    assert (
        "loss 6.1, 95% interval up to 6.1, entropy of the frequencies 6 nats per token, both on 500 tokens of prose"
        in sections["damage"].title
    )
    assert damage.answer(tables) == f"{sections['damage'].title}."
    assert sections["damage"].findings == ()
    for anchor, title in (
        ("perturbation_errors", "tell what an error"),
        ("strength", "tell what noise"),
        ("beliefs", "test the"),
    ):
        assert sections[anchor].title.startswith(f"This text cannot {title}")
        assert not [finding for finding in sections[anchor].findings if "KL" in finding]


def test_without_dimensions_the_section_about_strengths_says_why_a_text_cannot_tell():
    tables = planted.damage_tables(planted.damage({("scale", 2.0): (6.2,)}, base=6.1))
    [finding] = _section(errors.strength_section(tables, planted.facts())).findings
    assert finding == damage.answer(tables)
    assert "entropy of the frequencies 6" in finding


def test_a_strength_that_is_not_clearly_below_a_mark_is_beside_the_upper_end_that_decides():
    """A KL of 0.0298 nats is itself below 0.03; its interval reaches 2.8% further."""
    [change] = _grid(_breaking({("truncate", 75): (2.1985,)})).rows
    assert change[1] == "75 dimensions (75.0%): KL 0.030, up to 0.0306"
    assert change[2] == "none, not at 75 dimensions"


def test_every_text_and_side_has_a_figure_of_its_own():
    frame = planted.joined(planted.damage(), planted.damage(text="generated", base=1.5))
    section = _section(damage.breaking_section(planted.damage_tables(frame), planted.facts()))
    plots = [block for block in section.blocks if isinstance(block, Plot)]
    assert [plot.caption for plot in plots] == ["On prose", "On text that the model generated"]
    assert (
        "On 500 tokens of text that the model generated (undamaged loss 1.5 nats per token), the same kind is the gentlest at 1 of 3"
        in section.findings[2]
    )


def test_beliefs_that_nothing_tests_are_no_section():
    tables = planted.damage_tables(planted.damage({("truncate", 50): (2.1,)}))
    assert damage.claims_section(tables, planted.facts()) is None


def test_verdicts_on_several_texts_stand_side_by_side():
    frame = planted.joined(planted.damage(), planted.damage(text="generated"))
    grid = _grid(_section(damage.claims_section(planted.damage_tables(frame), planted.facts())))
    assert grid.header[1:3] == ("on prose", "on text that the model generated")
    assert len(grid.rows) == 6


def test_without_noise_and_scaling_they_have_no_section():
    tables = planted.damage_tables(planted.damage({("truncate", 50): (2.1,)}))
    assert errors.strength_section(tables, planted.facts()) is None


def test_continuations_are_beside_the_undamaged_one_and_the_first_prompt_is_open():
    section = _section(generations.generation_section(planted.damage_tables(), planted.facts()))
    galleries = [block for block in section.blocks if isinstance(block, Gallery)]
    assert [gallery.opened for gallery in galleries] == [True, False]
    same = [("undamaged", ""), ("truncate 75", "5 of 5"), ("project 25", "1 of 6")]
    assert [(a.change, a.same) for a in galleries[0].answers] == same


@pytest.fixture(scope="module")
def whole() -> set[str]:
    """Return the sections of all tables."""
    return {section.anchor for section in _sections(planted.damage_tables())}


@pytest.mark.parametrize("missing", ["damage", "breaking", "claims", "generations", "operator", "operator_block"])
def test_a_missing_table_leaves_its_section_out_and_the_others_in(whole, missing):
    tables = planted.damage_tables()
    rest = {section.anchor for section in _sections({k: v for k, v in tables.items() if k != missing})}
    needed = {
        "damage": {"damage", "perturbation_errors", "strength"}, "breaking": set(), "claims": {"beliefs"}, "generations": {"generations"},
        "operator": {"operator"}, "operator_block": {"operator"},
    }  # fmt: skip
    assert whole - rest == needed[missing]


def test_losses_that_are_no_numbers_are_left_out():
    def without(frame: pl.DataFrame, *columns: str) -> pl.DataFrame:
        lost = (pl.col("kind") == "project") & (pl.col("text") == "prose")
        return frame.with_columns(pl.when(lost).then(None).otherwise(pl.col(c)).alias(c) for c in columns)

    rows = planted.damage()
    frame = planted.Rows(without(rows.damage, "value"), without(rows.windows, *SUMS))
    sections = _sections(planted.damage_tables(frame))
    assert {"damage", "perturbation_errors"} <= {section.anchor for section in sections}


def test_the_page_holds_the_study_and_runs_no_text_of_the_model():
    html = render_page(page_of([DAMAGE.load()], planted.damage_tables(), planted.facts()), [])
    assert "<script>alert(1)</script>" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "&lt;b&gt;Once&lt;/b&gt;" in html
    assert html.count("<details") == 2


def _errors(losses: planted.Losses) -> str:
    return _section(errors.error_section(planted.damage_tables(planted.damage(losses)), planted.facts())).title


def test_equal_error_is_unequal_damage_only_where_the_interval_of_a_pair_says_so():
    """Noise and a shift of one strength make equal errors. Their loss was compared without any error."""
    noise = {("noise", 0.5): (2.5, 2.5, 2.5)}
    apart = _errors(noise | {("shift", 0.5): (2.7, 2.71, 2.69)})
    assert (
        "one shift of 0.5 sd for all tokens has a KL 0.030 nats (95% interval 0.026 to 0.034) above that of noise of 0.5 sd"
        in apart
    )
    seeds = _errors(noise | {("shift", 0.5): (2.3, 2.7, 3.1)})  # KL differences of -0.03, 0.03 and 0.09
    assert seeds == "At equal error no change clearly costs more than another"
    assert (
        _errors({("noise", 0.5): (2.5, 2.5), ("shift", 1.0): (3.0, 3.0)}) == "The error of the table, and what it costs"
    )


def test_changes_of_equal_error_are_named_with_their_strengths_and_with_errors_that_differ():
    cut = {("truncate", 4): (4.0,)}  # a relative error of 0.576
    assert "error of about 0.58, truncation by SVD to 4 dimensions has" in _errors(cut | {("noise", 0.576): (2.5,) * 2})
    apart = _errors(cut | {("noise", 0.6): (2.5,) * 2})
    assert "truncation by SVD to 4 dimensions (relative error 0.58) has a KL 0.22 nats (95%" in apart
    assert apart.endswith("above that of noise of 0.6 sd (0.6)")


def test_pairs_of_equal_error_are_compared_at_once():
    borderline = {("noise", 0.5): (2.0, 3.0, 4.0), ("shift", 0.5): (2.269, 3.2, 4.131)}
    assert _errors(borderline).startswith("Equal error is not equal damage")
    others = {(kind, strength): (3.0, 3.0, 3.0) for kind in ("noise", "shift") for strength in (1.0, 2.0)}
    assert _errors(borderline | others) == "At equal error no change clearly costs more than another"


def test_strengths_are_compared_with_the_tolerance_by_intervals():
    """Its title was the rise of the loss, without any error."""
    changes = {("noise", 0.5): (2.1, 2.1, 2.1), ("noise", 2.0): (9.0, 9.0, 9.0), ("scale", 0.5): (3.0,)}
    undecided = changes | {("shift", 1.0): (2.0, 2.3, 2.6)}
    section = _section(errors.strength_section(planted.damage_tables(planted.damage(undecided)), planted.facts()))
    assert section.title == (
        "Compared with rounding to 4 bits, noise of 0.5 sd costs no more; scaling by 0.5 costs more; one shift of 1 sd for all "
        "tokens may cost more or less"
    )
    assert "noise of 0.5 sd: KL 0.015 nats (95% interval for 3 at once" in section.findings[0].lower().replace(
        "kl", "KL"
    )


def test_noise_of_nothing_alone_has_no_figure():
    tables = planted.damage_tables(planted.damage({("noise", 0.0): (2.0,), ("truncate", 50): (2.5,)}))
    assert errors.strength_section(tables, planted.facts()) is None
    assert {"damage", "perturbation_errors"} <= {section.anchor for section in _sections(tables)}
