"""Sources: from the data options to one ordered, deterministic stream of documents.

`resolve` lists the files, `read` streams one of them in bounded memory, whatever its size. Every file opens through
fsspec: a local path, or a URL of a protocol that does nothing but transfer bytes.
"""

import codecs
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from doremi_train.config import UserError, flatten, redact
from doremi_train.data import installed, megatron, planted
from doremi_train.data.options import Options
from doremi_train.remote import PIPE, PROTOCOLS, filesystem, harmless, one_line, reaching

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


def resolve(options: Options) -> list[Source]:
    """The files to read, sorted by domain, split and name.

    Raises UserError for everything wrong that can be seen without reading them.
    """
    given = [key for key in ("root", "domains", "files") if getattr(options, key) is not None]
    if len(given) > 1:
        raise UserError(
            f"data.{' and data.'.join(given)}: only one of data.root, data.domains, data.files; remove the others"
        )
    if options.domain_key is not None and given != ["files"]:
        raise UserError(
            f"data.domain_key={options.domain_key!r}: it divides data.files; give data.files, or remove data.domain_key"
        )
    if options.root is not None:
        sources = _from_root(options.root, options)
    elif options.domains is not None:
        sources = _from_domains(options)
    elif options.files is not None:
        sources = _from_files(options)
    elif options.embedded == "planted":
        sources = _from_planted()
    elif options.embedded is not None:
        sources = _from_installed(options)
    else:
        raise UserError("data: nothing to read; give data.root, data.domains, data.files or data.embedded=installed")
    sources.sort(key=lambda source: (source.domain or "", source.split or "", source.url))
    _refuse_twice(sources)
    return sources


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


def signature(options: Options, sources: list[Source]) -> dict[str, Any]:
    """A JSON value that changes with any source file or reading option: the content address of what is prepared.

    Files of data.root are named relative to it, so that the folder may move.
    """
    files = {
        name: {"domain": source.domain, "split": source.split, "size": source.size, "version": source.version}
        for name, source in zip(names(options, sources), sources, strict=True)
    }
    return {"reader": READER, "text_key": options.text_key, "domain_key": options.domain_key, "files": files}


def names(options: Options, sources: list[Source]) -> list[str]:
    """A name for every source: its URL, or its path in data.root, so that the folder may move."""
    found: dict[str, None] = {}
    for source in sources:
        name = redact(source.url)  # a password that changed is not another file
        name = "/".join(name.split("/")[-2:]) if options.root is not None else name
        while name in found:  # addresses that differ only in what is not shown
            name += " (again)"
        found[name] = None
    return list(found)


# Which files


def _from_root(root: str, options: Options) -> list[Source]:
    fs, path = _filesystem(root, "data.root", options)
    with reaching(root, "data.root"):
        if not root or not fs.isdir(path):
            raise UserError(f"data.root={root!r}: no such folder; give the folder whose sub-folders are the domains")
        folders = [entry for entry in _entries(fs, path) if _is_folder(fs, entry)]
        if not folders:
            raise UserError(
                f"data.root={root!r}: no domain in it; each domain is a sub-folder with train* files ({_allowed()})"
            )
        return [source for folder in folders for source in _from_folder(fs, folder["name"])]


def _from_folder(fs: Any, folder: str) -> list[Source]:
    """One domain of data.root."""
    domain = _base(folder)
    found: dict[str, list[str]] = {"train": [], "validation": []}
    for entry in _entries(fs, folder):
        for split, paths in found.items():
            if (
                _base(entry["name"]).startswith(split)
                and not entry["name"].endswith(".idx")
                and not _is_folder(fs, entry)
            ):
                paths.append(entry["name"])
    if not found["train"]:
        raise UserError(
            f"data.root: domain {domain!r} has no train* file directly in {folder}; "
            f"add one ({_allowed()}), or remove the folder"
        )
    splits = _splits(bool(found["validation"]))
    return [_source(fs, path, domain, splits[split], "data.root") for split in found for path in found[split]]


def _from_domains(options: Options) -> list[Source]:
    sources = []
    for domain, files in (options.domains or {}).items():
        splits = _splits(bool(files.validation))
        if not domain or not files.train:
            raise UserError(f"data.domains.{domain}.train={list(files.train)}: a domain needs a name and files")
        for split, patterns in (("train", files.train), ("validation", files.validation)):
            for pattern in patterns:
                sources += _match(pattern, domain, splits[split], f"data.domains.{domain}.{split}", options)
    if not sources:
        raise UserError("data.domains={}: no domain; give data.domains={NAME: {train: [FILES]}}")
    return sources


def _from_files(options: Options) -> list[Source]:
    if not options.files:
        raise UserError("data.files=[]: nothing to read; give globs, paths or URLs")
    if options.domain_key is None:
        raise UserError(
            "data.domain_key: missing; data.files needs the key that names a record's domain, such as meta.source"
        )
    sources = [source for pattern in options.files for source in _match(pattern, None, None, "data.files", options)]
    for source in sources:
        if not source.url.startswith(PIPE) and _ending(source.url) in (".txt", ".bin"):
            raise UserError(
                f"data.files: {source.url} has no records, so data.domain_key={options.domain_key!r} cannot name its "
                "domain; give data.domains"
            )
    return sources


