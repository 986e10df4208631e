"""The examples of docs/python.md give what they show: the public surface, used as a stranger would."""

import doctest
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # whole commands or studies

PAGE = Path(__file__).parent.parent / "docs" / "python.md"


def test_every_example_gives_what_it_shows(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)  # restored afterwards: the page changes the working folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = PAGE.read_text(encoding="utf-8").replace("```python", "").replace("```", "")
    test = doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0)
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=output.append)
    assert runner.failures == 0, "".join(output)


@pytest.mark.parametrize("verb", ["dimensions", "spectrum", "layers", "damage", "narrow", "neighbors", "evaluate"])
def test_the_page_shows_every_verb(verb):
    assert f"dimscope.{verb}(" in PAGE.read_text(encoding="utf-8")
