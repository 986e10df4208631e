"""`dimscope report` end to end: what it writes, what it reuses, and kill -9 and Ctrl-C in the middle."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import damage
import models
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from dimscope.cli.app import build_app, option_names
from dimscope.studies import STUDIES

pytestmark = pytest.mark.slow  # whole commands or studies

TABLES = {
    "budget", "tokens", "spectrum", "dimensions", "measures", "correlation",
    "correlation_blocks", "duplicates", "knn", "hubs", "probes", "influence", "truncation",
}  # fmt: skip
LIGHT = ("--embedding.knn-sample", "50", "--embedding.permutations", "1")


def read_tables(folder: Path) -> dict[str, pl.DataFrame]:
    return {path.stem: pl.read_parquet(path) for path in (folder / "tables").glob("*.parquet")}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bert"])
def test_tied_untied_and_encoder_models_get_their_page(checkpoint, cli, digest, tmp_path, family):
    folder = checkpoint(family)
    before = digest(folder)
    result = cli("report", folder, "-o", tmp_path / "report", "--embedding.knn-sample", "100")
    assert result.returncode == 0, result.stderr
    facts = models.read_json(tmp_path / "report" / "report.json")
    spec = models.FAMILIES[family]
    assert (facts["vocab_size"], facts["hidden_size"]) == (512, 32)
    own = facts["studies"]["embedding"]["facts"]
    assert (own["neighbors"], own["n_queries"], own["full_knn"]) == (10, 100, False)
    assert facts["tied"] == (spec.tied if spec.output is not None else None)
    tables = read_tables(tmp_path / "report")
    assert tables.keys() == TABLES
    sides = {"input", "output"} if spec.output and not spec.tied else {"input"}
    for name in ("spectrum", "dimensions"):
        assert set(tables[name]["table"]) == sides
    assert not list((tmp_path / "report").rglob("*.tmp"))
    assert (tmp_path / "report" / "index.html").stat().st_size > 1_000_000
    assert digest(folder) == before


def test_every_option_of_a_study_is_one_of_the_report():
    arguments = build_app(STUDIES)["report"].assemble_argument_collection()
    names = {name for argument in arguments for name in argument.names}
    for study in STUDIES:
        options = {option for field, option in option_names(study.settings).items() if field != "trust_remote_code"}
        assert {f"--{study.name}.{option.removeprefix('--')}" for option in options} <= names
    assert {"--damage.plain", "--narrowing.untied"} <= names


def test_the_shared_real_model_works(shared_data, cli, digest, tmp_path):
    folder = shared_data / "models" / "stories260k"
    before = digest(folder)
    result = cli("report", folder, "-o", tmp_path)
    assert result.returncode == 0, result.stderr
    assert digest(folder) == before


def test_json_names_the_page_and_nothing_else_is_printed(checkpoint, cli, tmp_path):
    result = cli("report", checkpoint("llama"), "-o", tmp_path / "report", "--embedding.full-knn", "--json")
    assert result.returncode == 0, result.stderr
    assert Path(json.loads(result.stdout)["page"]) == tmp_path / "report" / "index.html"
    facts = models.read_json(tmp_path / "report" / "report.json")["studies"]["embedding"]["facts"]
    assert (facts["neighbors"], facts["n_queries"], facts["full_knn"]) == (10, 512, True)


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "tables").iterdir()}


def test_finished_tables_are_used_again_until_something_they_depend_on_changes(checkpoint, editable, cli, tmp_path):
    folder, out = editable(checkpoint("qwen2")), tmp_path / "report"
    command = ("report", folder, *LIGHT, "-o", out)
    assert cli(*command).returncode == 0
    first, tables = stamps(out), read_tables(out)
    assert cli(*command).returncode == 0
    assert stamps(out) == first
    (out / "tables" / "knn.json").unlink()  # a table without provenance is not finished
    (out / "tables" / "hubs.parquet").unlink()
    (out / "tables" / "probes.json").write_text("{")
    assert cli(*command).returncode == 0
    changed = {name for name, stamp in stamps(out).items() if stamp != first[name]}
    assert changed == {f"{name}.{ending}" for name in ("knn", "hubs", "probes") for ending in ("json", "parquet")}
    for name, table in read_tables(out).items():
        assert_frame_equal(table, tables[name])
    damage.set_rows(folder, range(20, 60), models.stock_tables(folder)["input"][5])
    assert cli(*command).returncode == 0
    assert read_tables(out)["duplicates"].height >= 41


def test_another_model_in_the_same_folder_takes_nothing_from_the_first(checkpoint, cli, tmp_path):
    for family, out in (("qwen2", "shared"), ("gpt2", "shared"), ("gpt2", "alone")):
        assert cli("report", checkpoint(family), *LIGHT, "-o", tmp_path / out).returncode == 0
    shared, alone = read_tables(tmp_path / "shared"), read_tables(tmp_path / "alone")
    for name in TABLES:
        assert_frame_equal(shared[name], alone[name])


def test_the_page_says_how_long_all_its_studies_took_also_where_a_command_only_reads_them(checkpoint, cli, tmp_path):
    light = ("--layers.shuffles", "0", "--layers.no-random-weights", "--windows", "1", "--length", "16", "-o", tmp_path)

    def report(*studies: str) -> dict[str, float]:
        ran = cli("report", checkpoint("llama"), "--studies", *studies, *LIGHT, *light)
        assert ran.returncode == 0, ran.stderr
        own = models.read_json(tmp_path / "report.json")["studies"]
        return {name: study["seconds"] for name, study in own.items()}

    def slower(**seconds: float) -> None:
        """Write into report.json that studies took these seconds."""
        whole = models.read_json(tmp_path / "report.json")
        for name, value in seconds.items():
            whole["studies"][name]["seconds"] = value
        (tmp_path / "report.json").write_text(json.dumps(whole), encoding="utf-8")

    assert report("embedding").keys() == {"embedding"}
    slower(embedding=1000.0)
    both = report("layers")
    assert both["embedding"] == 1000
    slower(layers=500.0)
    assert report("layers", "embedding") == {"embedding": 1000, "layers": 500}
    assert "Computed in 1500 seconds" in (tmp_path / "index.html").read_text(encoding="utf-8")
    (tmp_path / "tables" / "knn.json").unlink()
    again = report("embedding")
    assert again["embedding"] < 1000
    seconds = f"Computed in {again['embedding'] + 500:.0f} seconds"
    assert seconds in (tmp_path / "index.html").read_text(encoding="utf-8")


# ---- narrowing -----------------------------------------------------------------------------------------------------


def test_what_narrowing_would_cost_is_on_the_page_and_stays_when_another_study_joins(checkpoint, cli, digest, tmp_path):
    folder, out = checkpoint("llama", max_position_embeddings=128), tmp_path / "report"
    before = digest(folder)
    light = ("--narrowing.width", "24", "--narrowing.basis", "raw", "--windows", "2", "--length", "32")
    ran = cli("report", folder, "--studies", "narrowing", *light, "-o", out)
    assert ran.returncode == 0, ran.stderr
    assert "index.html" in ran.stdout
    anchors = re.compile(r'<section id="([^"]+)"')
    assert anchors.findall((out / "index.html").read_text()) == ["narrowing", "narrow", "provenance"]
    facts, alone = models.read_json(out / "report.json"), read_tables(out)
    assert alone.keys() == {"plan", "narrow_texts"}
    own = facts["studies"]["narrowing"]
    joined = cli("report", folder, "--studies", "embedding", *LIGHT, "-o", out)
    assert joined.returncode == 0, joined.stderr
    page = (out / "index.html").read_text()
    assert {"map", "spectrum"} < {*anchors.findall(page)}
    assert anchors.findall(page)[-3:] == ["narrowing", "narrow", "provenance"]
    assert own["facts"]["advice"][0] in page
    for row in alone["plan"].filter(pl.col("method") == "narrow").iter_rows(named=True):
        assert f"<bdi>width {row['width']}, {row['basis']}</bdi>" in page
        assert f"<bdi>{row['kl']:.4f}" in page
    assert "<bdi>Once upon a time</bdi>" in page  # the prompt of a model with a long enough context
    together = models.read_json(out / "report.json")
    assert together["studies"].keys() == {"narrowing", "embedding"}
    assert together["studies"]["narrowing"] == own
    assert own["tables"] == ["plan", "narrow_texts"]
    tables = read_tables(out)
    assert tables.keys() == TABLES | alone.keys()
    for name, table in alone.items():
        assert_frame_equal(tables[name], table)
    assert digest(folder) == before


def test_a_family_that_cannot_be_narrowed_is_refused(checkpoint, refuses):
    refuses(checkpoint("gpt2"), "gpt2", "not narrowed", command="report", options=("--studies", "narrowing"))


# ---- kill -9 and Ctrl-C --------------------------------------------------------------------------------------------


def test_kill_9_then_ctrl_c_then_the_same_command_to_its_end(checkpoint, cli, digest, tmp_path):
    folder, out = checkpoint("qwen2"), tmp_path / "killed"
    before = digest(folder)
    command = ("report", folder, *LIGHT, "-o")
    kept: dict[str, int] = {}
    for count, number in ((2, signal.SIGKILL), (4, signal.SIGINT)):
        ended = cli.interrupt(*command, out, after=out / "tables" / "*.json", count=count, by=number)
        assert ended.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
        finished = {path.stem for path in out.glob("tables/*.json")}
        assert len(finished) == count
        assert not (out / "report.json").exists()
        assert not (out / "index.html").exists()
        now = {name: stamp for name, stamp in stamps(out).items() if name.split(".")[0] in finished}
        assert now.items() >= kept.items()  # what was finished before is not written again
        kept = now
    assert ended.stdout == ""
    assert ended.stderr.splitlines()[-1].startswith("stopped; finished tables are kept")
    assert "Traceback" not in ended.stderr
    for target in (out, tmp_path / "whole"):
        ran = cli(*command, target)
        assert ran.returncode == 0, ran.stderr
    assert stamps(out).items() >= kept.items()
    resumed, whole = read_tables(out), read_tables(tmp_path / "whole")
    assert resumed.keys() == whole.keys() == TABLES
    for name in TABLES:
        assert_frame_equal(resumed[name], whole[name])
    assert digest(folder) == before
    reports = [models.read_json(target / "report.json") for target in (out, tmp_path / "whole")]
    for report in reports:
        report["studies"]["embedding"].pop("seconds")
    assert reports[0] == reports[1]
