"""Storage beyond this machine: fsspec URLs opened safely, tried again where the network fails, and
a second home of the store."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from doremi_train.config import UserError, redact
from doremi_train.files import FULL
from doremi_train.storage import steady
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
# All retries are ours, so that each is said and their number is bounded.
SETTINGS: dict[str, dict[str, Any]] = {
    name: {"config_kwargs": {"retries": {"total_max_attempts": 1}}} for name in ("s3", "s3a")
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
    scheme, separator, _ = url.partition("://")
    if not separator:
        return LocalFileSystem(), os.path.abspath(Path(url).expanduser())  # noqa: PTH100 (links are kept)
    if scheme in EXTRAS and redact(url) != url:
        raise UserError(
            f"{key}={url!r}: credentials do not belong into this URL; take them out, and give them "
            "in the environment or in the provider's own file (for s3: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY)"
        )
    try:
        fs, path = fsspec.core.url_to_fs(url, **SETTINGS.get(scheme, {}))
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
    if scheme in SETTINGS:
        fs.retries = 1
    fs.invalidate_cache()  # what is there now, not what was there when this process looked before
    return Steady(fs), path


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
