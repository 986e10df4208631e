"""Where the files of a checkpoint are: a folder, or a repository on the hub. Knows nothing of tensors."""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dimscope.errors import CheckpointNotFound, CorruptCheckpoint, NetworkError

CHUNK = 1 << 20


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

    def size(self, file: str) -> int:
        """Return the bytes of a file."""
        return self.fetch(file).stat().st_size

    def read(self, file: str, begin: int, end: int) -> Tensor:
        """Return bytes `begin` to `end` as a uint8 tensor; fewer where the file ends."""
        return read_range(self.fetch(file), begin, end)

    def keep(self, file: str, begin: int, end: int) -> None:
        """Do nothing: the bytes are on this machine."""


@contextmanager
def hub_errors(name: str, revision: str | None) -> Generator[None]:
    """Turn what huggingface_hub raises into one line.

    Raises:
        CheckpointNotFound: There is no such repository or revision, or no access to it.
        NetworkError: The hub cannot be reached, or broke off.
    """
    from huggingface_hub import errors

    # The bases are OSError and the HTTPError of the client that this huggingface_hub uses (httpx, later httpx2).
    bases = tuple(b for b in errors.HfHubHTTPError.__bases__ if issubclass(b, Exception))
    transport_errors: tuple[type[Exception], ...] = (*bases, errors.OfflineModeIsEnabled)

    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except errors.GatedRepoError as e:
        raise CheckpointNotFound(
            f"{name}: the model is gated; ask for access on its page, then set HF_TOKEN (or run `hf auth login`)"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise CheckpointNotFound(
            f"{name}: neither a folder here nor a model on the hub (a private one needs HF_TOKEN)"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise CheckpointNotFound(f"{name}: the hub has the model, but not{at}") from e
    except errors.HFValidationError as e:
        raise CheckpointNotFound(f"{name}: no such folder, and not a hub id either (those read owner/name)") from e
    except transport_errors as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise NetworkError(
            f"{name}: no such folder here, and the hub could not be reached or broke off ({reason}); "
            "check the connection, or give a local folder"
        ) from e


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A model repository on the hub at one commit. Weights travel by byte range, other files whole into the hub's cache."""

    name: str
    revision: str
    files: frozenset[str]

    def fetch(self, file: str) -> Path:
        """Return the path of a file in the hub's cache, downloaded if need be.

        Raises:
            CorruptCheckpoint: There is no such file.
            NetworkError: The hub cannot be reached.
        """
        from huggingface_hub import hf_hub_download

        if file not in self.files:
            raise CorruptCheckpoint(f"{self.name}: the file {file} is missing from the repository")
        with hub_errors(self.name, self.revision):
            return Path(hf_hub_download(self.name, file, revision=self.revision))

    def size(self, file: str) -> int:
        """Return the bytes of a file, without downloading it.

        Raises:
            NetworkError: The hub cannot be reached, or gives no size.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        if path := self._in_hub_cache(file):
            return path.stat().st_size
        with hub_errors(self.name, self.revision):
            size = get_hf_file_metadata(hf_hub_url(self.name, file, revision=self.revision)).size
        if size is None:
            raise NetworkError(f"{self.name}: the hub gives no size for {file}")
        return size

    def read(self, file: str, begin: int, end: int) -> Tensor:
        """Return bytes `begin` to `end` as a uint8 tensor, from this machine where they are there already."""
        if path := self._in_hub_cache(file):
            return read_range(path, begin, end)
        for path, first, last in self._kept(file):
            if first <= begin and end <= last:
                return read_range(path, begin - first, end - first)
        chunks = [torch.frombuffer(bytearray(c), dtype=torch.uint8) for c in self._stream(file, begin, end)]
        return torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.uint8)

    def keep(self, file: str, begin: int, end: int) -> None:
        """Download the range once into the cache; a broken download is resumed.

        Raises:
            NetworkError: The hub cannot be reached, or broke off.
        """
        from tqdm import tqdm

        path = self._range_folder() / f"{file}.{begin}-{end}"
        if self._in_hub_cache(file) or path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with (
            part.open("ab") as f,
            tqdm(
                total=end - begin,
                initial=f.tell(),
                unit="B",
                unit_scale=True,
                desc=f"{file} (its embedding rows only)",
                disable=None,
            ) as bar,
        ):
            for chunk in self._stream(file, begin + f.tell(), end):
                f.write(chunk)
                bar.update(len(chunk))
            f.flush()
            os.fsync(f.fileno())
        if part.stat().st_size != end - begin:
            raise NetworkError(
                f"{self.name}: the download of {file} broke off; run the same command again to resume it"
            )
        part.replace(path)

    def _range_folder(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HOME) / "dimscope" / self.name.replace("/", "--") / self.revision

    def _kept(self, file: str) -> Iterator[tuple[Path, int, int]]:
        for path in self._range_folder().glob(f"{file}.*-*"):
            span = path.name.removeprefix(f"{file}.")
            if not span.endswith(".part"):
                first, last = span.split("-")
                yield path, int(first), int(last)

    def _in_hub_cache(self, file: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.name, file, revision=self.revision)
        return Path(path) if isinstance(path, str) else None

    def _stream(self, file: str, begin: int, end: int) -> Iterator[bytes]:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        if begin >= end:
            return
        headers = build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}"}
        url = hf_hub_url(self.name, file, revision=self.revision)
        with (
            hub_errors(self.name, self.revision),
            get_session().stream("GET", url, headers=headers, follow_redirects=True) as r,
        ):
            hf_raise_for_status(r)
            if r.status_code != 206:
                raise NetworkError(
                    f"{self.name}: the server does not answer byte ranges; download the model and give its folder"
                )
            yield from r.iter_bytes(CHUNK)


def find_on_hub(name: str, revision: str | None) -> Source:
    """Return the repository `name` at a revision, or its copy in the hub's cache where the hub cannot be reached.

    Raises:
        CheckpointNotFound: There is no such repository or revision, or no access to it.
        NetworkError: The hub cannot be reached, and there is no copy.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        with hub_errors(name, revision):
            info = HfApi().model_info(name, revision=revision)
    except NetworkError:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise
        folder = Path(cached).parent
        return LocalFolder(folder, name, folder.name)
    files = frozenset(s.rfilename for s in info.siblings or [])
    return HubRepository(name, info.sha or revision or "main", files)
