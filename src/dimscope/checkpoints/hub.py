"""A model repository on the hub at one commit, or what the cache has of it where the hub cannot be reached."""

import os
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dimscope.checkpoints.hub_cache import COMMIT, RepositoryCache, is_damaged, is_safe_name
from dimscope.checkpoints.hub_client import hub_errors, stream_range
from dimscope.checkpoints.hub_environment import check_connection_variables
from dimscope.checkpoints.sources import Source, read_range
from dimscope.errors import CheckpointNotFound, CorruptCheckpoint, NetworkError, NonFiniteRows
from dimscope.storage import writing

SMALL_FILES = re.compile(r".*\.(json|txt|model|py|jinja|tiktoken)", re.DOTALL)
"""Config, tokenizer and code, which a model needs beside its weights."""

LONGEST_LIST = 3  # paths in one line

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A model repository at one commit. Weights travel by byte range, other files whole into the hub's cache.

    Attributes:
        name: The hub id.
        revision: The commit.
        sizes: The files, each with its bytes where the hub names them.
        reference: The branch, tag or commit that was requested.
        unreachable: Why the hub is not asked; empty where it can be.
    """

    name: str
    revision: str
    sizes: Mapping[str, int | None] = field(repr=False)
    reference: str = "main"
    unreachable: str = ""

    @property
    def files(self) -> frozenset[str]:
        """Return the names of the files."""
        return frozenset(self.sizes)

    @property
    def cache(self) -> RepositoryCache:
        """Return where its files are kept."""
        return RepositoryCache(self.name)

    @property
    def small_files(self) -> list[str]:
        """Return the files that a model needs beside its weights."""
        return sorted(file for file in self.sizes if SMALL_FILES.fullmatch(file))

    def fetch(self, file: str) -> Path:
        """Return the path of a file in the hub's cache, downloaded if need be.

        Raises:
            CorruptCheckpoint: There is no such file.
            NetworkError: The hub cannot be reached, or the file arrives damaged.
        """
        from huggingface_hub import hf_hub_download

        if file not in self.sizes:
            raise CorruptCheckpoint(f"{self.name}: the file {file} is missing from the repository")
        if path := self.cache.whole(self.revision, file):
            return path
        self._require_hub(file)
        with hub_errors(self.name, self.revision):
            path = Path(hf_hub_download(self.name, file, revision=self.revision))
        if is_damaged(path):
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise NetworkError(f"{self.name}: {file} arrived damaged and was deleted; run the same command again")
        return path

    def folder(self, files: Iterable[str]) -> Path:
        """Return the folder of the snapshot with these files and all small ones that can be had, downloaded if need be."""
        for file in (*sorted(files), *self.at_hand(self.small_files)):
            self.fetch(file)
        self.cache.reference(self.reference, self.revision)
        return self.cache.snapshot(self.revision)

    def at_hand(self, files: Iterable[str]) -> list[str]:
        """Return those files that can be fetched: all of them, or without the hub those in the cache."""
        return [file for file in files if not self.unreachable or self.cache.whole(self.revision, file)]

    def size(self, file: str) -> int:
        """Return the bytes of a file, without downloading it.

        Raises:
            NetworkError: The hub cannot be reached, or gives no size.
        """
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

        if path := self.cache.whole(self.revision, file):
            return path.stat().st_size
        if (size := self.sizes.get(file)) is not None:
            return size
        self._require_hub(file)
        with hub_errors(self.name, self.revision):
            url = hf_hub_url(self.name, file, revision=self.revision)
            size = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT).size
        if size is None:
            raise NetworkError(f"{self.name}: the hub gives no size for {file}")
        self.cache.remember(self.reference, self.revision, {**self.cache.sizes(self.revision), file: size})
        return size

    def read(self, file: str, begin: int, end: int) -> Tensor:
        """Return bytes `begin` to `end` as a uint8 tensor, fewer where the file ends; what is downloaded is kept."""
        end = min(end, self.size(file))
        if begin >= end:
            return torch.empty(0, dtype=torch.uint8)
        if path := self.cache.whole(self.revision, file):
            return read_range(path, begin, end)
        path, first = self._kept(file, begin, end) or self._download(file, begin, end, shown=False)
        return read_range(path, begin - first, end - first)

    def keep(self, file: str, begin: int, end: int) -> None:
        """Download the range once into the cache; a broken download is resumed.

        Raises:
            NetworkError: The hub cannot be reached, or broke off.
            InvalidArgument: The cache cannot be written.
        """
        if begin < end and not self.cache.whole(self.revision, file) and not self._kept(file, begin, end):
            self._download(file, begin, end, shown=True)

    def _kept(self, file: str, begin: int, end: int) -> tuple[Path, int] | None:
        """Return a range in the cache that holds this one, with its first byte."""
        kept = self.cache.kept_ranges(self.revision, file)
        return next(((path, first) for path, first, last in kept if first <= begin and end <= last), None)

    def _download(self, file: str, begin: int, end: int, *, shown: bool) -> tuple[Path, int]:
        """Download a range into the cache, one process at a time, and return its path and first byte."""
        from filelock import FileLock

        self._require_hub(f"a part of {file}")
        path = self.cache.range_path(self.revision, file, begin, end)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(path.name + ".lock")):
                if kept := self._kept(file, begin, end):  # another process was faster
                    return kept
                self._resume(file, begin, end, path, shown=shown)
        return path, begin

    def _resume(self, file: str, begin: int, end: int, path: Path, *, shown: bool) -> None:
        from tqdm import tqdm

        part = path.with_name(path.name + ".part")
        with part.open("ab") as f:
            if f.tell() > end - begin:
                f.truncate(0)
            done = f.seek(0, os.SEEK_END)
            what = f"{file} (its embedding rows only)"
            disable = None if shown else True
            with tqdm(total=end - begin, initial=done, unit="B", unit_scale=True, desc=what, disable=disable) as bar:
                if done < end - begin:
                    for chunk in stream_range(self.name, self.revision, file, begin + done, end):
                        f.write(chunk)
                        bar.update(len(chunk))
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)

    def _require_hub(self, what: str) -> None:
        """Raise NetworkError where the hub is not asked."""
        if self.unreachable:
            raise NetworkError(
                f"{self.name}: {what} at commit {self.revision[:12]} is not in the cache, and {self.unreachable}; "
                f"run `{self._download_command}` once online"
            )

    @property
    def _download_command(self) -> str:
        return download_command(self.name, self.reference)


def download_command(name: str, revision: str) -> str:
    """Return the command that downloads a model for use without a connection."""
    return f"dimscope download {name}" + ("" if revision == "main" else f" --revision {revision}")


def find_on_hub(name: str, revision: str | None) -> HubRepository:
    """Return the repository `name` at a revision; where the hub cannot be reached, as the cache has it.

    Raises:
        CheckpointNotFound: There is no such repository or revision, or no access to it.
        NetworkError: The hub cannot be reached, and the cache does not have it.
        InvalidArgument: An environment variable for the connection cannot be used.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        variable = next((name for name in OFFLINE if os.environ.get(name)), OFFLINE[0])
        return _find_in_cache(name, revision or "main", f"{variable} is set")
    check_connection_variables()
    try:
        with hub_errors(name, revision):
            # HF_HUB_ETAG_TIMEOUT is the time after which huggingface_hub itself turns to the cache.
            info = HfApi().model_info(
                name, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
    except NetworkError as e:
        reason = str(e).removeprefix(f"{name}: ").rpartition(";")[0] or "the hub could not be reached"
        return _find_in_cache(name, revision or "main", reason)
    return _repository(name, revision or "main", info)


def _repository(name: str, revision: str, info: Any) -> HubRepository:
    """Return the repository that an answer of the hub describes, and keep the answer."""
    commit = str(info.sha or "")
    if not COMMIT.fullmatch(commit):
        raise NetworkError(
            f"{name}: the server does not answer as a hub does (commit {commit[:60]!r}); check HF_ENDPOINT"
        )
    listed = {s.rfilename: s.size for s in info.siblings or []}
    if unsafe := next((file for file in listed if not is_safe_name(file)), None):
        raise CorruptCheckpoint(f"{name}: the repository lists {unsafe!r}, which is not a name of a file in it")
    cache = RepositoryCache(name)
    cached = cache.sizes(commit)  # some mirrors list no sizes
    sizes = {file: cached.get(file) if size is None else size for file, size in listed.items()}
    cache.remember(revision, commit, sizes)
    return HubRepository(name, commit, sizes, revision)


def _find_in_cache(name: str, revision: str, unreachable: str) -> HubRepository:
    cache = RepositoryCache(name)
    commit = cache.commit_of(revision)
    at = "" if revision == "main" else f" at revision {revision!r}"
    if commit is None:
        raise NetworkError(
            f"{name}: no such folder here, the model{at} is not in the cache of the hub ({cache.hub.parent}), and "
            f"{unreachable}; check the connection or give a local folder, or run `{download_command(name, revision)}` once online"
        )
    repository = HubRepository(name, commit, cache.sizes(commit), revision, unreachable)
    if not cache.is_listed(commit) and not any(f == "config.json" or f.endswith(".gguf") for f in repository.files):
        repository._require_hub("config.json")
    return repository


@contextmanager
def cache_errors(source: Source, file: str = "") -> Generator[None]:
    """Add to the errors about a repository, or one file of it, which cached file to delete, or that the cache is incomplete.

    Raises:
        CheckpointError: The error with the advice.
        NonFiniteRows: Likewise.
    """
    try:
        yield
    except (CheckpointNotFound, CorruptCheckpoint, NonFiniteRows) as e:
        advice = cache_advice(source, f"{e} {file}", headers=not isinstance(e, NonFiniteRows))
        if advice:
            raise type(e)(f"{e}{advice}") from e
        raise


def damaged_file(source: Source, files: Iterable[str]) -> Path | None:
    """Return the first of these files whose copy in the hub's cache differs from the hash that the hub names."""
    if not isinstance(source, HubRepository):
        return None
    whole = (path for file in files if (path := source.cache.whole(source.revision, file)))
    return next((path.resolve() for path in whole if is_damaged(path)), None)


def cache_advice(source: Source, message: str = "", *, headers: bool = True) -> str:
    """Return which cached file is, or may be, at fault for an error; empty where none can be.

    Whole files are compared with the hash that the hub names. Ranges have none: those of headers, or all others, are
    named where the message names their file, or no file.
    """
    if not isinstance(source, HubRepository):
        return ""
    cache, commit = source.cache, source.revision
    named = [file for file in source.sizes if file in message] or sorted(source.sizes)
    if damaged := damaged_file(source, named):
        return f"; the cached file {damaged} is damaged: delete it and run the same command again"
    read = [file for file in named if not cache.whole(commit, file)]
    kept = [(path, begin) for file in read for path, begin, _ in cache.kept_ranges(commit, file)]
    if ranges := [path for path, begin in kept if not headers or begin == 0]:
        at = " and ".join(map(str, ranges)) if len(ranges) <= LONGEST_LIST else f"the byte ranges in {ranges[0].parent}"
        return f"; if the download was damaged, delete {at} and run the same command again"
    if source.unreachable and not cache.is_listed(commit):
        command = download_command(source.name, source.reference)
        return f"; the cache may hold a part of the model only, and {source.unreachable}: run `{command}` once online"
    return ""
