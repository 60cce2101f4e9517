"""Remote reads that survive a network: tried again at the byte where they stopped, or where nothing
came any more."""

import functools
import io
import os
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

from fsspec.callbacks import Callback

from doremi_train.config import UserError
from doremi_train.console import say
from doremi_train.storage import waiting

ATTEMPTS = 13  # with these waits more than half a minute
# Seconds; each wait is twice the one before, less up to half of it by chance.
FIRST_WAIT, LONGEST_WAIT = (
    0.5,
    8.0,
)
PATIENCE = 60.0  # seconds without a byte after which an attempt has failed
# Where only the end of a call is seen: bytes per second that it moves at least, and how many times
# PATIENCE a call of many requests may take.
SLOWEST, MANY = 1 << 18, 10
LISTINGS = ("find", "glob", "walk", "du", "expand_path")
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


class Unreached(UserError):
    """A service or the network failed for long. Exit code 1: nothing that was given is wrong."""

    exit_code = 1


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ── Trying again ──────────────────────────────────────────────────────────────────────────────────


def steadily(what: str, call: Callable[[], T]) -> T:
    """`call()`, again after a growing wait where the network fails; every retry is said in one
    line.

    Raises OSError at once where trying again is no use (missing, forbidden), and Unreached after
    ATTEMPTS attempts.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as raised:
            error = _failure(raised)
            network = type(error).__module__.partition(".")[0] in NETWORK
            if not network and not isinstance(error, OSError | HTTPException):
                raise
            why = f"{type(error).__name__}: {_said(error)}"
            if not _passing(error):
                if isinstance(raised, OSError):
                    raise
                raise OSError(why) from error
            if attempt == ATTEMPTS:
                raise Unreached(
                    f"{what}: failed {ATTEMPTS} times, the last time with {why}; "
                    "check the network and the service, and run the same command again"
                ) from error
            wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * (1 - os.urandom(1)[0] / 510)
            again = f"trying again in {wait:.1f} s (attempt {attempt + 1} of {ATTEMPTS})"
            say(f"{what}: {why}; {again}")
            time.sleep(wait)
    raise AssertionError("unreachable")


def _said(error: Exception) -> str:
    if isinstance(error, TimeoutError) and not str(error):  # asyncio's
        return f"nothing came for {PATIENCE:g} s"
    return one_line(error)


def _failure(error: Exception) -> Exception:
    """The error itself, or the failure of the network that a library took for another one."""
    cause, before = error.__cause__, error.__context__
    # fsspec's HTTP takes every failure for an absence.
    if (
        isinstance(error, FileNotFoundError)
        and isinstance(cause, Exception)
        and type(cause).__module__.startswith("aiohttp.")
        and _passing(cause)
    ):
        return cause
    # s3fs looks into the arguments of a timeout, which has none.
    if isinstance(error, IndexError) and isinstance(before, TimeoutError):
        return before
    return error


def _passing(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    status = getattr(error, "status", None)  # of an HTTP answer
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        return False
    return not isinstance(error, LASTING) and type(error).__name__ not in (
        "NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidURL",
    )  # fmt: skip


class Steady:
    """An fsspec file system whose every call is tried again, and ends.

    `limited`: its client gives up a connection on which nothing comes (`urls.LIMITS`). Of others
    nothing is seen but whether a call has ended, so each has a time in which it must.
    """

    def __init__(self, fs: Any, limited: bool = False) -> None:
        self._fs, self._limited = fs, limited
        self._stuck = False

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._fs, name)
        if name.startswith("_") or not callable(value):
            return value
        seconds = PATIENCE * MANY if name in LISTINGS else PATIENCE

        @functools.wraps(value)
        def call(path: str = "", *arguments: Any, **keywords: Any) -> Any:
            size = sum(len(value) for value in arguments if isinstance(value, bytes))
            return steadily(
                self.unstrip_protocol(path),
                lambda: self.watched(
                    lambda: getattr(self.fresh(), name)(path, *arguments, **keywords),
                    seconds + size / SLOWEST,
                ),
            )

        return call

    def watched(self, call: Callable[[], T], seconds: float) -> T:
        """`call()`, given up after so many seconds where the client would wait on."""
        if self._limited:
            return call()
        return self._giving_up(lambda: waiting.within(seconds, call))

    def fresh(self) -> Any:
        """The file system; a new one, of new connections, where a call of the last is stuck."""
        if self._stuck:
            old = self._fs
            self._fs = type(old)(*old.storage_args, skip_instance_cache=True, **old.storage_options)
            self._stuck = False
        return self._fs

    def _giving_up(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except waiting.Waited:
            self._stuck = True
            raise

    def put_file(self, local: str, path: str) -> None:
        """Copy a local file there."""
        steadily(self.unstrip_protocol(path), lambda: self._put(local, path))

    def _put(self, local: str, path: str) -> None:
        if self._limited:
            self._fs.put_file(local, path)
            return
        seen = _Progress(Path(local).stat().st_size)
        self._giving_up(
            lambda: waiting.within(
                float("inf"),
                lambda: self.fresh().put_file(local, path, callback=seen),
                seen.check,
            )
        )

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

    def glob(self, path: str, detail: bool = False) -> Any:
        """Paths that match, or with `detail` what each is. fsspec would leave out a folder whose
        listing failed."""
        try:
            return self.__getattr__("glob")(path, detail=detail, on_error="raise")
        except FileNotFoundError:
            return {} if detail else []

    def open(self, path: str, mode: str = "rb") -> io.BufferedReader:
        if mode != "rb":
            raise ValueError(f"mode {mode!r}: remote files are opened for reading only")
        return io.BufferedReader(SteadyFile(self, path), CHUNK)

    def _type(self, path: str) -> str | None:
        """fsspec's own isfile and isdir take every failure for an absence."""
        try:
            return self.info(path)["type"]
        except FileNotFoundError:
            return None


