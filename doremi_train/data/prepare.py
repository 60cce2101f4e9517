"""Text to token shards: one ordered stream, tokenised on all cores, the same bytes whoever computes it.

    sources → reader thread (split, cut, batch) → tokenise two batches on all cores → append to streams → shards

The result stands in a folder named by the content address of the request, so a changed source or tokeniser is never
silently reused, and a killed preparation continues where the shards end.
"""

import hashlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, NamedTuple, TypeVar

import numpy as np
import orjson
from tokenizers import Tokenizer

from doremi_train.config import UserError, fingerprint, flatten
from doremi_train.data import tokenizer as tokenizers
from doremi_train.data.options import Options
from doremi_train.data.reading import BadLines, Piece, Source, read
from doremi_train.data.selected import Selected, identity
from doremi_train.data.selected import domains as chosen_domains
from doremi_train.data.shards import CHECKSUMS, Stream, shards_of, token_dtype
from doremi_train.data.sources import resolve, signature
from doremi_train.data.writing import ShardWriter, write_manifest
from doremi_train.files import read_json, try_lock, write_bytes, write_json
from doremi_train.remote import Mirror

RECIPE = 1  # raise when the same request would give other tokens
PIECE = 2**18  # characters or tokens handled as one: the tokeniser needs some 150 bytes of memory a token
BATCH_BYTES = 2**22  # UTF-8 bytes tokenised together
BATCH_PIECES = 2**14
TOKENISED_TOGETHER = 2  # batches: while one's tokens become arrays, on one core, the other keeps all cores busy
READ_AHEAD = 4  # how many times the tokeniser's sample is read in search of domains, where the files do not name them

Progress = Callable[[str, int, int | None], None]  # description, bytes of the sources done, all bytes or None
Request = dict[str, Any]
T = TypeVar("T")
R = TypeVar("R")


def silent(description: str, done: int, total: int | None) -> None:
    """Show no progress."""


def request(options: Options) -> Request:
    """What decides the tokens: files (by size and time of change), reading options, tokeniser. Reads no text."""
    return _request(options, resolve(options))


def address(wanted: Request) -> str:
    """Content address of a request: the name of the prepared folder."""
    return fingerprint(wanted)


def explain_change(old: Request, new: Request) -> str:
    """One line naming the files and options that differ; "" where none does."""
    old_files, new_files = old["sources"]["files"], new["sources"]["files"]
    groups = {
        "new files": sorted(new_files.keys() - old_files.keys()),
        "files gone": sorted(old_files.keys() - new_files.keys()),
        "changed files": sorted(f for f in old_files.keys() & new_files.keys() if old_files[f] != new_files[f]),
    }
    parts = [f"{what}: {_some(files)}" for what, files in groups.items() if files]
    before, after = flatten(_without_files(old)), flatten(_without_files(new))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            parts.append(f"{key}: {before.get(key)!r} → {after.get(key)!r}")
    return "; ".join(parts)


