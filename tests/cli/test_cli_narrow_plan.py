"""`dimscope narrow --plan`: what widths would cost, against checkpoints that are really cut; kept, used again, taken up again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import models
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from dimscope.studies.narrowing.windows import split_windows
from dimscope.texts.texts import open_text
from dimscope.texts.windows import middle_windows

pytestmark = pytest.mark.slow  # whole commands or studies

SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s", "prefill_ratio", "decode_ratio")
READ = ("--length", 16, "--windows", 2)
BASES = ("random", "raw", "normalised")  # of a plan that is asked for none


class Ran(NamedTuple):
    """What a plan printed as JSON, its rows, and the folder it was written to."""

    told: dict[str, Any]
    rows: list[dict[str, Any]]
    folder: Path

    def of(self, method: str, **wanted: object) -> list[dict[str, Any]]:
        return [r for r in self.rows if r["method"] == method and all(r[name] == v for name, v in wanted.items())]


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(models.TEXT)
    return path


@pytest.fixture(scope="module")
def plans(cli, prose) -> Callable[..., Ran]:
    """Return `plans(model, out, *arguments)`: a plan that succeeds."""

    def run(model: Path, out: Path, *arguments: object) -> Ran:
        read = READ[:2] if "--windows" in arguments else READ
        ran = cli("narrow", model, "--plan", "--text", prose, *read, *arguments, "-o", out, "--json")
        assert ran.returncode == 0, ran.stderr[-1000:]
        told = json.loads(ran.stdout)
        return Ran(told, pl.read_parquet(out / "tables" / "plan.parquet").to_dicts(), out)

    return run


@pytest.fixture(scope="module")
def model(checkpoint) -> Path:
    """A tied model of three layers."""
    return checkpoint("qwen2", hidden_size=64, layers=3)


@pytest.fixture(scope="module")
def usual(model, plans, tmp_path_factory) -> Ran:
    """A plan of which nothing is asked in particular."""
    return plans(model, tmp_path_factory.mktemp("plan") / "usual")


@pytest.fixture
def cut(cli, prose, tmp_path) -> Callable[..., tuple[int, int, dict[str, Any]]]:
    """Return `cut(model, width, *arguments)`: parameters and bytes in the files of a real cut, and what is told of it."""

    def run(model: Path, width: int, *arguments: object) -> tuple[int, int, dict[str, Any]]:
        out = tmp_path / f"cut-{len(list(tmp_path.iterdir()))}"
        ran = cli("narrow", model, "--width", width, "--text", prose, *READ, *arguments, "-o", out, "--json")
        assert ran.returncode == 0, ran.stderr[-1000:]
        return *counted(out), json.loads(ran.stdout)

    return run


def counted(folder: Path) -> tuple[int, int]:
    held = load_file(folder / "model.safetensors").values()
    return sum(t.numel() for t in held), sum(t.nbytes for t in held)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """When every candidate's table was written, and which file it is: a rewritten one is another."""
    return {
        p.stem: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (folder / "tables" / "candidates").glob("*.parquet")
    }


