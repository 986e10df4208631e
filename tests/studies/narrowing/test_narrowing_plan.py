"""What a plan of a narrowing is made of: windows dealt out, widths proposed, curves read off, and the advice that follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import t

from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.errors import InvalidArgument
from dimscope.evaluation.evaluate import SUMS
from dimscope.evaluation.yardstick import TOLERANCE
from dimscope.narrowing.target import resolve_target
from dimscope.studies.narrowing.advice import (
    DENSE,
    DROP,
    NARROW,
    ROUND,
    SCHEMA,
    SPEEDS,
    TextRead,
    advice,
    best_basis,
    shown_candidate,
    with_equal_size,
)
from dimscope.studies.narrowing.plan import default_widths
from dimscope.studies.narrowing.plan_rows import _halves, _judged_by_text
from dimscope.studies.narrowing.windows import split_windows
from dimscope.texts.windows import Window

SLIGHT, DEAR = TOLERANCE.kl / 5, TOLERANCE.kl * 3  # KL
TEXT = TextRead(["prose"], 8, 6.0)


def row(method: str, parameters: int, kl: float, rise: float | None = None, **more: object) -> dict[str, object]:
    """A row of a plan; the rise of the loss is the KL unless it is told."""
    told = {"method": method, "tied": False, "parameters": parameters, "bytes": 4 * parameters, "kl": kl, "loss": 3.0}
    return dict.fromkeys(SCHEMA) | told | {"loss_rise": kl if rise is None else rise} | more


def narrow(width: int, parameters: int, kl: float, rise: float | None = None, basis: str = "raw") -> dict[str, object]:
    return row(NARROW, parameters, kl, rise, basis=basis, width=width)


def plan(*rows: dict[str, object]) -> pl.DataFrame:
    """The rows after those of a dense model of 1,000 parameters and of its rounding to 8 bits, as `plan_narrowing` has it."""
    dense, rounded = row(DENSE, 1000, 0.0), row(ROUND, 1000, 1e-4, bits=8) | {"bytes": 1000}
    return with_equal_size(pl.DataFrame([dense, *rows, rounded], schema=SCHEMA))


def of(frame: pl.DataFrame, **wanted: object) -> dict[str, object]:
    """The one row with these values."""
    return frame.filter(*[pl.col(name) == value for name, value in wanted.items()]).row(0, named=True)


# ---- at the same size ----------------------------------------------------------------------------------------------


def test_dropping_layers_at_the_size_of_a_narrow_model_is_read_off_the_line_between_its_neighbours():
    found = plan(
        row(DROP, 800, 1.0, 0.4, layers=2), row(DROP, 600, 2.0, 0.9, layers=1),
        narrow(7, 700, 9.0), narrow(6, 650, 9.0), narrow(9, 900, 9.0), narrow(8, 800, 9.0),
    )  # fmt: skip
    between = {
        700: (1.5, 0.65),
        650: (1.75, 0.775),
        900: (0.5, 0.2),
        800: (1.0, 0.4),
    }  # 900: half way to the dense model
    for parameters, (kl, rise) in between.items():
        held = of(found, method=NARROW, parameters=parameters)
        assert held["kl_dropping"] == pytest.approx(kl, abs=1e-12)
        assert held["loss_rise_dropping"] == pytest.approx(rise, abs=1e-12)
    dropped = found.filter(method=DROP)
    assert dropped["kl_dropping"].to_list() == pytest.approx(dropped["kl"].to_list())


def test_beyond_what_was_dropped_and_beyond_the_dense_model_there_is_nothing_to_compare_with():
    found = plan(row(DROP, 800, 1.0, layers=2), narrow(3, 799, 1.0), narrow(9, 1001, 1.0), narrow(8, 801, 1.0))
    assert of(found, parameters=799)["kl_dropping"] is None
    assert of(found, parameters=799)["loss_rise_dropping"] is None
    assert of(found, parameters=1001)["kl_dropping"] is None
    assert of(found, parameters=801)["kl_dropping"] is not None


def test_a_model_without_a_layer_to_spare_is_compared_with_nothing():
    found = plan(narrow(8, 800, 1.0))
    assert found["kl_dropping"].to_list() == [None] * 3
    assert found.schema["kl_dropping"] == pl.Float64


# ---- which candidate -----------------------------------------------------------------------------------------------


def test_the_best_basis_is_the_one_that_loses_least_at_most_widths():
    found = plan(
        narrow(8, 800, 1.0, basis="raw"), narrow(8, 800, 2.0, basis="random"),
        narrow(6, 600, 3.0, basis="raw"), narrow(6, 600, 4.0, basis="random"),
        narrow(4, 400, 90.0, basis="raw"), narrow(4, 400, 5.0, basis="random"),
    )  # fmt: skip
    assert best_basis(found) == "raw"


def test_shown_is_of_the_best_basis_the_widest_that_is_a_tenth_smaller():
    rows = [narrow(w, p, kl, basis=b) for w, p in ((9, 950), (8, 900), (4, 400)) for b, kl in (("raw", 1), ("random", 2))]  # fmt: skip
    shown = shown_candidate(plan(*rows))
    assert (shown["basis"], shown["width"]) == ("raw", 8)


def test_where_no_candidate_is_a_tenth_smaller_the_narrowest_is_shown():
    assert shown_candidate(plan(narrow(9, 980, 1.0), narrow(8, 950, 2.0)))["width"] == 8
    assert shown_candidate(plan(narrow(8, 1200, 2.0), narrow(9, 1300, 1.0)))["width"] == 8


# ---- advice --------------------------------------------------------------------------------------------------------


def judged(candidate: dict[str, object], choice: float, judged: float, speed: float | None = None) -> dict[str, object]:
    """A candidate with its KL on the windows of the choice and on the others, 10% apart, and its speed, 5% apart."""
    halves = {
        "choice_kl": choice, "choice_kl_high": 1.1 * choice, "judged_kl": judged, "judged_kl_low": 0.9 * judged,
        "judged_kl_high": 1.1 * judged, "judged_within": 0.987 if judged < TOLERANCE.kl else 0.004,
    }  # fmt: skip
    speeds = (
        {}
        if speed is None
        else dict(zip(SPEEDS, (1, 1, speed, speed, *[0.95 * speed] * 2, *[1.05 * speed] * 2), strict=True))
    )
    return candidate | halves | speeds


def answers(*rows: dict[str, object], text: TextRead = TEXT) -> dict[str, str]:
    """Return the title, and the sentence of each goal."""
    title, *rest = advice(plan(*rows), text)
    goals = ("Fewest bytes", "Fewest parameters", "Fastest")
    return {"title": title} | {goal: line for goal in goals for line in rest if line.startswith(f"{goal}:")}


def test_there_is_one_answer_for_each_goal():
    told = answers(
        judged(narrow(8, 800, SLIGHT), SLIGHT, SLIGHT, 1.3), judged(narrow(7, 700, DEAR), DEAR, DEAR, 1.6),
        judged(row(DROP, 850, SLIGHT, layers=5), SLIGHT, SLIGHT, 1.4),
    )  # fmt: skip
    assert (
        told["title"] == "Fewest bytes: 8-bit weights (not certain); fewest parameters: width 8, raw; fastest: 5 layers"
    )
    assert told["Fewest bytes"].startswith("Fewest bytes: 8-bit weights, 25% of the bytes")
    assert told["Fewest parameters"] == (
        "Fewest parameters: width 8, raw, 80% of the parameters: KL 0.0060 nats (95% interval 0.0054 to 0.0066), within the "
        "0.03 of rounding to 4 bits; the probability that its KL is at most 0.03 is 99%."
    )
    assert "1.40 times (1.33 to 1.47) as fast" in told["Fastest"]


def test_a_choice_is_judged_on_the_windows_that_it_was_not_made_on():
    """On the windows of the choice width 7 is good by chance, and on the others it is not."""
    lucky = judged(narrow(7, 700, 0.02), choice=0.01, judged=0.05)
    told = answers(judged(narrow(8, 800, SLIGHT), SLIGHT, SLIGHT), lucky)
    assert "fewest parameters: width 7, raw (not confirmed)" in told["title"]
    assert "KL 0.050 nats" in told["Fewest parameters"]
    assert "the probability that its KL is at most 0.03 is less than 1%" in told["Fewest parameters"]
    unlucky = judged(narrow(7, 700, 0.02), choice=0.05, judged=0.01)
    assert (
        "fewest parameters: width 8, raw;" in answers(judged(narrow(8, 800, SLIGHT), SLIGHT, SLIGHT), unlucky)["title"]
    )


def test_a_choice_counts_by_the_upper_end_of_its_interval():
    at, above = (judged(narrow(7, 700, kl), kl, kl) for kl in (TOLERANCE.kl / 1.1001, TOLERANCE.kl / 1.0999))
    assert "fewest parameters: width 7" in answers(at)["title"]
    assert "fewest parameters: keep the dense model" in answers(above)["title"]


def test_a_speed_within_the_spread_of_the_dense_model_is_not_faster():
    slow = judged(narrow(8, 800, SLIGHT), SLIGHT, SLIGHT, 1.04)  # 0.99 to 1.09
    assert "fastest: keep the dense model" in answers(slow)["title"]
    assert answers(slow)["Fastest"] == "Fastest: no candidate is better than the dense model in every round."


def test_where_nothing_is_good_the_dense_model_is_kept():
    told = answers(judged(narrow(8, 800, DEAR), DEAR, DEAR, 1.3))
    assert told["title"].endswith("fewest parameters: keep the dense model; fastest: keep the dense model")
    assert "the nearest candidate is width 8, raw, KL 0.090 nats" in told["Fewest parameters"]


def test_a_text_that_the_model_reads_no_better_than_its_unigrams_cannot_tell():
    frame = plan(judged(narrow(8, 800, SLIGHT), SLIGHT, SLIGHT)).with_columns(loss=pl.lit(4.0), loss_high=pl.lit(4.4))
    title = advice(frame, TextRead(["prose"], 8, 4.3, length=512))[0]
    assert title.startswith("This text cannot tell what a cut costs")
    assert (
        "(loss 4, 95% interval up to 4.4, entropy of the frequencies 4.3 nats per token, both on 8 windows of 512 tokens of prose)"
        in title
    )
    assert "width 8" in advice(frame, TextRead(["prose"], 8, 4.5))[0]


def test_few_windows_cannot_judge_a_choice():
    lines = advice(plan(narrow(8, 800, SLIGHT)), TextRead(["prose"], 1, 6.0))
    assert any("1 window of prose cannot judge a choice" in line for line in lines)
    assert "(not certain)" in lines[0]


def test_narrowing_and_dropping_layers_are_compared_at_a_tenth_fewer_parameters():
    lines = advice(plan(row(DROP, 500, 5.0, layers=1), narrow(6, 600, 2.0)), TEXT)
    # On the lines from the dense model to 600 and to 500 parameters.
    assert lines[-1].startswith(
        "With 10% fewer parameters, by interpolation between the candidates, narrowing (raw) has a KL of 0.500 nats, and dropping "
        "layers one of 1.00"
    )


def test_with_a_second_table_there_is_no_line_from_the_widest_candidate_to_the_dense_model():
    # A cut that unties is larger at full width than the dense model: what the line would say is not so.
    rows = [row(DROP, 600, 4.0, layers=1) | {"tied": True}, narrow(9, 880, 2.0), narrow(8, 700, 3.0)]
    dense, rounded = (r | {"tied": True} for r in (row(DENSE, 1000, 0.0), row(ROUND, 1000, 1e-4, bits=8)))
    last = advice(with_equal_size(pl.DataFrame([dense, *rows, rounded], schema=SCHEMA)), TEXT)[-1]
    assert last.startswith("With 12% fewer parameters")  # the size of the widest, not a tenth less than the dense model
    assert "KL of 2.00 nats, and dropping layers one of 1.20" in last  # on its own line to the dense model


def test_where_no_width_makes_it_smaller_that_is_said():
    lines = advice(plan(row(DROP, 800, 1.0, layers=2), narrow(9, 1100, 1e-6), narrow(8, 1000, 1e-5)), TEXT)
    assert lines[-1].startswith("No width makes this model smaller")


# ---- widths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "arguments", "export", "expected"),
    [
        ("qwen2", {"hidden_size": 32}, None, (28, 24, 20, 16)),  # nothing to align to
        ("qwen2", {"hidden_size": 64}, None, (56, 48, 40, 32)),
        ("llama", {"hidden_size": 128}, None, (112, 96, 80, 64)),
        ("llama", {"hidden_size": 512}, None, (448, 384, 320, 256)),
        ("llama", {"hidden_size": 96, "num_attention_heads": 12}, None, (84, 72, 60, 48)),  # heads before alignment
        ("llama", {"hidden_size": 32, "num_attention_heads": 16}, None, (16,)),
        ("qwen2", {"hidden_size": 96, "num_attention_heads": 12}, None, (80, 72, 64, 48)),
        ("qwen2", {"hidden_size": 96, "num_attention_heads": 12}, "llama", (84, 72, 60, 48)),
        ("gpt_neox", {"hidden_size": 96, "num_attention_heads": 12}, "phi", (80, 72, 64, 48)),
    ],
)
def test_proposed_widths_are_below_the_width_aligned_and_allowed(
    checkpoint: Callable[..., Path], family, arguments, export, expected
):
    opened = open_checkpoint(str(checkpoint(family, layers=1, tokenizer=None, **arguments)))
    widths = default_widths(resolve_target(opened, export=export))
    assert widths == expected
    dim = arguments["hidden_size"]
    step = arguments.get("num_attention_heads", 4) if "llama" in (family, export) else 1
    assert all(0 < w < dim and w % step == 0 for w in widths)


# ---- windows -------------------------------------------------------------------------------------------------------


def windows(count: int, length: int = 4) -> list[Window]:
    """Windows that can be told apart by their index."""
    n_bytes = torch.ones(length, dtype=torch.int64)
    return [Window(i, torch.full((length,), i), n_bytes.cumsum(0), n_bytes, 0) for i in range(count)]


def indices(dealt: list[Window]) -> list[int]:
    return [w.index for w in dealt]


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("count", "each"), [(3, 1), (3, 8), (24, 8), (25, 8), (100, 8), (101, 7), (10, 2), (4, 2)])
def test_nothing_that_is_judged_or_held_out_is_trained_or_calibrated_on(count, each, trains):
    reading = split_windows({"t": windows(count)}, each, trains)
    calibration, judged = indices(reading.calibration), indices(reading.evaluation)
    held_out, training = indices(reading.held_out), indices(reading.training)
    n = min(each, count // (3 if trains else 2))
    assert len(calibration) == len(judged) == n
    assert len(held_out) == (n if trains else 0)
    assert len({*calibration, *judged, *held_out}) == len(calibration) + len(judged) + len(held_out)
    assert not {*training} & {*judged, *held_out}
    assert sorted([*training, *judged, *held_out]) == list(range(count))
    assert {*calibration} <= {*training}


def test_every_kind_comes_from_every_part_of_the_texts():
    reading = split_windows({"t": windows(60)}, 5, True)
    for dealt in (reading.calibration, reading.evaluation, reading.held_out):
        assert [i // 12 for i in indices(dealt)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("count", "trains", "kind"), [(1, False, "evaluation"), (1, True, "held-out"), (2, True, "held-out")]
)
def test_too_few_windows_to_deal_are_refused_with_what_they_are_for(count, trains, kind):
    with pytest.raises(InvalidArgument, match="too few") as refused:
        split_windows({"mine.txt": windows(count, 9), "yours.txt": []}, 8, trains)
    line = str(refused.value)
    assert "mine.txt, yours.txt" in line
    assert f"{count} windows of 9 tokens" in line
    assert kind in line
    assert ("held-out" in line) == trains


def test_both_halves_of_the_evaluation_have_windows_of_every_text():
    """16 windows of one text, then 16 of another; every other window of the evaluation is for the choice."""
    every = windows(32)
    split = split_windows({"a": every[:16], "b": every[16:]}, 8, False)
    judged = indices(split.evaluation)
    assert split.evaluation_texts == ["a" if i < 16 else "b" for i in judged]
    for half in (judged[0::2], judged[1::2]):
        assert [sum(i < 16 for i in half), sum(i >= 16 for i in half)] == [2, 2]


# ---- several texts -------------------------------------------------------------------------------------------------


def sums_of(*kl: float) -> torch.Tensor:
    """Return the sums of windows of 100 positions with these KL."""
    sums = torch.zeros(len(kl), len(SUMS), dtype=torch.float64)
    sums[:, :3], sums[:, SUMS.index("kl")] = 100, 100 * torch.tensor(kl)
    return sums


def test_a_candidate_is_judged_on_the_text_on_which_it_costs_the_most():
    """On both texts together its KL of 0.02 is within the tolerance, and on code it is not."""
    prose, code = [0.001, 0.0011, 0.001, 0.0009] * 2, [0.039, 0.0391, 0.039, 0.0389] * 2
    halves = _halves(sums_of(*prose, *code), ["prose"] * 8 + ["code"] * 8)
    assert halves["judged_text"] == "code"
    assert halves["judged_kl"] == pytest.approx(0.039)
    assert halves["judged_kl_high"] == pytest.approx(0.039 + t.ppf(0.975, 3) * np.std([0.0391, 0.0389] * 2, ddof=1) / 2)
    assert halves["judged_within"] < 0.001
    assert halves["choice_kl"] == pytest.approx(0.02)


def test_one_text_is_judged_on_every_other_window():
    halves = _halves(sums_of(0.01, 0.02, 0.01, 0.03), ["prose"] * 4)
    assert (halves["judged_text"], halves["judged_kl"]) == (None, pytest.approx(0.025))


@pytest.mark.parametrize("n_code", [1, 2])
def test_a_text_that_is_hardly_read_is_not_known_to_be_harmless(n_code):
    """One window for the choice alone, or one for the choice and one to judge: neither gives an interval."""
    halves = _halves(sums_of(*[0.001] * 8, *[0.002] * n_code), ["prose"] * 8 + ["code"] * n_code)
    assert halves["judged_text"] == "code"
    assert halves.get("judged_kl_high") is None
    frame = plan(narrow(8, 800, 0.001) | halves)
    assert "width 8, raw (not certain)" in advice(frame, TextRead(["prose", "code"], 8 + n_code, 6.0))[0]


def test_groups_of_neighbouring_windows_belong_to_their_text_and_to_none_where_it_ends():
    """Five windows of prose and five of code, two in each row of sums: the third row has both."""
    kl = _judged_by_text(sums_of(9, 0.1, 9, 0.2, 9), ["prose"] * 5 + ["code"] * 5)
    assert {name: found.value for name, found in kl.items()} == pytest.approx({"prose": 0.1, "code": 0.2})


def test_the_advice_names_the_text_on_which_a_candidate_costs_the_most():
    texts = TextRead(["prose", "code"], 16, 6.0)
    told = answers(judged(narrow(8, 800, SLIGHT), SLIGHT, SLIGHT) | {"judged_text": "code"}, text=texts)
    assert (
        "rounding to 4 bits on code, the text on which it costs the most; the probability" in told["Fewest parameters"]
    )
    lines = advice(plan(narrow(8, 800, SLIGHT)), texts)
    assert any("judged on 8 others, on each text alone" in line for line in lines)
    lines = advice(plan(narrow(8, 800, SLIGHT)), TextRead(["prose", "code"], 7, 6.0))
    assert any("7 windows of prose and code cannot judge a choice on each text" in line for line in lines)


def test_the_comparison_with_dropping_layers_has_standard_errors():
    """Half way to the dense model, whose KL of 0 has no error, the error is half of that of the candidate."""
    lines = advice(plan(row(DROP, 800, 1.0, layers=1, kl_stderr=0.2), narrow(8, 800, 0.5) | {"kl_stderr": 0.1}), TEXT)
    assert "narrowing (raw) has a KL of 0.250 ± 0.050 nats, and dropping layers one of 0.50 ± 0.10" in lines[-1]
    assert "± one standard error" in lines[-1]
