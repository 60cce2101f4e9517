"""Storage beyond this machine: fsspec URLs opened safely, tried again where the network fails, and
a second home of the store."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from doremi_train.config import UserError
from doremi_train.files import FULL
from doremi_train.redaction import redact
from doremi_train.storage import steady, waiting
from doremi_train.storage.steady import Steady

# Protocols that only transfer bytes. Others may run code on this machine, as chained URLs (a::b)
# may.
PROTOCOLS = (
    *("file", "local", "memory", "http", "https", "ftp", "sftp", "ssh", "smb", "webdav"),
    *("s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "oci", "oss", "tos", "hf", "hdfs", "webhdfs"),
)
PIPE = "pipe:"
EXTRAS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
}


def _s3() -> dict[str, Any]:
    from aiobotocore.config import AioConfig
    from botocore.exceptions import ParamValidationError

    sockets: dict[str, Any] = {"connector_args": {"socket_factory": _socket}}
    try:
        AioConfig(**sockets)
    except ParamValidationError:  # an older one
        sockets = {}
    # All retries are ours, so that each is said and their number is bounded.
    once = {"retries": {"total_max_attempts": 1}}
    patience = {"connect_timeout": steady.PATIENCE, "read_timeout": steady.PATIENCE}
    return {"config_kwargs": {**once, **patience, **sockets}}


def _http() -> dict[str, Any]:
    import aiohttp

    # Its own limit is one for the whole of an answer, however well it comes.
    patience = {"sock_connect": steady.PATIENCE, "sock_read": steady.PATIENCE}
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, **patience)}}


def _socket(address: Any) -> socket.socket:
    """A socket that gives up also where what it sends is not taken."""
    made = socket.socket(*address[:3])
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * steady.PATIENCE))
    return made


# Settings of the clients that know a time without a byte, by protocol.
LIMITS: dict[str, Callable[[], dict[str, Any]]] = {
    "s3": _s3,
    "s3a": _s3,
    "http": _http,
    "https": _http,
}


# ── Opening URLs ──────────────────────────────────────────────────────────────────────────────────


def harmless(url: str) -> bool:
    """Whether opening the URL can do nothing but transfer bytes."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        first = url.partition("/")[0]
        return ":" not in first or os.path.lexists(first)
    return scheme in PROTOCOLS and "::" not in url


def filesystem(url: str, key: str, odd: bool = False) -> tuple[Any, str]:
    """File system, and path in it, of a path or URL given as `key`.

    Raises UserError for a protocol that may run code (unless `odd` ones are wanted), or whose
    package is missing.
    """
    if not odd and not harmless(url):
        raise UserError(
            f"{key}={url!r}: refused, because it may run a command on this machine; allowed are "
            f"paths and {', '.join(PROTOCOLS)} URLs"
        )
    if "://" not in url:
        return LocalFileSystem(), os.path.abspath(Path(url).expanduser())  # noqa: PTH100 (links are kept)
    scheme = url.rpartition("::")[2].partition("://")[0]  # of the last link of a chain
    if scheme in EXTRAS and redact(url) != url:
        raise UserError(
            f"{key}={url!r}: credentials do not belong into this URL; take them out, and give them "
            "in the environment or in the provider's own file (for s3: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY)"
        )
    try:
        fs, path = _opened(url, scheme)
    except ImportError as error:
        package = EXTRAS.get(scheme)
        remedy = f"pip install {package!r}" if package else "install the package of this protocol"
        raise UserError(
            f"{key}={url!r}: cannot be reached ({steady.one_line(error)}); {remedy}"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}={url!r}: cannot be reached ({steady.one_line(error)}); correct the URL"
        ) from error
    if isinstance(fs, LocalFileSystem):
        return fs, path
    if hasattr(fs, "retries"):
        fs.retries = 1
    fs.invalidate_cache()  # what is there now, not what was there when this process looked before
    return Steady(fs, scheme in LIMITS), path


def _opened(url: str, scheme: str) -> tuple[Any, str]:
    """fsspec's file system, with the limits of the client that it reaches the network by; some
    connect at once."""
    settings = LIMITS[scheme]() if scheme in LIMITS else {}
    if "::" in url:
        settings = {scheme: settings}
    if scheme in LIMITS:
        return fsspec.core.url_to_fs(url, **settings)
    return waiting.within(steady.PATIENCE, lambda: fsspec.core.url_to_fs(url))


@contextmanager
def reaching(url: str, key: str) -> Iterator[None]:
    """What fails in here is a mistake in `key`, or in what it leads to."""
    try:
        yield
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise UserError(
            f"{key}={url!r}: cannot be reached ({steady.one_line(error)}); check path, rights and "
            "network"
        ) from error