def _from_installed(options: Options) -> list[Source]:
    sources = []
    for domain in installed.domains():
        for split in ("train", "validation"):
            documents = installed.listing(domain, split, options.validation_fraction)
            size = sum(document.size for document in documents)
            sources.append(Source(f"{INSTALLED}{domain}/{split}", domain, split, size, installed.version(documents)))
    if not sources:
        raise UserError("data.embedded=installed: this installation has too little text; give data.root")
    return sources


def _from_planted() -> list[Source]:
    return [
        Source(f"{PLANTED}{domain}/{split}", domain, split, planted.size(domain), planted.version(domain))
        for domain in planted.domains()
        for split in ("train", "validation")
    ]


def _splits(validation_given: bool) -> dict[str, str | None]:
    """Without validation files nobody has split the texts yet."""
    return {"train": "train" if validation_given else None, "validation": "validation"}


def _match(pattern: str, domain: str | None, split: str | None, key: str, options: Options) -> list[Source]:
    """Files of a path, glob or URL. Raises UserError where there is none."""
    if pattern.startswith(PIPE):
        _refuse_command(pattern, key, options)
        return [Source(pattern, domain, split, 0, "")]
    fs, path = _filesystem(pattern, key, options)
    with reaching(pattern, key):
        if fs.isfile(path):  # first: a name may hold glob characters
            return [_source(fs, path, domain, split, key, pattern)]
        if fs.isdir(path):
            raise UserError(
                f"{key}={pattern!r}: a folder, not a file; give {pattern.rstrip('/')}/*.ENDING ({_allowed()})"
            )
        magic = "*" if pattern.startswith("http") else "*?["  # a URL may have a ? query
        paths = sorted(fs.glob(path)) if any(character in path for character in magic) else []
        hidden = _base(path).startswith(".")
        paths = [found for found in paths if fs.isfile(found) and (hidden or not _base(found).startswith("."))]
        if not paths:
            raise UserError(f"{key}={pattern!r}: no such file, or the glob matches none; correct it or remove it")
        return [_source(fs, found, domain, split, key) for found in paths]


def _source(fs: Any, path: str, domain: str | None, split: str | None, key: str, url: str | None = None) -> Source:
    local = isinstance(fs, LocalFileSystem)
    url = path if local else url or fs.unstrip_protocol(path)
    ending = _ending(url)
    if ending is None:
        raise UserError(f"{key}: {url} has an unknown ending; allowed are {_allowed()}")
    version = _version(fs, path)
    if ending == ".bin":
        if not fs.isfile(_index_of(path)):
            raise UserError(f"{key}: {url} is without {_base(_index_of(path))}; put the .idx of this .bin beside it")
        version += " " + _version(fs, _index_of(path))
    return Source(url, domain, split, int(fs.info(path).get("size") or 0), version)


def _version(fs: Any, path: str) -> str:
    if isinstance(fs, LocalFileSystem):
        return str(Path(path).stat().st_mtime_ns)
    info = fs.info(path)
    keys = ("ETag", "etag", "md5Hash", "checksum", "LastModified", "last_modified", "updated", "mtime", "created")
    return next((str(info[key]) for key in keys if info.get(key)), "")


def _refuse_twice(sources: list[Source]) -> None:
    """A file listed twice would count twice, and might stand in training and validation."""
    seen: dict[str, Source] = {}
    for source in sources:
        file = os.path.realpath(source.url) if source.url.startswith("/") else source.url
        if file in seen:
            first, second = _place(seen[file]), _place(source)
            where = f"by {first} and by {second}" if first != second else f"by {first}: its patterns overlap"
            raise UserError(f"{file}: listed twice, {where}; list every file once")
        seen[file] = source


def _place(source: Source) -> str:
    return f"domain {source.domain!r} ({source.split or 'train'})" if source.domain is not None else "data.files"


def _entries(fs: Any, folder: str) -> list[dict[str, Any]]:
    entries = [entry for entry in fs.ls(folder, detail=True) if not _base(entry["name"]).startswith(".")]
    return sorted(entries, key=lambda entry: entry["name"])


def _is_folder(fs: Any, entry: dict[str, Any]) -> bool:
    return entry["type"] == "directory" or (bool(entry.get("islink")) and fs.isdir(entry["name"]))


def _base(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _ending(url: str) -> str | None:
    name = url.partition("?")[0] if url.startswith("http") else url
    return next((ending for ending in READERS if name.lower().endswith(ending)), None)


def _allowed() -> str:
    return " ".join(READERS)


def _index_of(path: str) -> str:
    return path[: -len(".bin")] + ".idx"


# Opening


def _filesystem(url: str, key: str, options: Options) -> tuple[Any, str]:
    """(file system, path in it). Raises UserError for a protocol that may run code, or that is not installed."""
    if not harmless(url):
        _refuse_command(url, key, options)
    return filesystem(url, key, odd=True)


def _refuse_command(url: str, key: str, options: Options) -> None:
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
    fs, path = _filesystem(url, "data", options)
    with fs.open(path, "rb") as raw:
        stream = io.BufferedReader(raw, CHUNK)  # remote files read lines slowly by themselves
        codec = CODECS.get(str(_ending(url)).rpartition(".")[-1])
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
    path = _index_of(source.url)
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
    fs, path = _filesystem(url, "data", options)
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
    return _read_jsonl if url.startswith(PIPE) else READERS[str(_ending(url))]


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