def unspeeded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What does not depend on how busy the machine is."""
    return [{name: value for name, value in row.items() if name not in SPEEDS} for row in rows]


# ---- what is in it -------------------------------------------------------------------------------------------------


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


def test_judged_is_on_windows_that_nothing_was_calibrated_on(model, usual, prose):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dense, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    assert tokenizer is not None
    windows = middle_windows(open_text(str(prose)), tokenizer, length=16, count=4)
    reading = split_windows(windows, 2, False, ["prose"])
    mean = {}
    for name, dealt in (("evaluation", reading.evaluation), ("calibration", reading.calibration)):
        ids = torch.stack([window.ids for window in dealt])
        mean[name] = float(dense(ids, labels=ids).loss.detach())
    assert usual.of("dense")[0]["loss"] == pytest.approx(mean["evaluation"], abs=1e-4)
    assert abs(mean["evaluation"] - mean["calibration"]) > 1e-3


def test_the_directions_make_no_difference_to_speed_and_rounding_none_that_is_measured(usual):
    for width in (56, 48, 40, 32):
        speeds = {tuple(row[name] for name in SPEEDS) for row in usual.of("narrow", width=width)}
        assert len(speeds) == 1
        assert None not in speeds.pop()
    assert [usual.of("quantise")[0][name] for name in SPEEDS] == [None] * 4
    assert usual.of("drop layers")[0]["prefill_ratio"] > 0


@pytest.mark.parametrize(
    ("family", "arguments", "options"),
    [
        ("qwen2", {"dtype": "bfloat16"}, ()),
        ("qwen2", {}, ("--untied", "--export-as", "llama")),
        ("gpt_neox", {}, ()),
    ],
)
def test_parameters_and_bytes_are_those_of_a_checkpoint_that_is_really_cut(
    checkpoint, plans, cut, tmp_path, family, arguments, options
):
    model = checkpoint(family, **arguments)
    ran = plans(model, tmp_path / "plan", "--width", 16, 24, "--basis", "random", *options)
    for width in (16, 24):
        [row] = ran.of("narrow", width=width)
        assert (row["parameters"], row["bytes"]) == cut(model, width, "--basis", "random", "--no-evaluate", *options)[
            :2
        ]
    [dense], [rounded] = ran.of("dense"), ran.of("quantise")
    assert (dense["parameters"], dense["bytes"]) == counted(model)
    held = load_file(model / "model.safetensors")
    one_layer = sum(t.numel() for name, t in held.items() if ".layers.0." in name)
    assert [r["parameters"] for r in ran.of("drop layers", layers=1)] == [dense["parameters"] - one_layer]
    size = next(iter(held.values())).element_size()
    assert rounded["parameters"] == dense["parameters"]
    assert rounded["bytes"] == sum(t.numel() + len(t) * size if t.ndim == 2 else t.nbytes for t in held.values())


@pytest.mark.parametrize(
    ("basis", "options"), [("normalised", ()), ("normalised", ("--untied", "--export-as", "llama")), ("learned", ())]
)
def test_what_a_width_costs_in_a_plan_is_what_it_costs_when_it_is_cut(model, plans, cut, tmp_path, basis, options):
    how = ("--basis", basis, "--learn-steps", 3, *options)
    [row] = plans(model, tmp_path / "plan", "--width", 40, *how).of("narrow")
    judged = {r["metric"]: r for r in cut(model, 40, *how)[2]["measured"]}
    assert judged["KL"]["narrow"] == pytest.approx(row["kl"], rel=1e-3)
    assert judged["loss"]["narrow"] == pytest.approx(row["loss"], rel=1e-6)
    assert judged["loss"]["narrow"] - judged["loss"]["dense"] == pytest.approx(row["loss_rise"], abs=1e-5)


def test_several_widths_and_bases_are_planned_as_they_are_asked_for(model, plans, tmp_path):
    ran = plans(model, tmp_path / "plan", "--width", 20, 50, 20, "--basis", "embedding", "coordinates", "embedding")
    asked = [(r["width"], r["basis"]) for r in ran.of("narrow")]
    assert asked == [(50, "embedding"), (50, "coordinates"), (20, "embedding"), (20, "coordinates")]


def test_what_dropping_layers_costs_at_the_same_size_is_on_the_line_to_the_dense_model(usual):
    [dense], [dropped] = usual.of("dense"), usual.of("drop layers")
    for row in usual.of("narrow"):
        share = (dense["parameters"] - row["parameters"]) / (dense["parameters"] - dropped["parameters"])
        for value in ("kl", "loss_rise"):
            expected = None if share > 1 else pytest.approx(share * dropped[value], abs=1e-9)
            assert row[f"{value}_dropping"] == expected
    assert {row["kl_dropping"] is None for row in usual.of("narrow")} == {True, False}


def test_there_is_advice_of_a_few_sentences(usual, plans, tmp_path, checkpoint):
    assert usual.told["answer"].startswith(("Narrow it to", "Do not narrow"))
    assert "8 bits" in usual.told["answer"]
    untied = plans(checkpoint("qwen2"), tmp_path / "plan", "--width", 28, "--basis", "random", "--untied")
    assert untied.told["answer"].startswith("Do not narrow")  # two tables outweigh what is saved


def test_healing_adds_a_row_for_the_candidate_that_is_shown(model, plans, tmp_path):
    ran = plans(
        model, tmp_path / "plan", "--width", 48, 32, "--basis", "learned", "--learn-steps", 3, "--heal-steps", 30
    )
    [healed], [cut] = ran.of("narrow, healed"), ran.of("narrow", width=32)
    assert (healed["width"], healed["basis"]) == (32, "learned")  # the smallest that is tolerable
    assert (healed["parameters"], healed["bytes"]) == (cut["parameters"], cut["bytes"])
    assert healed["kl"] < cut["kl"]


def test_healing_needs_no_learned_basis(model, plans, tmp_path):
    ran = plans(model, tmp_path / "plan", "--width", 48, "--basis", "raw", "--heal-steps", 5)
    assert len(ran.of("narrow, healed")) == 1


def test_prompts_are_answered_by_the_dense_and_by_the_narrow_model(checkpoint, plans, tmp_path):
    roomy = checkpoint("qwen2", max_position_embeddings=128)
    asked = ("--width", 16, "--basis", "random")
    texts = plans(roomy, tmp_path / "plan", *asked, "--prompt", "The keeper", "Bells").told["narrow_texts"]
    assert [row["prompt"] for row in texts] == ["The keeper", "Bells"]
    assert all(row["dense"] and row["narrow"] for row in texts)
    assert texts[0]["dense"] != texts[1]["dense"]
    assert "narrow_texts" not in plans(roomy, tmp_path / "plan", *asked).told
    assert not list((tmp_path / "plan").rglob("narrow_texts*"))


# ---- on disk -------------------------------------------------------------------------------------------------------


def test_the_folder_has_a_page_the_facts_and_the_tables_that_were_printed_and_no_weights(usual):
    assert usual.told["page"] == str(usual.folder / "index.html")
    assert "<html" in (usual.folder / "index.html").read_text()[:1000]
    facts = json.loads((usual.folder / "report.json").read_text())
    assert facts["studies"]["narrowing"]["tables"] == ["plan"]
    assert facts["studies"]["narrowing"]["facts"]["advice"][0] in usual.told["answer"]
    assert facts["studies"]["narrowing"]["facts"]["widths"] == [56, 48, 40, 32]
    assert len(usual.told["candidates"]) == len(usual.rows)
    assert len(files(usual.folder)) == len(usual.rows)
    assert not list(usual.folder.rglob("*.safetensors"))
    assert not list(usual.folder.rglob("config.json"))


def test_without_a_folder_a_plan_is_told_and_nothing_is_written(cli, model, prose, tmp_path):
    asked = ("--width", 40, "--basis", "random")
    ran = cli("narrow", model, "--plan", "--text", prose, *READ, *asked, "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert "page" not in told
    assert len(told["candidates"]) == 4
    assert list(tmp_path.iterdir()) == []


def test_the_same_command_uses_its_candidates_again_and_says_the_same(model, usual, plans):
    before = files(usual.folder)
    again = plans(model, usual.folder)
    assert files(usual.folder) == before
    assert again.rows == usual.rows
    assert again.told["answer"] == usual.told["answer"]


def test_another_width_is_added_and_other_windows_are_judged_anew(model, plans, tmp_path):
    asked = ("--basis", "random", "--width", 40)
    first = plans(model, tmp_path / "plan", *asked)
    before = files(tmp_path / "plan")
    wider = plans(model, tmp_path / "plan", *asked, 48)
    after = files(tmp_path / "plan")
    assert {name: after[name] for name in before} == before
    assert {*after} - {*before} == {"random-48"}
    assert [row for row in wider.rows if row["width"] != 48] == first.rows
    other = plans(model, tmp_path / "plan", *asked, "--windows", 3)
    assert not {*files(tmp_path / "plan").values()} & {*before.values()}
    assert {row["n_tokens"] for row in other.rows} == {48}


def test_candidates_of_another_seed_are_not_used_again(model, plans, tmp_path):
    asked = ("--basis", "random", "--width", 40)
    kl = {}
    for seed in (1, 2, 1):
        [row] = plans(model, tmp_path / "plan", *asked, "--seed", seed).of("narrow")
        assert kl.setdefault(seed, row["kl"]) == row["kl"]
    assert kl[1] != kl[2]


def test_a_learned_basis_added_later_is_judged_on_the_windows_of_the_others(model, plans, tmp_path):
    # Where something is trained the windows are dealt out otherwise, so nothing that was judged before can be used.
    learned = ("--width", 40, "--learn-steps", 3, "--basis", "random", "learned")
    plans(model, tmp_path / "plan", "--width", 40, "--learn-steps", 3, "--basis", "random", "raw")
    later = plans(model, tmp_path / "plan", *learned)
    assert unspeeded(later.rows) == unspeeded(plans(model, tmp_path / "at-once", *learned).rows)


def test_what_was_healed_by_weights_is_not_taken_for_healed_by_low_rank_changes(model, plans, tmp_path):
    pytest.importorskip("peft")
    asked = ("--width", 40, "--basis", "learned", "--learn-steps", 3, "--heal-steps", 10)
    [weights] = plans(model, tmp_path / "plan", *asked).of("narrow, healed")
    [low_rank] = plans(model, tmp_path / "plan", *asked, "--lora", 1).of("narrow, healed")
    assert low_rank["kl"] != weights["kl"]


def test_kill_9_in_the_middle_keeps_what_is_finished_and_the_same_command_goes_on(
    cli, killed, model, usual, prose, tmp_path
):
    out = tmp_path / "plan"
    arguments = ("narrow", model, "--plan", "--text", prose, *READ, "-o", out, "--json")
    provenance = out / "tables" / "candidates"
    killed(arguments, lambda: len(list(provenance.glob("*.json"))) >= 4)
    finished = {p.stem for p in provenance.glob("*.json")}
    before = {name: at for name, at in files(out).items() if name in finished}
    assert 4 <= len(before) < len(usual.rows)
    assert not (out / "index.html").exists()
    assert not (out / "tables" / "plan.json").exists()
    ran = cli(*arguments)
    assert ran.returncode == 0, ran.stderr
    after = files(out)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(usual.rows)
    assert unspeeded(pl.read_parquet(out / "tables" / "plan.parquet").to_dicts()) == unspeeded(usual.rows)
    assert (out / "index.html").exists()
    assert not [p.name for p in out.rglob(".*")]


# ---- refusals ------------------------------------------------------------------------------------------------------

REFUSED = {
    "a width that heads do not divide": ("llama", ("--width", 16, 30), ["28 or 32"]),
    "a width above the model's": ("qwen2", ("--width", 16, 33), ["from 1 to 32", "33"]),
    "an unknown basis": ("qwen2", ("--basis", "widest"), ["--basis", "widest"]),
    "a family that cannot be": ("gpt2", (), ["gpt2", "whole heads"]),
    "another family that does not say the same": ("llama", ("--export-as", "phi"), ["--export-as phi", "llama"]),
    "verifying too": ("llama", ("--verify",), ["--plan", "--verify"]),
    "a prompt without room to go on": ("llama", ("--prompt", "Hello " * 80), ["'Hello", "64"]),
    "low-rank healing without healing": ("llama", ("--lora", 2), ["--lora", "--heal-steps"]),
    "negative healing": ("llama", ("--heal-steps", -1), ["--heal-steps", "-1"]),
    "nothing learned": ("llama", ("--basis", "learned", "--learn-steps", 0), ["--learn-steps", "0"]),
    "a window longer than the context": ("llama", ("--length", 65), ["--length", "65", "64"]),
    "a tie that is not there": ("llama", ("--tied",), ["--tied", "two tables"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_planned_is_one_line_and_nothing_is_written(checkpoint, refuses, prose, case):
    family, options, named = REFUSED[case]
    read = () if "--length" in options else READ
    refuses(checkpoint(family), *named, command="narrow", options=("--plan", "--text", prose, *read, *options))


def test_a_model_without_a_smaller_width_is_refused(checkpoint, refuses, prose):
    folder = checkpoint("llama", num_attention_heads=32, head_dim=4)
    refuses(folder, "no width below", "32", command="narrow", options=("--plan", "--text", prose, *READ))


def test_a_short_text_is_refused_before_anything_is_planned(checkpoint, refuses, tmp_path):
    (tmp_path / "short.txt").write_text("A")
    options = ("--plan", "--text", tmp_path / "short.txt", "--length", 9)
    refuses(checkpoint("qwen2"), "short.txt", "at least", command="narrow", options=options)


def test_a_file_is_no_folder_for_a_plan(checkpoint, cli, refused, prose, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused(
        cli("narrow", checkpoint("llama"), "--plan", "--text", prose, *READ, "-o", tmp_path / "notes.txt"), "is a file"
    )
    assert (tmp_path / "notes.txt").read_text() == "mine"
