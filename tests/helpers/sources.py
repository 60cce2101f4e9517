"""Files of every format that hold the same texts, and what is read of them."""

import gzip
import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from doremi_train.config import UserError, load
from doremi_train.data.corpus.opening import BadLines, Piece
from doremi_train.data.corpus.reading import read
from doremi_train.data.corpus.sources import resolve
from doremi_train.data.options import DataOptions

TEXTS = ["first\r\nwith two lines", "zweiter: ÄÖÜ €", "третий 🦊", "  kept  \n", "null \x00 byte"]


def options(**values: Any) -> DataOptions:
    return load(DataOptions, values, "data")


def jsonl(texts: list[str], key: str = "text", newline: str = "\n") -> bytes:
    return newline.join(
        json.dumps({"id": index, key: text}) for index, text in enumerate(texts)
    ).encode()


def write_parquet(path: Path, texts: list[str]) -> None:
    table = pa.table(
        {
            "text": texts,
            "meta": [{"source": f"s{index % 2}", "n": index} for index in range(len(texts))],
        }
    )
    pq.write_table(table, path, row_group_size=2)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_megatron(
    prefix: Path, documents: list[list[list[int]]], code: int = 8, dtype: str = "<u2"
) -> None:
    """Documents of sequences of token ids, as Megatron's IndexedDatasetBuilder writes them."""
    sequences = [np.array(sequence, dtype) for document in documents for sequence in document]
    sizes = np.array([len(sequence) for sequence in sequences], "<i4")
    pointers = (np.cumsum(sizes, dtype="<i8") - sizes) * np.dtype(dtype).itemsize
    bounds = np.cumsum([0] + [len(document) for document in documents], dtype="<i8")
    prefix.with_suffix(".bin").write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(bounds))
    prefix.with_suffix(".idx").write_bytes(
        header + sizes.tobytes() + pointers.tobytes() + bounds.tobytes()
    )


def pieces(given: DataOptions) -> list[Piece]:
    bad = BadLines(given)
    return [piece for source in resolve(given) for piece in read(source, given, bad)]


def texts(given: DataOptions) -> list[str | None]:
    return [piece.text for piece in pieces(given)]


def one(path: Path | str, **values: Any) -> DataOptions:
    return options(domains={"a": {"train": [str(path)]}}, **values)


def refused(given: DataOptions | Callable[[], DataOptions], *words: str) -> None:
    """Resolving and reading ends in one message that holds every word."""
    with pytest.raises(UserError) as error:
        pieces(given if isinstance(given, DataOptions) else given())
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def write_as(folder: Path, ending: str) -> None:
    """TEXTS in files of `ending`; file names sort in their order."""
    folder.mkdir(parents=True)
    path = folder / f"train-0{ending}"
    if ending == ".txt":
        for index, text in enumerate(TEXTS):
            (folder / f"train-{index}.txt").write_bytes(text.encode())
    elif ending == ".parquet":
        write_parquet(path, TEXTS)
    elif ending == ".bin":  # a token a byte
        write_megatron(path.with_suffix(""), [[list(text.encode())] for text in TEXTS])
    elif ending == ".tar":
        write_tar(path, [(f"{index:03}.txt", text.encode()) for index, text in enumerate(TEXTS)])
    elif ending.endswith(".zst"):
        data = jsonl(TEXTS)
        # Two frames.
        path.write_bytes(zstandard.compress(data[:50]) + zstandard.compress(data[50:]))
    elif ending.endswith(".gz"):
        data = jsonl(TEXTS)
        path.write_bytes(gzip.compress(data[:50]) + gzip.compress(data[50:]))
    else:
        path.write_bytes(jsonl(TEXTS))
