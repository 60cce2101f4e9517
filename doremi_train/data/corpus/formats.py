"""A reader for every ending: JSON lines, parquet, plain text, Megatron's, archives, and what is
made here."""

import codecs
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from doremi_train.config import UserError
from doremi_train.data.corpus import archives, installed, megatron, opening, planted, records
from doremi_train.data.corpus.opening import CHUNK, BadLines, Piece, Source
from doremi_train.data.options import DataOptions
from doremi_train.storage.urls import PIPE

BATCH = 1 << 24  # bytes of parquet rows decoded together, about
EXPANDED = 1 << 28  # bytes of a row group that a thousandth of it may become
ROWS = 16  # and no more rows: one entry of a dictionary may be the text of all of them
INSTALLED = "installed:"
PLANTED = "planted:"


def read_jsonl(source: Source, options: DataOptions, bad: BadLines) -> Iterator[Piece]:
    for number, record in objects(source, options, bad):
        place = f"{source.url}, line {number}"
        for piece in records.record_text(record, source, options, place, bad):
            yield piece._replace(row=number - 1)


def objects(
    source: Source, options: DataOptions, bad: BadLines
) -> Iterator[tuple[int, dict[str, Any]]]:
    with opening.open_file(source.url, options) as stream:
        for place, (number, line) in enumerate(_lines(stream)):
            if place == 0:
                records.require_lines(line, source.url)
            record = records.parse(line, f"{source.url}, line {number}", bad)
            if record is not None:
                yield number, record


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) without blank lines; of a line longer than LINE only LINE + 1 bytes are
    kept."""
    number = 0
    while line := stream.readline(records.LINE + 1):
        number += 1
        rest = line
        while len(rest) >= records.LINE and not rest.endswith(b"\n"):
            rest = stream.readline(records.LINE)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.isspace():
            yield number, line


def _read_parquet(source: Source, options: DataOptions, bad: BadLines) -> Iterator[Piece]:
    columns = (
        [options.text_key]
        if source.domain is not None
        else [options.text_key, str(options.domain_key)]
    )
    with opening.open_file(source.url, options) as stream:
        # Pages as they are needed, not row groups.
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=CHUNK)
        kinds = dict(_leaves(file.schema_arrow))
        for key, column in zip(("data.text_key", "data.domain_key"), columns, strict=False):
            _require_column(key, column, kinds, source.url)
        number = 0
        rows = _rows(file.metadata, columns, source.url)
        for batch in file.iter_batches(rows, columns=columns):
            for record in _records_of(batch):
                number += 1
                place = f"{source.url}, row {number}"
                if isinstance(record, dict):
                    for piece in records.record_text(record, source, options, place, bad):
                        yield piece._replace(row=number - 1)
                else:
                    bad.add(f"{place}: invalid UTF-8 ({record.reason})")


def _records_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Records of a batch; of a row with a string that is no UTF-8 what is wrong with it."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield from batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield error


def _leaves(fields: Iterable[pa.Field], within: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """(dotted name, type) of the columns that a record's keys lead to."""
    for field in fields:
        if pa.types.is_struct(field.type):
            yield from _leaves(
                (field.type.field(index) for index in range(field.type.num_fields)),
                f"{within}{field.name}.",
            )
        else:
            yield within + field.name, field.type


def _require_column(key: str, column: str, kinds: dict[str, pa.DataType], url: str) -> None:
    """Raise UserError where the column is missing, or is a list or a map, or a part of one."""
    nested = [name for name, kind in kinds.items() if pa.types.is_nested(kind)]
    around = next((name for name in nested if f"{column}.".startswith(f"{name}.")), None)
    if column not in kinds and around is None:
        raise UserError(records.no_key(key, column, url, list(kinds)))
    if column not in kinds or column in nested:
        kind = kinds[str(around)]
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        raise UserError(
            f"{key}={column!r}: a column of strings is needed, but {around!r} of {url} is a "
            f"{f'list of {kind.value_type}s' if listed else kind}; write its text as one string a "
            "row, or name another column"
        )


