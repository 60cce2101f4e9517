"""Tokens of Megatron's indexed datasets (MMapIndexedDataset version 1: PREFIX.bin with PREFIX.idx
beside it).

Layout of the .idx, little-endian: magic; uint64 version; uint8 code of the token type; uint64
number of sequences S; uint64 number of document bounds D; int32 sizes (S,) in tokens; int64
pointers (S,) in bytes into the .bin; int64 bounds (D,), the first sequence of each document and S
at the end. Multimodal writers append one int8 mode per sequence, 0 where it is text.
"""

import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# 6 and 7 are floats: no tokens.
TYPES = {
    1: "<u1",
    2: "<i1",
    3: "<i2",
    4: "<i4",
    5: "<i8",
    8: "<u2",
}
BLOCK = 1 << 16  # entries of the index looked at together


class Index(NamedTuple):
    dtype: np.dtype
    sizes: np.ndarray  # (S,) tokens of each sequence
    pointers: np.ndarray  # (S,) first byte of each sequence in the .bin
    bounds: np.ndarray  # (D,) sequences; document d is bounds[d] to bounds[d + 1]
    modes: np.ndarray  # (S,) kind of each sequence, 0 of text; (0,) where there are none


def open_index(buffer: np.ndarray) -> Index:
    """The arrays of an .idx, as views of its bytes `buffer` (n,) uint8, usually memory-mapped.

    Raises ValueError where the bytes are not an index of version 1, are too few, or contradict
    themselves.
    """
    if len(buffer) < HEADER.size:
        raise ValueError(f"{len(buffer)} bytes are too few for an index")
    magic, version, code, sequences, documents = HEADER.unpack(buffer[: HEADER.size].tobytes())
    if magic != MAGIC or version != 1:
        raise ValueError("it does not start as an MMIDIDX index of version 1")
    if code not in TYPES:
        raise ValueError(f"token type {code} is none of the integer types {sorted(TYPES)}")
    arrays = 12 * sequences + 8 * documents
    if len(buffer) - HEADER.size not in (arrays, arrays + sequences):
        raise ValueError(
            f"{len(buffer)} bytes do not hold {sequences} sequences and {documents} document bounds"
        )
    start = HEADER.size
    sizes = np.frombuffer(buffer, "<i4", sequences, start)
    pointers = np.frombuffer(buffer, "<i8", sequences, start + 4 * sequences)
    bounds = np.frombuffer(buffer, "<i8", documents, start + 12 * sequences)
    modes = np.frombuffer(buffer, "<i1", -1, start + arrays)
    index = Index(np.dtype(TYPES[code]), sizes, pointers, bounds, modes)
    _check(index)
    return index


def _check(index: Index) -> None:
    """Sequences must follow each other without gaps, and so must documents: then the .bin is read
    front to back."""
    end = 0  # bytes
    for first in range(0, len(index.sizes), BLOCK):
        sizes = index.sizes[first : first + BLOCK].astype(np.int64) * index.dtype.itemsize
        ends = end + np.cumsum(sizes)
        if (sizes < 0).any() or not np.array_equal(
            index.pointers[first : first + BLOCK], ends - sizes
        ):
            raise ValueError("its pointers do not follow from its sizes")
        end = int(ends[-1])
    if len(index.bounds) == 0 or index.bounds[0] != 0 or index.bounds[-1] != len(index.sizes):
        raise ValueError("its document bounds do not cover its sequences")
    for first in range(0, len(index.bounds), BLOCK):
        if (np.diff(index.bounds[first : first + BLOCK + 1]) < 0).any():
            raise ValueError("its document bounds are not sorted")


def total_bytes(index: Index) -> int:
    """Bytes that the .bin must have."""
    return (
        int(index.pointers[-1]) + int(index.sizes[-1]) * index.dtype.itemsize
        if len(index.sizes)
        else 0
    )


def documents(index: Index, stream: BinaryIO, piece: int) -> Iterator[tuple[int, np.ndarray, bool]]:
    """(number of the document, tokens (n,), last) in order, at most `piece` tokens at a time; empty
    documents are skipped.

    Raises EOFError where the .bin `stream` ends early and ValueError for a negative token.
    """
    end = total_bytes(index)
    for first in range(0, len(index.bounds) - 1, BLOCK):
        bounds = index.bounds[first : first + BLOCK + 1]
        starts = np.full(len(bounds), end)  # bytes; a bound equal to S is the end of the .bin
        starts[bounds < len(index.sizes)] = index.pointers[bounds[bounds < len(index.sizes)]]
        for number, size in enumerate(np.diff(starts).tolist(), first):
            for tokens, last in _document(stream, size, index.dtype, piece * index.dtype.itemsize):
                yield number, tokens, last


def _document(
    stream: BinaryIO, size: int, dtype: np.dtype, most: int
) -> Iterator[tuple[np.ndarray, bool]]:
    while size:
        data = stream.read(min(size, most))
        if len(data) < min(size, most):
            raise EOFError("the .bin ends before its .idx says so")
        tokens = np.frombuffer(data, dtype)
        if dtype.kind == "i" and tokens.min() < 0:
            raise ValueError(f"token {tokens.min()} is negative")
        size -= len(data)
        yield tokens, size == 0
