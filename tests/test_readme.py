"""The README is a promise: its example runs and its commands exist. test_docs.py checks its links."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # whole commands or studies

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_in_python_runs_and_prints_dimensions(forked_python):
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    done = forked_python("-c", code[1])
    assert done.returncode == 0, done.stderr
    assert "participation_ratio" in done.stdout


def test_every_command_of_the_table_exists(cli):
    named = set(re.findall(r"\| `dimscope (\w+)", README))
    listed = cli("--help").stdout
    assert named == {
        "inspect",
        "tokens",
        "neighbors",
        "pairs",
        "correlate",
        "spectrum",
        "embedding",
        "layers",
        "damage",
        "narrow",
        "report",
        "download",
    }
    assert all(name in listed for name in named)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("embeddings", "parameters are token embeddings"),
        ("hidden_layers", "after final norm"),
        ("damage", "same top prediction at"),
        ("narrowing", "transformers counts"),
    ],
)
def test_the_example_runs(forked_python, name, told):
    done = forked_python(ROOT / f"examples/{name}.py")
    assert done.returncode == 0, done.stderr
    assert told in done.stdout
