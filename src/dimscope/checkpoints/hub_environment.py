"""The environment variables that huggingface_hub and its HTTP client read: each is checked before it is used.

Their own errors are tracebacks without the name of the variable, partly when the package is imported.
"""

import os
import re
import sys
from importlib.util import find_spec
from urllib.parse import urlsplit

from dimscope.errors import InvalidArgument

SECONDS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
IN_HEADERS = re.compile(r"[\x21-\x7e]*")  # what a value of an HTTP header may hold, without spaces


def check_import_variables() -> None:
    """Check the variables without which huggingface_hub and transformers cannot be imported.

    Raises:
        InvalidArgument: A variable has a value that cannot be parsed.
    """
    try:
        urlsplit(os.environ.get("HF_ENDPOINT", ""))
    except ValueError as e:
        raise _endpoint_error(str(e)) from e
    for variable in SECONDS:
        value = os.environ.get(variable) or "0"
        try:
            int(value)
        except ValueError as e:
            raise InvalidArgument(f"{variable} must be a whole number of seconds, got {value!r}") from e


def check_connection_variables() -> None:
    """Check the variables that a connection to the hub depends on: address, proxies, token.

    Raises:
        InvalidArgument: A variable has a value that cannot be used.
    """
    _check_endpoint()
    for variable in (name for upper in PROXIES for name in (upper, upper.lower())):
        if value := os.environ.get(variable, "").strip():
            _check_proxy(variable, value)
    _check_token()
    if not IN_HEADERS.fullmatch(os.environ.get("HF_HUB_USER_AGENT_ORIGIN", "").replace(" ", "")):
        raise InvalidArgument("HF_HUB_USER_AGENT_ORIGIN may hold printable ASCII characters only")
    _check_client()


def _endpoint_error(reason: str) -> InvalidArgument:
    value = os.environ.get("HF_ENDPOINT", "")
    shown = repr(value) if "@" not in value else "its value"  # which may hold a password
    return InvalidArgument(
        f"HF_ENDPOINT must be the address of a hub, such as https://huggingface.co, but {shown} is not one ({reason})"
    )


def _check_endpoint() -> None:
    value = os.environ.get("HF_ENDPOINT")
    if value is None:
        return
    if reason := _address_error(value, ("http", "https")):
        raise _endpoint_error(reason)


def _address_error(value: str, schemes: tuple[str, ...]) -> str | None:
    """Return why a value is not the address of a server, or None where it is one."""
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "host or port cannot be parsed"
    if not re.fullmatch(r"\w[\w+.-]*://.*", value, re.DOTALL) or parts.scheme not in schemes:
        return f"it does not begin with {', '.join(f'{scheme}://' for scheme in schemes)}"
    if not host or port == 0 or re.search(r"\s|[\x00-\x1f\x7f]", value):
        return "it has a space or line break" if host and port != 0 else "it names no host"
    return None


def _check_proxy(variable: str, value: str) -> None:
    """Check one proxy. Its value is not shown, because it may hold a password."""
    address = value if "://" in value else f"http://{value}"
    if reason := _address_error(address, PROXY_SCHEMES):
        raise InvalidArgument(f"{variable} must be an address such as http://proxy:3128, and is not one ({reason})")
    if urlsplit(address).scheme.startswith("socks") and find_spec("socksio") is None:
        raise InvalidArgument(f"{variable} names a SOCKS proxy, which needs the package socksio: pip install socksio")


def _check_token() -> None:
    from huggingface_hub import constants, get_token

    if os.environ.get("HF_OIDC_RESOURCE"):
        return  # the token comes from a server, not from the user
    variable = next((name for name in TOKENS if os.environ.get(name)), None)
    where = variable or f"the token file {constants.HF_TOKEN_PATH}"
    try:
        token = get_token() or ""
    except (UnicodeDecodeError, OSError) as e:
        raise InvalidArgument(f"{where} cannot be read as text; run `hf auth login` again") from e
    if not IN_HEADERS.fullmatch(token):
        raise InvalidArgument(
            f"{where} must be a token of ASCII letters, digits and _, but holds another character; copy the token again"
        )


def _check_client() -> None:
    """Build the HTTP client; what else can be wrong with its variables (certificates, NO_PROXY) is raised there."""
    from huggingface_hub import get_session

    try:
        get_session()
    except Exception as e:
        names = (*PROXIES, *map(str.lower, PROXIES), "NO_PROXY", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR")
        used = ", ".join(name for name in names if os.environ.get(name)) or f"of the proxy on {sys.platform}"
        raise InvalidArgument(
            f"the HTTP client cannot be built with the settings {used} ({type(e).__name__}: {str(e)[:100]})"
        ) from e