def prepare(options: Options, folder: Path, progress: Progress = silent, mirror: Mirror | None = None) -> Path:
    """The finished token store `folder`/<address> of these options: made, continued or found there, or in `mirror`,
    where it is then too.

    Raises UserError for wrong options, unreadable sources, a domain without training tokens or validation documents.
    """
    sources = resolve(options)
    wanted = _request(options, sources)
    target = folder / address(wanted)
    if not (target / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{target.name}.lock", progress):
            found = (target / "manifest.json").exists()  # where the process we waited for has made it
            if not found and not (mirror and fetch(target, mirror)):
                _fill(target, options, sources, wanted, progress)
    _refuse_bad_lines(target, options)
    if mirror is not None:
        _publish(target, mirror, progress)
    return target


def fetch(target: Path, mirror: Mirror) -> bool:
    """Bring what opens the store `target` from its second home, if it is finished there; its shards come when they are
    needed. Returns whether there is such a store."""
    home = mirror.at(target.name)
    missing = [name for name in _OPENED if not (target / name).exists()]
    if missing and home.has("manifest.json"):
        for name in missing:
            home.pull(target, name)
    return (target / "manifest.json").exists()


_OPENED = (CHECKSUMS, "index.npy", "tokenizer.json", "manifest.json")  # the manifest last: it says that all is there


def _publish(target: Path, mirror: Mirror, progress: Progress) -> None:
    """Copy a finished store to its second home, unless it is there; goes on where an earlier copy stopped."""
    home = mirror.at(target.name)
    if home.has("manifest.json"):
        return
    shards = shards_of(read_json(target / "manifest.json"))
    checksums: dict[str, str] = {}
    there, done, total = home.sizes(), 0, sum(shards.values())
    for name, size in shards.items():
        progress("uploading", done, total)
        with _shard(target / name).open("rb") as file:
            checksums[name] = hashlib.file_digest(file, "sha256").hexdigest()
        if there.get(name) != size:
            home.push(target, [name])
        done += size
    write_json(target / CHECKSUMS, checksums)
    home.push(target, _OPENED)


def _shard(path: Path) -> Path:
    if not path.exists():
        raise UserError(
            f"store: {path} is missing, and it is not in remote either; delete {path.parents[2]}, run again"
        )
    return path


def _request(options: Options, sources: list[Source]) -> Request:
    if options.tokenizer == "train":
        tokenizer: Request = {"vocabulary_size": options.vocabulary_size, "tokenizer_sample": options.tokenizer_sample}
    else:
        tokenizer = {"fingerprint": tokenizers.fingerprint(tokenizers.load(options.tokenizer))}
    selection = {"selection": identity(options, sources)} if options.selection is not None else {}
    return {
        **selection,
        "recipe": RECIPE,
        "sources": signature(options, sources),
        "tokenizer": {**tokenizer, "end_of_document": options.end_of_document},
        "validation_fraction": options.validation_fraction,
        "member_tokens": options.member_tokens,
        "members_per_shard": options.members_per_shard,
    }


def _without_files(wanted: Request) -> Request:
    return {**wanted, "sources": {key: value for key, value in wanted["sources"].items() if key != "files"}}


def _some(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextmanager
def locked(path: Path, progress: Progress) -> Iterator[None]:
    """Only one process prepares an address; the others wait, and may be told to stop."""
    with path.open("w") as file:
        while not try_lock(file):
            progress("waiting for another process", 0, None)
            time.sleep(0.2)
        yield


def _refuse_bad_lines(target: Path, options: Options) -> None:
    """max_bad_lines is not part of the address, so a store made under a looser one may be found."""
    bad = orjson.loads((target / "manifest.json").read_bytes())["bad_lines"]
    if bad > options.max_bad_lines:
        raise UserError(
            f"data.max_bad_lines={options.max_bad_lines}: {target} was prepared with {bad} broken lines left out; "
            "mend the files, or raise data.max_bad_lines"
        )


# ── The stages of a preparation ──────────────────────────────────────────────────────────────────────────────────────


def _fill(target: Path, options: Options, sources: list[Source], wanted: Request, progress: Progress) -> None:
    target.mkdir(exist_ok=True)
    tokenizer = _tokenizer(target, options, sources, progress)
    end = tokenizers.end_of_document(tokenizer, options.end_of_document)
    size = tokenizers.vocabulary_size(tokenizer)
    writer = ShardWriter(target, token_dtype(size), options.member_tokens, options.members_per_shard)
    router, bad = Router(options, sources), BadLines(options)
    meter = Meter(sources, "tokenising", progress)
    with (
        closing(_in_background(_batches(_work(router, bad, writer, meter)))) as batches,
        ThreadPoolExecutor(TOKENISED_TOGETHER) as pool,
    ):
        for batch, tokenised in _on(pool, lambda batch: list(_tokenise(tokenizer, batch, size)), batches):
            for work, tokens in zip(batch, tokenised, strict=True):
                writer.append(work.stream, _ended(tokens, end, work.last), work.last, work.text_bytes)
            meter.show(batch[-1].done)
    writer.finish()
    chosen = chosen_domains(options)
    now = request(options)
    if now != wanted:
        shutil.rmtree(target)  # nobody will ask for this address again
        raise UserError(f"data: changed while it was read ({explain_change(wanted, now)}); run again")
    try:
        _check(writer, [source for source in sources if chosen is None or source.domain in (None, *chosen)])
    except UserError:
        shutil.rmtree(target)  # the remedies lead to other addresses
        raise
    write_manifest(writer, tokenizer, end, bad.count, router.dropped, wanted)


def _check(writer: ShardWriter, sources: list[Source]) -> None:
    """Raises UserError for domains that cannot be trained on or evaluated."""
    streams = writer.streams
    domains = {source.domain for source in sources if source.domain is not None} | {domain for _, domain in streams}
    if not domains:
        raise UserError("data: no document in the given files; give files that hold text")
    empty = sorted(domain for domain in domains if ("train", domain) not in streams)
    if empty:
        raise UserError(
            f"data: no training document in domain {_some(empty)}: its files hold no text, or all of it went to "
            "validation (data.validation_fraction) or is also a validation document; add text or remove the domain"
        )
    unseen = sorted(d for d in domains if ("validation", d) not in streams or not streams["validation", d].documents)
    if unseen:
        raise UserError(
            f"data: no validation document in domain {_some(unseen)}: documents are split by hash, and it has too few "
            "of them; give validation files, or raise data.validation_fraction"
        )


def _tokenizer(target: Path, options: Options, sources: list[Source], progress: Progress) -> Tokenizer:
    """The store's tokeniser: given, or learned once; its file also serves a continued preparation."""
    file = target / "tokenizer.json"
    if file.exists():
        return tokenizers.parse(file.read_text(encoding="utf-8"))
    if options.tokenizer == "train":
        texts = _sample(options, sources, Meter(sources, "learning the tokeniser", progress))
        tokenizer = tokenizers.learn(texts, options.vocabulary_size)
    else:
        tokenizer = tokenizers.load(options.tokenizer)
    write_bytes(file, tokenizers.serialise(tokenizer).encode())
    return tokenizer


def _sample(options: Options, sources: list[Source], meter: "Meter") -> list[str]:
    """The first training documents of each domain, up to an even share of data.tokenizer_sample characters.

    Where the files do not name the domains, a share shrinks whenever a new domain is met, and at most READ_AHEAD times
    the sample is read.
    """
    shares = {source.domain: _Share() for source in sources if source.domain is not None}
    named, seen = bool(shares), 0
    for domain, text in _sample_texts(options, sources, shares, meter):
        share = shares.setdefault(domain, _Share())
        share.add(text, _even(options, shares))
        seen += len(text)
        if not named and seen >= READ_AHEAD * options.tokenizer_sample:
            break
    for share in shares.values():
        share.keep(_even(options, shares))
    return [text for domain in sorted(shares) for text in shares[domain].texts]


def _sample_texts(
    options: Options, sources: list[Source], shares: dict[str, "_Share"], meter: "Meter"
) -> Iterator[tuple[str, str]]:
    """(domain, text) of training pieces, passing over the rest of a named domain once its share is full."""
    router, bad = Router(options, sources), BadLines(options)
    for source in router.order:
        named = shares.get(source.domain) if source.domain is not None and source.split != "validation" else None
        if named is not None and named.characters >= _even(options, shares):
            continue
        for split, piece in router.pieces(source, bad):
            if piece.text is None:
                raise UserError(
                    f"data.tokenizer='train': {source.url} is already tokenised; give the tokeniser it was made with"
                )
            meter.show(meter.read(source, len(piece.text)))
            if split == "train":
                yield piece.domain, piece.text
            if named is not None and named.characters >= _even(options, shares):
                break


def _even(options: Options, shares: dict[str, "_Share"]) -> int:
    return max(options.tokenizer_sample // len(shares), 1)


class _Share:
    """Text of one domain for the tokeniser."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.characters = 0

    def add(self, text: str, most: int) -> None:
        """Append as much of the text as fits `most` characters."""
        part = text[: max(most - self.characters, 0)]
        if part:
            self.texts.append(part)
            self.characters += len(part)

    def keep(self, most: int) -> None:
        """Keep the first `most` characters."""
        texts, self.texts, self.characters = self.texts, [], 0
        for text in texts:
            self.add(text, most)


# ── Reading and routing ──────────────────────────────────────────────────────────────────────────────────────────────


class Router:
    """Decides the split of every document, such that no text is in validation and in training.

    Order: given validation files, then documents split by hash (the same text falls on the same side, whatever its
    domain), then given training files. A document equal to a validation document met before is dropped and counted.
    """

    def __init__(self, options: Options, sources: list[Source]) -> None:
        self.options = options
        self.sources = sources
        rank = {"validation": 0, None: 1, "train": 2}
        self.order = sorted(sources, key=lambda source: rank[source.split])  # stable: else as resolved
        self.dropped = 0
        self._validation = HashSet()
        self._mixed = any(source.split == "train" for source in sources)
        self._threshold = _threshold(options)
        self._domains = chosen_domains(options)

    def pieces(self, source: Source, bad: BadLines) -> Iterator[tuple[str, Piece]]:
        """(split, piece) of the source, without what is dropped."""
        split: str | None = None
        first = True
        selected = Selected(self.options, self.sources, source) if self._select(source) else None
        for piece in read(source, self.options, bad):
            kept = [piece] if selected is None else selected.parts(piece)
            if self._domains is not None and piece.domain not in self._domains:
                continue
            if first:
                split = self._split(piece)
                self.dropped += split is None
            first = piece.last
            if split == "train":
                yield from ((split, part) for part in kept)
            elif split is not None:
                yield split, piece

    def _select(self, source: Source) -> bool:
        return self.options.selection is not None and source.split != "validation"

    def _split(self, piece: Piece) -> str | None:
        """Split of the document that begins with this piece; None: dropped."""
        key = _key(piece)
        if piece.split == "validation":
            self._validation.add(key)
            return "validation"
        if key in self._validation:
            # Split off by hash in another domain: both copies are validation documents.
            return "validation" if piece.split is None and key < self._threshold else None
        if piece.split is None and key < self._threshold:
            if self._mixed:  # else the hash alone keeps the splits apart
                self._validation.add(key)
            return "validation"
        return "train"


def held_out(piece: Piece, options: Options) -> bool:
    """Whether the document that begins with this piece is for validation, by its source or by its hash."""
    return piece.split == "validation" or (piece.split is None and _key(piece) < _threshold(options))


def _key(piece: Piece) -> int:
    content = piece.text.encode() if piece.text is not None else np.asarray(piece.tokens, "<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _threshold(options: Options) -> float:
    return options.validation_fraction * 2.0**64


class HashSet:
    """A set of 64-bit integers at about 8 bytes each: validation sets of any size fit the memory."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._new: set[int] = set()

    def add(self, key: int) -> None:
        self._new.add(key)
        if len(self._new) >= 2**18:
            self._sorted = np.union1d(self._sorted, np.fromiter(self._new, np.uint64))
            self._new.clear()

    def __contains__(self, key: int) -> bool:
        if key in self._new:
            return True
        place = int(np.searchsorted(self._sorted, np.uint64(key)))
        return place < len(self._sorted) and int(self._sorted[place]) == key


class Work(NamedTuple):
    """A piece on its way to the tokeniser."""

    stream: Stream
    text: str | None
    tokens: np.ndarray | None  # (n,) already tokenised
    last: bool  # a document ends with it
    text_bytes: int | None  # UTF-8 bytes; None: not known
    done: int  # bytes of the sources read so far, for the progress bar
    url: str


def _work(router: Router, bad: BadLines, writer: ShardWriter, meter: "Meter") -> Iterator[Work]:
    """Pieces that are not on disk yet, in order, cut to a size that the tokeniser's memory allows."""
    skip = {stream: state.pieces for stream, state in writer.streams.items()}
    for source in router.order:
        for split, piece in router.pieces(source, bad):
            stream = (split, piece.domain)
            for part, last in _cut(piece.text if piece.text is not None else piece.tokens, piece.last):
                size = len(part.encode()) if isinstance(part, str) else None
                done = meter.read(source, size if size is not None else part.nbytes)
                if skip.get(stream, 0) > 0:
                    skip[stream] -= 1
                elif isinstance(part, str):
                    yield Work(stream, part, None, last, size, done, source.url)
                else:
                    yield Work(stream, None, part, last, None, done, source.url)


def _cut(content: Any, last: bool) -> Iterator[tuple[Any, bool]]:
    """(part, whether the document ends with it) of a text or of tokens (n,): parts of at most PIECE."""
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
    for work in items:
        batch.append(work)
        size += work.text_bytes if work.tokens is None else work.tokens.nbytes  # type: ignore[operator]
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


def _on(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """(item, function(item)) in order, with TOKENISED_TOGETHER of them in work."""
    working: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        working.append((item, pool.submit(function, item)))
        if len(working) == TOKENISED_TOGETHER:
            first, result = working.popleft()
            yield first, result.result()
    for first, result in working:
        yield first, result.result()


def _tokenise(tokenizer: Tokenizer, batch: list[Work], vocabulary_size: int) -> Iterator[np.ndarray]:
    """Tokens (n,) of each piece; the pieces are independent, so batches may be divided in any way."""
    encoded = iter(tokenizers.encode(tokenizer, [work.text for work in batch if work.text is not None]))
    for work in batch:
        if work.tokens is None:
            yield next(encoded)
            continue
        if len(work.tokens) and not 0 <= int(work.tokens.min()) <= int(work.tokens.max()) < vocabulary_size:
            raise UserError(
                f"{work.url}: token ids {int(work.tokens.min())} to {int(work.tokens.max())}, but data.tokenizer has "
                f"only ids 0 to {vocabulary_size - 1}; give the tokeniser these files were made with"
            )
        yield work.tokens.astype(np.int64)  # a narrow type might not hold the end of document


def _ended(tokens: np.ndarray, end: int, last: bool) -> np.ndarray:
    """With the end-of-document token, if the document ends here and does not bring its own."""
    if not last or (len(tokens) and int(tokens[-1]) == end):
        return tokens
    return np.append(tokens, np.asarray(end, tokens.dtype))


@dataclass
class Meter:
    """Progress in bytes of the sources: text is larger than its compressed file, so its share is estimated."""

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
