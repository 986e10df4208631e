"""Help and version: complete, fast because nothing heavy is imported, with an example for every command."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import version

import pytest
from forks import write_shims

import dimscope

TABLE_COMMANDS = ("tokens", "neighbors", "pairs", "correlate", "spectrum", "report")
COMMANDS = ("inspect", *TABLE_COMMANDS, "embedding", "layers", "damage", "narrow", "download")
PROBE = """
import sys
from dimscope.cli.app import main
for command in sys.argv[1:]:
    try:
        code = main(command.split())
    except SystemExit as e:
        code = e.code
    assert code == 0, command
    print("=" * 10)
print(*[name for name in ("torch", "transformers", "plotly", "polars", "scipy") if name in sys.modules])
"""


def test_help_imports_nothing_heavy_and_lists_every_command(run_python):
    result = run_python("-c", PROBE, "--help")
    assert result.returncode == 0, result.stderr
    text, loaded = result.stdout.split("=" * 10)
    assert not {"torch", "transformers", "plotly", "scipy"} & set(loaded.split())
    for command in COMMANDS:
        assert command in text


def test_the_help_of_each_command_has_an_example_and_needs_no_torch(run_python):
    result = run_python("-c", PROBE, *(f"{command} --help" for command in COMMANDS))
    assert result.returncode == 0, result.stderr
    *texts, loaded = result.stdout.split("=" * 10)
    for command, text in zip(COMMANDS, texts, strict=True):
        assert "Example" in text
        assert f"dimscope {command} " in text
        assert not re.search(r"--empty-|default: (\(|False|None)", text), command  # as Python prints them
        for option in ("--json", "--out", "--revision", "--allow-pickle", "MODEL"):
            assert option in text, (command, option)
        tables = (*TABLE_COMMANDS, "embedding")
        for option, having in (("--skip-nonfinite", tables), ("--side", (*tables, "damage"))):
            assert (option in text) == (command in having), (command, option)
    assert not {"torch", "transformers", "plotly"} & set(loaded.split())


def test_version(run_cli):
    result = run_cli("--version")
    assert (result.returncode, result.stdout.strip()) == (0, version("dimscope"))
    assert version("dimscope") == dimscope.__version__


def test_the_helps_examples_are_commands_that_parse(run_python):
    program = """
import re, shlex, sys
from dimscope.cli.app import build_app
from dimscope.studies import STUDIES
app = build_app(STUDIES)
for command in sys.argv[1:]:
    examples = re.findall(r"Example: `dimscope (.*)`", app[command].default_command.__doc__)
    assert examples, command
    for example in examples:
        app.parse_args(shlex.split(example), exit_on_error=False, print_error=False)
print("all parse")
"""
    result = run_python("-c", program, *COMMANDS)
    assert result.stdout == "all parse\n", result.stderr[-400:]


@pytest.mark.slow
def test_a_reader_who_hangs_up_is_no_error(checkpoint, fork_server, tmp_path):
    dimscope = write_shims(tmp_path / "bin", fork_server) / "dimscope"
    pipe = f"{dimscope} tokens {checkpoint('qwen2')} --json | head -c 10; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", pipe], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout) == 10
