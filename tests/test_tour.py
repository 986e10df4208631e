"""The whole line as a script, from a checkpoint to text of a narrow model."""

import os
import subprocess
from pathlib import Path

import pytest
from forks import write_shims

TOUR = Path(__file__).parent.parent / "examples" / "tour.sh"


@pytest.mark.slow
def test_the_tour_goes_from_a_checkpoint_to_text_of_a_narrow_model(fork_server, tmp_path):
    path = os.pathsep.join([str(write_shims(tmp_path / "bin", fork_server)), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", TOUR, "builtin", tmp_path / "out"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    headings = [line for line in result.stderr.splitlines() if line.startswith("== ")]
    assert len(headings) == 8
    assert "hold 95% of the variance" in result.stdout
    assert "hidden size 192, " in result.stdout
    assert result.stdout.splitlines()[-1].startswith("Once upon a time")
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").glob("*/*")}
    assert {"layers/index.html", "damage/index.html", "narrow/config.json", "narrow/tokenizer.json"} <= files