def _rows(metadata: pq.FileMetaData, columns: list[str], url: str) -> int:
    """Rows of about BATCH bytes, by the mean row of the fattest row group. Raises UserError for
    what no text becomes: a page is decompressed as a whole, and may be all that a row group has."""
    mean = 1.0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        every = (group.column(index) for index in range(group.num_columns))
        read = [column for column in every if column.path_in_schema in columns]
        packed, size = (
            sum(getattr(column, name) for column in read)
            for name in ("total_compressed_size", "total_uncompressed_size")
        )
        if size > max(EXPANDED, 1000 * packed) or size > records.LINE * group.num_rows:
            raise UserError(
                f"{url}: row group {number} has {packed} bytes, which become {size} of "
                f"{group.num_rows} rows; write it in smaller row groups, and shorter texts"
            )
        mean = max(mean, size / max(group.num_rows, 1))
    return int(min(max(BATCH / mean, 1), ROWS))


def _read_text(source: Source, options: DataOptions, bad: BadLines) -> Iterator[Piece]:
    with opening.open_file(source.url, options) as stream:
        yield from records.document(
            str(source.domain), source.split, records.decode(stream, source.url)
        )


def _read_megatron(source: Source, options: DataOptions, bad: BadLines) -> Iterator[Piece]:
    path = index_of(source.url)
    try:
        index = megatron.open_index(_bytes_of(path, options))
    except ValueError as error:
        raise UserError(
            f"{path}: corrupt index ({error}); write {source.url} and its .idx again"
        ) from error
    if index.modes.any():
        raise UserError(
            f"{path}: {np.count_nonzero(index.modes)} of {len(index.modes)} sequences have a mode, "
            f"so they are no text; write {source.url} and its .idx with text alone"
        )
    if source.size and source.size != megatron.total_bytes(index):
        raise EOFError(f"{source.size} bytes, but its .idx says {megatron.total_bytes(index)}")
    with opening.open_file(source.url, options) as stream:
        try:
            for row, tokens, last in megatron.documents(index, stream, records.PIECE):
                yield Piece(str(source.domain), source.split, None, tokens, last, row)
        except ValueError as error:
            raise UserError(
                f"{source.url}: {error}; tokens are ids from 0; write the file again"
            ) from error


def _bytes_of(url: str, options: DataOptions) -> np.ndarray:
    """(n,) uint8: memory-mapped where the file is local."""
    fs, path = opening.file_system(url, "data", options)
    if isinstance(fs, LocalFileSystem) and fs.size(path):
        return np.memmap(path, np.uint8, "r")
    return np.frombuffer(fs.cat_file(path), np.uint8)


def _read_installed(source: Source, options: DataOptions, bad: BadLines) -> Iterator[Piece]:
    domain, split = source.url.removeprefix(INSTALLED).split("/")
    for _, text in installed.texts(installed.listing(domain, split, options.validation_fraction)):
        yield from records.document(domain, split, [text])


def _read_planted(source: Source, options: DataOptions, bad: BadLines) -> Iterator[Piece]:
    domain, split = source.url.removeprefix(PLANTED).split("/")
    for text in planted.texts(domain, split, options.validation_fraction):
        yield from records.document(domain, split, [text])


def reader(url: str) -> Callable[[Source, DataOptions, BadLines], Iterator[Piece]]:
    if url.startswith(INSTALLED):
        return _read_installed
    if url.startswith(PLANTED):
        return _read_planted
    return read_jsonl if url.startswith(PIPE) else READERS[str(ending_of(url))]


READERS: dict[str, Callable[[Source, DataOptions, BadLines], Iterator[Piece]]] = {
    ".jsonl": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".json.zst": read_jsonl,
    ".json.gz": read_jsonl,
    ".parquet": _read_parquet,
    ".tar": archives.read_tar,
    ".txt": _read_text,
    ".bin": _read_megatron,
}
"""Texts of a file:

>>> import tempfile
>>> from pathlib import Path
>>> from doremi_train.data.corpus import reading, sources
>>> from doremi_train.data.corpus.opening import BadLines
>>> from doremi_train.data.options import DataOptions, Split
>>> file = Path(tempfile.mkdtemp(), "train.jsonl")
>>> written = file.write_text('{"text": "one document"}\\n{"text": "another"}\\n')
>>> options = DataOptions(domains={"web": Split((str(file),))})
>>> for source in sources.resolve(options):
...     for piece in reading.read(source, options, BadLines(options)):
...         print(piece.domain, piece.text)
web one document
web another
"""


def ending_of(url: str) -> str | None:
    """The ending by which a file is read; None where it is none of READERS."""
    name = opening.without_query(url).lower()
    return next((ending for ending in READERS if name.endswith(ending)), None)


def index_of(path: str) -> str:
    """The file that belongs to one of Megatron's."""
    return path[: -len(".bin")] + ".idx"
