"""WebDataset tars: a sample is the members that share a key and follow each other. A key ends at
the first dot of the base name; what comes after it is the field."""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from doremi_train.config import UserError
from doremi_train.data.corpus import opening, records
from doremi_train.data.corpus.opening import CHUNK, BadLines, Piece, Source
from doremi_train.data.options import DataOptions

# Endings of members that hold documents, or may: without KEY.txt or KEY.json beside them they are
# refused, and not passed over.
DOCUMENTS = re.compile(
    r"\.(txt|json|jsonl|ndjson|parquet|arrow|tar|tgz|zip)(\.(gz|zst|xz|bz2|lz4))?$", re.IGNORECASE
)


@dataclass
class _Sample:
    """What was met of a sample so far."""

    key: str
    texts: int = 0  # KEY.txt and KEY.json
    record: dict[str, Any] | None = None  # of a KEY.json whose KEY.txt may follow
    place: str = ""  # of the record
    broken: bool = False  # a KEY.json is no record
    fields: list[str] = field(default_factory=list)  # names of all other members


def read_tar(source: Source, options: DataOptions, bad: BadLines) -> Iterator[Piece]:
    """A webdataset: KEY.txt is the text of a sample, else the text key of KEY.json; nothing is
    written to disk. Members that are not read are counted by kind.

    Raises UserError for members that may be documents, but are neither.
    """
    texts = 0
    with opening.open_file(source.url, options) as stream:
        tail = _Tail(stream)
        sample, met = _Sample(""), set[tuple[str, str]]()
        with tarfile.open(fileobj=cast(BinaryIO, tail), mode="r|") as archive:
            members = iter(archive)
            for member in members:
                _require_inside(member, source.url)
                if _aside(member, source.url, bad):
                    continue
                key, ending = _split_name(member.name)
                if key != sample.key:
                    yield from _finished(sample, source, options, bad, chain([member], members))
                    sample = _Sample(key)
                place = f"{source.url}, member {member.name!r}"
                if ending not in ("txt", "json"):
                    sample.fields.append(member.name)
                    continue
                if not sample.texts:
                    _require_together(key, ending, met, place)
                met.add((key, ending))
                texts += 1
                sample.texts += 1
                content = cast(BinaryIO, archive.extractfile(member))
                if ending == "txt":
                    yield from _text(sample, content, source, options, bad, place)
                elif sample.texts == 1:
                    sample.place = place
                    sample.record = records.parse(content.read(records.LINE + 1), place, bad)
                    sample.broken = sample.record is None
            yield from _finished(sample, source, options, bad, ())
        tail.finish()
    if not texts:
        others = f" (not read so far: {bad.passed_over})" if str(bad.passed_over) else ""
        raise UserError(
            f"{source.url}: no KEY.txt and no KEY.json in this tar{others}; give a webdataset of "
            "texts"
        )


def _text(
    sample: _Sample,
    content: BinaryIO,
    source: Source,
    options: DataOptions,
    bad: BadLines,
    place: str,
) -> Iterator[Piece]:
    """The document of a KEY.txt; its domain is in the KEY.json before it, where the source names
    none."""
    if sample.broken and source.domain is None:
        return  # counted already
    if sample.record is None:
        place += " (no KEY.json stands before it)"
    record, sample.record = sample.record or {}, None
    domain = records.domain_of(record, source, options, place, bad)
    if domain is not None:
        yield from records.document(domain, source.split, records.decode(content, place))


def _finished(
    sample: _Sample,
    source: Source,
    options: DataOptions,
    bad: BadLines,
    rest: Any,
) -> Iterator[Piece]:
    """The document of a sample without KEY.txt; what else it has is counted.

    Raises UserError where it has neither KEY.txt nor KEY.json, but something that may be a
    document; `rest` are the members after it.
    """
    if sample.record is not None:
        yield from records.record_text(sample.record, source, options, sample.place, bad)
    unclear = [name for name in sample.fields if DOCUMENTS.search(name)]
    if unclear and not sample.texts:
        more = len(unclear) + sum(_unclear(member) for member in rest) - 1
        _, ending = _split_name(unclear[0])
        raise UserError(
            f"{source.url}: member {unclear[0]!r} is not read, and {more} more of such endings: "
            "documents of a tar are KEY.txt or KEY.json, and a key ends at the first dot of the "
            f"base name, so this is the field {ending!r} of the sample {sample.key!r}, which has "
            "no text; rename it (no other dot) if it is a document, unpack the tar (tar -xf) if "
            "it holds several, or take it out"
        )
    for name in sample.fields:
        _, ending = _split_name(name)
        suffix = f".{ending}" if sample.texts else PurePosixPath(name).suffix
        bad.passed_over.add(f"members {suffix}", _shown(source.url, name))


def _require_together(key: str, ending: str, met: set[tuple[str, str]], place: str) -> None:
    """Raise UserError where a sample's text and record are far apart: each would be a document. A
    key that comes again with the same members is another sample, as where tars were joined."""
    other = "txt" if ending == "json" else "json"
    if (key, other) in met and (key, ending) not in met:
        raise UserError(
            f"{place}: {key}.{other} stands elsewhere in this tar; members of a sample must follow "
            "each other: write the tar sorted by name (tar --sort=name -cf)"
        )


def _unclear(member: tarfile.TarInfo) -> bool:
    return (
        member.isreg()
        and _split_name(member.name)[1] not in ("txt", "json", "")
        and DOCUMENTS.search(member.name) is not None
    )


def _aside(member: tarfile.TarInfo, url: str, bad: BadLines) -> bool:
    """Whether a member belongs to no sample; counted then, but for folders."""
    name = PurePosixPath(member.name)
    if member.isdir():
        return True
    if not member.isreg():
        kind = "links and devices"
    elif name.name.startswith(".") or "__MACOSX" in name.parts:
        kind = "hidden members (such as an archiver's own)"
    elif not _split_name(member.name)[1]:
        kind = "members without an ending"
    else:
        return False
    bad.passed_over.add(kind, _shown(url, member.name))
    return True


def _shown(url: str, name: str) -> str:
    return f"{PurePosixPath(url).name}: {name}"


def _split_name(name: str) -> tuple[str, str]:
    """(KEY with its folder, field in lower case); the field is empty where the name has no dot."""
    path = PurePosixPath(name)
    key, _, ending = path.name.partition(".")
    return str(path.with_name(key)) if key else "", ending.lower()


def _require_inside(member: tarfile.TarInfo, url: str) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(
            f"{url}: member {member.name!r} points outside the archive; write the tar with "
            "relative names"
        )


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
