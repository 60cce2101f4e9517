"""The token store: WebDataset tars of uncompressed arrays, an index that makes them random access,
a manifest.

    <store>/manifest.json, index.npy, tokenizer.json
    <store>/<split>/<folder of the domain>/00000.tar
        members 00000000.tokens.npy, 00000000.ends.npy, 00000001.…

A *stream* is one split of one domain. A *member* is a run of its tokens (about data.member_tokens
of them) and the positions just after each end of a document. Legend: K domains, M members, B
sequences.
"""

import errno
import fcntl
import hashlib
import io
import json
import mmap
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from doremi_train.config import UserError
from doremi_train.config import fingerprint as content_address
from doremi_train.data.tokens import tokenizer as tokenizers
from doremi_train.files import clear_partial, read_object
from doremi_train.storage import seal
from doremi_train.storage.mirror import Mirror, Torn

SPLITS = ("train", "validation")
INDEX = np.dtype([(name, "<i8") for name in ("stream", "shard", "offset", "tokens", "documents")])
SCHEMA = 1
OPEN_MAPS = 256  # a map holds a file descriptor, and 1024 is a usual limit for a process
_ENDED = (errno.EMFILE, errno.ENFILE)  # no descriptor is left
END_OF_TAR = bytes(1024)
CHECKSUMS = "checksums.json"  # {shard: SHA-256}, where the store has a second home

Stream = tuple[str, str]  # split, domain


def token_dtype(vocabulary_size: int) -> type[np.unsignedinteger]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.uint16 if vocabulary_size <= 2**16 else np.uint32


def domain_folder(domain: str) -> str:
    """A path-safe folder name, different for different domains."""
    name = quote(domain, safe="")
    if name.startswith("."):  # "..", and files that tools hide
        name = "%2E" + name[1:]
    # File systems stop at 255 bytes; quote() never leaves a "+", so no name collides.
    if not name or len(name) > 200:
        name = f"{name[:150]}+{content_address(domain)}"
    return name


class _Windows(NamedTuple):
    """The sequences of one length, numbered through the whole index."""

    members: np.ndarray  # (M + 1,) number of the first sequence of every member
    streams: np.ndarray  # (2K + 1,) and of every stream
    # (M,) sequence n of a member begins at token origin + n · length of its shard.
    origin: np.ndarray


