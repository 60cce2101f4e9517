"""Documents and records of a file, whatever its format."""

import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from doremi_train.config import UserError
from doremi_train.data.corpus import formats
from doremi_train.data.corpus.formats import READERS
from doremi_train.data.corpus.opening import BadLines, Piece, Source
from doremi_train.data.corpus.records import domain_of
from doremi_train.data.options import DataOptions
from doremi_train.storage.steady import one_line

LONG_WINDOW = "too much memory for decoding"  # in what Arrow says of it


def read(source: Source, options: DataOptions, bad: BadLines) -> Iterator[Piece]:
    """The documents of one source, in its order; empty ones are skipped, but they have a row.

    Raises UserError for a file that is truncated, corrupt, unreadable or not as the options say.
    """
    with _whole(source):
        count = 0
        for piece in formats.reader(source.url)(source, options, bad):
            yield piece if piece.row >= 0 else piece._replace(row=count)
            count += piece.last


def records(
    source: Source, options: DataOptions, bad: BadLines
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Domain, line (from 1) and JSON object of every line of a source of JSON lines.

    Raises UserError as `read` does, and for a file of another kind.
    """
    if formats.reader(source.url) is not formats.read_jsonl:
        allowed = " ".join(
            ending for ending, reader in READERS.items() if reader is formats.read_jsonl
        )
        raise UserError(
            f"{source.url}: not a file of JSON lines, which are needed here; allowed are {allowed}"
        )
    with _whole(source):
        for number, record in formats.objects(source, options, bad):
            domain = domain_of(record, source, options, f"{source.url}, line {number}", bad)
            if domain is not None:
                yield domain, number, record


@contextmanager
def _whole(source: Source) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        EOFError,
        ImportError,
        UnicodeDecodeError,
        tarfile.TarError,
        pa.ArrowException,
        zlib.error,
    ) as error:
        if LONG_WINDOW in str(error):
            raise UserError(
                f"{source.url}: needs a zstd window of more than 128 MB (it was written with "
                "--long); write it with a smaller one (zstd -dc --long=31 FILE | zstd > NEW.zst), "
                "or give 'pipe:zstd -dc --long=31 FILE' to data.domains with data.allow_pipe=true"
            ) from error
        raise UserError(
            f"{source.url}: truncated or corrupt, or it cannot be read ({one_line(error)}); "
            "write or copy this file again"
        ) from error
