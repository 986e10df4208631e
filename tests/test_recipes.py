"""The recipes of CONTRIBUTING.md, followed: a study and a perturbation join by one word each."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest

import dimscope
from dimscope import studies
from dimscope.cli.app import main
from dimscope.interventions import maps
from dimscope.interventions.perturbations import PERTURBATIONS, Mark, perturbation
from dimscope.page.section import Section
from dimscope.studies.options import require_at_least
from dimscope.studies.study import RunOutput, Study, StudyCode, Summary


# ---- a study: settings, run, one section, a summary -----------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class ToySettings:
    """Options of the toy study."""

    letters: int = 3
    "Letters that count as short."

    def __post_init__(self) -> None:
        """Raise InvalidArgument for values out of range."""
        require_at_least(1, self, "letters")


def run(checkpoint, settings, store, monitor):
    def compute() -> pl.DataFrame:
        tokens = dimscope.read_vocabulary(checkpoint.source, dimscope.open_table(checkpoint).n_rows).tokens
        short = sum(len(token.label) <= settings.letters for token in tokens)
        return pl.DataFrame({"metric": ["short tokens"], "value": [float(short)]})

    return RunOutput({"toy": store.table("toy", {"letters": settings.letters}, compute)}, {"letters": settings.letters})


def short_section(tables, facts):
    title = f"{tables['toy']['value'][0]:,.0f} tokens are short"
    return Section("toy", "toy", title, (), f"{facts.of('toy')['letters']} letters or fewer.", "A toy.", ("toy",))


def summarise(tables, facts):
    return Summary(f"{tables['toy']['value'][0]:,.0f} short tokens.", tables)


TOY = Study("toy", "How many tokens are short?", ToySettings, lambda: StudyCode(run, (short_section,), summarise))
# ---- end of the study -----------------------------------------------------------------------------------------------


@pytest.fixture
def _with_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "STUDIES", (*studies.STUDIES, TOY))


@pytest.mark.usefixtures("_with_toy")
def test_a_study_joins_the_command_line_the_report_and_the_library(tmp_path: Path, capsys) -> None:
    count = dimscope.toy("builtin", letters=2).tables["toy"]["value"][0]
    assert 0 < count < dimscope.toy().tables["toy"]["value"][0]

    assert main(["toy", "builtin", "--letters", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["toy"] == [{"metric": "short tokens", "value": count}]
    assert main(["toy", "builtin", "--letters", "0"]) == 2
    assert capsys.readouterr().err == "error: --letters must be 1 or more, got 0\n"

    assert main(["report", "builtin", "--studies", "toy", "--toy.letters", "2", "-o", str(tmp_path)]) == 0
    assert f"{count:,.0f} tokens are short" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert pl.read_parquet(tmp_path / "tables" / "toy.parquet")["value"].to_list() == [count]
    assert main(["--help"]) == 0
    assert TOY.question in capsys.readouterr().out


# ---- a perturbation -------------------------------------------------------------------------------------------------


@pytest.fixture
def _with_flip() -> Iterator[None]:
    @perturbation("flipping", "factor", Mark("#000000"), expected=lambda table, factor: table.norm * abs(factor + 1))
    def flip(table, factor, seed):
        """Multiply every row by a negative number."""
        return maps.LinearMap(-factor * maps.identity(table.dim))

    yield
    del PERTURBATIONS["flip"]


@pytest.mark.usefixtures("_with_flip")
def test_a_perturbation_joins_the_study_of_damage_by_its_name(capsys) -> None:
    short = ["--windows", "1", "--length", "32", "--text", "builtin:prose", "--json"]
    assert main(["damage", "builtin", "--flip", "1,2", *short]) == 0
    table = pl.DataFrame(json.loads(capsys.readouterr().out)["damage"])
    assert {"flip 1", "flip 2"} <= set(table["change"])
    result = dimscope.damage("builtin", None, ["flip:1"], text="The sea is wide. " * 20, length=32, windows=1)
    assert "flip 1" in set(result.tables["damage"]["change"])
    assert "flip" in [trace.name for trace in result.figure("damage-error").data]
