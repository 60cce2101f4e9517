"""Inner loops over bytes, compiled by numba at their first call and kept on disk (extra `select`).

A batch is the UTF-8 of its documents, one after the other. A token is a 64-bit hash. Tests hold
every loop against the same thing written naively.
"""

import functools
import itertools
import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from doremi_train.config import UserError

SPACE, WORD, OTHER, ALONE = 0, 1, 2, 3  # classes of characters
SIGNS = 4  # entries of a bucket's direction in a projection
SHINGLE = 13  # tokens that are no coincidence: who shares them has copied
START = np.uint64(0xCBF29CE484222325)
PRIME = np.uint64(0x100000001B3)
BASE = np.uint64(0x9FB21C651E98DF25)
SCATTER = np.uint64(0xD6E8FEB86659FD93)


LOOPS: list[Callable[..., Any]] = []  # as they are written


def loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """A loop that is compiled when one of them is first called: no other command waits for numba.
    Raises UserError then, where numba is not installed."""

    @functools.wraps(function)
    def first(*arguments: Any) -> Any:
        require_numba()
        return globals()[function.__name__](*arguments)

    LOOPS.append(function)
    return first


@lru_cache(1)
def require_numba() -> None:
    """Put the compiled loops in their own places in this module, so that they call each other and
    nothing stands between. Raises UserError where numba is not installed."""
    try:
        from numba import njit
    except ImportError:
        raise UserError("selection: needs numba; pip install 'doremi-train[select]'") from None
    for function in LOOPS:
        try:
            globals()[function.__name__] = njit(cache=True, nogil=True)(function)
        except RuntimeError:  # nowhere can anything be kept (NUMBA_CACHE_DIR says where)
            globals()[function.__name__] = njit(nogil=True)(function)


class Tokens(NamedTuple):
    """The tokens of a batch of B documents, n in all."""

    hashes: NDArray[np.uint64]  # (n,)
    ends: NDArray[np.int64]  # (n,) first byte after the token, in the batch
    first: NDArray[np.int64]  # (B + 1,) number of each document's first token


class Known(NamedTuple):
    """Runs of SHINGLE tokens to be found again."""

    runs: NDArray[np.uint64]  # (S,) their hashes, sorted
    # (2^k / 8,) a bit for k leading ones: what is not marked here is certainly none of them.
    sieve: NDArray[np.uint8]
    shift: np.uint64  # 64 − k


class Alphabet(NamedTuple):
    """What a character is, by its code point."""

    kind: NDArray[np.uint8]  # (0x110000,)
    lower: NDArray[np.uint32]  # (0x110000,)
    ascii: NDArray[np.uint16]  # (128,) both: the kind in the upper byte


@lru_cache(1)
def alphabet() -> Alphabet:
    """Word characters are those of Python's `\\w` and the marks written over and under them. A
    character of a script written without spaces is a word of its own. Lower case is by character:
    where it would be several, the first."""
    kind = np.full(sys.maxunicode + 1, OTHER, np.uint8)
    lower = np.arange(sys.maxunicode + 1, dtype=np.uint32)
    # Beyond and between, nothing is a letter or a mark.
    for code in (
        *range(0x34000),
        *range(0xE0000, 0xE1000),
    ):
        character = chr(code)
        if character.isspace():
            kind[code] = SPACE
        elif character == "_" or character.isalnum() or unicodedata.category(character)[0] == "M":
            kind[code] = WORD
        if character != character.lower():
            lower[code] = ord(character.lower()[0])
    for low, high in UNSPACED:
        kind[low:high] = np.where(kind[low:high] == WORD, ALONE, kind[low:high])
    return Alphabet(
        kind, lower, kind[:128].astype(np.uint16) << np.uint16(8) | lower[:128].astype(np.uint16)
    )


UNSPACED = (  # Thai and Lao, Tibetan, Burmese, Khmer, kana, Han
    (0x0E00, 0x1000), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3005, 0x3008), (0x3040, 0x3100),
    (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x32000),
)  # fmt: skip


