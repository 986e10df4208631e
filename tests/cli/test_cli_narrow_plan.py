"""`dimscope narrow --plan`: what widths cost, compared with checkpoints that are really cut; reused and resumed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import models
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from dimscope.studies.narrowing.advice import SPEEDS
from dimscope.studies.narrowing.windows import split_windows
from dimscope.texts.texts import open_text
from dimscope.texts.windows import middle_windows

pytestmark = pytest.mark.slow  # whole commands or studies

READ = ("--length", 16, "--windows", 2)
BASES = ("random", "raw", "normalised")  # of a plan without --basis
Json = dict[str, Any]


class Plan(NamedTuple):
    """What a plan printed as JSON, its rows, and the folder it was written to."""

    result: Json
    rows: list[Json]
    folder: Path

    def of(self, method: str, **values: object) -> list[Json]:
        return [r for r in self.rows if r["method"] == method and all(r[name] == v for name, v in values.items())]


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(models.TEXT)
    return path


@pytest.fixture(scope="module")
def plans(cli, prose) -> Callable[..., Plan]:
    """Return `plans(model, out, *arguments)`: a plan that succeeds."""

    def run(model: Path, out: Path, *arguments: object) -> Plan:
        read = READ[:2] if "--windows" in arguments else READ
        ran = cli("narrow", model, "--plan", "--text", prose, *read, *arguments, "-o", out, "--json")
        assert ran.returncode == 0, ran.stderr[-1000:]
        return Plan(json.loads(ran.stdout), pl.read_parquet(out / "tables" / "plan.parquet").to_dicts(), out)

    return run


@pytest.fixture(scope="module")
def model(checkpoint) -> Path:
    """A tied model of three layers."""
    return checkpoint("qwen2", hidden_size=64, layers=3)


@pytest.fixture(scope="module")
def usual(model, plans, tmp_path_factory) -> Plan:
    """A plan with the default widths and bases."""
    return plans(model, tmp_path_factory.mktemp("plan") / "usual")


@pytest.fixture
def cut(cli, prose, tmp_path) -> Callable[..., tuple[int, int, Json]]:
    """Return `cut(model, width, *arguments)`: parameters and bytes in the files of a real cut, and its JSON."""

    def run(model: Path, width: int, *arguments: object) -> tuple[int, int, Json]:
        ran = cli(
            "narrow", model, "--width", width, "--text", prose, *READ, *arguments, "-o", tmp_path / "cut", "--json"
        )
        assert ran.returncode == 0, ran.stderr[-1000:]
        return *counted(tmp_path / "cut"), json.loads(ran.stdout)

    return run


def counted(folder: Path) -> tuple[int, int]:
    tensors = load_file(folder / "model.safetensors").values()
    return sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """When every candidate's table was written, and which file it is: a rewritten one is another."""
    return {
        p.stem: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (folder / "tables" / "candidates").glob("*.parquet")
    }


def without_speeds(rows: list[Json]) -> list[Json]:
    """What does not depend on how busy the machine is."""
    return [{name: value for name, value in row.items() if name not in SPEEDS} for row in rows]


# ---- the rows ------------------------------------------------------------------------------------------------------


def test_a_plan_has_the_dense_model_every_width_and_basis_layers_dropped_and_weights_rounded(usual):
    kinds = [(r["method"], r["width"], r["basis"], r["layers"], r["bits"]) for r in usual.rows]
    narrow = [("narrow", width, basis, None, None) for width in (56, 48, 40, 32) for basis in BASES]
    assert kinds == [
        ("dense", None, None, None, None), *narrow, ("drop layers", None, None, 2, None), ("quantise", None, None, None, 8),
    ]  # fmt: skip
    assert {r["n_tokens"] for r in usual.rows} == {32}  # 2 windows of 16 predicted positions, the same for all


def test_the_dense_model_is_what_everything_is_compared_with(model, usual):
    [dense] = usual.of("dense")
    assert (dense["parameters"], dense["bytes"]) == counted(model)
    assert (dense["kl"], dense["loss_rise"], dense["top_1"], dense["prefill_ratio"]) == (0, 0, 1, 1)
    for row in usual.rows:
        assert row["loss"] - dense["loss"] == pytest.approx(row["loss_rise"], abs=1e-5)
        assert (row["kl"] > 0) == (row is not dense)
    kl = {width: usual.of("narrow", width=width, basis="normalised")[0]["kl"] for width in (56, 48, 40, 32)}
    assert kl[56] < kl[48] < kl[40] < kl[32]


def test_candidates_are_evaluated_on_windows_that_nothing_was_calibrated_on(model, usual, prose):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dense, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    assert tokenizer is not None
    windows = middle_windows(open_text(str(prose)), tokenizer, length=16, count=4)
    parts = split_windows({"prose": windows}, 2, False)
    mean = {}
    for name, own in (("evaluation", parts.evaluation), ("calibration", parts.calibration)):
        ids = torch.stack([window.ids for window in own])
        mean[name] = float(dense(ids, labels=ids).loss.detach())
    assert usual.of("dense")[0]["loss"] == pytest.approx(mean["evaluation"], abs=1e-4)
    assert abs(mean["evaluation"] - mean["calibration"]) > 1e-3


