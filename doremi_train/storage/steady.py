"""Remote reads that survive a network: tried again at the byte where they stopped."""

import functools
import io
import os
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from typing import Any, TypeVar

from doremi_train.config import UserError, redact

ATTEMPTS = 5
# Seconds; each wait is twice the one before, less up to half of it by chance.
FIRST_WAIT, LONGEST_WAIT = (
    0.5,
    8.0,
)
CHUNK = 1 << 20  # bytes read together
LASTING = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
)
# Their errors are not all OSErrors.
NETWORK = (
    "aiohttp",
    "botocore",
    "aiobotocore",
    "requests",
    "urllib3",
)
T = TypeVar("T")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ── Trying again ──────────────────────────────────────────────────────────────────────────────────


def steadily(what: str, call: Callable[[], T]) -> T:
    """`call()`, again after a growing wait where the network fails; every retry is said in one
    line.

    Raises OSError at once where trying again is no use (missing, forbidden), and UserError after
    ATTEMPTS attempts.
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
        def call(path: str = "", *arguments: Any, **keywords: Any) -> Any:
            return steadily(
                self._fs.unstrip_protocol(path), lambda: value(path, *arguments, **keywords)
            )

        return call

    def unstrip_protocol(self, path: str) -> str:
        return self._fs.unstrip_protocol(path)

    def invalidate_cache(self) -> None:
        self._fs.invalidate_cache()

    def isfile(self, path: str) -> bool:
        return self._type(path) == "file"

    def isdir(self, path: str) -> bool:
        # To HTTP everything is a file, and a page of links may also be listed.
        kind = self._type(path)
        return kind == "directory" or (
            kind == "file" and path.startswith("http") and self._fs.isdir(path)
        )

    def glob(self, path: str) -> list[str]:
        """Paths that match. fsspec would leave out a folder whose listing failed."""
        try:
            return steadily(
                self._fs.unstrip_protocol(path), lambda: self._fs.glob(path, on_error="raise")
            )
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
    """A remote file that continues at the byte where a read failed, so that nothing is lost or read
    twice."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path, self.name = fs, path, fs.unstrip_protocol(path)
        self._file: Any = None
        self._position = 0
        # Size and version of the file that was opened first.
        self._seen: tuple[Any, ...] | None = None
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
        position = (
            offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: size or 0}[whence]
        )
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
        seen = (
            getattr(self._file, "size", None),
            *(details.get(k) for k in ("ETag", "LastModified", "mtime")),
        )
        if self._seen not in (None, seen):
            raise UserError(
                f"{self.name}: changed while it was read; run again when nobody writes it"
            )
        self._seen = seen
        self._place()

    def _place(self) -> None:
        """Bring the open file to the position."""
        if self._file.tell() == self._position:
            return
        try:
            self._file.seek(self._position)
        except (ValueError, io.UnsupportedOperation):
            # A server that knows no ranges: from the start again.
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
