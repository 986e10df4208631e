"""The examples of docs/python.md give what they show: the public surface, used as a stranger would."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # whole commands or studies

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
PROGRAM = """
import doctest, sys
text = open(sys.argv[1], encoding="utf-8").read().replace("```python", "").replace("```", "")
test = doctest.DocTestParser().get_doctest(text, {}, sys.argv[1], sys.argv[1], 0)
print(doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test))
"""


def test_every_example_gives_what_it_shows(forked_python, tmp_path):
    ran = forked_python("-c", PROGRAM, PAGE, cwd=tmp_path)  # the network is cut
    counts = re.search(r"TestResults\(failed=(\d+), attempted=(\d+)\)$", ran.stdout.strip())
    assert counts is not None, ran.stderr[-600:]
    assert int(counts[1]) == 0, ran.stdout
    assert int(counts[2]) > 20


@pytest.mark.parametrize("verb", ["dimensions", "spectrum", "layers", "damage", "narrow", "neighbors", "evaluate"])
def test_the_page_shows_every_verb(verb):
    assert f"dimscope.{verb}(" in PAGE.read_text(encoding="utf-8")