class _Progress(Callback):
    """Bytes of an upload as they go; not every file system tells."""

    def __init__(self, size: int) -> None:
        super().__init__(size=size)
        self._step, self._last = size, time.monotonic()
        self._told = False

    def relative_update(self, inc: int = 1) -> None:
        self._step = max(self._step, inc) if self._told else inc
        self._told, self._last = True, time.monotonic()

    def check(self) -> None:
        limit = PATIENCE + self._step / SLOWEST
        if time.monotonic() - self._last > limit:
            raise waiting.Waited(f"nothing was taken for {limit:.0f} s")


class SteadyFile(io.RawIOBase):
    """A remote file that continues at the byte where a read failed, so that nothing is lost or read
    twice."""

    def __init__(self, fs: Steady, path: str) -> None:
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
            data = self._fetch(size)
        except waiting.Waited:
            self._file = None  # closing it would wait as well
            raise
        except Exception:
            self._drop()
            raise
        whole = self._seen[0] if self._seen else None
        if size and not data and whole is not None and self._position < whole:
            self._drop()
            raise OSError(f"it ended at byte {self._position} of {whole}")
        return data

    def _fetch(self, size: int) -> bytes:
        """The next bytes of the open file, which may fetch a whole block for them."""
        file = self._file
        block = max(size, getattr(file, "blocksize", None) or 0)
        return self._fs.watched(lambda: file.read(size), PATIENCE + block / SLOWEST)

    def _open(self) -> Any:
        return self._fs.watched(lambda: self._fs.fresh().open(self._path, "rb"), PATIENCE)

    def _reopen(self) -> None:
        self._fs.invalidate_cache()
        self._file = self._open()
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
                self._file = self._open()
            while left := self._position - self._file.tell():
                if not self._fetch(min(left, CHUNK)):
                    raise OSError(f"it ended before byte {self._position}") from None

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(Exception):  # it failed before
                self._fs.watched(file.close, PATIENCE)
