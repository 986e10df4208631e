"""Where the files of a checkpoint are: the interface, and a folder on this machine. Knows nothing of tensors."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dimscope.errors import CorruptCheckpoint


@runtime_checkable
class Source(Protocol):
    """A set of files that can be listed, fetched whole (small ones) and read by byte range (weights)."""

    @property
    def name(self) -> str:
        """Return the name of the model, as the user wrote it."""
        ...

    @property
    def revision(self) -> str | None:
        """Return the commit, where there is one."""
        ...

    @property
    def files(self) -> frozenset[str]:
        """Return the names of the files."""
        ...

    def fetch(self, file: str) -> Path:
        """Return the local path of a file, downloaded whole if need be.

        Raises:
            CheckpointError: There is no such file, or it cannot be downloaded.
        """
        ...

    def folder(self, files: Iterable[str]) -> Path:
        """Return a folder that holds these files and all small ones (config, tokenizer, code), downloaded if need be."""
        ...

    def size(self, file: str) -> int:
        """Return the bytes of a file."""
        ...

    def read(self, file: str, begin: int, end: int) -> Tensor:
        """Return bytes `begin` to `end` as a uint8 tensor; fewer where the file ends."""
        ...

    def keep(self, file: str, begin: int, end: int) -> None:
        """Make a range cheap to read from now on."""
        ...


def read_range(path: Path, begin: int, end: int) -> Tensor:
    """Return bytes `begin` to `end` of a local file as a uint8 tensor; fewer where the file ends."""
    with path.open("rb", buffering=0) as f:
        end = min(end, os.fstat(f.fileno()).st_size)
        buffer = torch.empty(max(0, end - begin), dtype=torch.uint8)
        view, position = memoryview(buffer.numpy()), 0
        f.seek(begin)
        while position < len(view) and (count := f.readinto(view[position:])):
            position += count
    return buffer[:position]


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder on this machine."""

    path: Path
    name: str
    revision: str | None = None

    @property
    def files(self) -> frozenset[str]:
        """Return the names of the files."""
        return frozenset(p.name for p in self.path.iterdir() if p.is_file())

    def fetch(self, file: str) -> Path:
        """Return the path of a file.

        Raises:
            CorruptCheckpoint: There is no such file.
        """
        path = self.path / file
        if not path.is_file():
            raise CorruptCheckpoint(f"{self.name}: the file {file} is missing")
        return path

    def folder(self, files: Iterable[str]) -> Path:
        """Return the folder."""
        return self.path

    def size(self, file: str) -> int:
        """Return the bytes of a file."""
        return self.fetch(file).stat().st_size

    def read(self, file: str, begin: int, end: int) -> Tensor:
        """Return bytes `begin` to `end` as a uint8 tensor; fewer where the file ends."""
        return read_range(self.fetch(file), begin, end)

    def keep(self, file: str, begin: int, end: int) -> None:
        """Do nothing: the bytes are on this machine."""
