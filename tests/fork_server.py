"""Runs Python programs in processes forked from one that has paid the imports: one JSON job per connection of a socket.

`fork_server.py DESCRIPTOR` accepts connections of the listening socket with that number, and ends when its standard
input ends. A job has the arguments of `python` (a file, -c CODE, -m MODULE, or - for a program on standard input).
Each program is a process of its own with its own arguments, folder, variables, streams and exit code. What is read
from the environment when a package is imported (HF_ENDPOINT, HF_HOME) must be set for the server as a whole.

A job is answered by the exit code of its program; a job in the background by the process id. {"pid": ...} is answered
by "paused" or the exit code of a program in the background. "pause": [PATTERN, COUNT] stops a program as Ctrl-Z does, once
so many files match and it is about to give another file its name: a test that kills it then does so in the middle.
"""

import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from glob import glob
from typing import Any

import huggingface_hub  # noqa: F401
import safetensors.torch  # noqa: F401
import savings
import scipy.stats  # noqa: F401
import torch  # noqa: F401
import transformers.models.auto.tokenization_auto
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import dimscope.checkpoints.checkpoint
import dimscope.cli.app
import dimscope.report  # noqa: F401
from dimscope.checkpoints.model import Placement
from dimscope.page import render, theme
from dimscope.studies import STUDIES, estimate


def run_program(arguments: list[str]) -> None:
    """Run what `python ARGUMENTS` would run."""
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind in ("-c", "-"):
        code = rest.pop(0) if kind == "-c" else sys.stdin.read()
        sys.argv = [kind, *rest]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


def pause_at(pattern: str, count: int) -> None:
    """Stop this process, once, before it renames a file while so many others match the pattern."""
    paused = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and not paused and len(glob(pattern, recursive=True, include_hidden=True)) >= count:
            paused.append(arguments)
            os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(watch)


def run(job: dict[str, Any]) -> int:
    """Run one program in this process, with standard output and error in files, pipes or on a terminal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, number in ((job["stdout"], 1), (job["stderr"], 2)):
        os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(job["stdin"], os.O_RDONLY), 0)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    raw = (open(number, "wb", buffering=0, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.stdout, sys.stderr = (io.TextIOWrapper(stream, encoding, write_through=True) for stream in raw)  # unbuffered
    if job["pause"]:
        pause_at(*job["pause"])
    try:
        run_program(job["arguments"])
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def wait(pid: int) -> int | str:
    """Return the exit code of a program once it ends, or "paused" once it does."""
    _, status = os.waitpid(pid, os.WUNTRACED)
    return "paused" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)


def answer(job: dict[str, Any]) -> int | str:
    """Do a job and return the answer to it."""
    if "pid" in job:
        return wait(job["pid"])
    child = os.fork()
    if child == 0:
        os._exit(run(job))
    return child if job["background"] else wait(child)


savings.save_time()
for study in STUDIES:  # what every program would do anew
    study.load()
for measured in (estimate._operations_per_second, estimate._bytes_per_second):
    measured(Placement("float32", "cpu"))
get_checkpoint_conversion_mapping("llama")  # builds the mapping of all families, and keeps it
render._environment().get_template("page.html.jinja")
theme.figure(300).add_scatter(x=[0], y=[0]).add_bar(x=[0], y=[0]).add_heatmap(z=[[0]]).to_plotly_json()
gc.collect()
gc.freeze()  # a collection in a program would copy the pages of all that is here
listener = socket.socket(fileno=int(sys.argv[1]))
while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
    connection, _ = listener.accept()
    with connection, connection.makefile("rw", encoding="utf-8") as stream:
        print(answer(json.loads(stream.readline())), file=stream)
