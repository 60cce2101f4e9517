"""Limits of a machine, put on this process: to be called in a process that is about to begin, or in
a test for a while."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

# Of <linux/capability.h>: to pass over modes and owners of files, which root may.
_PASSING_OVER = (0, 1, 2, 3)
_DROP = 24  # PR_CAPBSET_DROP
_VERSION = 0x20080522

_Words = ctypes.c_uint32 * 6  # effective, permitted and inheritable rights, twice


def bound_by_modes() -> None:
    """Modes and owners of files hold for this process, and for what it starts, also where it is
    root's."""
    if os.geteuid() == 0:
        for right in _PASSING_OVER:
            assert ctypes.CDLL(None, use_errno=True).prctl(_DROP, right, 0, 0, 0) == 0
        _effective(False)


@contextmanager
def modes_hold() -> Iterator[None]:
    """The same of this thread, and of those that it starts, for a while."""
    if os.geteuid() == 0:
        _effective(False)
    try:
        yield
    finally:
        if os.geteuid() == 0:
            _effective(True)


def _effective(passing_over: bool) -> None:
    header, words, libc = (ctypes.c_uint32 * 2)(_VERSION, 0), _Words(), ctypes.CDLL(None)
    assert libc.capget(header, words) == 0
    mask = sum(1 << right for right in _PASSING_OVER)
    words[0] = words[0] | (words[1] & mask) if passing_over else words[0] & ~mask
    assert libc.capset(header, words) == 0


def latin_1(folder: Path) -> dict[str, str]:
    """The environment of a process whose locale is a Latin-1 one, made in `folder`."""
    name = "de_DE.ISO-8859-1"
    command = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / name)]
    try:
        made = subprocess.run(command, capture_output=True, check=False).returncode <= 1  # warned
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("no Latin-1 locale: localedef, or what it reads, is not installed")
    return {"LOCPATH": str(folder), "LC_ALL": name, "PYTHONUTF8": "0"}


def nobody_reads() -> None:
    """Output goes to a pipe that nobody reads, messages to a full disk."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)


@cache
def _own_mounts() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "ro", "none", "/dev/shm"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def without_shared_memory(command: list[str]) -> list[str]:
    """The command where nothing can be written to /dev/shm."""
    if not _own_mounts():
        pytest.skip(
            "no mounts of its own for a process: not root, or a container without the right"
        )
    mount = 'mount -t tmpfs -o ro none /dev/shm && exec "$@"'
    return ["unshare", "-m", "sh", "-c", mount, "sh", *command]
