"""The second home of a store, in an object store or on a network file system."""

import copy
import hashlib
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from doremi_train.config import UserError
from doremi_train.files import aside_of, clear_dead, sync_folder
from doremi_train.redaction import redact
from doremi_train.storage import steady, urls


class Torn(Exception):
    """What came back is not what was put there."""


class Mirror:
    """A folder's second home, at a path or URL. A file goes there, and comes back, whole or not at
    all."""

    def __init__(self, url: str, key: str = "remote") -> None:
        self.key, self.url = key, redact(url.rstrip("/"))  # for messages
        self._fs, self._path = urls.filesystem(url.rstrip("/"), key)

    def at(self, *parts: str) -> "Mirror":
        """The home of a sub-folder."""
        other = copy.copy(self)
        other.url, other._path = "/".join((self.url, *parts)), "/".join((self._path, *parts))
        return other

    def prove(self) -> None:
        """Raises UserError where nothing can be written, before hours of work depend on it."""
        with urls.reaching(self.url, self.key):
            if isinstance(self._fs, LocalFileSystem):
                self._fs.makedirs(self._path, exist_ok=True)
            self._fs.pipe_file(
                f"{self._path}/.doremi", b"A second home of token shards and runs.\n"
            )

    def sizes(self) -> dict[str, int]:
        """Bytes of every file there, by its name relative to the folder.

        Raises UserError for a name that leads out of the folder.
        """
        with urls.reaching(self.url, self.key):
            self._fs.invalidate_cache()
            try:
                entries = self._fs.find(self._path, detail=True)
            except FileNotFoundError:
                return {}
        start = len(self._path) + 1
        names = {path[start:]: entry["size"] for path, entry in entries.items()}
        for name in names:
            self._within(name)
        return {name: size for name, size in names.items() if not name.endswith(".partial")}

    def has(self, name: str) -> bool:
        with urls.reaching(self.url, self.key):
            self._fs.invalidate_cache()
            return self._fs.isfile(f"{self._path}/{name}")

    def read(self, name: str) -> bytes | None:
        """Content of a small file; None where it is not there."""
        with urls.reaching(self.url, self.key):
            try:
                return self._fs.cat_file(f"{self._path}/{name}")
            except FileNotFoundError:
                return None

    def clear_dead(self) -> None:
        """Remove what killed processes of this machine left half-written there: a store of objects
        has nothing of the kind."""
        if isinstance(self._fs, LocalFileSystem):
            clear_dead(Path(self._path))

    def push(self, folder: Path, names: Iterable[str]) -> None:
        """Copy `folder`/name there, in this order: the name that says that all is there comes
        last."""
        for name in names:
            target = f"{self._path}/{name}"
            with urls.reaching(f"{self.url}/{name}", self.key):
                if isinstance(self._fs, LocalFileSystem):
                    with (folder / name).open("rb") as source:
                        _write_aside(Path(target), source, None, None)
                else:
                    self._fs.put_file(str(folder / name), target)

    def pull(
        self, folder: Path, name: str, size: int | None = None, sha256: str | None = None
    ) -> None:
        """Copy name to `folder`/name. Raises Torn where it has not the size or the checksum that it
        must have, and UserError for a name that leads out of the folder."""
        self._within(name)
        with (
            urls.reaching(f"{self.url}/{name}", self.key),
            self._fs.open(f"{self._path}/{name}", "rb") as source,
        ):
            _write_aside(folder / name, source, size, sha256)

    def _within(self, name: str) -> None:
        """Objects may have any name, and what names them here comes from there."""
        parts = name.split("/")
        if {"", ".", ".."} & {*parts} or "\0" in name or PurePosixPath(name).is_absolute():
            raise UserError(
                f"{self.key}={self.url}: names a file {name!r}, which leads out of its folder; "
                "nothing of ours has such a name, so delete it there"
            )

    def remove(self, names: Iterable[str]) -> None:
        """Delete files there; those that are gone already are none of our business."""
        for name in names:
            with urls.reaching(f"{self.url}/{name}", self.key), suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._path}/{name}")


def _write_aside(path: Path, source: Any, size: int | None, sha256: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    try:
        with aside.open("w+b") as file:
            shutil.copyfileobj(source, file, steady.CHUNK)
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
