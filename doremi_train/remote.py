"""Storage beyond this machine: fsspec URLs opened safely, tried again where the network fails, and a second home of
the store."""

import copy
import functools
import hashlib
import io
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from doremi_train.config import UserError, redact
from doremi_train.files import aside_of, sync_folder

# Protocols that only transfer bytes. Others may run code on this machine, as chained URLs (a::b) may.
PROTOCOLS = (
    *("file", "local", "memory", "http", "https", "ftp", "sftp", "ssh", "smb", "webdav"),
    *("s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "oci", "oss", "tos", "hf", "hdfs", "webhdfs"),
)
PIPE = "pipe:"
EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
# All retries are ours, so that each is said and their number is bounded.
SETTINGS: dict[str, dict[str, Any]] = {
    name: {"config_kwargs": {"retries": {"total_max_attempts": 1}}} for name in ("s3", "s3a")
}
ATTEMPTS = 5
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds; each wait is twice the one before, less up to half of it by chance
CHUNK = 1 << 20  # bytes read together
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
NETWORK = ("aiohttp", "botocore", "aiobotocore", "requests", "urllib3")  # their errors are not all OSErrors

T = TypeVar("T")


# ── Opening URLs ─────────────────────────────────────────────────────────────────────────────────────────────────────


def harmless(url: str) -> bool:
    """Whether opening the URL can do nothing but transfer bytes."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        first = url.partition("/")[0]
        return ":" not in first or os.path.lexists(first)
    return scheme in PROTOCOLS and "::" not in url


def filesystem(url: str, key: str, odd: bool = False) -> tuple[Any, str]:
    """(file system, path in it) of a path or URL given as `key`.

    Raises UserError for a protocol that may run code (unless `odd` ones are wanted), or whose package is missing.
    """
    if not odd and not harmless(url):
        raise UserError(
            f"{key}={url!r}: refused, because it may run a command on this machine; allowed are paths and "
            f"{', '.join(PROTOCOLS)} URLs"
        )
    scheme, separator, _ = url.partition("://")
    if not separator:
        return LocalFileSystem(), os.path.abspath(Path(url).expanduser())  # noqa: PTH100 (links are kept)
    if scheme in EXTRAS and redact(url) != url:
        raise UserError(
            f"{key}={url!r}: credentials do not belong into this URL; take them out, and give them in the environment "
            "or in the provider's own file (for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    try:
        fs, path = fsspec.core.url_to_fs(url, **SETTINGS.get(scheme, {}))
    except ImportError as error:
        package = EXTRAS.get(scheme)
        remedy = f"pip install {package!r}" if package else "install the package of this protocol"
        raise UserError(f"{key}={url!r}: cannot be reached ({one_line(error)}); {remedy}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={url!r}: cannot be reached ({one_line(error)}); correct the URL") from error
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
        raise UserError(
            f"{key}={url!r}: cannot be reached ({one_line(error)}); check path, rights and network"
        ) from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ── Trying again ─────────────────────────────────────────────────────────────────────────────────────────────────────


def steadily(what: str, call: Callable[[], T]) -> T:
    """`call()`, again after a growing wait where the network fails; every retry is said in one line.

    Raises OSError at once where trying again is no use (missing, forbidden), and UserError after ATTEMPTS attempts.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            network = type(error).__module__.partition(".")[0] in NETWORK
            if not network and not isinstance(error, OSError | HTTPException):
                raise
            why = f"{type(error).__name__}: {one_line(error)}"
            if not _passing(error):
                if isinstance(error, OSError):
                    raise
                raise OSError(why) from error
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{what}: failed {ATTEMPTS} times, the last time with {why}; "
                    "check the network and the service, and run the same command again"
                ) from error
            wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * (1 - os.urandom(1)[0] / 510)
            again = f"trying again in {wait:.1f} s (attempt {attempt + 1} of {ATTEMPTS})"
            print(redact(f"{what}: {why}; {again}"), flush=True)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _passing(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    status = getattr(error, "status", None)  # of an HTTP answer
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        return False
    return not isinstance(error, LASTING) and type(error).__name__ not in (
        "NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidURL",
    )  # fmt: skip


class Steady:
    """An fsspec file system whose every call is tried again."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._fs, name)
        if name.startswith("_") or not callable(value):
            return value

        @functools.wraps(value)
        def call(path: str = "", *more: Any, **named: Any) -> Any:
            return steadily(self._fs.unstrip_protocol(path), lambda: value(path, *more, **named))

        return call

    def unstrip_protocol(self, path: str) -> str:
        return self._fs.unstrip_protocol(path)

    def invalidate_cache(self) -> None:
        self._fs.invalidate_cache()

    def isfile(self, path: str) -> bool:
        return self._type(path) == "file"

    def isdir(self, path: str) -> bool:
        kind = self._type(path)  # to HTTP everything is a file, and a page of links may also be listed
        return kind == "directory" or (kind == "file" and path.startswith("http") and self._fs.isdir(path))

    def glob(self, path: str) -> list[str]:
        """Paths that match. fsspec would leave out a folder whose listing failed."""
        try:
            return steadily(self._fs.unstrip_protocol(path), lambda: self._fs.glob(path, on_error="raise"))
        except FileNotFoundError:
            return []

    def open(self, path: str, mode: str = "rb") -> io.BufferedReader:
        if mode != "rb":
            raise ValueError(f"mode {mode!r}: remote files are opened for reading only")
        return io.BufferedReader(SteadyFile(self._fs, path), CHUNK)

    def _type(self, path: str) -> str | None:
        """fsspec's own isfile and isdir take every failure for an absence."""
        try:
            return self.info(path)["type"]
        except FileNotFoundError:
            return None


class SteadyFile(io.RawIOBase):
    """A remote file that continues at the byte where a read failed, so that nothing is lost or read twice."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path, self.name = fs, path, fs.unstrip_protocol(path)
        self._file: Any = None
        self._position = 0
        self._seen: tuple[Any, ...] | None = None  # size and version of the file that was opened first
        steadily(self.name, self._reopen)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        size = self._seen[0] if self._seen else None
        if whence == os.SEEK_END and size is None:
            raise io.UnsupportedOperation(f"{self.name}: its size is not known")
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: size or 0}[whence]
        if position != self._position:
            self._position = position
            if self._file is not None:
                self._place()
        return position

    def readinto(self, buffer: Any) -> int:
        data = steadily(self.name, lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._reopen()
            data = self._file.read(size)
        except Exception:
            self._drop()
            raise
        whole = self._seen[0] if self._seen else None
        if size and not data and whole is not None and self._position < whole:
            self._drop()
            raise OSError(f"it ended at byte {self._position} of {whole}")
        return data

    def _reopen(self) -> None:
        self._fs.invalidate_cache()
        self._file = self._fs.open(self._path, "rb")
        details = getattr(self._file, "details", None) or {}
        seen = (getattr(self._file, "size", None), *(details.get(k) for k in ("ETag", "LastModified", "mtime")))
        if self._seen not in (None, seen):
            raise UserError(f"{self.name}: changed while it was read; run again when nobody writes it")
        self._seen = seen
        self._place()

    def _place(self) -> None:
        """Bring the open file to the position."""
        if self._file.tell() == self._position:
            return
        try:
            self._file.seek(self._position)
        except (ValueError, io.UnsupportedOperation):  # a server that knows no ranges: from the start again
            if self._file.tell() > self._position:
                self._file.close()
                self._file = self._fs.open(self._path, "rb")
            while left := self._position - self._file.tell():
                if not self._file.read(min(left, CHUNK)):
                    raise OSError(f"it ended before byte {self._position}") from None

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(Exception):  # it failed before
                file.close()


# ── A second home ────────────────────────────────────────────────────────────────────────────────────────────────────


class Torn(Exception):
    """What came back is not what was put there."""


class Mirror:
    """A folder's second home, at a path or URL. A file goes there, and comes back, whole or not at all."""

    def __init__(self, url: str, key: str = "remote") -> None:
        self.key, self.url = key, redact(url.rstrip("/"))  # for messages
        self._fs, self._path = filesystem(url.rstrip("/"), key)

    def at(self, *parts: str) -> "Mirror":
        """The home of a sub-folder."""
        other = copy.copy(self)
        other.url, other._path = "/".join((self.url, *parts)), "/".join((self._path, *parts))
        return other

    def prove(self) -> None:
        """Raises UserError where nothing can be written, before hours of work depend on it."""
        with reaching(self.url, self.key):
            if isinstance(self._fs, LocalFileSystem):
                self._fs.makedirs(self._path, exist_ok=True)
            self._fs.pipe_file(f"{self._path}/.doremi", b"A second home of token shards and runs.\n")

    def sizes(self) -> dict[str, int]:
        """Bytes of every file there, by its name relative to the folder."""
        with reaching(self.url, self.key):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._path, detail=True)
            except FileNotFoundError:
                return {}
        start = len(self._path) + 1
        names = {path[start:]: entry["size"] for path, entry in found.items()}
        return {name: size for name, size in names.items() if not name.endswith(".partial")}

    def has(self, name: str) -> bool:
        with reaching(self.url, self.key):
            self._fs.invalidate_cache()
            return self._fs.isfile(f"{self._path}/{name}")

    def read(self, name: str) -> bytes | None:
        """Content of a small file; None where it is not there."""
        with reaching(self.url, self.key):
            try:
                return self._fs.cat_file(f"{self._path}/{name}")
            except FileNotFoundError:
                return None

    def push(self, folder: Path, names: Iterable[str]) -> None:
        """Copy `folder`/name there, in this order: the name that says that all is there comes last."""
        for name in names:
            target = f"{self._path}/{name}"
            with reaching(f"{self.url}/{name}", self.key):
                if isinstance(self._fs, LocalFileSystem):
                    with (folder / name).open("rb") as source:
                        _write_aside(Path(target), source, None, None)
                else:
                    self._fs.put_file(str(folder / name), target)

    def pull(self, folder: Path, name: str, size: int | None = None, sha256: str | None = None) -> None:
        """Copy name to `folder`/name. Raises Torn where it has not the size or the checksum that it must have."""
        with reaching(f"{self.url}/{name}", self.key), self._fs.open(f"{self._path}/{name}", "rb") as source:
            _write_aside(folder / name, source, size, sha256)

    def remove(self, names: Iterable[str]) -> None:
        """Delete files there; those that are gone already are none of our business."""
        for name in names:
            with reaching(f"{self.url}/{name}", self.key), suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._path}/{name}")


def _write_aside(path: Path, source: Any, size: int | None, sha256: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    try:
        with aside.open("w+b") as file:
            shutil.copyfileobj(source, file, CHUNK)
            file.flush()
            os.fsync(file.fileno())
            if size is not None and file.tell() != size:
                raise Torn(f"has {file.tell()} bytes where {size} were written")
            file.seek(0)
            if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise Torn("has another checksum than what was written")
        aside.rename(path)
        sync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)
