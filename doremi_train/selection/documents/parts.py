"""Raw documents in batches, cut into the parts that are chosen or refused.

B documents of a batch, n tokens, P parts.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from doremi_train.config import UserError
from doremi_train.data.corpus.opening import BadLines, Piece, Source
from doremi_train.data.corpus.reading import read
from doremi_train.data.corpus.routing import held_out
from doremi_train.data.options import DataOptions
from doremi_train.methods import ngram
from doremi_train.selection.documents import kernels

BATCH = 2**20  # bytes of text together: fewer calls from Python, and the memory stays small


class Document(NamedTuple):
    """A training document, or a piece of a giant one."""

    row: int  # of its file: lines that were skipped count too
    base: int  # bytes (or tokens) of the document before this piece
    domain: str
    content: bytes | NDArray[np.int64]  # UTF-8, or tokens


class Batch(NamedTuple):
    documents: list[Document]
    text: NDArray[np.uint8] | None  # (b,) None: tokens are given
    tokens: kernels.Tokens
    bounds: NDArray[np.int64]  # (P + 1,) first token of each part
    document: NDArray[np.int64]  # (P,) its number in this batch
    start: NDArray[np.int64]  # (P,) first byte (or token) in the batch
    end: NDArray[np.int64]  # (P,)

    def part(self, number: int | np.integer) -> bytes:
        """UTF-8 of a part."""
        assert self.text is not None
        return self.text[self.start[number] : self.end[number]].tobytes()


def batches(source: Source, data: DataOptions, bad: BadLines, chunk: int | None) -> Iterator[Batch]:
    """The training documents of one source, cut into parts of at most `chunk` tokens; None: not
    cut. The tokens of a batch hold until the next is asked for."""
    return batched(documents(source, data, bad, whole=chunk is None), chunk)


def batched(stream: Iterable[Document], chunk: int | None) -> Iterator[Batch]:
    """Documents in batches, as `batches` gives them."""
    waiting: list[Document] = []
    size, room = 0, kernels.Room()
    for document in stream:
        if waiting and (size >= BATCH or type(waiting[0].content) is not type(document.content)):
            yield batch(waiting, chunk, room)
            waiting, size = [], 0
        waiting.append(document)
        size += len(document.content)
    if waiting:
        yield batch(waiting, chunk, room)


def documents(
    source: Source, data: DataOptions, bad: BadLines, whole: bool, every: bool = False
) -> Iterator[Document]:
    """What of a source is for training, or `every` document; a giant one in pieces, or `whole`."""
    base, kept = 0, False
    parts: list[bytes] = []
    begins = True
    for piece in read(source, data, bad):
        if begins:
            base, kept = 0, every or not held_out(piece, data)
        begins = piece.last
        if not kept:
            continue
        content = (
            piece.text.encode() if piece.text is not None else np.asarray(piece.tokens, np.int64)
        )
        if whole and isinstance(content, bytes):
            parts.append(content)
            if piece.last:
                yield Document(piece.row, 0, piece.domain, b"".join(parts))
                parts = []
        else:
            yield Document(piece.row, base, piece.domain, content)
        base += len(content)


def batch(documents: list[Document], chunk: int | None, room: kernels.Room | None = None) -> Batch:
    """Split documents into words (or take their tokens), and cut them into parts."""
    text, offsets = None, np.cumsum([0, *(len(document.content) for document in documents)])
    if isinstance(documents[0].content, bytes):
        text, offsets = kernels.joined([document.content for document in documents])  # type: ignore[misc]
        tokens = kernels.split(text, offsets, room)
    else:
        ids = np.concatenate([document.content for document in documents])
        tokens = kernels.Tokens(
            ngram.mixed(ids.astype(np.uint64)), np.arange(1, len(ids) + 1), offsets
        )
    n = np.diff(tokens.first)  # (B,)
    parts = np.maximum(-(-n // chunk), 1) if chunk else np.ones_like(n)
    document = np.repeat(np.arange(len(documents)), parts)
    part = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
    first = tokens.first[document] + n[document] * part // parts[document]
    start = offsets[document].copy()
    inner = part > 0
    start[inner] = tokens.ends[first[inner] - 1]
    end = np.append(start[1:], offsets[-1])
    last = part == parts[document] - 1
    end[last] = offsets[document[last] + 1]
    return Batch(documents, text, tokens, np.append(first, tokens.first[-1]), document, start, end)


def texts(sources: Iterable[Source], data: DataOptions, key: str) -> list[bytes]:
    """All documents of target or benchmark files, which fit the memory. Raises UserError where
    there is none."""
    contents: list[bytes] = []
    for source in sources:
        pieces: list[str] = []
        for piece in read(source, data, BadLines(data)):
            pieces.append(_text(piece, source, key))
            if piece.last:
                contents.append("".join(pieces).encode())
                pieces = []
    contents = [text for text in contents if text.strip()]
    if not contents:
        raise UserError(f"{key}: no document in its files; give files that hold text")
    return contents


def _text(piece: Piece, source: Source, key: str) -> str:
    if piece.text is None:
        raise UserError(f"{key}: {source.url} holds tokens, not text; give text")
    return piece.text
