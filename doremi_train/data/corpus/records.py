"""One record of a JSON file: its text, its domain, and what is wrong with it."""

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import orjson

from doremi_train.config import UserError, flatten, listed
from doremi_train.data.corpus.opening import CHUNK, BadLines, Piece, Source
from doremi_train.data.options import DataOptions
from doremi_train.storage.steady import one_line

PIECE = 4_000_000  # characters (or tokens) of a document handed on together
LINE = 1 << 26  # bytes of one JSON record: more would not fit the memory once decoded


def parse(data: bytes, place: str, bad: BadLines) -> dict[str, Any] | None:
    """The JSON object in `data`; None, and one more bad line, where there is none."""
    if len(data) > LINE:
        bad.add(f"{place}: broken JSON: longer than {LINE} bytes")
        return None
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        bad.add(f"{place}: broken JSON: {one_line(error)}{_python_only(data)}")
        return None
    if not isinstance(record, dict):
        bad.add(f"{place}: a JSON object is needed, this is a {type(record).__name__}")
        return None
    return record


def require_lines(first: bytes, url: str) -> None:
    """Raise UserError where the first line of a file tells that it is one JSON value over many
    lines, or an array of records: never JSON lines, however many broken ones are allowed."""
    line = first.strip()
    array = line.startswith(b"[") and (not line.endswith(b"]") or line[1:].lstrip()[:1] == b"{")
    if array or line == b"{":
        split = "jq -c '.[]'" if array else "jq -c ."
        raise UserError(
            f"{url}: this is one JSON array, or pretty-printed JSON, not JSON lines; write one "
            f"object a line ({split} FILE > FILE.jsonl)"
        )


def _python_only(data: bytes) -> str:
    """A hint where Python's own json reads what is no JSON."""
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return ""
    return (
        " (NaN, Infinity and a half of a surrogate pair are no JSON, though Python's json writes "
        "them)"
    )


def decode(stream: BinaryIO, place: str) -> Iterator[str]:
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


def record_text(
    record: dict[str, Any], source: Source, options: DataOptions, place: str, bad: BadLines
) -> Iterator[Piece]:
    """The text of a record; one more bad line, where it has no text or no domain."""
    domain = domain_of(record, source, options, place, bad)
    if domain is None:
        return
    text = _field(record, options.text_key, "data.text_key", place, bad)
    if text is not None:
        yield from document(domain, source.split, [text])


def domain_of(
    record: dict[str, Any], source: Source, options: DataOptions, place: str, bad: BadLines
) -> str | None:
    """The source's domain, else the one that the record names; None, and one more bad line, where
    it names none."""
    if source.domain is not None:
        return source.domain
    domain = _field(record, str(options.domain_key), "data.domain_key", place, bad)
    if domain == "":
        bad.add(
            f"data.domain_key={options.domain_key!r}: the domain is empty in {place}; name it there"
        )
    return domain or None


def _field(record: dict[str, Any], key: str, option: str, place: str, bad: BadLines) -> str | None:
    """The string at a dotted key; a key that holds dots itself is found too. None, and one more bad
    line, where there is none."""
    value: Any = record
    for part in [key] if key in record else key.split("."):
        if not isinstance(value, dict) or part not in value:
            bad.add(no_key(option, key, place, list(flatten(record))))
            return None
        value = value[part]
    if not isinstance(value, str):
        bad.add(
            f"{option}={key!r}: a string is needed, {place} has a {type(value).__name__}; mend it, "
            "or name another key"
        )
        return None
    return value


def no_key(option: str, key: str, place: str, keys: list[str]) -> str:
    return (
        f"{option}={key!r}: no such key in {place}; the keys there: {listed(keys)}; set {option} "
        "to the right one"
    )


def document(domain: str, split: str | None, chunks: Iterable[str]) -> Iterator[Piece]:
    """A document as pieces of at most PIECE characters: the same ones however its text arrives in
    chunks."""
    text = ""
    for chunk in chunks:
        text += chunk
        while len(text) > PIECE:
            cut = max(text.rfind(space, PIECE // 2, PIECE) for space in " \n\t") + 1 or PIECE
            yield Piece(domain, split, text[:cut], None, False)
            text = text[cut:]
    if text:
        yield Piece(domain, split, text, None, True)
