"""Reading: the documents of one file in bounded memory, whatever its format and size.

Every file opens through fsspec: a local path, or a URL of a protocol that does nothing but transfer bytes.
"""

import codecs
import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from doremi_train.config import UserError, flatten
from doremi_train.data import installed, megatron, planted
from doremi_train.data.options import Options
from doremi_train.remote import PIPE, PROTOCOLS, filesystem, harmless, one_line

READER = 1  # raise when the same files would give other documents: data prepared before is then not reused
PIECE = 4_000_000  # characters (or tokens) of a document handed on together
LINE = 1 << 26  # bytes of one JSON record: more would not fit the memory once decoded
CHUNK = 1 << 20  # bytes read together
BATCH = 1 << 24  # bytes of parquet rows decoded together, about
CODECS = {"zst": "zstd", "gz": "gzip"}
INSTALLED = "installed:"
PLANTED = "planted:"


class Piece(NamedTuple):
    """A document, or a part of a giant one."""

    domain: str
    split: str | None  # "train", "validation", or None: the caller splits by hash of the text
    text: str | None  # None where already tokenised
    tokens: np.ndarray | None  # (n,) already tokenised
    last: bool  # False: the next piece continues the same document


@dataclass(frozen=True)
class Source:
    """One file."""

    url: str  # absolute local path, fsspec URL, pipe:COMMAND, or installed:DOMAIN/SPLIT, or planted:…
    domain: str | None  # None: the record's data.domain_key says
    split: str | None  # as in Piece
    size: int  # bytes; 0 where unknown
    version: str  # time of change in ns for local files; ETag or the like for remote ones; "" if nothing is known


class BadLines:
    """Counts broken JSON lines over the whole preparation."""

    def __init__(self, options: Options) -> None:
        self.most = options.max_bad_lines
        self.count = 0

    def add(self, url: str, line_number: int, why: str) -> None:
        """Count one more. Raises UserError naming file and line once more than data.max_bad_lines were met."""
        self.count += 1
        if self.count > self.most:
            raise UserError(
                f"{url}, line {line_number}: broken JSON line: {why}; data.max_bad_lines={self.most} are allowed "
                "in all: mend the file, or raise data.max_bad_lines to skip and count such lines"
            )


def read(source: Source, options: Options, bad: BadLines) -> Iterator[Piece]:
    """The documents of one source, in its order; empty ones are skipped.

    Raises UserError for a file that is truncated, corrupt, unreadable or not as the options say.
    """
    with _whole(source):
        yield from _reader(source.url)(source, options, bad)


def records(source: Source, options: Options, bad: BadLines) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Domain, line (from 1) and JSON object of every line of a source of JSON lines.

    Raises UserError as `read` does, and for a file of another kind.
    """
    if _reader(source.url) is not _read_jsonl:
        allowed = " ".join(ending for ending, reader in READERS.items() if reader is _read_jsonl)
        raise UserError(f"{source.url}: not a file of JSON lines, which are needed here; allowed are {allowed}")
    with _whole(source):
        for number, record in _objects(source, options, bad):
            yield _domain(record, source, options, f"{source.url}, line {number}"), number, record


@contextmanager
def _whole(source: Source) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ImportError, UnicodeDecodeError, tarfile.TarError, pa.ArrowException) as error:
        raise UserError(
            f"{source.url}: truncated or corrupt, or it cannot be read ({one_line(error)}); "
            "write or copy this file again"
        ) from error


# Opening


def file_system(url: str, key: str, options: Options) -> tuple[Any, str]:
    """(file system, path in it). Raises UserError for a protocol that may run code, or that is not installed."""
    if not harmless(url):
        refuse_command(url, key, options)
    return filesystem(url, key, odd=True)


def refuse_command(url: str, key: str, options: Options) -> None:
    if not options.allow_pipe:
        raise UserError(
            f"{key}={url!r}: refused, because it may run a command on this machine; allowed are paths and "
            f"{', '.join(PROTOCOLS)} URLs; if you wrote this list yourself, set data.allow_pipe=true"
        )


@contextmanager
def _open(url: str, options: Options) -> Iterator[BinaryIO]:
    """Bytes of a file, decompressed by its ending, or of a command."""
    if url.startswith(PIPE):
        with _command(url) as stream:
            yield stream
        return
    fs, path = file_system(url, "data", options)
    with fs.open(path, "rb") as raw:
        stream = io.BufferedReader(raw, CHUNK)  # remote files read lines slowly by themselves
        codec = CODECS.get(str(ending_of(url)).rpartition(".")[-1])
        yield cast(BinaryIO, _decompress(stream, codec) if codec else stream)


def _decompress(stream: io.BufferedReader, codec: str) -> io.BufferedReader:
    """Arrow's streams read all frames of a file and, unlike others, raise where the last one is cut short."""
    if not stream.peek(1):
        raise EOFError("the file is empty")
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, "r"), codec), CHUNK)


