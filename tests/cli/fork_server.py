"""Runs `dimscope` commands in processes forked from one that has paid the imports: one JSON job per line of stdin.

Each command is a process of its own with its own arguments, folder, variables, streams and exit code. What is read
from the environment when a package is imported (HF_ENDPOINT, HF_HOME) must be set for the server as a whole.

A job is answered by the exit code of its command; a job in the background by the process id. {"pid": ..., "block": ...}
is answered by the exit code of a command in the background, or by "running".
"""

import json
import os
import signal
import sys
import traceback
from typing import Any

import huggingface_hub  # noqa: F401
import safetensors.torch  # noqa: F401
import torch  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import dimscope.checkpoints.checkpoint
import dimscope.cli
import dimscope.report  # noqa: F401
from dimscope.cli.app import main
from dimscope.studies import STUDIES


def run(job: dict[str, Any]) -> int:
    """Run one command in this process, with standard output and error in files or on a terminal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, number in ((job["stdout"], 1), (job["stderr"], 2)):
        os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(job["stdin"], os.O_RDONLY), 0)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdout, sys.stderr = (open(n, "w", encoding=encoding, closefd=False) for n in (1, 2))  # noqa: SIM115
    try:
        sys.argv = ["dimscope", *job["arguments"]]
        return main()
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def exit_code(pid: int, *, block: bool) -> int | str:
    """Return the exit code of a command, or "running"."""
    ended, status = os.waitpid(pid, 0 if block else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else "running"


for study in STUDIES:
    study.load()
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if "pid" in job:
        print(exit_code(job["pid"], block=job["block"]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        code = run(job)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child if job["background"] else exit_code(child, block=True), flush=True)
