"""A real HTTP server on 127.0.0.1 that speaks the routes of the Hugging Face hub which its client asks for.

It serves folders as model repositories, answers as the hub does (redirects large files to a second origin, names
errors in X-Error-Code, hides what a token may not see) and keeps a record of every request with the bytes it sent.
Point a subprocess at its `url` with HF_ENDPOINT. Not spoken: Xet, gzip, paging, anything that writes.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(
    r"/api/models/(?P<repo>[^/]+(?:/[^/]+)??)(?:/(?P<verb>revision|tree|refs|paths-info|commits)(?:/(?P<rest>.*))?)?"
)
RESOLVE = re.compile(r"/(?P<repo>[^/]+(?:/[^/]+)??)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
CDN = re.compile(r"/cdn/(?P<commit>[0-9a-f]{40})/(?P<name>.+)")
LARGE = (".safetensors", ".bin", ".gguf", ".model")
"""Names that the hub keeps in large-file storage and answers by a redirect; other files from 10 MB on as well."""

HOUSEKEEPING = "/api/agent-harnesses"
"""A list for its user-agent string that the client fetches once per HF_HOME: answered empty, in no count."""

DATE = "2024-01-01T00:00:00.000Z"
CHUNK = 1 << 18
HASHED_UP_TO = 1 << 26


@dataclass(frozen=True, slots=True)
class Blob:
    """One file of a commit as the hub describes it."""

    path: Path
    size: int
    large: bool
    oid: str

    def lfs(self) -> dict[str, Any]:
        """Return the fields that the API gives for a large file, nothing for a small one."""
        return (
            {"lfs": {"oid": self.oid, "sha256": self.oid, "size": self.size, "pointerSize": 135}} if self.large else {}
        )


def describe(path: Path) -> Blob:
    """Describe a file: sha256 for a large one, git's blob id for a small one.

    Beyond 64 MB the name, size and time stand for the content, so that sparse giants need not be read.
    """
    size = path.stat().st_size
    large = path.suffix in LARGE or size >= 10_000_000
    if size > HASHED_UP_TO:
        return Blob(path, size, large, hashlib.sha256(f"{path} {size} {path.stat().st_mtime_ns}".encode()).hexdigest())
    content = path.read_bytes()
    if large:
        return Blob(path, size, large, hashlib.sha256(content).hexdigest())
    return Blob(path, size, large, hashlib.sha1(b"blob %d\0" % size + content).hexdigest())


@dataclass(frozen=True)
class Commit:
    """A folder, frozen when it was first asked for: its files by name and the sha that follows from them."""

    folder: Path

    @cached_property
    def blobs(self) -> dict[str, Blob]:
        """Describe every file below the folder by its name on the hub."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): describe(path) for path in paths}

    @cached_property
    def sha(self) -> str:
        """Return 40 hex digits that name this content."""
        listing = [(name, blob.oid) for name, blob in self.blobs.items()]
        return hashlib.sha1(json.dumps([self.folder.name, listing]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository: its commits by branch or tag, and the tokens that may read it (None: everybody)."""

    name: str
    revisions: dict[str, Commit]
    gated: bool = False
    private: bool = False
    readers: frozenset[str] | None = None

    def find(self, revision: str) -> Commit | None:
        """Return the commit of a branch, a tag or a (shortened) sha."""
        if revision in self.revisions:
            return self.revisions[revision]
        is_sha = re.fullmatch(r"[0-9a-f]{7,40}", revision)
        return next((c for c in self.revisions.values() if is_sha and c.sha.startswith(revision)), None)


@dataclass(slots=True)
class Request:
    """What was asked and what was answered; `bytes_sent` counts body bytes and grows while they go out."""

    method: str
    path: str
    query: str
    range: str | None
    authorization: str | None
    origin: str
    status: int = 0
    bytes_sent: int = 0


@dataclass
class HubServer:
    """The server, its repositories and its record; use it as a context manager or through `start` and `stop`."""

    port: int = 0
    repositories: dict[str, Repository] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)
    broken_status: int | None = None
    abort_after: int | None = None
    aborts_left: int = 0
    range_shift: int = 0  # bytes by which the ranges begin too late, as Content-Range says too
    range_excess: int = 0  # bytes after the last that was requested
    promised: int = 0  # bytes that Content-Length names and that are never sent
    delay: float = 0  # seconds before every answer
    spoilt: tuple[str, int, bytes] | None = None  # name of a file, and wrong bytes that arrive from some byte of it on

    def __enter__(self) -> HubServer:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> HubServer:
        """Listen on two ports of 127.0.0.1: the hub, and the storage to which it redirects; 0 is any free port."""
        self._servers = [_Server(self, origin, port) for origin, port in (("hub", self.port), ("cdn", 0))]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Close both ports: from now on connections are refused."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        """Return the address for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage_url(self) -> str:
        """Return the address to which large files are redirected: another origin, which must not see a token."""
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def add(
        self,
        name: str,
        folder: Path,
        *,
        revision: str = "main",
        gated: bool = False,
        private: bool = False,
        token: str | None = None,
    ) -> Commit:
        """Serve `folder` as a revision of the repository `name`; gated or private ones are read with `token` only."""
        if (gated or private) and token is None:
            raise ValueError("a gated or private repository needs the token that may read it")
        known = self.repositories[name].revisions if name in self.repositories else {}
        readers = frozenset({token}) if token else None
        commit = Commit(folder)
        self.repositories[name] = Repository(name, {**known, revision: commit}, gated, private, readers)
        if token:
            self.tokens.add(token)
        return commit

    def alias(self, old: str, new: str) -> None:
        """Redirect a repository's old name to its new one, as gpt2 goes to openai-community/gpt2."""
        self.aliases[old] = new

    def abort_bodies(self, after: int, times: int = 1) -> None:
        """Cut the connection after so many bytes of a storage or file body, in the next `times` such responses."""
        self.abort_after, self.aborts_left = after, times

    def asked(self, name: str | None = None, method: str | None = None) -> list[Request]:
        """Return the requests about repositories, or those whose path ends in `name` and whose method is `method`."""
        return [
            request
            for request in list(self.requests)
            if request.path.endswith(name or "") and method in (None, request.method) and request.path != HOUSEKEEPING
        ]

    def bytes_sent(self, name: str | None = None) -> int:
        """Return the body bytes that left the server (for paths that end in `name`)."""
        return sum(request.bytes_sent for request in self.asked(name))


class _Server(ThreadingHTTPServer):
    """One listening port that knows the hub it belongs to."""

    def __init__(self, hub: HubServer, origin: str, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub, self.origin = hub, origin

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent where a client hung up; anything else is a bug of this server and is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Refused(Exception):
    """An answer other than the content: status, X-Error-Code, X-Error-Message, more headers."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # type: ignore[assignment]

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the record is `hub.requests`."""

    # ---- one request ----

    def _answer(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.record = Request(
            self.command,
            unquote(parts.path),
            parts.query,
            self.headers.get("Range"),
            self.headers.get("Authorization"),
            self.server.origin,
        )
        hub.requests.append(self.record)
        time.sleep(hub.delay)
        try:
            if hub.broken_status is not None:
                raise _Refused(hub.broken_status, None, "The hub is having a bad day")
            self._route(parts.path)
        except _Refused as refusal:
            self._refuse(refusal)

    def _route(self, path: str) -> None:
        if self.server.origin == "cdn":
            return self._storage(path)
        token = self._token()
        if match := RESOLVE.fullmatch(path):
            return self._resolve(self._repository(match["repo"], token), token, match["revision"], match["name"])
        if match := API.fullmatch(path):
            repository = self._repository(match["repo"], token)
            rest = [unquote(part) for part in (match["rest"] or "").split("/")]
            return self._json(self._api(repository, match["verb"], rest))
        if path == HOUSEKEEPING:
            return self._json({"standardEnvVars": [], "harnesses": {}})
        raise _Refused(404, None, "Sorry, we can't find the page you are looking for.")

    # ---- who may see what ----

    def _token(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.server.hub.tokens:
            raise _Refused(401, None, "Invalid credentials in Authorization header")
        return token

    def _repository(self, name: str, token: str | None) -> Repository:
        name = unquote(name)
        if name in self.server.hub.aliases:
            target = self.path.replace(name, self.server.hub.aliases[name], 1)
            raise _Refused(307, None, "Temporary Redirect", Location=target)
        repository = self.server.hub.repositories.get(name)
        if repository is None or (repository.private and token not in (repository.readers or ())):
            # the hub does not tell strangers whether a private repository exists
            raise _Refused(401 if token is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def _commit(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(unquote(revision))
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
        return commit

    # ---- files ----

    def _resolve(self, repository: Repository, token: str | None, revision: str, name: str) -> None:
        if repository.gated and token not in (repository.readers or ()):
            ask = "Please log in." if token is None else "You are not in the authorized list."
            message = f"Access to model {repository.name} is restricted. {ask}"
            raise _Refused(401 if token is None else 403, "GatedRepo", message)
        commit = self._commit(repository, revision)
        blob = commit.blobs.get(unquote(name))
        if blob is None:
            raise _Refused(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit.sha})
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if not blob.large:
            self._file(blob, {**headers, "ETag": f'"{blob.oid}"', "Content-Type": "text/plain; charset=utf-8"})
            return
        location = f"{self.server.hub.storage_url}/cdn/{commit.sha}/{name}?X-Amz-Signature={blob.oid[:16]}"
        linked = {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.oid}"', "Location": location}
        self._send(302, {**headers, **linked}, b"")

    def _storage(self, path: str) -> None:
        if self.headers.get("Authorization") is not None:
            # a signed address and a token at once: storage refuses that, and the token has left the hub
            raise _Refused(400, None, "Only one auth mechanism allowed")
        match = CDN.fullmatch(path)
        commits = [c for r in self.server.hub.repositories.values() for c in r.revisions.values()]
        blobs = [c.blobs.get(unquote(match["name"])) for c in commits if match and c.sha == match["commit"]]
        if not blobs or blobs[0] is None:
            raise _Refused(403, None, "Access denied")
        self._file(
            blobs[0], {"ETag": f'"{blobs[0].oid}"', "Accept-Ranges": "bytes", "Content-Type": "binary/octet-stream"}
        )

    def _file(self, blob: Blob, headers: dict[str, str]) -> None:
        start, stop, status = 0, blob.size, 200
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            start, stop, status = *_span(wanted[1], wanted[2], blob.size), 206
            start, stop = start + self.server.hub.range_shift, stop + self.server.hub.range_excess
            if start >= stop:
                raise _Refused(416, None, "Range Not Satisfiable", **{"Content-Range": f"bytes */{blob.size}"})
            last = stop - self.server.hub.range_excess - 1
            headers = {**headers, "Content-Range": f"bytes {start}-{last}/{blob.size}"}
        promised = self.server.hub.promised if status == 206 else 0
        self._begin(status, {**headers, "Content-Length": str(stop - start + promised)})
        if self.command != "HEAD":
            self._pour(blob.path, start, stop)
        self.close_connection = self.close_connection and not promised

    def _pour(self, path: Path, start: int, stop: int) -> None:
        """Send a span of a file, or less of it where the hub was told to cut connections."""
        hub = self.server.hub
        cut = hub.aborts_left > 0 and hub.abort_after is not None and hub.abort_after < stop - start
        if cut:
            hub.aborts_left -= 1
            stop = start + (hub.abort_after or 0)
        for chunk in _chunks(path, start, stop):
            if hub.spoilt and path.name == hub.spoilt[0]:
                chunk = _overwritten(chunk, hub.spoilt[1] - start, hub.spoilt[2])
            start += len(chunk)
            self.record.bytes_sent += len(chunk)  # before the write: who has read the body finds it counted
            self.wfile.write(chunk)
        self.close_connection = self.close_connection or cut

    # ---- the API ----

    def _api(self, repository: Repository, verb: str | None, rest: list[str]) -> object:
        """Return what the API says: `verb` is the word after the repository's name, `rest` what follows it."""
        if verb == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.sha}
                for name, commit in repository.revisions.items()
            ]
            return {"branches": branches, "tags": [], "converts": []}
        commit = self._commit(repository, rest[0] or "main")
        if verb == "tree":
            return self._tree(commit, "/".join(rest[1:]))
        if verb == "paths-info":
            wanted = _posted_paths(self.body)
            return [_entry(name, blob) for name, blob in commit.blobs.items() if name in wanted]
        if verb == "commits":
            return [{"id": commit.sha, "title": "Upload", "message": "", "authors": [], "date": DATE}]
        return self._info(repository, commit)

    def _info(self, repository: Repository, commit: Commit) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in commit.blobs]
        if "blobs" in parse_qs(self.record.query):
            siblings = [
                {"rfilename": name, "size": blob.size, "blobId": blob.oid, **blob.lfs()}
                for name, blob in commit.blobs.items()
            ]
        return {
            "_id": commit.sha[:24],
            "id": repository.name,
            "modelId": repository.name,
            "author": repository.name.split("/")[0],
            "sha": commit.sha,
            "lastModified": DATE,
            "createdAt": DATE,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["transformers", "safetensors", "text-generation", "region:us"],
            "siblings": siblings,
        }

    def _tree(self, commit: Commit, below: str) -> list[dict[str, Any]]:
        prefix = f"{below}/" if below else ""
        inside = {name: blob for name, blob in commit.blobs.items() if name.startswith(prefix)}
        if below and not inside:
            raise _Refused(404, "EntryNotFound", f'{below} does not exist on "main"')
        recursive = parse_qs(self.record.query).get("recursive", ["False"])[0].lower() in ("true", "1")
        entries = [
            _entry(name, blob) for name, blob in inside.items() if recursive or "/" not in name.removeprefix(prefix)
        ]
        parents = {
            prefix + name.removeprefix(prefix).split("/")[0] for name in inside if "/" in name.removeprefix(prefix)
        }
        if recursive:
            parents = {parent.as_posix() for name in inside for parent in Path(name).parents} - {".", below}
        folders = [
            {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
            for name in sorted(parents)
        ]
        return folders + entries

    # ---- bytes ----

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.record.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.record.bytes_sent += len(body) if self.command != "HEAD" else 0
        self._begin(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(value).encode())

    def _refuse(self, refusal: _Refused) -> None:
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            "X-Error-Message": refusal.message,
            **refusal.headers,
        }
        if refusal.code is not None:
            headers["X-Error-Code"] = refusal.code
        if refusal.status < 400:
            del headers["X-Error-Message"]
        with suppress(ConnectionError):
            self._send(refusal.status, headers, json.dumps({"error": refusal.message}).encode())


def _overwritten(chunk: bytes, at: int, wrong: bytes) -> bytes:
    """Return the bytes with wrong ones at a place, where there is such a place."""
    return chunk[:at] + wrong + chunk[at + len(wrong) :] if 0 <= at <= len(chunk) - len(wrong) else chunk


def _span(first: str, last: str, size: int) -> tuple[int, int]:
    """Return the half-open span that a Range header's two numbers mean; empty where there is no such byte."""
    if first == "":
        return (max(0, size - int(last)), size) if last and int(last) else (size, size)
    return int(first), min(size, int(last) + 1) if last else size


def _chunks(path: Path, start: int, stop: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < stop and (chunk := file.read(min(CHUNK, stop - start))):
            start += len(chunk)
            yield chunk


def _entry(name: str, blob: Blob) -> dict[str, Any]:
    return {"type": "file", "oid": blob.oid[:40], "size": blob.size, "path": name, **blob.lfs()}


def _posted_paths(body: bytes) -> list[str]:
    """Return the paths of a paths-info request, which comes as a form or as JSON."""
    text = body.decode()
    return json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
