"""Runs `dimscope` commands in processes forked from one that has paid the imports: one JSON job per line of stdin.

Each command is a process of its own with its own arguments, folder, variables, output files and exit code. What is read
from the environment when a package is imported (HF_ENDPOINT, HF_HOME) must be set for the server as a whole.
"""

import json
import os
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


def run(job: dict[str, Any]) -> int:
    """Run one command in this process, with standard output and error in files."""
    for target, number in ((job["stdout"], 1), (job["stderr"], 2)):
        os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    try:
        sys.argv = ["dimscope", *job["arguments"]]
        return main()
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = run(json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
