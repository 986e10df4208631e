"""Text documents from http and https URLs: downloaded whole, as UTF-8, within limits of size and time."""

import codecs
import time
from dataclasses import dataclass
from http.client import HTTPException
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit, urlunsplit

from dimscope.errors import InvalidArgument, NetworkError

LARGEST = 64 << 20  # bytes of what can be read only once, and is kept in memory
TIMEOUT = 20.0  # seconds without a sign of the server
DEADLINE = 300.0  # seconds for a whole download


@dataclass(frozen=True, slots=True)
class Download:
    """A document in UTF-8; `name` is its URL without the query."""

    name: str
    data: bytes


def too_large() -> str:
    """Return the reason for which a document is refused, with the limit."""
    return f"more than {LARGEST / (1 << 20):g} MiB, the most that is kept in memory"


def download(source: str, scheme: str) -> Download:
    """Download the document at a URL.

    Raises:
        InvalidArgument: For another scheme than http and https, a URL with a password, or text that cannot be decoded.
        NetworkError: Where the server cannot be reached, is too slow, or sends too much.
    """
    if scheme not in ("http", "https"):
        raise InvalidArgument(f"texts are read from URLs that begin with http:// or https://, not {scheme}://")
    try:
        parts = urlsplit(source)
    except ValueError as e:
        raise InvalidArgument(f"{source}: no URL ({e})") from e
    if "@" in parts.netloc:  # the standard library does not log in, and its errors would show the password
        raise InvalidArgument(
            "texts are read from URLs without user name and password; download the file and pass its path"
        )
    name = urlunsplit((scheme, parts.netloc, parts.path, "", ""))
    try:
        body, charset = _read(name, source)
    except NetworkError:  # is an OSError too
        raise
    except (OSError, HTTPException, ValueError) as e:
        raise NetworkError(f"{name}: cannot be read ({_reason(e)}); check the address and the connection") from e
    return Download(name, _to_utf8(name, body, charset))


def _opener() -> request.OpenerDirector:
    """Return an opener without the standard one's file, data and ftp, which a redirect could lead to."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(),
        request.HTTPHandler(),
        request.HTTPSHandler(),
        request.HTTPRedirectHandler(),
        request.HTTPErrorProcessor(),
        request.HTTPDefaultErrorHandler(),
        request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _read(name: str, url: str) -> tuple[bytes, str | None]:
    """Return the body, and the charset that the header names."""
    late = time.monotonic() + DEADLINE
    query = request.Request(url, headers={"User-Agent": "dimscope"})
    with _opener().open(query, timeout=TIMEOUT) as response:
        expected, body = response.length, bytearray()
        while expected is None or len(body) < expected:
            if max(len(body), expected or 0) > LARGEST:
                raise NetworkError(f"{name}: {too_large()}; download it and pass the file")
            if time.monotonic() > late:
                raise NetworkError(f"{name}: not complete after {DEADLINE:g} s; download it and pass the file")
            # read1 comes back with what has arrived; read would wait for the whole of it, past the deadline.
            if not (chunk := response.read1(1 << 16)):
                break
            body += chunk
        if expected is not None and len(body) < expected:
            raise NetworkError(f"{name}: the download broke off after {len(body):,} of {expected:,} bytes; try again")
        return bytes(body), response.headers.get_content_charset()


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        error.close()
        return f"the server answers {error.code} {' '.join(str(error.reason).split())}"
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer for {TIMEOUT:g} s"
    return " ".join(str(cause).split()) or type(cause).__name__


def _to_utf8(name: str, body: bytes, charset: str | None) -> bytes:
    try:
        if charset is None or codecs.lookup(charset).name == "utf-8":
            return body
        return body.decode(charset).encode()
    except (LookupError, UnicodeError) as e:
        raise InvalidArgument(f"{name}: the server calls it {charset}, but it does not decode as that ({e})") from e
