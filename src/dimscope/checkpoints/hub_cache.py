"""What is kept of the hub, so that what ran once runs again without a connection.

HF_HUB_CACHE/models--OWNER--NAME/       the cache of huggingface_hub: whole files only
    refs/REVISION                       the commit of a branch or tag
    snapshots/COMMIT/FILE               links to blobs/HASH
HF_HOME/dimscope/OWNER--NAME/           what huggingface_hub has no place for, and would take for whole files
    refs/REVISION                       the commit that a branch, tag or short commit was when the hub was last reached
    COMMIT/files.json                   the files of the repository with their sizes
    COMMIT/FILE.BEGIN-END               bytes BEGIN to END of a file: headers and embedding tables
    COMMIT/FILE.BEGIN-END.part, .lock   a download that is resumed, and the lock of the process that downloads
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from urllib.parse import quote

COMMIT = re.compile(r"[0-9a-f]{40}")
SHORT_COMMIT = re.compile(r"[0-9a-f]{4,39}")
HASHED = 1 << 24  # bytes read at once to hash a file


@dataclass(frozen=True, slots=True)
class RepositoryCache:
    """The two folders of one repository."""

    name: str

    @property
    def ranges(self) -> Path:
        """Return the folder of dimscope."""
        from huggingface_hub import constants

        return Path(constants.HF_HOME) / "dimscope" / self.name.replace("/", "--")

    @property
    def hub(self) -> Path:
        """Return the folder of huggingface_hub."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}"

    def snapshot(self, commit: str) -> Path:
        """Return the folder of the whole files of a commit."""
        return self.hub / "snapshots" / commit

    def whole(self, commit: str, file: str) -> Path | None:
        """Return the path of a file that is there whole."""
        path = self.snapshot(commit) / file
        return path if path.is_file() else None

    def range_path(self, commit: str, file: str, begin: int, end: int) -> Path:
        """Return the path where a range is kept."""
        return self.ranges / commit / f"{file}.{begin}-{end}"

    def kept_ranges(self, commit: str, file: str) -> list[tuple[Path, int, int]]:
        """Return the ranges of a file that are there, complete, with their first byte and the byte after their last."""
        beside = self.range_path(commit, file, 0, 0).parent
        pattern = re.compile(re.escape(Path(file).name) + r"\.(\d+)-(\d+)")
        ranges = []
        for path in beside.iterdir() if beside.is_dir() else ():
            if (match := pattern.fullmatch(path.name)) and path.stat().st_size == int(match[2]) - int(match[1]):
                ranges.append((path, int(match[1]), int(match[2])))
        return sorted(ranges, key=lambda kept: kept[1:])

    # ---- what the hub answered ----

    def remember(self, revision: str, commit: str, sizes: Mapping[str, int | None]) -> None:
        """Keep the commit of a revision and the files of the commit. A cache that cannot be written stays as it is."""
        with suppress(OSError):
            _write(self.ranges / "refs" / quote(revision, safe=""), commit)
            if self._listed(commit) != sizes:
                _write(self._list(commit), json.dumps(dict(sizes), indent=1))

    def reference(self, revision: str, commit: str) -> None:
        """Name a commit of the hub's cache by a branch or tag, as huggingface_hub does, for other programs."""
        path = self.hub / "refs" / revision
        if COMMIT.fullmatch(revision) or not _is_inside(revision) or not self.snapshot(commit).is_dir():
            return
        with suppress(OSError):
            _write(path, commit)

    def sizes(self, commit: str) -> dict[str, int | None]:
        """Return the files of a commit with their sizes: all that the hub lists, else those that are here whole."""
        if (listed := self._listed(commit)) is not None:
            return listed
        folder = self.snapshot(commit)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}

    def is_listed(self, commit: str) -> bool:
        """Whether the list of all files of a commit is here."""
        return self._listed(commit) is not None

    def _list(self, commit: str) -> Path:
        return self.ranges / commit / "files.json"

    def _listed(self, commit: str) -> dict[str, int | None] | None:
        try:
            listed = json.loads(self._list(commit).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return listed if isinstance(listed, dict) else None

    # ---- revisions ----

    def commit_of(self, revision: str) -> str | None:
        """Return the commit of a branch, tag or (short) commit as far as the cache knows it, else None."""
        references = [self.ranges / "refs" / quote(revision, safe="")]
        if _is_inside(revision):
            references.append(self.hub / "refs" / revision)
        commits = self._commits()
        for path in sorted(filter(Path.is_file, references), key=lambda p: p.stat().st_mtime_ns, reverse=True):
            if (commit := path.read_text(encoding="utf-8", errors="replace").strip()) in commits:
                return commit
        alike = [commit for commit in commits if commit.startswith(revision)]
        short = SHORT_COMMIT.fullmatch(revision) or COMMIT.fullmatch(revision)
        return alike[0] if short and len(alike) == 1 else None

    def _commits(self) -> set[str]:
        folders = [folder for folder in (self.hub / "snapshots", self.ranges) if folder.is_dir()]
        return {path.name for folder in folders for path in folder.iterdir() if COMMIT.fullmatch(path.name)}


def _write(path: Path, text: str) -> None:
    """Write a small file whole, whatever other processes write at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{token_hex(4)}")  # tempfile's are readable by their owner only
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _is_inside(path: str) -> bool:
    """Whether a relative path stays in its folder."""
    return not path.startswith(("/", "\\")) and not {"", ".", ".."} & set(re.split(r"[/\\]", path)) and "\0" not in path


def is_safe_name(file: str) -> bool:
    """Whether the name of a file can be a path in a cache."""
    return _is_inside(file) and ":" not in file


def is_damaged(path: Path) -> bool:
    """Whether a whole file in the hub's cache differs from the hash by which its blob is named; False where there is none."""
    if not path.is_symlink():
        return False
    named = Path(os.readlink(path)).name
    size = path.stat().st_size
    if re.fullmatch(r"[0-9a-f]{64}", named):
        return _hash(path, hashlib.sha256()) != named
    if COMMIT.fullmatch(named):  # git's hash of a blob; some mirrors name the plain SHA-1
        return named not in (_hash(path, hashlib.sha1(b"blob %d\0" % size)), _hash(path, hashlib.sha1()))
    return False


def _hash(path: Path, digest: "hashlib._Hash") -> str:
    with path.open("rb") as f:
        while block := f.read(HASHED):
            digest.update(block)
    return digest.hexdigest()
