"""WebDataset tars: a sample is the members that share a key."""

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from doremi_train.config import UserError
from doremi_train.data.corpus import opening, records
from doremi_train.data.corpus.opening import CHUNK, BadLines, Piece, Source
from doremi_train.data.options import DataOptions


def read_tar(source: Source, options: DataOptions, bad: BadLines) -> Iterator[Piece]:
    """A webdataset: KEY.txt is the text of a sample, else the text key of KEY.json; nothing is
    written to disk."""
    samples = 0
    with opening.open_file(source.url, options) as stream:
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
                    yield from records.record_text(
                        pending[1],
                        source,
                        options,
                        f"{source.url}, member {pending[0] + '.json'!r}",
                        bad,
                    )
                    pending = None
                content = cast(BinaryIO, archive.extractfile(member))
                if ending == ".txt":
                    domain = records.domain_of(
                        pending[1] if pending else {}, source, options, place, bad
                    )
                    if domain is not None:
                        yield from records.document(
                            domain, source.split, records.decode(content, place)
                        )
                    pending, done = None, key
                elif key != done:
                    record = records.parse(content.read(records.LINE + 1), place, bad)
                    pending = None if record is None else (key, record)
            if pending:
                yield from records.record_text(
                    pending[1],
                    source,
                    options,
                    f"{source.url}, member {pending[0] + '.json'!r}",
                    bad,
                )
        tail.finish()
    if not samples:
        raise UserError(
            f"{source.url}: no KEY.txt and no KEY.json in this tar; give a webdataset of texts"
        )


def _split_name(member: tarfile.TarInfo, url: str) -> tuple[str, str]:
    """(KEY, ending); the ending is empty where the member is no regular file."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(
            f"{url}: member {member.name!r} points outside the archive; write the tar with "
            "relative names"
        )
    return str(name.with_suffix("")) if name.suffix else str(
        name
    ), name.suffix if member.isreg() else ""


class _Tail:
    """A stream that remembers its end: tarfile takes a tar that was cut between two members for a
    whole one."""

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
