"""Requests to the hub: a byte range, checked against what was requested, and errors as one line."""

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from dimscope.errors import CheckpointNotFound, DimscopeError, InvalidArgument, NetworkError

CHUNK = 1 << 20


@contextmanager
def hub_errors(name: str, revision: str | None) -> Generator[None]:
    """Turn what huggingface_hub raises into one line.

    Raises:
        CheckpointNotFound: There is no such repository or revision, or no access to it.
        NetworkError: The hub cannot be reached, broke off, or answers with an error.
        InvalidArgument: The cache cannot be written.
    """
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except DimscopeError:  # some are an OSError too
        raise
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
    except errors.HfHubHTTPError as e:
        raise _refusal(name, e) from e
    except _transport_errors() as e:
        raise _broken(name, e) from e
    except ValueError as e:
        raise NetworkError(
            f"{name}: the server does not answer as a hub does ({reason_of(e)}); check HF_ENDPOINT"
        ) from e


def _transport_errors() -> tuple[type[Exception], ...]:
    """Return OSError and the HTTPError of the client that this huggingface_hub uses (httpx, later httpx2)."""
    from huggingface_hub import errors

    return tuple(b for b in errors.HfHubHTTPError.__bases__ if issubclass(b, Exception))


def _broken(name: str, error: Exception) -> DimscopeError:
    """Return the error for a connection that failed, or a cache that cannot be written."""
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
        where = error.filename or "the cache"
        return InvalidArgument(
            f"{where} cannot be written: {error.strerror}; set HF_HOME to another folder for the cache"
        )
    return NetworkError(
        f"{name}: the hub could not be reached or broke off ({reason_of(error)}); "
        "check the connection, or give a local folder"
    )


def _refusal(name: str, error: Any) -> DimscopeError:
    """Return the error for an answer that is an error."""
    status = error.response.status_code
    if status in (401, 403):
        return CheckpointNotFound(
            f"{name}: the hub refuses access with this token (status {status}); check HF_TOKEN, or run `hf auth login`"
        )
    return NetworkError(f"{name}: the hub answers with an error ({reason_of(error)}); try again later")


def reason_of(error: BaseException) -> str:
    """Return the first line of an error."""
    return str(error).splitlines()[0][:200] if str(error).strip() else type(error).__name__


def stream_range(name: str, revision: str, file: str, begin: int, end: int) -> Iterator[bytes]:
    """Yield bytes `begin` to `end` of a file, exactly these.

    Raises:
        NetworkError: The hub cannot be reached, stops sending, or sends other bytes than requested.
    """
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(name, file, revision=revision)
    # A compressed range would be a range of something else.
    headers = build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds to connect, and without a byte
    left = end - begin
    with (
        hub_errors(name, revision),
        get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as r,
    ):
        hf_raise_for_status(r)
        _check_range(name, file, r, begin, end)
        for chunk in r.iter_bytes(CHUNK):
            left -= len(chunk)
            if left < 0:
                raise NetworkError(f"{name}: the server sends more of {file} than the {end - begin:,} bytes requested")
            yield chunk
    if left:
        raise NetworkError(f"{name}: the download of {file} broke off; run the same command again to resume it")


def _check_range(name: str, file: str, response: Any, begin: int, end: int) -> None:
    if response.status_code != 206:
        raise NetworkError(f"{name}: the server does not answer byte ranges; download the model and give its folder")
    sent = response.headers.get("Content-Range", "no range")
    if not re.fullmatch(rf"bytes\s+{begin}-{end - 1}/(\d+|\*)", sent.strip()):
        raise NetworkError(
            f"{name}: the server sends {sent} of {file} instead of bytes {begin}-{end - 1}; a proxy may be at fault: "
            "download the model and give its folder"
        )
