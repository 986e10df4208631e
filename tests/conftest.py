"""Fixtures: real checkpoints built once per run, a hub on a local port, and the command line as a subprocess.

No test reaches the network: subprocesses get an HF_ENDPOINT where nobody listens, unless the test has a `hub`.
Starting Python with torch and transformers takes seconds, so programs are forked from a process that has imported them;
`run_python` is for those that must be started anew.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import forks
import pytest
import savings
from filelock import FileLock
from hub_server import HubServer
from models import build_checkpoint

ROOT = Path(__file__).resolve().parent.parent
DROPPED = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "DIMSCOPE_")
PROXIES = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}

LONGEST = {
    "test_cli_layers",
    "test_layers_run",
    "test_cli_report",
    "test_browser",
    "test_cli_hub_offline",
}  # half a minute or more

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first, and files without slow tests last: no worker waits for the other at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.stem not in LONGEST, item.path not in slow))


@pytest.fixture(scope="session", autouse=True)
def save_time() -> None:
    """Leave out waits for the disk, and what every study or page would compute again; see savings.py."""
    savings.save_time()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `checkpoint(family, **arguments)`: build_checkpoint, each once per run. Read only: see `editable`.

    The workers of pytest-xdist share the checkpoints. Who comes first builds one under a lock and renames it when it is
    complete, so that a worker that is killed leaves no half of one.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "checkpoints"
    root.mkdir(exist_ok=True)

    def build(family: str, **arguments: Any) -> Path:
        key = hashlib.sha256(repr(sorted(arguments.items())).encode()).hexdigest()[:12]
        folder = root / f"{family}-{key}"
        if not folder.is_dir():
            with FileLock(root / f"{folder.name}.lock"):
                if not folder.is_dir():
                    draft = root / f"{folder.name}.draft"
                    shutil.rmtree(draft, ignore_errors=True)
                    build_checkpoint(draft, family, **arguments).rename(folder)
        return folder

    return build


@pytest.fixture
def editable(tmp_path: Path) -> Callable[..., Path]:
    """Return `editable(folder, name=None)`: a copy of a folder that the test may spoil."""

    def copy(folder: Path, name: str | None = None) -> Path:
        return shutil.copytree(folder, tmp_path / (name or folder.name))

    return copy


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of test data that is never committed, or skip."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the test data is not beside the repository (looked for {os.path.relpath(folder, ROOT)})")
    return folder


@pytest.fixture(scope="session")
def hub_port() -> Iterator[int]:
    """Return a port of 127.0.0.1 that refuses every connection unless `hub` listens: it is bound for the session."""
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a hub may bind it as well
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture(scope="session")
def hub_endpoint(hub_port: int) -> str:
    """Return the address of the hub for every process that the tests start: nobody listens unless a test has `hub`."""
    return f"http://127.0.0.1:{hub_port}"


@pytest.fixture
def hub(hub_port: int, hub_home: Path) -> Iterator[HubServer]:
    """Return a running hub without repositories, which `cli` and `forked_python` ask; their cache starts empty."""
    shutil.rmtree(hub_home, ignore_errors=True)
    with HubServer(hub_port) as server:
        yield server


def clean_variables(endpoint: str, home: Path) -> dict[str, str]:
    """Return this process's variables without its hub, proxy and token settings, with this hub and its cache."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(DROPPED) and name.lower() not in PROXIES
    }
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "NO_COLOR": "1",
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",  # tiny tables: a second thread would only wait
    }


@pytest.fixture(scope="session")
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the HF_HOME of `cli` and `forked_python`."""
    return tmp_path_factory.mktemp("hub") / "home"


@pytest.fixture(scope="session")
def fork_server(
    tmp_path_factory: pytest.TempPathFactory, hub_endpoint: str, hub_home: Path
) -> Iterator[forks.ForkServer]:
    """Return the server of this worker that runs Python programs without their imports; see fork_server.py."""
    server = forks.ForkServer(tmp_path_factory.mktemp("forks"), clean_variables(hub_endpoint, hub_home))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def forked_python(fork_server: forks.ForkServer) -> forks.Forked:
    """Return `forked_python(*arguments, env=None, cwd=None)`: as `run_python`, but packages are imported already."""
    return forks.Forked(fork_server)


@pytest.fixture(scope="session")
def cli(fork_server: forks.ForkServer) -> forks.Forked:
    """Return `cli(*arguments, env=None, cwd=None)`: a command in a process of its own, at the price of no import."""
    return forks.Forked(fork_server, ("-m", "dimscope"))


@pytest.fixture
def clean_environment(tmp_path: Path, hub_endpoint: str) -> dict[str, str]:
    """Return this process's variables without its hub, proxy and token settings, the cache in tmp, the network cut."""
    return clean_variables(hub_endpoint, tmp_path / "hf_home")


@pytest.fixture
def run_python(clean_environment: dict[str, str], tmp_path: Path) -> Run:
    """Return `run_python(*arguments, env=None, timeout=300)`: this interpreter in a subprocess, output as text.

    `env` is added to `clean_environment`. The working folder is tmp_path.
    """

    def run(
        *arguments: object, env: Mapping[str, str] | None = None, timeout: float = 300, cwd: Path = tmp_path
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**clean_environment, **(env or {})},
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )

    return run


@pytest.fixture
def run_cli(run_python: Run) -> Run:
    """Return `run_cli(*arguments, env=None, timeout=300)`: `python -m dimscope` in a subprocess."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return run_python("-m", "dimscope", *arguments, **options)

    return run


@pytest.fixture(scope="session")
def digest() -> Callable[[Path], dict[str, str]]:
    """Return `digest(folder)`: the sha256 of every file in it by name, to prove that nothing was changed."""

    def of(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    return of
