"""Documents become token arrays, in order: pieces are cut and batched in a thread, and batches
tokenised on all cores.

reader thread (split, cut, batch) → two batches at a time on all cores → tokens in the order of the
text
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tokenizers import Tokenizer

from doremi_train.config import UserError
from doremi_train.data.corpus.opening import BadLines, Source
from doremi_train.data.corpus.routing import Router
from doremi_train.data.tokens import tokenizer as tokenizers
from doremi_train.data.tokens.shards import Stream
from doremi_train.data.tokens.unwritable import Measure, Written

# Characters or tokens handled as one: the tokeniser needs some 150 bytes of memory a token.
PIECE = 2**18
BATCH_BYTES = 2**21  # UTF-8 bytes tokenised together
BATCH_PIECES = 2**14
# Batches in work: while one's tokens become arrays, on one core, the other keeps all cores busy.
TOGETHER = 2

# Description, bytes of the sources done, all bytes or None.
Progress = Callable[[str, int, int | None], None]
T = TypeVar("T")
R = TypeVar("R")


class Work(NamedTuple):
    """A piece on its way to the tokeniser."""

    stream: Stream
    text: str | None
    tokens: np.ndarray | None  # (n,) already tokenised
    last: bool  # a document ends with it
    text_bytes: int | None  # UTF-8 bytes; None: not known
    done: int  # bytes of the sources read so far, for the progress bar
    url: str


def work(
    router: Router, bad: BadLines, skip: Mapping[Stream, int], meter: "Meter"
) -> Iterator[Work]:
    """Pieces in order, cut to a size that the tokeniser's memory allows, but the first `skip` of
    each stream."""
    left = dict(skip)
    for source in router.order:
        for split, piece in router.pieces(source, bad):
            stream = (split, piece.domain)
            for part, last in _cut(
                piece.text if piece.text is not None else piece.tokens, piece.last
            ):
                size = len(part.encode()) if isinstance(part, str) else None
                done = meter.read(source, size if size is not None else part.nbytes)
                if left.get(stream, 0) > 0:
                    left[stream] -= 1
                elif isinstance(part, str):
                    yield Work(stream, part, None, last, size, done, source.url)
                else:
                    yield Work(stream, None, part, last, None, done, source.url)


def tokenised(
    tokenizer: Tokenizer, items: Iterable[Work], vocabulary_size: int, end: int
) -> Generator[list[tuple[Work, Written]], None, None]:
    """Batches of the items, each with what became of it; a document ends with the token `end`. To
    be closed when it is left early."""
    measure = Measure(tokenizer)
    with closing(_in_background(_batches(items))) as batches, ThreadPoolExecutor(TOGETHER) as pool:
        for batch, tokens in _on(
            pool, lambda batch: list(_tokenise(measure, batch, vocabulary_size)), batches
        ):
            yield [
                (item, some._replace(tokens=_ended(some.tokens, end, item.last)))
                for item, some in zip(batch, tokens, strict=True)
            ]


def _cut(content: Any, last: bool) -> Iterator[tuple[Any, bool]]:
    """(part, whether the document ends with it) of a text or of tokens (n,): parts of at most
    PIECE."""
    while len(content) > PIECE:
        cut = PIECE
        if isinstance(content, str):  # before a space, where most tokenisers separate words
            cut = max(content.rfind(space, PIECE // 2, PIECE) for space in " \n")
            cut = cut if cut > 0 else PIECE
        yield content[:cut], False
        content = content[cut:]
    yield content, last


def _batches(items: Iterable[Work]) -> Iterator[list[Work]]:
    batch: list[Work] = []
    size = 0
    for item in items:
        batch.append(item)
        size += item.tokens.nbytes if item.tokens is not None else item.text_bytes or 0
        if size >= BATCH_BYTES or len(batch) >= BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_background(items: Iterable[T], ahead: int = 2) -> Generator[T, None, None]:
    """The same items, computed by a thread while the consumer works; errors are raised here."""
    queue: Queue[tuple[T | None, BaseException | None]] = Queue(ahead)
    stopped = Event()

    def put(item: T | None, error: BaseException | None = None) -> bool:
        while not stopped.is_set():
            try:
                queue.put((item, error), timeout=0.1)
                return True
            except Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(None)
        except BaseException as error:  # carried to the consumer
            put(None, error)

    thread = Thread(target=produce, name="reader", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item, error = queue.get(timeout=1)
            except Empty:
                continue
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def _on(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]
) -> Iterator[tuple[T, R]]:
    """(item, function(item)) in order, with TOGETHER of them in work."""
    working: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        working.append((item, pool.submit(function, item)))
        if len(working) == TOGETHER:
            first, result = working.popleft()
            yield first, result.result()
    for first, result in working:
        yield first, result.result()


def _tokenise(measure: Measure, batch: list[Work], vocabulary_size: int) -> Iterator[Written]:
    """What becomes of each piece; the pieces are independent, so batches may be divided in any
    way."""
    texts = [item for item in batch if item.text is not None]
    try:
        encoded = iter(list(measure.encode([str(item.text) for item in texts])))
    except tokenizers.CannotEncode as error:
        split, domain = texts[error.number].stream
        raise UserError(
            f"{texts[error.number].url}: in the {split} text of domain {domain}, {error}"
        ) from None
    for item in batch:
        if item.tokens is None:
            yield next(encoded)
            continue
        if (
            len(item.tokens)
            and not 0 <= int(item.tokens.min()) <= int(item.tokens.max()) < vocabulary_size
        ):
            raise UserError(
                f"{item.url}: token ids {int(item.tokens.min())} to {int(item.tokens.max())}, but "
                f"data.tokenizer has only ids 0 to {vocabulary_size - 1}; give the tokeniser these "
                "files were made with"
            )
        # A narrow type might not hold the end of document.
        yield Written(item.tokens.astype(np.int64), 0)


def _ended(tokens: np.ndarray, end: int, last: bool) -> np.ndarray:
    """Tokens of a piece and the end of the document, where it ends and does not bring its own."""
    if not last or (len(tokens) and int(tokens[-1]) == end):
        return tokens
    return np.append(tokens, np.asarray(end, tokens.dtype))


@dataclass
class Meter:
    """Progress in bytes of the sources: text is larger than its compressed file, so its share is
    estimated."""

    sources: list[Source]
    description: str
    progress: Progress
    _source: Source | None = None
    _text: int = 0
    _finished: int = 0

    def read(self, source: Source, text: int) -> int:
        """Count `text` bytes read of the source; returns the bytes done over all sources, about."""
        if source is not self._source:
            self._finished += self._source.size if self._source is not None else 0
            self._source, self._text = source, 0
        self._text += text
        ratio = 0.3 if source.url.endswith((".zst", ".gz", ".parquet")) else 1.0
        return self._finished + min(source.size, int(ratio * self._text))

    def show(self, done: int) -> None:
        """Report `done` bytes."""
        total = sum(source.size for source in self.sources)
        self.progress(self.description, done, total or None)
