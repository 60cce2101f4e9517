"""Writing a token store: members collect in memory, shards grow in turn, and a journal says what of
them is whole.

The format is that of `data.tokens.shards`.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from doremi_train.config import UserError
from doremi_train.config import fingerprint as content_address
from doremi_train.data.tokens import tokenizer as tokenizers
from doremi_train.data.tokens.shards import (
    END_OF_TAR,
    INDEX,
    SCHEMA,
    SPLITS,
    Stream,
    domain_folder,
    read_manifest,
)
from doremi_train.data.tokens.verify import chained
from doremi_train.files import sync_folder, write_bytes
from doremi_train.storage import seal

_JOURNAL = "journal.jsonl"  # one line per member on disk; gone once the store is finished
BUFFER_BYTES = 256_000_000  # tokens waiting in memory, over all streams


@dataclass
class StreamState:
    """What the finished members of a stream hold."""

    members: int = 0
    pieces: int = 0  # how many pieces of the stream need not be tokenised again
    tokens: int = 0
    documents: int = 0
    bytes: int | None = 0  # UTF-8 bytes of the text; None: not known
    lost: int = 0  # and of what the tokeniser cannot write
    shards: list[int] = field(default_factory=list)  # size of each tar in bytes
    # Chained over the members: depends on the tokens, the ends and where members are divided.
    sha256: str = ""


@dataclass
class _Buffer:
    """The member that is being filled."""

    tokens: bytearray = field(default_factory=bytearray)
    ends: array = field(default_factory=lambda: array("q"))
    bytes: int | None = 0
    lost: int = 0
    pieces: int = 0

    @property
    def size(self) -> int:
        return len(self.tokens) + 8 * len(self.ends)


class Written(NamedTuple):
    """What stands in a store's folder, by stream."""

    folder: Path
    dtype: np.dtype
    streams: dict[Stream, StreamState]
    records: dict[Stream, list[dict[str, Any]]]  # of the journal, one a member
    folders: dict[Stream, str]  # of the shards, below the store's
    poured: dict[str, list[str]]  # domains that became one


