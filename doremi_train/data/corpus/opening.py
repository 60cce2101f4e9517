"""Opening a file of a corpus: a local path, or a URL of a protocol that does nothing but transfer
bytes (fsspec), or a command that the user allowed; decompressed on the way, in bounded memory.
"""

import gzip
import io
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa

from doremi_train.config import UserError
from doremi_train.console import say
from doremi_train.data.options import DataOptions
from doremi_train.storage.urls import PIPE, PROTOCOLS, filesystem, harmless

# By ending, 1 where none stands here. Raise it when the same files would give other documents: data
# prepared before is then not reused.
READER_VERSION = {".tar": 2}
CHUNK = 1 << 20  # bytes read together
KINDS, NAMED = 10, 5  # of what is passed over: kinds that are listed, and names of each
CODECS = {"zst": "zstd", "gz": "gzip"}


class Piece(NamedTuple):
    """A document, or a part of a giant one."""

    domain: str
    split: str | None  # "train", "validation", or None: the caller splits by hash of the text
    text: str | None  # None where already tokenised
    tokens: np.ndarray | None  # (n,) already tokenised
    last: bool  # False: the next piece continues the same document
    row: int = -1  # of the document in its file, from 0; −1: it is counted


@dataclass(frozen=True)
class Source:
    """One file."""

    url: str  # absolute local path, fsspec URL, pipe:COMMAND, installed:DOMAIN/SPLIT, or planted:…
    domain: str | None  # None: the record's data.domain_key says
    split: str | None  # as in Piece
    size: int  # bytes; 0 where unknown
    # Time of change in ns for local files; ETag or the like for remote ones; "" if unknown.
    version: str


class PassedOver:
    """Counts by kind what stands in a source and is not read."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[str]] = {}  # the first names of each
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, name: str) -> None:
        self._counts[kind] += 1
        names = self._kinds.setdefault(kind, [])
        if len(names) < NAMED:
            names.append(name)

    def say(self, rule: str) -> None:
        """Print the line, with the `rule` that tells what is read; nothing where nothing was passed
        over."""
        if self._counts:
            say(f"data: not read, since {rule}: {self}")

    def __str__(self) -> str:
        """One line of all kinds; empty where nothing was passed over."""
        parts = [
            f"{count} {kind} ({', '.join(self._kinds[kind])}{', …' if count > NAMED else ''})"
            for kind, count in self._counts.most_common(KINDS)
        ]
        rest = sum(self._counts.values()) - sum(n for _, n in self._counts.most_common(KINDS))
        return "; ".join([*parts, f"{rest} of other kinds"] if rest else parts)


class BadLines:
    """Counts broken JSON lines and records without text over the whole preparation, and what is
    passed over in its files."""

    def __init__(self, options: DataOptions) -> None:
        self.passed_over = PassedOver()
        self.most = options.max_bad_lines
        self.count = 0
        self.first = ""  # what is wrong with the first one, and where

    def add(self, what: str) -> None:
        """Count one more, of which `what` says where it is and what is wrong. Raises UserError once
        more than data.max_bad_lines were met."""
        self.count += 1
        self.first = self.first or what
        if self.count > self.most:
            raise UserError(
                f"{what}; data.max_bad_lines={self.most} are allowed in all: mend the file, or "
                "raise data.max_bad_lines to skip and count such lines and records"
            )


def require_few(bad_lines: int, options: DataOptions) -> None:
    """Raise UserError where the workers met more broken lines in all than are allowed."""
    if bad_lines > options.max_bad_lines:
        raise UserError(
            f"data.max_bad_lines={options.max_bad_lines}: there are {bad_lines} broken JSON lines "
            "in all; mend the files, or raise data.max_bad_lines to skip and count such lines"
        )


def file_system(url: str, key: str, options: DataOptions) -> tuple[Any, str]:
    """(file system, path in it). Raises UserError for a protocol that may run code, or that is not
    installed."""
    if not harmless(url):
        refuse_command(url, key, options)
    return filesystem(url, key, odd=True)


def refuse_command(url: str, key: str, options: DataOptions) -> None:
    if not options.allow_pipe:
        raise UserError(
            f"{key}={url!r}: refused, because it may run a command on this machine; allowed are "
            f"paths and {', '.join(PROTOCOLS)} URLs; if you wrote this list yourself, set "
            "data.allow_pipe=true"
        )


@contextmanager
def open_file(url: str, options: DataOptions) -> Iterator[BinaryIO]:
    """Bytes of a file, decompressed by its ending, or of a command."""
    if url.startswith(PIPE):
        with _command(url) as stream:
            yield stream
        return
    fs, path = file_system(url, "data", options)
    with fs.open(path, "rb") as raw:
        stream = io.BufferedReader(raw, CHUNK)  # remote files read lines slowly by themselves
        codec = CODECS.get(without_query(url).lower().rpartition(".")[-1])
        yield cast(BinaryIO, _decompress(stream, codec) if codec else stream)


def without_query(url: str) -> str:
    """A URL up to its file's name: what follows a ? of http is no ending."""
    return url.partition("?")[0] if url.startswith("http") else url


def _decompress(stream: io.BufferedReader, codec: str) -> io.BufferedReader:
    """Python's gzip passes over the zeros after the last member that tapes and copies leave there;
    Arrow's streams read all frames of a zstd file and, unlike others, raise where the last one is
    cut short."""
    if not stream.peek(1):
        raise EOFError("the file is empty")
    if codec == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=stream, mode="rb"), CHUNK)
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, "r"), codec), CHUNK)


@contextmanager
def _command(url: str) -> Iterator[BinaryIO]:
    """Output of `pipe:COMMAND`. Raises UserError where the command, or any part of its pipeline,
    fails.

    A terminal and Slurm tell all processes to stop; here the reader decides when, and the command
    does not listen.
    """
    shell = [
        shutil.which("bash") or "sh",
        "-c",
        "trap '' INT TERM USR1 USR2; (set -o pipefail) 2>/dev/null && set -o pipefail; "
        f"{url.removeprefix(PIPE)}",
    ]
    with subprocess.Popen(shell, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            yield cast(BinaryIO, process.stdout)
            if process.wait():
                raise UserError(
                    f"{url}: the command ended with status {process.returncode}; run it by hand to "
                    "see why"
                )
        finally:
            process.kill()  # whoever stops reading early wants no more of it