class TokenStore:
    """Random access to the sequences of a finished store.

    A sequence is a window of length + 1 tokens with stride `length` inside one member, so of one
    domain only. Opening reads manifest.json and index.npy; a shard is opened when a sequence of it
    is asked for, and where it is not on this machine it comes from `mirror`, the store's second
    home.
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], index: np.ndarray, mirror: Mirror | None = None
    ) -> None:
        self.path, self.manifest, self._index, self._mirror = path, manifest, index, mirror
        self.domains: tuple[str, ...] = tuple(sorted(manifest["domains"]))
        self.vocabulary_size: int = manifest["tokenizer"]["vocabulary_size"]
        self.end_of_document: int = manifest["tokenizer"]["end_of_document"]
        self.fingerprint: str = manifest["fingerprint"]
        self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._streams = [(split, domain) for split in SPLITS for domain in self.domains]
        # (2K + 1,)
        self._first_member = np.searchsorted(index["stream"], np.arange(len(self._streams) + 1))
        begins = (np.diff(index["stream"], prepend=-1) != 0) | (
            np.diff(index["shard"], prepend=-1) != 0
        )
        self._shards = index[begins]  # the first member of each shard
        self._shard = np.cumsum(begins) - 1  # (M,) number of the member's shard among those
        self._windows: dict[int, _Windows] = {}
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        # Most of what a process may open is for all else.
        self._most_maps = min(OPEN_MAPS, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, 1))
        self._sound = set[int]()  # shards that this process looked at
        self._lock = threading.Lock()

    def named(self, vector: Any) -> dict[str, float]:
        """{domain: value} of a tensor or array (K,)."""
        return dict(zip(self.domains, vector.tolist(), strict=True))

    def vector(self, values: Mapping[str, float]) -> NDArray[np.float64]:
        """(K,) of {domain: value}: the inverse of `named`."""
        return np.array([values[name] for name in self.domains], np.float64)

    @classmethod
    def open(
        cls,
        path: str | Path,
        mirror: Mirror | None = None,
        only: Sequence[str] | None = None,
        least: int = 0,
    ) -> "TokenStore":
        """Open a finished store, or the part of it that has these domains (`data.only`) and as many
        training tokens of each (`data.least_tokens`).

        Raises UserError where it is unfinished, incomplete or was changed, or has no such domain.
        """
        path = Path(path)
        manifest = read_manifest(path)
        data = _read(path / "index.npy")
        if hashlib.sha256(data).hexdigest() != manifest["index_sha256"]:
            raise _damaged(path / "index.npy", "is not the file that the manifest was written with")
        whole = cls(path, manifest, np.load(io.BytesIO(data), allow_pickle=False), mirror)
        if only is not None and (not only or set(only) - set(whole.domains)):
            raise UserError(
                f"data.only=[{', '.join(only)}]: name some of the domains, "
                f"{', '.join(whole.domains)}"
            )
        named = taken(dict(zip(whole.domains, whole.sizes("train"), strict=True)), only, least)
        return whole if named == list(whole.domains) else whole.only(named)

    def only(self, domains: Sequence[str]) -> "TokenStore":
        """The same store as if it had these domains only: its fingerprint does not know of the
        others."""
        described = {domain: self.manifest["domains"][domain] for domain in sorted(set(domains))}
        content = {
            domain: {split: splits[split]["sha256"] for split in SPLITS}
            for domain, splits in described.items()
        }
        manifest = self.manifest | {
            "domains": described,
            "fingerprint": content_address(
                {"content": content, "tokenizer": self.manifest["tokenizer"]}
            ),
        }
        numbers = [self._streams.index((split, domain)) for split in SPLITS for domain in described]
        index = self._index[np.isin(self._index["stream"], numbers)].copy()
        index["stream"] = np.searchsorted(numbers, index["stream"])
        return TokenStore(self.path, manifest, index, self._mirror)

    def tokenizer(self) -> Tokenizer:
        """The tokeniser of this store."""
        file = self.path / "tokenizer.json"
        text = _read(file).decode()
        try:
            tokenizer = tokenizers.parse(text)
        except Exception as error:  # the Rust library raises plain Exception
            raise _damaged(file, f"is not a tokeniser ({error})") from None
        if tokenizers.fingerprint(tokenizer) != self.manifest["tokenizer"]["fingerprint"]:
            raise _damaged(file, "is not the tokeniser that wrote the tokens")
        return tokenizer

    def sizes(self, split: str) -> np.ndarray:
        """(K,) tokens."""
        return self._column(split, "tokens")

    def documents(self, split: str) -> np.ndarray:
        """(K,) documents."""
        return self._column(split, "documents")

    def bytes_per_token(self, split: str) -> np.ndarray:
        """(K,) UTF-8 bytes of text per token, an end of document being a token; nan where unknown
        or without tokens."""
        text = [self.manifest["domains"][domain][split]["bytes"] for domain in self.domains]
        known = np.array([np.nan if n is None else n for n in text], np.float64)
        tokens = self.sizes(split)
        return np.divide(known, tokens, out=np.full(len(known), np.nan), where=tokens > 0)

    @property
    def elsewhere(self) -> bool:
        """Whether shards that are not here may be in a second home."""
        return (self.path / CHECKSUMS).exists()

    def members(self) -> dict[Stream, np.ndarray]:
        """(members, 3) shard, offset and tokens of the members of every stream, in order."""
        columns = np.stack([self._index[name] for name in ("shard", "offset", "tokens")], axis=1)
        parts = np.split(columns, self._first_member[1:-1])
        return dict(zip(self._streams, parts, strict=True))

    def unwritable(self) -> np.ndarray:
        """(K,) part of the bytes of text that the tokeniser cannot write."""
        return self.vector(unwritable_share(self.manifest))

    def sequences(self, split: str, length: int) -> np.ndarray:
        """(K,) how many sequences of `length` + 1 tokens each domain has."""
        first = SPLITS.index(split) * len(self.domains)
        return np.diff(self._sequences_of(length).streams[first : first + len(self.domains) + 1])

    def gather(
        self, split: str, domain: np.ndarray, sequence: np.ndarray, length: int
    ) -> np.ndarray:
        """Tokens (B, length + 1) int64 of the sequences numbered `sequence` (B,) of the domains
        numbered `domain` (B,).

        Raises IndexError where there is no such sequence, UserError where a shard is missing or was
        changed.
        """
        domain, sequence = np.asarray(domain, np.int64), np.asarray(sequence, np.int64)
        windows = self._sequences_of(length)
        stream = SPLITS.index(split) * len(self.domains) + domain
        # Unsigned, a negative number is too large as well.
        if (domain.view(np.uint64) >= len(self.domains)).any() or (
            sequence.view(np.uint64)
            >= (windows.streams[stream + 1] - windows.streams[stream]).view(np.uint64)
        ).any():
            available = self.sequences(split, length).tolist()
            raise IndexError(
                f"gather: no such domain or sequence; there are {available} sequences of {length}"
            )
        position = windows.streams[stream] + sequence
        order = position.argsort()  # neighbours in one shard follow each other
        position = position[order]
        member = windows.members.searchsorted(position, side="right") - 1
        start = windows.origin[member] + position * length
        out = np.empty((len(member), length + 1), np.int64)
        mapped = None
        # The only loop over rows: whatever can be done for all of them at once is done above.
        for row, shard, first in zip(
            order.tolist(), self._shard[member].tolist(), start.tolist(), strict=True
        ):
            if shard != mapped:
                mapped, tokens = shard, self._map(shard)
            out[row] = tokens[first : first + length + 1]
        return out

    def sample(self, split: str, length: int = 256, most: int = 64) -> list[str]:
        """Text of the first tokens of up to `most` domains, as the tokeniser writes it."""
        tokenizer, texts = self.tokenizer(), []
        for domain in np.flatnonzero(self.sequences(split, length))[:most]:
            tokens = self.gather(split, domain[None], np.zeros(1, np.int64), length)[0]
            texts.append(tokenizer.decode(tokens[tokens != self.end_of_document].tolist()))
        return texts

    def carrying(
        self, split: str, domain: np.ndarray, sequence: np.ndarray, length: int
    ) -> np.ndarray:
        """(B,) tokens of the sequences that carry a loss: all."""
        return np.full(len(sequence), length)

    def _column(self, split: str, name: str) -> np.ndarray:
        return np.array(
            [self.manifest["domains"][domain][split][name] for domain in self.domains], np.int64
        )

    def _sequences_of(self, length: int) -> "_Windows":
        if length < 1:
            raise ValueError(f"sequence length {length}: must be at least 1")
        if length not in self._windows:
            per_member = np.maximum(self._index["tokens"] - 1, 0) // length
            members = np.concatenate([[0], np.cumsum(per_member)])
            origin = self._index["offset"] // self._dtype.itemsize - members[:-1] * length
            self._windows[length] = _Windows(members, members[self._first_member], origin)
        return self._windows[length]

    def _sample(self, stream: int, shard: int) -> str | None:
        """None in a store of an older version."""
        split, domain = self._streams[stream]
        samples = self.manifest["domains"][domain][split].get("shard_samples")
        return samples[shard] if samples else None

    @cached_property
    def _shard_bytes(self) -> list[list[int]]:
        return [
            self.manifest["domains"][domain][split]["shard_bytes"]
            for split, domain in self._streams
        ]

    def _map(self, number: int) -> np.ndarray:
        """A whole tar as an array of tokens; the least recently used maps are closed."""
        with self._lock:
            if number in self._maps:
                self._maps.move_to_end(number)
                return self._maps[number]
            stream, shard = self._shards[number][["stream", "shard"]].item()
            split, domain = self._streams[stream]
            path = (
                self.path / self.manifest["domains"][domain][split]["folder"] / f"{shard:05d}.tar"
            )
            expected = self._shard_bytes[stream][shard]
            if self._mirror is not None and not path.exists():
                self._fetch(self._mirror, path, expected)
            try:
                tokens = self._opened(number, path, expected, self._sample(stream, shard))
            except OSError as error:
                if error.errno not in _ENDED or not self._maps:
                    raise
                self._maps.clear()
                self._most_maps = max(self._most_maps // 2, 1)
                tokens = self._opened(number, path, expected, self._sample(stream, shard))
            self._maps[number] = tokens
            if len(self._maps) > self._most_maps:
                self._maps.popitem(last=False)
            return tokens

    def _opened(self, number: int, path: Path, size: int, sample: str | None) -> np.ndarray:
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            elsewhere = self._mirror is None and self.elsewhere
            raise _damaged(path, "is missing" + " (it may be in `remote`)" * elsewhere) from None
        try:
            found = os.fstat(file).st_size
            if number not in self._sound:
                wrong = seal.otherwise(path, size, sample)
                if wrong is not None:
                    raise _damaged(path, wrong)
                self._sound.add(number)
            # Not np.memmap, which resolves the path each time: with many shards opening is most of
            # the reading.
            return np.frombuffer(mmap.mmap(file, found, access=mmap.ACCESS_READ), self._dtype)
        finally:
            os.close(file)

    def _fetch(self, mirror: Mirror, path: Path, size: int) -> None:
        """Bring one shard of `size` bytes here; of several processes on this machine one does
        it."""
        with (self.path / ".fetch.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists():
                return
            name = path.relative_to(self.path).as_posix()
            clear_partial(path.parent, below=False)
            try:
                mirror.pull(self.path, name, size, self._checksums[name])
            except Torn as error:
                raise UserError(
                    f"remote: {mirror.url}/{name} {error}; delete {mirror.url}, and run again"
                ) from None

    @cached_property
    def _checksums(self) -> dict[str, str]:
        return json.loads(_read(self.path / CHECKSUMS))


def taken(tokens: Mapping[str, int], only: Sequence[str] | None, least: int) -> list[str]:
    """The domains that take part, of those that have so many training tokens."""
    return sorted(
        domain for domain in (tokens if only is None else set(only)) if tokens[domain] >= least
    )


def unwritable_share(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Part of every domain's bytes of text that the tokeniser cannot write; 0 where it was not
    measured."""
    shares = {}
    for domain, splits in manifest["domains"].items():
        lost = sum(split.get("unwritable_bytes", 0) for split in splits.values())
        text = sum(split["bytes"] or 0 for split in splits.values())
        shares[domain] = lost / text if text else 0.0
    return shares


def shards_of(manifest: dict[str, Any]) -> dict[str, int]:
    """Size in bytes of every shard, by its name in the store's folder."""
    splits = [described for domain in manifest["domains"].values() for described in domain.values()]
    return {
        f"{described['folder']}/{shard:05d}.tar": size
        for described in splits
        for shard, size in enumerate(described["shard_bytes"])
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """What is in a finished token store. Raises UserError where there is none, a damaged one or one
    of another version."""
    file = path.resolve() / "manifest.json"  # what to delete is not the link to it
    if not file.is_file():
        raise UserError(
            f"store: {file} does not exist, so this is no finished token store; run with "
            "stage=prepare"
        )
    try:
        manifest = read_object(file)
    except ValueError as error:
        raise _damaged(file, f"is not JSON ({error})") from None
    if manifest.get("schema") != SCHEMA:
        raise UserError(
            f"store: {file} has schema {manifest.get('schema')!r} where {SCHEMA} is read; "
            f"delete {path} and run with stage=prepare"
        )
    return manifest


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise _damaged(file, "is missing") from None


def _damaged(file: Path, what: str) -> UserError:
    return UserError(
        f"store: {file} {what}; delete the store's folder and run with stage=prepare to make it "
        "again"
    )