@contextmanager
def _command(url: str) -> Iterator[BinaryIO]:
    """Output of `pipe:COMMAND`. Raises UserError where the command, or any part of its pipeline, fails.

    A terminal and Slurm tell all processes to stop; here the reader decides when, and the command does not listen.
    """
    shell = [
        shutil.which("bash") or "sh",
        "-c",
        f"trap '' INT TERM USR1 USR2; (set -o pipefail) 2>/dev/null && set -o pipefail; {url.removeprefix(PIPE)}",
    ]
    with subprocess.Popen(shell, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            yield cast(BinaryIO, process.stdout)
            if process.wait():
                raise UserError(f"{url}: the command ended with status {process.returncode}; run it by hand to see why")
        finally:
            process.kill()  # whoever stops reading early wants no more of it


# Reading


def _read_jsonl(source: Source, options: Options, bad: BadLines) -> Iterator[Piece]:
    for number, record in _objects(source, options, bad):
        yield from _record(record, source, options, f"{source.url}, line {number}")


def _objects(source: Source, options: Options, bad: BadLines) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open(source.url, options) as stream:
        for number, line in _lines(stream):
            record = _parse(line, source.url, number, bad)
            if record is not None:
                yield number, record


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) without blank lines; of a line longer than LINE only LINE + 1 bytes are kept."""
    number = 0
    while line := stream.readline(LINE + 1):
        number += 1
        rest = line
        while len(rest) >= LINE and not rest.endswith(b"\n"):
            rest = stream.readline(LINE)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.isspace():
            yield number, line


def _parse(data: bytes, place: str, number: int, bad: BadLines) -> dict[str, Any] | None:
    """The JSON object in `data`; None, and one more bad line, where there is none."""
    if len(data) > LINE:
        bad.add(place, number, f"longer than {LINE} bytes")
        return None
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        bad.add(place, number, one_line(error))
        return None
    if not isinstance(record, dict):
        bad.add(place, number, f"a JSON object is needed, this is a {type(record).__name__}")
        return None
    return record


def _read_parquet(source: Source, options: Options, bad: BadLines) -> Iterator[Piece]:
    columns = [options.text_key] if source.domain is not None else [options.text_key, str(options.domain_key)]
    with _open(source.url, options) as stream:
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=CHUNK)  # pages as they are needed, not row groups
        names = [file.schema.column(index).path for index in range(len(file.schema))]
        for key, column in zip(("data.text_key", "data.domain_key"), columns, strict=False):
            if column not in names:
                raise UserError(_no_key(key, column, source.url, names))
        number = 0
        for batch in file.iter_batches(_rows(file.metadata), columns=columns):
            for record in batch.to_pylist():
                number += 1
                yield from _record(record, source, options, f"{source.url}, row {number}")


def _rows(metadata: pq.FileMetaData) -> int:
    """Rows of about BATCH bytes, by the mean row of the fattest row group."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    mean = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1)
    return int(min(max(BATCH / max(mean, 1), 1), 1024))


