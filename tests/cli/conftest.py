"""What every refusal of the command line must look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import Forked, Result


def refusal(result: Result[str], *named: object) -> str:
    """Check that a command refused in one line that names what it is about, and return the line.

    Before it there may be lines about what was going to run, and about finished stages.
    """
    assert result.returncode == 2, f"exit code {result.returncode}: {(result.stderr or result.stdout)[-300:]}"
    lines = result.stderr.splitlines()
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], result.stderr[-600:]
    assert result.stdout == ""
    for word in named:
        assert str(word) in lines[-1]
    return lines[-1]


@pytest.fixture(scope="session")
def refused() -> Callable[..., str]:
    """Return `refused(result, *named)`: exit code 2, one line `error: ...` that holds every `named`, nothing else."""
    return refusal


@pytest.fixture
def refuses(cli: Forked, tmp_path: Path, digest: Callable[[Path], dict[str, str]]) -> Callable[..., str]:
    """Return `refuses(folder, *named, command=..., options=())`: a bad model is refused by a command with -o.

    Nothing appears where -o points, and no file of the model is changed.
    """

    def check(folder: Path, *named: object, command: str = "tokens", options: tuple[Any, ...] = ()) -> str:
        before, out = digest(folder), tmp_path / "refused-out"
        line = refusal(cli(command, folder, "-o", out, *options), *named)
        assert not out.exists()
        assert digest(folder) == before
        return line

    return check