def test_two_texts_are_judged_one_by_one(model, plans, tmp_path):
    letters = tmp_path / "letters.txt"
    letters.write_text(" ".join("abcdefghijklmnopqrstuvwxyz" * 40))
    plan = plans(model, tmp_path / "two", "--text", letters, "--width", 32, "--basis", "raw", "--windows", 8)
    [narrow] = plan.of("narrow")
    assert narrow["judged_text"] in ("prose.txt", "letters.txt")
    assert narrow["judged_kl_low"] < narrow["judged_kl"] < narrow["judged_kl_high"]


def test_the_basis_makes_no_difference_to_speed_and_that_of_rounded_weights_is_not_measured(usual):
    for width in (56, 48, 40, 32):
        [speeds] = {tuple(row[name] for name in SPEEDS) for row in usual.of("narrow", width=width)}
        assert None not in speeds
    assert [usual.of("quantise")[0][name] for name in SPEEDS] == [None] * len(SPEEDS)
    assert usual.of("drop layers")[0]["prefill_ratio"] > 0


CASES = {
    "stored in bfloat16": ("qwen2", {"dtype": "bfloat16"}, ("--basis", "random")),
    "untied, of another family": ("qwen2", {}, ("--basis", "normalised", "--untied", "--export-as", "llama")),
    "learned, with centred norms": ("gpt_neox", {}, ("--basis", "learned", "--learn-steps", 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_width_costs_in_a_plan_is_what_it_costs_when_it_is_cut(checkpoint, plans, cut, tmp_path, case):
    family, arguments, options = CASES[case]
    model = checkpoint(family, **arguments)
    plan = plans(model, tmp_path / "plan", "--width", 24, *options)
    [row], [dense], [rounded] = plan.of("narrow"), plan.of("dense"), plan.of("quantise")
    parameters, n_bytes, result = cut(model, 24, *options)
    assert (row["parameters"], row["bytes"]) == (parameters, n_bytes)
    measured = {r["metric"]: r["narrow"] for r in result["measured"]}
    # The plan computes in float32; a checkpoint in bfloat16 has its weights rounded to 2^-9 once more.
    precise = not arguments
    assert measured["KL"] == pytest.approx(row["kl"], rel=1e-3 if precise else 0.2)
    assert measured["loss"] == pytest.approx(row["loss"], rel=1e-6 if precise else 1e-2)
    assert (dense["parameters"], dense["bytes"]) == counted(model)
    tensors = load_file(model / "model.safetensors")
    one_layer = sum(t.numel() for name, t in tensors.items() if ".layers.0." in name)
    assert [r["parameters"] for r in plan.of("drop layers", layers=1)] == [dense["parameters"] - one_layer]
    size = next(iter(tensors.values())).element_size()
    assert rounded["parameters"] == dense["parameters"]
    assert rounded["bytes"] == sum(t.numel() + len(t) * size if t.ndim == 2 else t.nbytes for t in tensors.values())


def test_what_dropping_layers_costs_at_the_same_size_is_on_the_line_to_the_dense_model(usual):
    [dense], [dropped] = usual.of("dense"), usual.of("drop layers")
    for row in usual.of("narrow"):
        share = (dense["parameters"] - row["parameters"]) / (dense["parameters"] - dropped["parameters"])
        for value in ("kl", "loss_rise"):
            expected = None if share > 1 else pytest.approx(share * dropped[value], abs=1e-9)
            assert row[f"{value}_dropping"] == expected
    assert {row["kl_dropping"] is None for row in usual.of("narrow")} == {True, False}


def test_one_half_of_the_windows_is_for_the_choice_and_the_other_judges(usual):
    for row in usual.rows:  # of two windows, of equal length
        assert (row["choice_kl"] + row["judged_kl"]) / 2 == pytest.approx(row["kl"], rel=1e-6)
    assert all(row["choice_kl"] != row["judged_kl"] for row in usual.of("narrow"))


def test_a_speed_lies_between_those_of_its_rounds(usual):
    for row in usual.of("narrow"):
        for name in ("prefill_ratio", "decode_ratio"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]


def test_the_answer_is_advice(usual):
    # Random weights predict no better than unigrams do.
    assert usual.result["answer"].startswith("This text cannot tell what a cut costs")


def test_healing_adds_a_row_that_depends_on_how_it_was_healed(checkpoint, plans, tmp_path):
    plan = plans(checkpoint("qwen2"), tmp_path, "--width", 24, "--basis", "raw", "--heal-steps", 5)
    [healed], [row] = plan.of("narrow, healed"), plan.of("narrow")
    assert (healed["width"], healed["basis"]) == (24, "raw")
    assert (healed["parameters"], healed["bytes"]) == (row["parameters"], row["bytes"])
    assert healed["kl"] < row["kl"]
    [provenance] = (tmp_path / "tables" / "candidates").glob("*healed*.json")
    recipe = models.read_json(provenance)["recipe"]["arguments"]
    assert recipe.items() >= {"heal": 5, "lora": None}.items()


def test_prompts_are_continued_by_the_dense_and_by_the_narrow_model(checkpoint, plans, tmp_path):
    long = checkpoint("qwen2", max_position_embeddings=128)
    options = ("--width", 16, "--basis", "random")
    texts = plans(long, tmp_path / "plan", *options, "--prompt", "The keeper", "Bells").result["narrow_texts"]
    assert [row["prompt"] for row in texts] == ["The keeper", "Bells"]
    assert all(row["dense"] and row["narrow"] for row in texts)
    assert texts[0]["dense"] != texts[1]["dense"]
    assert "narrow_texts" not in plans(long, tmp_path / "plan", *options).result
    assert not list((tmp_path / "plan").rglob("narrow_texts*"))


# ---- on disk -------------------------------------------------------------------------------------------------------


def test_the_folder_has_a_page_the_facts_and_the_tables_that_were_printed_and_no_weights(usual):
    assert usual.result["page"] == str(usual.folder / "index.html")
    assert "<html" in (usual.folder / "index.html").read_text()[:1000]
    own = models.read_json(usual.folder / "report.json")["studies"]["narrowing"]
    assert own["tables"] == ["plan"]
    assert own["facts"]["advice"][0] in usual.result["answer"]
    assert own["facts"]["widths"] == [56, 48, 40, 32]
    assert len(usual.result["candidates"]) == len(usual.rows)
    assert len(files(usual.folder)) == len(usual.rows)
    assert not list(usual.folder.rglob("*.safetensors"))
    assert not list(usual.folder.rglob("config.json"))


def test_without_a_folder_every_width_and_basis_is_planned_once_and_nothing_is_written(cli, model, prose, tmp_path):
    options = ("--width", 20, 50, 20, "--basis", "embedding", "coordinates", "embedding")
    ran = cli("narrow", model, "--plan", "--text", prose, *READ, *options, "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert "page" not in result
    names = [row["candidate"] for row in result["candidates"] if row["candidate"].startswith("width")]
    assert names == [f"width {width}, {basis}" for width in (50, 20) for basis in ("embedding", "coordinates")]
    assert list(tmp_path.iterdir()) == []


def test_the_same_command_uses_its_candidates_again(model, usual, plans):
    before = files(usual.folder)
    again = plans(model, usual.folder)
    assert files(usual.folder) == before
    assert again.rows == usual.rows
    assert again.result["answer"] == usual.result["answer"]


def test_another_width_is_added_and_other_windows_or_seeds_are_evaluated_anew(checkpoint, plans, tmp_path):
    model, out, options = checkpoint("qwen2"), tmp_path / "plan", ("--basis", "random", "--width", 16)
    first = plans(model, out, *options)
    before = files(out)
    wider = plans(model, out, *options, 24)
    after = files(out)
    assert {name: after[name] for name in before} == before
    assert {*after} - {*before} == {"random-24"}
    assert [row for row in wider.rows if row["width"] != 24] == first.rows
    other = plans(model, out, *options, "--windows", 3)
    assert not {*files(out).values()} & {*before.values()}
    assert {row["n_tokens"] for row in other.rows} == {48}
    [row], [seeded] = other.of("narrow"), plans(model, out, *options, "--windows", 3, "--seed", 1).of("narrow")
    assert seeded["kl"] != row["kl"]


def test_a_learned_basis_that_is_added_later_is_evaluated_on_the_windows_of_the_others(checkpoint, plans, tmp_path):
    # Where something is trained the windows are split otherwise, so no earlier candidate can be used.
    model, learned = checkpoint("qwen2"), ("--width", 16, "--learn-steps", 2, "--basis", "raw", "learned")
    plans(model, tmp_path / "plan", *learned[:-1])
    later, at_once = plans(model, tmp_path / "plan", *learned), plans(model, tmp_path / "at-once", *learned)
    assert without_speeds(later.rows) == without_speeds(at_once.rows)


def test_kill_9_in_the_middle_keeps_what_is_finished_and_the_same_command_resumes(cli, model, usual, prose, tmp_path):
    out = tmp_path / "plan"
    arguments = ("narrow", model, "--plan", "--text", prose, *READ, "-o", out, "--json")
    provenance = out / "tables" / "candidates"
    ended = cli.interrupt(*arguments, after=provenance / "*.json", count=4, by=signal.SIGKILL)
    assert ended.returncode == -signal.SIGKILL
    finished = {p.stem for p in provenance.glob("*.json")}
    before = {name: at for name, at in files(out).items() if name in finished}
    assert len(before) == 4 < len(usual.rows)
    assert not (out / "index.html").exists()
    assert not (out / "tables" / "plan.json").exists()
    ran = cli(*arguments)
    assert ran.returncode == 0, ran.stderr
    after = files(out)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(usual.rows)
    rows = pl.read_parquet(out / "tables" / "plan.parquet").to_dicts()
    assert without_speeds(rows) == without_speeds(usual.rows)
    assert (out / "index.html").exists()
    assert not [p.name for p in out.rglob(".*")]
