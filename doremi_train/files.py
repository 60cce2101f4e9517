"""Files that are never half-written: write aside, fsync, rename."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import orjson

# Errors of a disk that has no room, which is no mistake in what was given.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` atomically: a reader or a crash sees the old content or the new one, nothing
    between."""
    with replacing(path) as aside:
        aside.write_bytes(content)


def aside_of(path: Path) -> Path:
    """The name aside under which this process, and no other of any machine on this file system,
    writes `path`."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a file to write aside, which then replaces `path` atomically, as in
    `write_bytes`. Where writing it fails, nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    try:
        yield aside
        _sync(aside)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """The same for a folder, but that for a moment there may be none."""
    aside = aside_of(path)
    aside.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        for written in filter(Path.is_file, aside.rglob("*")):
            _sync(written)
        if path.exists():
            shutil.rmtree(path)
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(path.parent)


@contextlib.contextmanager
def naming_the_disk(path: Path) -> Iterator[None]:
    """What safetensors says of a full disk, as the OSError that it is."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        cause = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(cause[1]), str(error), str(path)) if cause else error) from None


_ASIDE = re.compile(r"\..+-\d+\.partial|step-\d+\.\d+\.partial")


def clear_partial(folder: Path, below: bool = True) -> None:
    """Remove what processes that were killed left half-written in a folder, and `below` it. It is
    for whoever holds the folder's lock: nobody else is writing there."""
    for path in [*(folder.rglob if below else folder.glob)("*.partial")]:
        if _ASIDE.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def clear_dead(folder: Path) -> None:
    """Remove what processes of this machine that are gone left half-written in a folder that has no
    lock, since other machines write there too."""
    own = re.compile(rf"\..+\.{re.escape(socket.gethostname())}-(\d+)\.partial")
    for path in [*folder.rglob("*.partial")]:
        found = own.fullmatch(path.name)
        if found and not _alive(int(found[1])):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def follow_umask(folder: Path) -> None:
    """Give the files of a folder the mode that a new file has: some libraries write for the owner
    alone."""
    aside = aside_of(folder / "mode")
    try:
        aside.touch()
        mode = aside.stat().st_mode & 0o777
    finally:
        aside.unlink(missing_ok=True)
    for file in folder.iterdir():
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically by indented JSON; floats read back exactly; a NaN is an error and
    not a file nobody can read."""
    write_bytes(path, as_json(value))


def as_json(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file that may have been damaged. Raises ValueError for anything else."""
    return as_object(path.read_bytes())


def as_object(content: bytes) -> dict[str, Any]:
    """The same of what was read."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} where an object is expected")
    return value


def sync_folder(folder: Path) -> None:
    """Make renames within `folder` durable."""
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link(path: Path, target: Path) -> None:
    """Make `path` a symbolic link to `target`, relative so that both can move together."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    aside.unlink(missing_ok=True)
    aside.symlink_to(os.path.relpath(target.resolve(), path.parent.resolve()))
    aside.rename(path)


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file for this process alone, unless another has it. The lock is the kernel's
    (flock): it ends with the process that held it, however that ended."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take_lock(path: Path) -> IO[str] | None:
    """The file `path`, open and locked for this process alone; None where another has it, or
    deleted it meanwhile: what is locked then keeps nobody out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    if try_lock(file) and identity(path) == _identity(os.fstat(file.fileno())):
        return file
    file.close()
    return None


def identity(path: Path) -> tuple[int, int] | None:
    """Which file a path is, as long as somebody has it open; None where there is none."""
    try:
        return _identity(path.stat())
    except FileNotFoundError:
        return None


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[IO[str]]:
    """Hold the lock that the file `path` is, for this process alone; gives that file, open. While
    another has it, `waiting` is called again and again; what it raises ends the wait."""
    while (file := take_lock(path)) is None:
        waiting()
        time.sleep(0.2)
    with file:
        yield file


@contextlib.contextmanager
def making(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold the lock of a file that is made once, whoever needs it. Gives whether it is still to be
    made; what kills left of it is gone. `waiting` is as for `locked`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock"), waiting):
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            left.unlink(missing_ok=True)
        yield not path.exists()


@contextlib.contextmanager
def at_work(folder: Path) -> Iterator[Callable[[], contextlib.AbstractContextManager[bool]]]:
    """Say that this process works in `folder`, as others may too. What is given is a context that
    keeps others out, and says whether this process is the only one; where that cannot be known, it
    is not."""
    handle = os.open(folder, os.O_RDONLY)

    @contextlib.contextmanager
    def alone() -> Iterator[bool]:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
        fcntl.flock(handle, fcntl.LOCK_SH)

    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield alone
    finally:
        os.close(handle)


def in_use(folder: Path) -> bool:
    """Whether any process is at work in a folder, which it said by `at_work`."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


class JsonLines:
    """A log of one JSON object a line, each with a "step". Opening it cuts it back to the step a
    run continues from."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        kept = [line for line in read_lines(path) if line["step"] <= step] if step else []
        write_bytes(path, b"".join(orjson.dumps(line) + b"\n" for line in kept))
        self._file = path.open("ab")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append. Floats are written shortest that reads back exactly; a NaN becomes null."""
        self._file.write(orjson.dumps(line) + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Make all lines so far durable, before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line torn by a crash is left out; no file, no
    lines."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield orjson.loads(line)