def joined(texts: Sequence[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The UTF-8 (b,) of B texts as one batch, and where each begins and the last ends (B + 1,)."""
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return np.frombuffer(b"".join(texts), np.uint8), offsets


class Room:
    """Memory for the tokens of one batch after another: to have it anew from the system costs a
    tenth of the time."""

    def __init__(self) -> None:
        self.hashes, self.ends = np.empty(0, np.uint64), np.empty(0, np.int64)

    def grown(self, size: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        if len(self.hashes) < size:
            self.hashes, self.ends = np.empty(size, np.uint64), np.empty(size, np.int64)
        return self.hashes, self.ends


def split(text: NDArray[np.uint8], offsets: NDArray[np.int64], room: Room | None = None) -> Tokens:
    """The words of a batch; where a room is given, they hold until the next batch takes it."""
    hashes, ends = (room or Room()).grown(len(text))
    first = np.empty(len(offsets), np.int64)
    n = words(text, offsets, *alphabet(), hashes, ends, first)
    return Tokens(hashes[:n], ends[:n], first)


def known(hashes: NDArray[np.uint64], first: NDArray[np.int64]) -> Known:
    """All runs of SHINGLE tokens of documents."""
    room = np.empty(len(hashes) + 1, np.uint64)
    runs = [
        room[: shingles(hashes, start, end, room)].copy()
        for start, end in itertools.pairwise(first)
    ]
    return sieved(np.unique(np.concatenate([*runs, np.empty(0, np.uint64)])))


def sieved(runs: NDArray[np.uint64]) -> Known:
    """Runs (S,), sorted, ready to be found."""
    # One mark in 128 is set, or fewer: a search costs many looks.
    bits = max(len(runs) * 128, 8).bit_length()
    sieve = np.zeros(2 ** (bits - 3), np.uint8)
    place = (runs * SCATTER) >> np.uint64(64 - bits)
    np.bitwise_or.at(
        sieve, place >> np.uint64(3), np.uint8(1) << (place & np.uint64(7)).astype(np.uint8)
    )
    return Known(runs, sieve, np.uint64(64 - bits))


def overlap(
    hashes: NDArray[np.uint64], bounds: NDArray[np.int64], known: Known
) -> NDArray[np.int64]:
    """(P,) how many runs of SHINGLE tokens of each part, tokens bounds[p] to bounds[p + 1], are
    known."""
    shared = np.zeros(len(bounds) - 1, np.int64)
    if len(known.runs):
        copied(hashes, bounds, *known, shared)
    return shared


@loop
def mix(value):
    """`methods.ngram.mixed` of one number."""
    value += np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@loop
def words(text, offsets, kind, lower, ascii, hashes, ends, first):
    """Split a batch into words: text (b,) uint8, document d from offsets[d] to offsets[d + 1].
    Fills `Tokens`, whose arrays have room for as many tokens as bytes; returns how many there are.

    Places are unsigned, since a signed one may be negative and would be looked at for that.
    """
    n, one, two, three = np.uint64(0), np.uint64(1), np.uint64(2), np.uint64(3)
    for d in range(len(offsets) - 1):
        first[d] = n
        before = np.uint16(SPACE)
        value = START
        i, end = np.uint64(offsets[d]), np.uint64(offsets[d + 1])
        while i < end:
            byte = text[i]
            if byte < 0x80:
                both = ascii[np.uint64(byte)]
                now, character, size = both >> np.uint16(8), np.uint64(both & np.uint16(0xFF)), one
            else:
                if byte < 0xE0:
                    code, size = np.uint32((byte & 0x1F) << 6 | (text[i + one] & 0x3F)), two
                elif byte < 0xF0:
                    code = np.uint32(
                        (byte & 0x0F) << 12 | (text[i + one] & 0x3F) << 6 | (text[i + two] & 0x3F)
                    )
                    size = three
                else:
                    high = (byte & 0x07) << 18 | (text[i + one] & 0x3F) << 12
                    code = np.uint32(high | (text[i + two] & 0x3F) << 6 | (text[i + three] & 0x3F))
                    size = np.uint64(4)
                now, character = np.uint16(kind[code]), np.uint64(lower[code])
            begins = (now != before) | (now == ALONE)
            # Of the word before, should it end here: no branch, for none could be foretold.
            hashes[n], ends[n] = value, i
            n += np.uint64(begins & (before != SPACE))
            value = ((START if begins else value) ^ character) * PRIME
            before = now
            i += size
        if before != SPACE:
            hashes[n], ends[n] = value, end
            n += one
    first[len(offsets) - 1] = n
    return n


@loop
def bucket(mixed, buckets):
    """The bucket of a mixed hash: its upper half as a fraction of all buckets."""
    return ((mixed >> np.uint64(32)) * buckets) >> np.uint64(32)


@loop
def count(hashes, bounds, counts):
    """Add the 1- and 2-grams of each part, tokens bounds[p] to bounds[p + 1], to counts (m,)."""
    buckets = np.uint64(len(counts))
    for p in range(len(bounds) - 1):
        if bounds[p] == bounds[p + 1]:
            continue
        before = mix(hashes[bounds[p]])
        counts[bucket(before, buckets)] += 1
        for i in range(np.uint64(bounds[p] + 1), np.uint64(bounds[p + 1])):
            counts[bucket(mix(before + hashes[i]), buckets)] += 1
            before = mix(hashes[i])
            counts[bucket(before, buckets)] += 1


@loop
def score(hashes, bounds, table, sums):
    """Add table (m, C) of the 1- and 2-grams of each part to sums (P, C): two columns at a time, a
    target's and its half's, whose sums then stay in registers."""
    buckets, columns = np.uint64(len(table)), table.shape[1]
    for p in range(len(bounds) - 1):
        if bounds[p] == bounds[p + 1]:
            continue
        for c in range(0, columns, 2):
            d = min(c + 1, columns - 1)
            before = mix(hashes[bounds[p]])
            one = bucket(before, buckets)
            first, second = np.float64(table[one, c]), np.float64(table[one, d])
            for i in range(np.uint64(bounds[p] + 1), np.uint64(bounds[p + 1])):
                two = bucket(mix(before + hashes[i]), buckets)
                before = mix(hashes[i])
                one = bucket(before, buckets)
                first += np.float64(table[one, c]) + table[two, c]
                second += np.float64(table[one, d]) + table[two, d]
            sums[p, c] += first
            if d > c:
                sums[p, d] += second


@loop
def identify(hashes, bounds, ids):
    """Ids (P,): a hash of the tokens of each part, so the same for the same words wherever they
    stand."""
    for p in range(len(bounds) - 1):
        value = START
        for i in range(bounds[p], bounds[p + 1]):
            value = (value ^ hashes[i]) * PRIME
            value ^= value >> np.uint64(29)
        ids[p] = mix(value)


@loop
def shingles(hashes, start, end, out):
    """Hashes of all runs of SHINGLE tokens from `start` to `end`; returns how many. A polynomial
    that rolls along."""
    leaving = np.uint64(1)
    for _ in range(SHINGLE):
        leaving *= BASE
    value = np.uint64(0)
    for i in range(start, end):
        value = value * BASE + hashes[i]
        if i >= start + SHINGLE:
            value -= hashes[i - SHINGLE] * leaving
        out[max(i - start - SHINGLE + 1, 0)] = value
    return max(end - start - SHINGLE + 1, 0)


@loop
def copied(hashes, bounds, known, sieve, shift, shared):
    """Add to shared (P,) how many runs of SHINGLE tokens of each part are known."""
    most = 0
    for p in range(len(bounds) - 1):
        most = max(most, bounds[p + 1] - bounds[p])
    runs = np.empty(most + 1, np.uint64)
    for p in range(len(bounds) - 1):
        for i in range(shingles(hashes, bounds[p], bounds[p + 1], runs)):
            at = (runs[i] * SCATTER) >> shift
            if sieve[at >> np.uint64(3)] >> (at & np.uint64(7)) & np.uint64(1):
                place = np.searchsorted(known, runs[i])
                shared[p] += place < len(known) and known[place] == runs[i]


class Trie(NamedTuple):
    """The tokens of a vocabulary as paths of bytes: a hash table of edges with open addresses."""

    edges: NDArray[np.int64]  # (E,) node · 256 + byte, −1 where there is none
    nodes: NDArray[np.int64]  # (E,) where the edge leads; the root is 0
    tokens: NDArray[np.int64]  # (nodes,) the token that ends here, or −1


def trie(tokens: Sequence[bytes]) -> Trie:
    """The trie of a vocabulary that holds every single byte; a token's number is its place."""
    text, offsets = joined(tokens)
    size = 1 << (4 * len(text)).bit_length()
    edges, nodes = np.full(size, -1, np.int64), np.zeros(size, np.int64)
    ends = np.full(len(text) + 1, -1, np.int64)
    return Trie(edges, nodes, ends[: grow(text, offsets, edges, nodes, ends)])


@loop
def place(edges, edge):
    """Place of an edge in the table, or where it would be."""
    at = np.int64(mix(np.uint64(edge)) & np.uint64(len(edges) - 1))
    while edges[at] != -1 and edges[at] != edge:
        at = (at + 1) & (len(edges) - 1)
    return at


@loop
def grow(text, offsets, edges, nodes, ends):
    """Fill a trie; returns how many nodes it has."""
    used = 1
    for token in range(len(offsets) - 1):
        node = 0
        for i in range(offsets[token], offsets[token + 1]):
            at = place(edges, node * 256 + np.int64(text[i]))
            if edges[at] == -1:
                edges[at] = node * 256 + np.int64(text[i])
                nodes[at] = used
                used += 1
            node = nodes[at]
        ends[node] = token
    return used


@loop
def longest(text, start, end, edges, nodes, ends, ids, first):
    """Tokens of the parts of a text, from start[p] to end[p]: always the longest that matches.
    Fills ids, with room for as many as bytes, and first (P + 1,); returns how many there are."""
    n = 0
    for p in range(len(start)):
        first[p] = n
        i = start[p]
        while i < end[p]:
            node, after = 0, i
            for j in range(i, end[p]):
                at = place(edges, node * 256 + np.int64(text[j]))
                if edges[at] == -1:
                    break
                node = nodes[at]
                if ends[node] >= 0:
                    ids[n], after = ends[node], j + 1
            n += 1
            i = after
    first[len(start)] = n
    return n


def segment(
    text: NDArray[np.uint8], start: NDArray[np.int64], end: NDArray[np.int64], tokens: Trie
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids (n,) of the tokens of P parts, and the first token of each (P + 1,)."""
    ids, first = np.empty(int((end - start).sum()), np.int64), np.empty(len(start) + 1, np.int64)
    n = longest(text, start, end, *tokens, ids, first)
    return ids[:n], first


@loop
def frequencies(hashes, bounds, seen, documents):
    """Add to documents (m,) in how many parts each bucket of a token comes; seen (m,) int64 is
    room, all zero."""
    buckets = np.uint64(len(documents))
    for p in range(len(bounds) - 1):
        for i in range(bounds[p], bounds[p + 1]):
            at = bucket(mix(hashes[i]), buckets)
            documents[at] += seen[at] != p + 1
            seen[at] = p + 1


@loop
def bm25(hashes, bounds, weights, saturation, length, mean, seen, sums):
    """Add to sums (P, C) the weights (m, C) of a part's tokens, each times f (k + 1) / (f + k (1 −
    b + b n / mean)) for its frequency f among the part's n tokens: k is `saturation`, b is
    `length`. seen (m,) int64 is room, all zero."""
    buckets = np.uint64(len(weights))
    for p in range(len(bounds) - 1):
        n = bounds[p + 1] - bounds[p]
        for i in range(bounds[p], bounds[p + 1]):
            seen[bucket(mix(hashes[i]), buckets)] += 1
        norm = saturation * (1 - length + length * n / mean)
        for i in range(bounds[p], bounds[p + 1]):
            at = bucket(mix(hashes[i]), buckets)
            f = seen[at]
            if f:
                seen[at] = 0
                for c in range(weights.shape[1]):
                    sums[p, c] += weights[at, c] * f * (saturation + 1) / (f + norm)


@loop
def tally(hashes, bounds, seen, buckets, counts, first):
    """The distinct tokens of each part, in the order of their first occurrence: fills their buckets
    and counts, with room for as many as tokens, and first (P + 1,); returns how many there are.
    seen (m,) int64 is room, all zero, and is so again."""
    n = 0
    for p in range(len(bounds) - 1):
        first[p] = n
        for i in range(bounds[p], bounds[p + 1]):
            at = bucket(mix(hashes[i]), np.uint64(len(seen)))
            if seen[at] == 0:
                buckets[n] = at
                counts[n] = 0
                n += 1
                seen[at] = n
            counts[seen[at] - 1] += 1
        for i in range(first[p], n):
            seen[buckets[i]] = 0
    first[len(bounds) - 1] = n
    return n


@loop
def project(buckets, counts, first, weights, unit, out):
    """Fill out (P, D) int16: of each part, whose distinct tokens are first[p] to first[p + 1], the
    sum of (1 + log count) · weights (m,) times a signed direction of each bucket, with SIGNS
    entries that are not 0; brought to length `unit`, and rounded. Where nothing weighs, 0."""
    dimensions = np.uint64(out.shape[1])
    sums = np.empty(out.shape[1], np.float64)
    for p in range(len(first) - 1):
        sums[:] = 0.0
        for i in range(first[p], first[p + 1]):
            weight = weights[buckets[i]]
            if weight == 0:
                continue
            weight *= 1 + np.log(np.float64(counts[i]))
            bits = mix(np.uint64(buckets[i]) ^ SCATTER)
            for _ in range(SIGNS):
                at = ((bits & np.uint64(0x7FFF)) * dimensions) >> np.uint64(15)
                sums[at] += weight if bits & np.uint64(0x8000) else -weight
                bits >>= np.uint64(16)
        square = 0.0
        for d in range(len(sums)):
            square += sums[d] * sums[d]
        scale = unit / np.sqrt(square) if square > 0 else 0.0
        for d in range(len(sums)):
            out[p, d] = np.int16(np.rint(sums[d] * scale))
