"""Options that several commands share, and what they do with them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from dimscope.cli.terminal import Output, print_json, print_tables, write
from dimscope.storage import check_folder

if TYPE_CHECKING:
    from dimscope.checkpoints.checkpoint import Checkpoint
    from dimscope.vectors.table import VectorTable

STANDARD_INPUT = "\0-"  # how the command line hands "-" on; no shell can pass it


@Parameter(name="*", group=Group("Options of every command", sort_key=1))
@dataclass(frozen=True)
class Common:
    """Options of every command."""

    revision: str | None = None
    "Branch, tag or commit of a model on the hub."
    json: Annotated[bool, Parameter(negative=())] = False
    "Print JSON, and nothing else, on standard output."
    out: Annotated[Path | None, Parameter(alias="-o")] = None
    "Folder to write the tables to, as Parquet."
    limit: int = 40
    "Rows of each table to print."
    allow_pickle: Annotated[bool, Parameter(negative=())] = False
    "Read pickle weights. They can run code on this machine when loaded."
    trust_remote_code: Annotated[bool, Parameter(negative=())] = False
    "Run the Python code that comes with the model. It can do anything that you can."

    def open(self, model: str, revision: str | None = None) -> Checkpoint:
        """Open a model, at this revision or else at that of the command line."""
        from dimscope.checkpoints.hub_environment import check_import_variables

        check_import_variables()
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

        from dimscope.checkpoints.checkpoint import open_checkpoint

        if self.out is not None:
            check_folder(self.out)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        hub_logging.set_verbosity_error()
        checkpoint = open_checkpoint(
            model,
            revision=revision or self.revision,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )
        for note in checkpoint.notes:
            announce(note)
        return checkpoint

    def open_source(self, source: str) -> Checkpoint | VectorTable:
        """Open a model, or vectors from a .npy, .npz, .parquet or .safetensors file."""
        from dimscope.vectors.sources import is_vectors, vectors_of

        if not is_vectors(source):
            return self.open(source)
        if self.out is not None:
            check_folder(self.out)
        return vectors_of(source)

    @contextmanager
    def folder(self) -> Generator[Path]:
        """Yield the folder of the command line, or a temporary one."""
        if self.out is not None:
            yield self.out
            return
        with tempfile.TemporaryDirectory(prefix="dimscope-") as temporary:
            yield Path(temporary)

    def show(self, output: Output) -> None:
        """Print the result of a command, and write it to the folder if there is one."""
        if self.out is not None:
            write(output, self.out)
        self.print(output)

    def print(self, output: Output) -> None:
        """Print the result of a command, as JSON on request."""
        if self.json:
            print_json(output)
        else:
            print_tables(output, self.limit)


COMMON = Common()


def text_sources(sources: tuple[str, ...]) -> tuple[str, ...]:
    """Return the texts with standard input as "-"."""
    return tuple("-" if source == STANDARD_INPUT else source for source in sources)


def announce(line: str) -> None:
    """Print a line to stderr; standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def log_stage(line: str) -> None:
    """Print a finished stage to stderr where no progress bar shows it: in the log of a queue."""
    if not sys.stderr.isatty():
        announce(line)
