"""Fixtures for the command line: many commands at the price of one import, and what every refusal must look like."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

Result = subprocess.CompletedProcess
SOURCES = Path(__file__).resolve().parents[2] / "src"


class ForkedCli:
    """A server process that forks one process per command; see fork_server.py. `env` is set for all of them."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder, self.env, self.count, self.ready = folder, dict(env), 0, False
        self.running: set[int] = set()
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("fork_server.py"))]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.env, text=True, cwd=folder
        )

    def __call__(
        self, *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Result[str]:
        """Run `dimscope ARGUMENTS` in a process of its own, output as text."""
        job = self._job(arguments, env=dict(env or {}), cwd=str(cwd or self.folder))
        return result_of(job, int(self.ask(job)))

    def start(self, *arguments: object, **job: Any) -> Background:
        """Start a command and return at once; `job` may have stdin, stdout and stderr, as paths, and env."""
        whole = self._job(arguments, **job, background=True)
        pid = int(self.ask(whole))
        self.running.add(pid)
        return Background(self, whole, pid)

    def _job(self, arguments: Iterable[object], **job: Any) -> dict[str, Any]:
        self.count += 1
        out, err = (str(self.folder / f"{self.count}.{name}") for name in ("out", "err"))
        streams = {"stdin": os.devnull, "stdout": out, "stderr": err}
        defaults = {**streams, "env": {}, "cwd": str(self.folder), "background": False}
        return {**defaults, **job, "arguments": [*map(str, arguments)]}

    def ask(self, job: Mapping[str, Any]) -> str:
        """Return the server's answer to a job."""
        if not self.ready:  # it imports while the test makes its models
            assert self._line() == "ready"
            self.ready = True
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()

    def stop(self) -> None:
        for pid in self.running:  # of a test that failed
            os.kill(pid, signal.SIGKILL)
        self.server.send_signal(signal.SIGKILL)
        self.server.communicate()


class Background:
    """A command that runs while the test goes on."""

    def __init__(self, cli: ForkedCli, job: Mapping[str, Any], pid: int) -> None:
        self.cli, self.job, self.pid = cli, job, pid

    def reach(self, reached: Callable[[], object], seconds: float = 120) -> None:
        """Return as soon as `reached()` is true; the command must not end before."""
        deadline = time.monotonic() + seconds
        while not reached():
            if (answer := self.cli.ask({"pid": self.pid, "block": False})) != "running":
                self.cli.running.discard(self.pid)
            assert answer == "running", (answer, Path(self.job["stderr"]).read_text()[-600:])
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def end(self, number: int | None = None) -> Result[str]:
        """Send a signal, or none, and return the result of the command once it has ended."""
        if number is not None:
            os.kill(self.pid, number)
        self.cli.running.discard(self.pid)
        return result_of(self.job, int(self.cli.ask({"pid": self.pid, "block": True})))


def result_of(job: Mapping[str, Any], code: int) -> Result[str]:
    """Return what a command printed into files; nothing of what it printed on a terminal."""
    streams = [Path(job[name]) for name in ("stdout", "stderr")]
    return Result(job["arguments"], code, *(s.read_text(encoding="utf-8") if s.is_file() else "" for s in streams))


@contextmanager
def forked_cli(folder: Path, variables: Mapping[str, str]) -> Iterator[ForkedCli]:
    """A `ForkedCli` whose environment has no hub, proxy or token settings but the given ones."""
    foreign = re.compile(r"(HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS|DIMSCOPE)_|.*_proxy$", re.IGNORECASE)
    inherited = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    fixed = {
        "PYTHONPATH": str(SOURCES),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "NO_COLOR": "1",
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",  # tiny tables: a second thread would only wait
    }
    cli = ForkedCli(folder, {**inherited, **fixed, **variables})
    try:
        yield cli
    finally:
        cli.stop()


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory, closed_endpoint: str) -> Iterator[ForkedCli]:
    """Return `cli(*arguments, env=None, cwd=None)`: a command in a process of its own, the network cut."""
    folder = tmp_path_factory.mktemp("cli")
    with forked_cli(folder, {"HF_ENDPOINT": closed_endpoint, "HF_HOME": str(folder / "hf_home")}) as run:
        yield run


@pytest.fixture(scope="session")
def fork_cli() -> Callable[..., AbstractContextManager[ForkedCli]]:
    """Return `forked_cli`, for a test that needs a hub and a cache of its own."""
    return forked_cli


@pytest.fixture(scope="module")
def hub_cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, ForkedCli]]:
    """Return a hub and a command line that asks it; one cache for the module, so take a repository name per test."""
    folder = tmp_path_factory.mktemp("hub_cli")
    with ExitStack() as stack:
        hub = stack.enter_context(HubServer())
        yield hub, stack.enter_context(forked_cli(folder, hub.environment(folder / "hf_home")))


@pytest.fixture
def killed(cli: ForkedCli) -> Callable[..., None]:
    """Return `killed(arguments, reached)`: a command in the background, ended by kill -9 once `reached()` is true."""

    def kill(arguments: Iterable[object], reached: Callable[[], object]) -> None:
        command = cli.start(*arguments)
        command.reach(reached)
        assert command.end(signal.SIGKILL).returncode == -signal.SIGKILL

    return kill


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
def refuses(cli: ForkedCli, tmp_path: Path, digest: Callable[[Path], dict[str, str]]) -> Callable[..., str]:
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