def _read_text(source: Source, options: Options, bad: BadLines) -> Iterator[Piece]:
    with _open(source.url, options) as stream:
        yield from _document(str(source.domain), source.split, _decode(stream, source.url))


def _decode(stream: BinaryIO, place: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # drops a byte order mark
    position = 0
    while chunk := stream.read(CHUNK):
        yield _decoded(decoder, chunk, place, position)
        position += len(chunk)
    yield _decoded(decoder, b"", place, position)


def _decoded(decoder: codecs.IncrementalDecoder, chunk: bytes, place: str, position: int) -> str:
    pending = len(decoder.getstate()[0])  # bytes of a character that began in the chunk before
    try:
        return decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        where = position - pending + error.start
        raise UserError(
            f"{place}: invalid UTF-8 at byte {where} ({error.reason}); convert the file to UTF-8"
        ) from error


def _read_tar(source: Source, options: Options, bad: BadLines) -> Iterator[Piece]:
    """A webdataset: KEY.txt is the text of a sample, else the text key of KEY.json; nothing is written to disk."""
    samples = 0
    with _open(source.url, options) as stream:
        tail = _Tail(stream)
        pending: tuple[str, dict[str, Any]] | None = None  # a KEY.json whose KEY.txt may follow
        done = ""  # the KEY whose text has been read
        with tarfile.open(fileobj=cast(BinaryIO, tail), mode="r|") as archive:
            for member in archive:
                key, ending = _split_name(member, source.url)
                if ending not in (".txt", ".json"):
                    continue
                samples += 1
                place = f"{source.url}, member {member.name!r}"
                if pending and pending[0] != key:
                    yield from _record(pending[1], source, options, f"{source.url}, member {pending[0] + '.json'!r}")
                    pending = None
                content = cast(BinaryIO, archive.extractfile(member))
                if ending == ".txt":
                    domain = _domain(pending[1] if pending else {}, source, options, place)
                    yield from _document(domain, source.split, _decode(content, place))
                    pending, done = None, key
                elif key != done:
                    record = _parse(content.read(LINE + 1), place, 1, bad)
                    pending = None if record is None else (key, record)
            if pending:
                yield from _record(pending[1], source, options, f"{source.url}, member {pending[0] + '.json'!r}")
        tail.finish()
    if not samples:
        raise UserError(f"{source.url}: no KEY.txt and no KEY.json in this tar; give a webdataset of texts")


def _split_name(member: tarfile.TarInfo, url: str) -> tuple[str, str]:
    """(KEY, ending); the ending is empty where the member is no regular file."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{url}: member {member.name!r} points outside the archive; write the tar with relative names")
    return str(name.with_suffix("")) if name.suffix else str(name), name.suffix if member.isreg() else ""


class _Tail:
    """A stream that remembers its end: tarfile takes a tar that was cut between two members for a whole one."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.end = b""

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.end = (self.end + data)[-tarfile.BLOCKSIZE :]
        return data

    def finish(self) -> None:
        """Raises EOFError where the blocks of zeros that end a tar are missing."""
        while self.read(CHUNK):
            pass
        if self.end.strip(b"\0"):
            raise EOFError("the end of the archive is missing")


def _read_megatron(source: Source, options: Options, bad: BadLines) -> Iterator[Piece]:
    path = index_of(source.url)
    try:
        index = megatron.open_index(_bytes_of(path, options))
    except ValueError as error:
        raise UserError(f"{path}: corrupt index ({error}); write {source.url} and its .idx again") from error
    if source.size and source.size != megatron.total_bytes(index):
        raise EOFError(f"{source.size} bytes, but its .idx says {megatron.total_bytes(index)}")
    with _open(source.url, options) as stream:
        try:
            for tokens, last in megatron.documents(index, stream, PIECE):
                yield Piece(str(source.domain), source.split, None, tokens, last)
        except ValueError as error:
            raise UserError(f"{source.url}: {error}; tokens are ids from 0; write the file again") from error


def _bytes_of(url: str, options: Options) -> np.ndarray:
    """(n,) uint8: memory-mapped where the file is local."""
    fs, path = file_system(url, "data", options)
    if isinstance(fs, LocalFileSystem) and fs.size(path):
        return np.memmap(path, np.uint8, "r")
    return np.frombuffer(fs.cat_file(path), np.uint8)


def _read_installed(source: Source, options: Options, bad: BadLines) -> Iterator[Piece]:
    domain, split = source.url.removeprefix(INSTALLED).split("/")
    for _, text in installed.texts(installed.listing(domain, split, options.validation_fraction)):
        yield from _document(domain, split, [text])


def _read_planted(source: Source, options: Options, bad: BadLines) -> Iterator[Piece]:
    domain, split = source.url.removeprefix(PLANTED).split("/")
    for text in planted.texts(domain, split, options.validation_fraction):
        yield from _document(domain, split, [text])


def _reader(url: str) -> Callable[[Source, Options, BadLines], Iterator[Piece]]:
    if url.startswith(INSTALLED):
        return _read_installed
    if url.startswith(PLANTED):
        return _read_planted
    return _read_jsonl if url.startswith(PIPE) else READERS[str(ending_of(url))]


READERS: dict[str, Callable[[Source, Options, BadLines], Iterator[Piece]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json.zst": _read_jsonl,
    ".json.gz": _read_jsonl,
    ".parquet": _read_parquet,
    ".tar": _read_tar,
    ".txt": _read_text,
    ".bin": _read_megatron,
}


def ending_of(url: str) -> str | None:
    """The ending by which a file is read; None where it is none of READERS."""
    name = url.partition("?")[0] if url.startswith("http") else url
    return next((ending for ending in READERS if name.lower().endswith(ending)), None)


def index_of(path: str) -> str:
    """The file that belongs to one of Megatron's."""
    return path[: -len(".bin")] + ".idx"


# Records


def _record(record: dict[str, Any], source: Source, options: Options, place: str) -> Iterator[Piece]:
    domain = _domain(record, source, options, place)
    text = _field(record, options.text_key, "data.text_key", place)
    yield from _document(domain, source.split, [text])


def _domain(record: dict[str, Any], source: Source, options: Options, place: str) -> str:
    """The source's domain, else the one that the record names."""
    if source.domain is not None:
        return source.domain
    domain = _field(record, str(options.domain_key), "data.domain_key", place)
    if not domain:
        raise UserError(f"data.domain_key={options.domain_key!r}: the domain is empty in {place}; name it there")
    return domain


def _field(record: dict[str, Any], key: str, option: str, place: str) -> str:
    """The string at a dotted key; a key that holds dots itself is found too."""
    value: Any = record
    for part in [key] if key in record else key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise UserError(_no_key(option, key, place, list(flatten(record))))
        value = value[part]
    if not isinstance(value, str):
        raise UserError(
            f"{option}={key!r}: a string is needed, {place} has a {type(value).__name__}; mend it, or name another key"
        )
    return value


def _no_key(option: str, key: str, place: str, keys: list[str]) -> str:
    there = ", ".join(sorted(keys)[:20]) or "none"
    return f"{option}={key!r}: no such key in {place}; the keys there: {there}; set {option} to the right one"


def _document(domain: str, split: str | None, chunks: Iterable[str]) -> Iterator[Piece]:
    """A document as pieces of at most PIECE characters: the same ones however its text arrives in chunks."""
    text = ""
    for chunk in chunks:
        text += chunk
        while len(text) > PIECE:
            cut = max(text.rfind(space, PIECE // 2, PIECE) for space in " \n\t") + 1 or PIECE
            yield Piece(domain, split, text[:cut], None, False)
            text = text[cut:]
    if text:
        yield Piece(domain, split, text, None, True)
