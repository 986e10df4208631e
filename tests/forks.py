"""The client of fork_server.py: Python programs and `dimscope` commands in processes of their own, without imports."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = subprocess.CompletedProcess


class ForkServer:
    """A process that forks one process per program; see fork_server.py. `env` is set for all of them."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder, self.address, self.count = folder, folder / "socket", 0
        self.running: set[int] = set()
        with socket.socket(socket.AF_UNIX) as listener:  # jobs may come while the server imports
            listener.bind(str(self.address))
            listener.listen()
            command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("fork_server.py"))]
            self.process = subprocess.Popen(
                [*command, str(listener.fileno())],
                stdin=subprocess.PIPE,
                env=env,
                cwd=folder,
                pass_fds=[listener.fileno()],
            )

    def job(self, arguments: Iterable[object], **job: Any) -> dict[str, Any]:
        """Return the job of a program: its streams are files of this server unless `job` has paths of its own."""
        self.count += 1
        out, err = (str(self.folder / f"{self.count}.{name}") for name in ("out", "err"))
        streams = {"stdin": os.devnull, "stdout": out, "stderr": err}
        defaults = {**streams, "env": {}, "cwd": str(self.folder), "background": False, "pause": None}
        return {**defaults, **job, "arguments": [*map(str, arguments)]}

    def ask(self, job: Mapping[str, Any]) -> str:
        """Return the server's answer to a job."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.address))
            with connection.makefile("rw", encoding="utf-8") as stream:
                print(json.dumps(job), file=stream, flush=True)
                return stream.readline().strip()

    def stop(self) -> None:
        """End the server, and what a test that failed has left."""
        for pid in self.running:
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


@dataclass(frozen=True, slots=True)
class Forked:
    """A program of a fork server: `python` itself, or with a prefix a command such as `python -m dimscope`."""

    server: ForkServer
    prefix: tuple[str, ...] = ()

    def __call__(
        self, *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Result[str]:
        """Run the program with these arguments in a process of its own, output as text."""
        job = self.server.job((*self.prefix, *arguments), env=dict(env or {}), cwd=str(cwd or self.server.folder))
        return result_of(job, int(self.server.ask(job)))

    def interrupt(
        self, *arguments: object, after: Path, count: int, by: int, env: Mapping[str, str] | None = None
    ) -> Result[str]:
        """Run the program and send it the signal `by` in the middle: after `count` files match the pattern `after`."""
        program = self.start(*arguments, pause=[str(after), count], env=dict(env or {}))
        if (answer := self.server.ask({"pid": program.pid})) != "paused":
            self.server.running.discard(program.pid)
        assert answer == "paused", (answer, Path(program.job["stderr"]).read_text()[-600:])
        os.kill(program.pid, by)
        os.kill(program.pid, signal.SIGCONT)
        return program.end()

    def start(self, *arguments: object, **job: Any) -> Background:
        """Start the program and return at once; `job` may have stdin, stdout and stderr, as paths, and env."""
        whole = self.server.job((*self.prefix, *arguments), **job, background=True)
        pid = int(self.server.ask(whole))
        self.server.running.add(pid)
        return Background(self.server, whole, pid)


@dataclass(frozen=True, slots=True)
class Background:
    """A program that runs while the test goes on."""

    server: ForkServer
    job: Mapping[str, Any]
    pid: int

    def end(self) -> Result[str]:
        """Return the result of the program once it has ended."""
        self.server.running.discard(self.pid)
        return result_of(self.job, int(self.server.ask({"pid": self.pid})))


def result_of(job: Mapping[str, Any], code: int) -> Result[str]:
    """Return what a program printed into files; nothing of what it printed on a terminal."""
    streams = [Path(job[name]) for name in ("stdout", "stderr")]
    return Result(job["arguments"], code, *(s.read_text(encoding="utf-8") if s.is_file() else "" for s in streams))


SHIM = """#!{python} -ISE
import json, os, socket, sys
job = {{"arguments": [*{prefix!r}, *sys.argv[1:]], "env": {{}}, "cwd": os.getcwd(), "background": False, "pause": None}}
job |= {{name: f"/proc/{{os.getpid()}}/fd/{{n}}" for n, name in enumerate(("stdin", "stdout", "stderr"))}}
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    with connection.makefile("rw", encoding="utf-8") as stream:
        print(json.dumps(job), file=stream, flush=True)
        sys.exit(int(stream.readline()))
"""


def write_shims(folder: Path, server: ForkServer) -> Path:
    """Write the commands `python` and `dimscope` that run on the server, for a PATH, and return the folder.

    The server runs one at a time: two of them in one pipe would wait for each other.
    """
    folder.mkdir()
    for name, prefix in (("python", ()), ("dimscope", ("-m", "dimscope"))):
        shim = folder / name
        shim.write_text(SHIM.format(python=sys.executable, prefix=prefix, address=str(server.address)))
        shim.chmod(0o755)
    return folder
