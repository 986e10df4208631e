"""The numbers of the study of damage: losses by stock transformers, errors and operators by numpy, sizes and summary."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from damage_oracles import (
    CASES,
    SIDES,
    D,
    changed,
    closed_form,
    damage_settings,
    drawn,
    first_norm,
    numbers,
    places,
    rows,
    sides,
    spelled,
    stock,
    tables_of,
)
from polars.testing import assert_frame_equal

import dimscope
from dimscope.checkpoints.model import Placement
from dimscope.interventions.perturbations import PERTURBATIONS
from dimscope.studies import estimate
from dimscope.studies.damage import points
from dimscope.studies.damage.inputs import DamageSession, damage_inputs
from dimscope.studies.damage.summary import change_frames
from dimscope.studies.damage.tables import DAMAGE, POINT

pytestmark = pytest.mark.slow  # whole commands or studies


# ---- losses and errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case != "untied, stored in bfloat16"])
def test_what_a_change_costs_is_what_stock_transformers_say_with_the_changed_table(studied, lively, table_after, case):
    """Logits in float32: 1e-4 of a loss of ten nats, 1e-3 of a small KL. Nearly equal logits may swap places."""
    frame, plain = studied(case)[2]["damage"], stock(lively(case))
    before = plain.log_probs({})
    evaluated = rows(frame, text="keeper.txt")
    kl = []
    for change, side, seed in places(evaluated):
        tables = {} if change == "undamaged" else {s: table_after(case, s, change, seed) for s in sides(side)}
        expected = plain.evaluated(before, plain.log_probs(tables))
        point = rows(evaluated, change=change, side=side, seed=seed)
        entropy = ["unigram entropy"] if change == "undamaged" else []
        assert point["metric"].to_list() == list(expected) + entropy
        point = point.filter(pl.col("metric") != "unigram entropy")
        for row in point.iter_rows(named=True):
            value, stderr, n = expected[row["metric"]]
            where, metric = (change, side, seed, row["metric"]), row["metric"]
            slack = 1.01 / n if metric == "top-1 agreement" else 5e-5
            assert row["value"] == pytest.approx(value, rel=1e-3, abs=slack), where
            if stderr is not ...:
                assert row["stderr"] == (None if stderr is None else pytest.approx(stderr, rel=1e-2, abs=1e-5)), where
            assert row["n_tokens"] == n, where
        kl.append(expected["KL"][0])
    assert places(evaluated) == places(frame)
    assert np.median(kl) > 0.05  # nothing here is so small that the tolerances would hide it


@pytest.mark.parametrize("case", CASES)
def test_errors_are_those_of_the_numpy_tables_beside_their_closed_forms(studied, lively, table_after, case):
    """Linear maps exactly; noise and rounding are added in float32, which is 1e-7 of a row."""
    folder, frame = lively(case), studied(case)[2]["damage"]
    tables = tables_of(folder)
    for change, side, seed in places(frame)[1:]:
        for name in sides(side):
            table, steps = tables[name], spelled(change)
            after, whole = table_after(case, name, change, seed), np.linalg.norm(table)
            error, expected = np.linalg.norm(table - after), closed_form(steps, table)
            point = rows(frame, change=change, side=side, seed=seed, table=name)
            metrics = {row["metric"]: row for row in point.iter_rows(named=True)}
            where = (change, side, seed, name)
            exact = not {"noise", "quantise"} & {part.partition(":")[0] for part in steps.split("+")}
            rel = 1e-9 if exact else 1e-5
            assert metrics["error"]["value"] == pytest.approx(error, rel=rel), where
            assert metrics["relative error"]["value"] == pytest.approx(error / whole, rel=rel), where
            cosines = (table * after).sum(axis=1) / np.linalg.norm(table, axis=1) / np.linalg.norm(after, axis=1)
            assert metrics["cosine"]["value"] == pytest.approx(cosines.mean(), rel=1e-5), where
            cast = np.linalg.norm(table - after.astype(np.float32)) / whole
            assert metrics["relative error, cast"]["value"] == pytest.approx(cast, rel=1e-5), where
            assert ("relative error, first norm" in metrics) == (name == "input")
            if name == "input":
                normed, other = (first_norm(folder, x) for x in (table, after))
                relative = np.linalg.norm(normed - other) / np.linalg.norm(normed)
                assert metrics["relative error, first norm"]["value"] == pytest.approx(relative, rel=1e-4, abs=1e-7), (
                    where
                )
            for metric, share in (("error", 1), ("relative error", whole)):
                form = None if expected is None else pytest.approx(expected / share, rel=1e-9)
                assert metrics[metric]["null"] == form, where
                # all rows: nothing to sample
                assert (metrics[metric]["n_tokens"], metrics[metric]["stderr"]) == (512, None), where
            assert {row["n_tokens"] for row in metrics.values()} == {512}


def test_places_say_what_was_changed(studied):
    frame = studied("untied")[2]["damage"]
    assert dict(frame.schema) == DAMAGE
    assert set(frame["model"]) == {"llama"}
    for row in frame.select(*POINT).unique().iter_rows(named=True):
        steps = [part.split(":") for part in spelled(row["change"]).split("+")]
        if row["change"] == "undamaged":
            assert (row["kind"], row["side"]) == ("undamaged", "input")
            assert {row[name] for name in ("strength", "unit", "kept_share", "seed")} == {None}
            continue
        assert row["kind"] == "+".join(name for name, *_ in steps)
        unit = PERTURBATIONS[steps[0][0]].unit if len(steps) == 1 else None
        assert row["unit"] == (unit or None)
        assert row["strength"] == (float(steps[0][1]) if unit else None)
        keeps = unit == "dimensions" and row["kind"] != "remove-leading"
        assert row["kept_share"] == (row["strength"] / D if keeps else None)
        assert (row["seed"] is not None) == any(PERTURBATIONS[name].random for name, *_ in steps)
    for name, case in CASES.items():
        expected = [("undamaged", "input", None)]
        for side in case.sides:
            for change in case.changes:
                label = change.replace(":", " ").replace("+", " + ")
                seeded = any(PERTURBATIONS[step.split(":")[0]].random for step in change.split("+"))
                expected += [(label, side, seed) for seed in (range(case.draws) if seeded else (None,))]
        assert places(studied(name)[2]["damage"]) == expected


def test_the_undamaged_model_is_compared_with_itself(studied):
    point = numbers(studied("untied")[2]["damage"], change="undamaged", text="keeper.txt")
    assert (point["KL"], point["loss rise"], point["top-1 agreement"]) == (0, 0, 1)
    assert point["loss"] > 0


def test_changes_that_change_nothing_cost_nothing(study, lively, tmp_path):
    """All dimensions kept, no noise, a factor of one: KL of float32 rounding, 1e-6 of a logit of order ten."""
    nothing = (
        "truncate:32", "truncate-centred:32", "remove-leading:0", "coordinates:100%", "project:32", "project-rescaled:32",
        "project-sparse:100%", "noise:0", "shift:0", "scale:1",
    )  # fmt: skip
    _, tables = study(lively("untied"), tmp_path, *nothing, sides=("input", "both"), draws=1)
    frame = tables["damage"]
    assert len(places(frame)) == 1 + 2 * len(nothing)
    metric = pl.col("metric")
    assert frame.filter(metric == "relative error")["value"].max() < 1e-7
    assert frame.filter(metric == "relative error, cast")["value"].max() < 1e-6  # rounded to float32 on the way
    assert frame.filter(metric == "KL")["value"].max() < 1e-6
    assert frame.filter(metric == "loss rise")["value"].abs().max() < 1e-4
    assert frame.filter(metric == "top-1 agreement")["value"].min() > 1 - 1.01 / 48  # a tie may fall otherwise
    for change in ("noise 0", "scale 1"):
        for side in ("input", "both"):
            point = numbers(frame, change=change, side=side, text="keeper.txt")
            assert (point["KL"], point["loss rise"], point["top-1 agreement"]) == (0, 0, 1)  # no bit differs


@pytest.mark.parametrize("case", ["tied, stored in bfloat16", "tied, with positions"])
def test_a_tied_head_reads_hidden_states_as_before_while_the_input_is_damaged(lively, text, case):
    settings = damage_settings(text, "truncate:4", sides=SIDES)
    session = DamageSession(damage_inputs(dimscope.open(str(lively(case))), settings))
    head, table = session.model.get_output_embeddings(), session.model.get_input_embeddings()
    hidden = torch.randn(5, D, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(20, 30)
    undamaged, only_input, only_output, both = session.inputs.points
    with torch.no_grad():
        logits, embedded = head(hidden), table(ids)
        for point, head_changes, reading_changes in (
            (undamaged, False, False),
            (only_input, False, True),
            (only_output, True, False),
            (both, True, True),
        ):
            with points.damaged(session, point, points.make_maps(session, point)):
                assert torch.equal(head(hidden), logits) != head_changes
                assert torch.equal(table(ids), embedded) != reading_changes
            assert torch.equal(head(hidden), logits)
            assert torch.equal(table(ids), embedded)


def test_sides_of_untied_tables_are_changed_each_by_its_own_directions(studied, lively):
    """The widest directions of two tables differ, so both at once is no one map."""
    case = "untied, stored in bfloat16"
    frame, tables = studied(case)[2]["damage"], tables_of(lively(case))
    errors = {name: np.sqrt((np.linalg.svd(table, compute_uv=False)[8:] ** 2).sum()) for name, table in tables.items()}
    assert errors["input"] != pytest.approx(errors["output"], rel=1e-3)
    for side in SIDES:
        point = rows(frame, change="truncate 8", side=side, metric="error").sort("table")
        assert point["table"].to_list() == list(sides(side))
        assert point["value"].to_list() == pytest.approx([errors[name] for name in sides(side)], rel=1e-9)


def test_in_bfloat16_rows_are_rounded_to_it_and_the_model_runs_in_it(study, lively, tmp_path):
    """8 bits of mantissa: a relative error of 2^-9 at most, 1.7e-3 on average, beside that of the change itself."""
    folder = lively("untied, stored in bfloat16")
    changes = ("truncate:31", "noise:0.001", "scale:1")
    facts, tables = study(folder, tmp_path, *changes, draws=1, dtype="bfloat16")
    assert facts["dtype"] == "bfloat16"
    frame, table = tables["damage"], tables_of(folder)["input"]
    for change in ("truncate:31", "noise:0.001", "scale:1"):
        label, after = change.replace(":", " "), changed(change, table, 0)
        rounded = torch.from_numpy(after).float().bfloat16().double().numpy()
        point = numbers(frame, change=label, table="input")
        cast = np.linalg.norm(table - rounded) / np.linalg.norm(table)
        assert point["relative error, cast"] == pytest.approx(cast, rel=1e-3)
        normed = [first_norm(folder, x) for x in (table, rounded)]
        relative = np.linalg.norm(normed[0] - normed[1]) / np.linalg.norm(normed[0])
        # The norm itself rounds to bfloat16 twice: what it gives, and the product with its weight.
        assert point["relative error, first norm"] == pytest.approx(relative, rel=0.1, abs=2**-8)
    fine = numbers(frame, change="noise 0.001", table="input")
    assert fine["relative error, cast"] != pytest.approx(fine["relative error"], rel=0.1)  # finer than bfloat16 is
    assert fine["relative error"] == pytest.approx(0.001 * table.std() / math.sqrt((table**2).mean()), rel=0.05)
    exact = stock(folder)
    before = exact.log_probs({})
    undamaged = numbers(frame, change="undamaged", text="keeper.txt")
    assert undamaged["loss"] == pytest.approx(exact.evaluated(before, before)["loss"][0], rel=0.05)
    assert numbers(frame, change="scale 1", text="keeper.txt")["KL"] == 0


def test_errors_without_an_exact_form_are_estimated_from_a_sample_of_a_large_table(study, checkpoint, tmp_path):
    """9,000 rows, 8,192 of them drawn; the standard error says how far off the sample may be."""
    folder = checkpoint("llama", vocab_size=9000, tokenizer_size=512, hidden_size=8)
    table = tables_of(folder)["input"]
    norm = np.linalg.norm(table)
    _, tables = study(folder, tmp_path, "quantise:3", "noise:1", "truncate:4", draws=1, windows=1)
    frame = tables["damage"]
    for change in ("quantise:3", "noise:1"):
        error = np.linalg.norm(table - changed(change, table, 0)) / norm
        [row] = rows(frame, change=change.replace(":", " "), metric="relative error").iter_rows(named=True)
        assert row["n_tokens"] == 8192
        assert 0 < row["stderr"] < 0.01 * error
        assert row["value"] == pytest.approx(error, abs=5 * row["stderr"])
        assert row["value"] != pytest.approx(error, rel=1e-7)
        [whole] = rows(frame, change=change.replace(":", " "), metric="error").iter_rows(named=True)
        expected = (norm * row["value"], norm * row["stderr"])
        assert (whole["value"], whole["stderr"]) == pytest.approx(expected, rel=1e-9)
    [exact] = rows(frame, change="truncate 4", metric="relative error").iter_rows(named=True)
    assert (exact["n_tokens"], exact["stderr"]) == (9000, None)
    assert rows(frame, change="truncate 4", metric="cosine")["n_tokens"].to_list() == [8192]


def test_windows_at_once_make_no_difference_but_rounding(study, lively, studied, tmp_path):
    _, tables = study(lively("untied"), tmp_path, "truncate:8", "noise:0.5", batch=1, draws=2, sides=("both",))
    metrics = ["error", "loss", "KL", "bits per byte", "relative error, first norm"]
    one, all_ = (
        t.filter(pl.col("metric").is_in(metrics), pl.col("change").is_in(["truncate 8", "noise 0.5"]))
        for t in (tables["damage"], studied("untied")[2]["damage"])
    )
    assert_frame_equal(one, all_, rel_tol=1e-4, abs_tol=1e-6)


# ---- errors token by token, and operators --------------------------------------------------------------------------


def test_token_errors_have_a_row_for_every_token_of_every_change(study, lively, tmp_path):
    folder = lively("untied")
    changes = ("truncate:8", "noise:0.5", "quantise:3")
    facts, tables = study(folder, tmp_path, *changes, sides=("both",), draws=1, token_errors=True)
    frame = tables["token_errors"]
    assert facts["n_changes"] == 3
    assert frame.columns == ["change", "side", "seed", "table", "id", "norm", "error", "cosine"]
    for change in changes:
        for name, table in tables_of(folder).items():
            point = rows(frame, change=change.replace(":", " "), table=name)
            assert point["id"].to_list() == list(range(512))
            after = changed(change, table, 0)
            norms, errors = np.linalg.norm(table, axis=1), np.linalg.norm(table - after, axis=1)
            cosines = (table * after).sum(axis=1) / norms / np.linalg.norm(after, axis=1)
            # rows in float32: 1e-7 of their length, and more of an error that is small beside it
            np.testing.assert_allclose(point["norm"], norms, rtol=1e-6)
            np.testing.assert_allclose(point["error"], errors, rtol=1e-5, atol=1e-6 * norms.max())
            np.testing.assert_allclose(point["cosine"], cosines, rtol=1e-5, atol=1e-5)
    assert len(frame) == 2 * 3 * 512
    _, without = study(folder, tmp_path, *changes, sides=("both",), draws=1)
    assert "token_errors" not in without
    assert not (tmp_path / "tables" / "token_errors.parquet").exists()


def test_the_operator_of_a_random_projection_is_the_one_nearest_to_two_thirds(study, lively, tmp_path):
    """P = A A^+ of the draws of its seed: the mean of its diagonal is k / d exactly, for every k."""
    _, tables = study(
        lively("untied"),
        tmp_path,
        "project:8",
        "project:20",
        "project-rescaled:29",
        "project:32",
        "truncate:21",
        draws=2,
        seed=4,
    )
    a = drawn(D, 20, 4)
    projector = a @ np.linalg.pinv(a)
    metrics = {row["metric"]: row for row in tables["operator"].iter_rows(named=True)}
    assert {(row["k"], row["d"]) for row in metrics.values()} == {(20, D)}
    assert metrics["mean of the diagonal"]["value"] == pytest.approx(20 / D, rel=1e-12)
    assert metrics["mean of the diagonal"]["null"] == 20 / D
    rest = projector[~np.eye(D, dtype=bool)]
    for metric, value, expected in (
        ("sd of the diagonal", np.diag(projector).std(), math.sqrt(2 * 20 * 12 / (D**2 * (D + 2)))),
        ("sd off the diagonal", math.sqrt((rest**2).mean()), math.sqrt(20 * 12 / ((D - 1) * D * (D + 2)))),
    ):
        assert metrics[metric]["value"] == pytest.approx(value, rel=1e-9)
        assert metrics[metric]["null"] == pytest.approx(expected, rel=1e-12)
    block = tables["operator_block"]
    assert block.columns == ["row", "column", "value"]
    matrix = np.full((D, D), np.nan)
    matrix[block["row"], block["column"]] = block["value"]
    np.testing.assert_allclose(matrix, projector, atol=1e-12)
    histogram = tables["operator_histogram"]
    width = 10 / len(histogram)
    assert np.diff(histogram["middle"]) == pytest.approx(width)
    inside = np.abs(rest / metrics["sd off the diagonal"]["null"]) <= 5
    assert (histogram["density"] * width).sum() == pytest.approx(inside.mean(), rel=1e-9)
    assert inside.mean() > 0.999
    # Half of the entries are on either side of zero, and most of them within two standard deviations.
    assert (histogram["density"] * histogram["middle"]).sum() * width == pytest.approx(0, abs=0.1)
    assert (histogram["density"] * histogram["middle"] ** 2).sum() * width == pytest.approx(1, abs=0.15)


def test_a_large_operator_is_shown_by_its_top_left(study, checkpoint, tmp_path):
    folder = checkpoint("llama", hidden_size=128)
    _, tables = study(folder, tmp_path, "project-rescaled:96", draws=1, windows=1)
    block, a = tables["operator_block"], drawn(128, 96, 0)
    assert (len(block), block["row"].max(), block["column"].max()) == (100 * 100, 99, 99)
    matrix = block["value"].to_numpy().reshape(100, 100)
    np.testing.assert_allclose(
        matrix, (a @ np.linalg.pinv(a))[:100, :100], atol=1e-12
    )  # the projector, not d/k times it
    assert rows(tables["operator"], metric="mean of the diagonal")["value"][0] == pytest.approx(0.75, rel=1e-12)


def test_there_is_no_operator_where_no_proper_random_projection_is(study, lively, tmp_path):
    study(lively("untied"), tmp_path, "project:8", draws=1, windows=1)
    assert (tmp_path / "tables" / "operator.parquet").exists()
    improper = ("truncate:8", "project:32", "project-rescaled:0", "project-sparse:8")
    _, tables = study(lively("untied"), tmp_path, *improper, draws=1, windows=1)
    assert not [name for name in tables if name.startswith("operator")]
    assert not list((tmp_path / "tables").glob("operator*"))  # of the study before


# ---- time and summary ----------------------------------------------------------------------------------------------


def test_the_time_is_that_of_products_and_of_reading_the_weights(checkpoint, monkeypatch):
    """Two operations for each weight and token of a pass; every weight read for each token that is written."""
    monkeypatch.setattr(estimate, "_operations_per_second", lambda placement: 1e6)
    monkeypatch.setattr(estimate, "_bytes_per_second", lambda placement: 1e6)
    opened = dimscope.open(str(checkpoint("llama")))
    weights = sum(info.n_elements for info in opened.tensors.values()) - 512 * D  # a look-up multiplies nothing
    lines = {}
    for n_points, tokens, written in ((11, 1000, 0), (11, 1000, 500)):
        line = estimate.estimate_damage(opened, Placement("float32", "cpu"), n_points, tokens, written)
        lines[written] = line
        seconds = n_points * 2 * weights * tokens / 1e6 + written * weights * 4 / 1e6
        assert f": {seconds / 60:.0f} min or more; " in line
    assert lines[0].startswith("10 changes and the unchanged model, 1,000 tokens each on cpu")
    assert ", 500 steps of generation on cpu" in lines[500]
    n_bytes = 4 * (weights + 512 * D) + 4 * 1_000_000 * (D + 512)
    assert f"; {n_bytes / 1e9:.1f} GB at most" in estimate.estimate_damage(
        opened, Placement("float32", "cpu"), 1, 1_000_000, 0
    )


def test_the_summary_has_a_row_for_every_change_of_a_side(studied):
    frame = studied("untied, stored in bfloat16")[2]["damage"]
    base = numbers(frame, change="undamaged", text="keeper.txt")["loss"]
    for side, summary in zip(SIDES, change_frames(frame), strict=True):
        assert (set(summary["text"]), set(summary["side"])) == ({"keeper.txt"}, {side})
        labels = [change for change, of, _ in places(frame) if of == side or change == "undamaged"]
        assert summary["change"].to_list() == list(dict.fromkeys(labels))
        for row in summary.iter_rows(named=True):
            of = frame if row["change"] == "undamaged" else rows(frame, side=side)
            of = rows(of, change=row["change"])
            losses, kl, same_first = (
                rows(of, metric=m, text="keeper.txt")["value"].to_numpy() for m in ("loss", "KL", "top-1 agreement")
            )
            assert row["loss"] == pytest.approx(losses.mean())
            assert row["sd"] == (pytest.approx(losses.std(ddof=1)) if len(losses) > 1 else None)
            assert row["rise %"] == pytest.approx(100 * (losses.mean() / base - 1))
            assert (row["KL"], row["same %"]) == pytest.approx((kl.mean(), 100 * same_first.mean()))
            errors = rows(of, metric="relative error")
            for column, source in (("error", "value"), ("theory", "null")):
                present = errors[source].drop_nulls()
                assert row[column] == (pytest.approx(present.mean()) if len(present) else None)
