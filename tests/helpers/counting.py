"""Counting what a process does to the files of a folder, and killing it before the n-th of it (see
`helpers.killed`). Nothing is imported but the standard library: every process begins with it."""

import fcntl
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

KEY = "DOREMI_KILLED"  # of the environment: what `install` is called with, as JSON


def install_from_environment() -> None:
    """Count and kill in this process, where the environment says so."""
    if KEY in os.environ:
        folder, log, at = json.loads(os.environ[KEY])
        install(folder, log, at)


def install(folder: str, log: str, at: int) -> None:
    count = partial(_count, folder, log, at)
    fsync = os.fsync

    def counted(file: Any) -> None:
        count("fsync", _path(file if isinstance(file, int) else file.fileno()))
        fsync(file)

    os.fsync = counted

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES:
            for operation, path in _CHANGES[event](*arguments):
                count(operation, path)

    sys.addaudithook(hear)


def _count(folder: str, log: str, at: int, operation: str, path: str) -> None:
    if not path.startswith(f"{folder}/"):
        return
    handle = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    fcntl.flock(handle, fcntl.LOCK_EX)
    done = os.pread(handle, os.fstat(handle).st_size, 0).count(b"\n")
    os.write(handle, f"{operation} {path.removeprefix(folder)[1:]}\n".encode())
    os.close(handle)
    if done + 1 == at:
        if operation == "empty":
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))
        os.kill(os.getpid(), signal.SIGKILL)


def _path(path: Any, folder: int = -1) -> str:
    """An absolute path of what an event names: a path, perhaps below an open folder, or an open
    file."""
    if isinstance(path, int):
        return str(Path(f"/proc/self/fd/{path}").readlink())
    base = Path(f"/proc/self/fd/{folder}").readlink() if folder >= 0 else Path.cwd()
    return os.path.normpath(base / os.fsdecode(path))


def _opened(path: Any, mode: Any, flags: int) -> Iterator[tuple[str, str]]:
    if isinstance(path, int) or not flags & (os.O_CREAT | os.O_TRUNC):
        return
    where = _path(path)
    there = Path(where).exists()
    if not there or (flags & os.O_TRUNC and Path(where).stat().st_size):
        yield "open", where
        # What is written aside is not read, and of a lock nothing is.
        if ".partial" not in where and not where.endswith("lock"):
            yield "empty", where


def _made(path: Any, mode: int, folder: int) -> Iterator[tuple[str, str]]:
    where = _path(path, folder)
    if not os.path.lexists(where):
        yield "mkdir", where


def _removed(path: Any, folder: int) -> Iterator[tuple[str, str]]:
    where = _path(path, folder)
    if os.path.lexists(where):
        yield "remove", where


_CHANGES: Mapping[str, Callable[..., Iterator[tuple[str, str]]]] = {
    "open": _opened,
    "os.mkdir": _made,
    "os.remove": _removed,
    "os.rmdir": _removed,
    "os.rename": lambda _, to, __, folder: iter([("rename", _path(to, folder))]),
    "os.link": lambda _, to, __, folder: iter([("link", _path(to, folder))]),
    "os.symlink": lambda _, to, folder: iter([("symlink", _path(to, folder))]),
    "os.truncate": lambda path, _: iter([("truncate", _path(path))]),
}