class ShardWriter:
    """Appends pieces to streams. Killed at any time, a new writer on the same folder continues
    after the last member that reached the disk: the caller skips `held(stream)` pieces of each
    stream and appends the rest.

    What is written is a function of the order of the pieces alone. A member closes with the piece
    that reaches `member_tokens`, or early, the largest first, where all buffers together pass
    `buffer_bytes`.
    """

    def __init__(
        self,
        folder: Path,
        dtype: type[np.unsignedinteger],
        member_tokens: int,
        members_per_shard: int,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self.folder, self.dtype = folder, np.dtype(dtype).newbyteorder("<")
        self.member_tokens, self.members_per_shard, self.buffer_bytes = (
            member_tokens,
            members_per_shard,
            buffer_bytes,
        )
        self.streams: dict[Stream, StreamState] = {}
        self._buffers: dict[Stream, _Buffer] = {}
        self._buffered = 0
        self._journal = folder / _JOURNAL
        self._recover()

    def held(self, stream: Stream) -> int:
        """Pieces of the stream that are on disk."""
        return self.streams[stream].pieces if stream in self.streams else 0

    def append(
        self,
        stream: Stream,
        tokens: np.ndarray,
        ends_document: bool,
        text_bytes: int | None,
        lost: int = 0,
    ) -> None:
        """Add one piece: tokens (n,), whether a document ends after them, UTF-8 bytes of its text
        or None, and of what the tokeniser cannot write of it."""
        buffer = self._buffers.setdefault(stream, _Buffer())
        before = buffer.size
        buffer.tokens += tokens.astype(self.dtype, copy=False).tobytes()
        if ends_document:
            buffer.ends.append(len(buffer.tokens) // self.dtype.itemsize)
        buffer.bytes = _add(buffer.bytes, text_bytes)
        buffer.lost += lost
        buffer.pieces += 1
        self._buffered += buffer.size - before
        if len(buffer.tokens) >= self.member_tokens * self.dtype.itemsize:
            self._flush(stream)
        while self._buffered > self.buffer_bytes:
            self._flush(max(self._buffers, key=lambda key: (self._buffers[key].size, key)))

    def finish(self) -> None:
        """Write what is buffered and give every shard its name."""
        for stream in sorted(self._buffers):
            self._flush(stream)
        for stream, state in sorted(self.streams.items()):
            self._close_shard(stream, len(state.shards) - 1)

    def written(self) -> Written:
        """What is there after `finish`."""
        records: dict[Stream, list[dict[str, Any]]] = {}
        for record in self._records():
            records.setdefault(tuple(record["stream"]), []).append(record)
        folders = {stream: stream_folder(stream) for stream in self.streams}
        return Written(self.folder, self.dtype, dict(self.streams), records, folders, {})

    def read(self, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and ends of the member of this record, after `finish`."""
        stream = tuple(record["stream"])
        path = self.folder / stream_folder(stream) / f"{record['shard']:05d}.tar"
        with path.open("rb") as file:
            file.seek(record["offset"])
            tokens = np.frombuffer(file.read(record["tokens"] * self.dtype.itemsize), self.dtype)
            padding = -file.tell() % tarfile.BLOCKSIZE
            file.seek(padding + tarfile.BLOCKSIZE, os.SEEK_CUR)
            return tokens, np.load(file, allow_pickle=False)

    def _flush(self, stream: Stream) -> None:
        """Put the stream's buffer on disk as one member, then into the journal.

        In this order, so that the journal never promises what a power cut could take.
        """
        buffer = self._buffers.pop(stream)
        self._buffered -= buffer.size
        state = self.streams.get(stream, StreamState())
        shard, nth = divmod(state.members, self.members_per_shard)
        path = self._part(stream, shard)
        tokens, ends = np.frombuffer(buffer.tokens, self.dtype), np.array(buffer.ends, "<i8")
        head, body = _npy_parts(tokens)
        key = f"{state.members:08d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab" if nth else "wb") as file:
            offset = file.tell() + tarfile.BLOCKSIZE + len(head)
            file.write(
                _tar_entry(f"{key}.tokens.npy", head + body)
                + _tar_entry(f"{key}.ends.npy", _npy(ends))
            )
            size = file.tell()
            _sync(file)
        record = {
            "stream": stream,
            "shard": shard,
            "offset": offset,
            "size": size,
            "tokens": len(tokens),
            "documents": len(ends),
            "bytes": buffer.bytes,
            "lost": buffer.lost,
            "pieces": buffer.pieces,
            "sha256": chained(state.sha256, body, ends),
        }
        with self._journal.open("a") as file:
            file.write(json.dumps(record) + "\n")
            _sync(file)
        self._count(record)
        if nth == self.members_per_shard - 1:
            self._close_shard(stream, shard)

    def _count(self, record: dict[str, Any]) -> None:
        state = self.streams.setdefault(tuple(record["stream"]), StreamState())
        state.members += 1
        state.pieces += record["pieces"]
        state.tokens += record["tokens"]
        state.documents += record["documents"]
        state.bytes = _add(state.bytes, record["bytes"])
        state.lost += record.get("lost", 0)  # not in journals of earlier versions
        state.sha256 = record["sha256"]
        del state.shards[record["shard"] :]
        state.shards.append(record["size"] + len(END_OF_TAR))

    def _part(self, stream: Stream, shard: int) -> Path:
        return self.folder / stream_folder(stream) / f"{shard:05d}.tar.part"

    def _close_shard(self, stream: Stream, shard: int) -> None:
        part = self._part(stream, shard)
        if not part.exists():  # closed before
            return
        with part.open("ab") as file:
            file.write(END_OF_TAR)
            _sync(file)
        part.replace(part.with_suffix(""))
        sync_folder(part.parent)

    def _records(self) -> Iterator[dict[str, Any]]:
        return _read_journal(self._journal)

    def _recover(self) -> None:
        """Continue after the last journaled member: cut what a killed writer wrote behind it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._journal.exists():
            data = self._journal.read_bytes()
            os.truncate(self._journal, data.rfind(b"\n") + 1)
        for record in self._records():
            self._count(record)
        for stream, state in self.streams.items():
            shard = len(state.shards) - 1
            part = self._part(stream, shard)
            promised = state.shards[shard] - len(END_OF_TAR)
            for number, size in enumerate(state.shards[:-1]):
                self._expect(self._part(stream, number).with_suffix(""), size)
            closed = part.with_suffix("")
            if closed.exists() and closed.stat().st_size > state.shards[shard]:
                closed.replace(part)  # the journal lost what came after: it is written again
            if not part.exists():
                self._expect(closed, state.shards[shard])
                continue
            self._expect(part, promised, more=True)
            os.truncate(part, promised)
            if state.members % self.members_per_shard == 0:
                self._close_shard(stream, shard)

    def _expect(self, path: Path, size: int, more: bool = False) -> None:
        found = path.stat().st_size if path.exists() else -1
        if found < size or (found > size and not more):
            what = "is missing" if found < 0 else f"has {found} bytes where {size} were written"
            raise UserError(
                f"store: {path} {what}; delete {self.folder} and run again with stage=prepare"
            )


def stream_folder(stream: Stream) -> str:
    """Where the shards of a stream are written, below the store's folder."""
    split, domain = stream
    return f"{split}/{domain_folder(domain)}"


def _add(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def _npy_parts(values: np.ndarray) -> tuple[bytes, bytes]:
    """Header and data of a .npy file; the header's length is a multiple of 64, so that maps of the
    data are aligned."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(values))
    return head.getvalue(), values.tobytes()


def _npy(values: np.ndarray) -> bytes:
    return b"".join(_npy_parts(values))


def _tar_entry(name: str, data: bytes) -> bytes:
    """Header and padded data. A fresh TarInfo has no time, owner or user: the same data give the
    same bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def write_manifest(
    written: Written,
    tokenizer: Tokenizer,
    end_of_document: int,
    bad_lines: int,
    dropped: int,
    request: dict[str, Any],
) -> None:
    """Write index.npy and, last of all, manifest.json: only with it is a store finished."""
    domains = tuple(sorted({domain for _, domain in written.streams}))
    index = _write_index(written, domains)
    described = {
        domain: {split: _describe(written, (split, domain)) for split in SPLITS}
        for domain in domains
    }
    tokenised = {
        "fingerprint": tokenizers.fingerprint(tokenizer),
        "vocabulary_size": tokenizers.vocabulary_size(tokenizer),
        "end_of_document": end_of_document,
    }
    content = {
        domain: {split: described[domain][split]["sha256"] for split in SPLITS}
        for domain in domains
    }
    manifest = {
        "schema": SCHEMA,
        "fingerprint": content_address({"content": content, "tokenizer": tokenised}),
        "tokenizer": tokenised,
        "dtype": written.dtype.name,
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "domains": described,
        "bad_lines": bad_lines,
        "dropped_validation_duplicates": dropped,
        "request": request,
    } | ({"poured": written.poured} if written.poured else {})
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    write_bytes(written.folder / "manifest.json", text.encode())
    tidy(written.folder)


def tidy(folder: Path) -> None:
    """Remove what a finished store needs no more: domains that were poured into another, and then
    the journal, which says how to continue."""
    if not (folder / _JOURNAL).exists():
        return
    journal = folder / _JOURNAL
    domains = read_manifest(folder)["domains"]
    for stream in {tuple(record["stream"]) for record in _read_journal(journal)}:
        split, domain = stream
        if domains.get(domain, {}).get(split, {}).get("folder") != stream_folder(stream):
            shutil.rmtree(folder / stream_folder(stream), ignore_errors=True)
    journal.unlink()


def _read_journal(journal: Path) -> Iterator[dict[str, Any]]:
    if journal.exists():
        with journal.open() as lines:
            yield from map(json.loads, lines)


def _write_index(written: Written, domains: tuple[str, ...]) -> bytes:
    streams = [(split, domain) for split in SPLITS for domain in domains]
    columns = (
        (number, r["shard"], r["offset"], r["tokens"], r["documents"])
        for number, stream in enumerate(streams)
        for r in written.records.get(stream, ())
    )
    index = np.fromiter(columns, INDEX)
    index = index[np.lexsort((index["offset"], index["shard"], index["stream"]))]
    data = _npy(index)
    write_bytes(written.folder / "index.npy", data)
    return data


def _describe(written: Written, stream: Stream) -> dict[str, Any]:
    state = written.streams.get(stream, StreamState())
    folder = written.folders.get(stream, stream_folder(stream))
    return {
        "folder": folder,
        "tokens": state.tokens,
        "documents": state.documents,
        "bytes": state.bytes,
        "unwritable_bytes": state.lost,
        "members": state.members,
        "shards": len(state.shards),
        "shard_bytes": state.shards,
        "shard_samples": [
            seal.sample_of(written.folder / folder / f"{number:05d}.tar")
            for number in range(len(state.shards))
        ],
        "sha256": state.sha256,
    }
