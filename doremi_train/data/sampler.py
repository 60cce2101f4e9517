"""Which sequences a step trains on: a pure function of (seed, weights, step), whatever the number
of processes.

Quotas. Step t draws quota_k = ⌊b W_k + u_t⌋ − ⌊b W_{k−1} + u_t⌋ sequences of domain k, with W the
cumulative weights and u_t = frac(t · golden ratio): systematic sampling with a rotating offset.
Quotas sum to b, differ from b α_k by less than 1, and the count over many steps stays within O(log
t) of t b α_k. For fixed weights the count before any step is closed form (`_floor_sum`), so seeking
is O(K); for weights that change, the counts are carried along as cursors.

Order. Draw j of a domain with N sequences is epoch j // N, position j % N of that epoch's own
permutation, computed by a small Feistel network: no list of N numbers is ever made, and every
sequence comes once per epoch. A sub-sample of n sequences is the first n of one more such
permutation, the same in every epoch.

K domains, b sequences a batch.
"""

import hashlib
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_BITS = 32  # fixed point of the quotas: weights are resolved to 2⁻³² / b
_ONE = 1 << _BITS
_GOLDEN = 0x9E3779B1  # golden ratio · 2³², odd
_ROUND = [(2 * turn + 1) * 0xD1B54A32D192ED03 % (1 << 64) for turn in range(4)]
# Draws whose sequences are computed together: for a few most of the time would be Python's. More
# every time, while a batch follows on the other.
_AHEAD = 2048, 65536
_PIECE = 8192  # numbers of an array that a core's cache holds several of
_KEPT = 64  # batches whose order is kept; for weights that stay there are K + 1 at most
_MAX_STEP = 1 << 30  # beyond it floor_sum would leave 63 bits


class Draw(NamedTuple):
    """The global batch of one step, before any token is read."""

    domain: Ints  # (b,)
    sequence: Ints  # (b,) index within the domain
    counts: Ints  # (K,) sequences drawn of each domain up to and with this step


class Subsample(NamedTuple):
    """A fixed part of every domain, chosen by its own seed and the domain's name."""

    part: Fraction  # in (0, 1]
    seed: int

    def sizes(self, whole: Ints) -> Ints:
        """(K,) sequences of each domain that are kept: the part, rounded up, so that none is left
        empty."""
        return np.array(
            [-(-int(n) * self.part.numerator // self.part.denominator) for n in whole],
            dtype=np.int64,
        )


class Sampler:
    """Draws global batches of `batch` sequences from domains of `whole` (K,) sequences, or from a
    sub-sample of them.

    The permutations depend on the seed and a domain's name only, so adding a domain leaves the
    others' order alone. `sizes` (K,) are the sequences of each domain that may be drawn.
    """

    def __init__(
        self,
        whole: Ints,
        names: tuple[str, ...],
        batch: int,
        seed: int,
        subsample: Subsample | None = None,
    ) -> None:
        self._whole = self.sizes = np.asarray(whole, dtype=np.int64)
        self.batch = batch
        self._keys = np.array([_key(seed, name) for name in names], dtype=np.uint64)
        self._kept: NDArray[np.uint64] | None = None
        if subsample is not None:
            self.sizes = subsample.sizes(self._whole)
            self._kept = np.array(
                [_key(subsample.seed, f"subsample\0{name}") for name in names], dtype=np.uint64
            )
        none = np.zeros(len(names), dtype=np.int64)
        # (K,) draws from which on and up to which they are known, (K,) where draw 0 would stand in
        # them, (·,).
        self._ahead = none, none, none, none[:0]
        self._following = _AHEAD[0]  # draws of it
        self._spreads: dict[bytes, tuple[Ints, Ints]] = {}  # by quotas
        self._asked = b"", none  # weights, and their edges

    def counts_before(self, step: int, weights: NDArray[np.float64]) -> Ints:
        """(K,) sequences of each domain in steps 0 … step − 1, for weights that never changed."""
        if not 0 <= step <= _MAX_STEP:
            raise ValueError(f"step={step}: must be between 0 and {_MAX_STEP}")
        edges = self._edges(weights)
        return np.diff(_floor_sum(step, _ONE, _GOLDEN, edges))

    def draw(self, step: int, weights: NDArray[np.float64], counts: Ints) -> Draw:
        """The batch of step `step` (from 0), given the (K,) counts drawn before it."""
        offset = step * _GOLDEN % _ONE
        before = (self._edges(weights) + offset) >> _BITS  # (K + 1,)
        quota = before[1:] - before[:-1]
        domain, nth = self._spread(quota)
        after = counts + quota
        return Draw(domain.copy(), self._upcoming(domain, nth, counts, after, weights), after)

    def sequence(self, domain: Ints, number: Ints) -> Ints:
        """(B,) the sequence that is draw `number` (B,), from 0, of `domain` (B,)."""
        epoch, position = np.divmod(number, self.sizes[domain])
        sequence = _permute(
            position, self.sizes, domain, self._keys[domain] ^ _mix(epoch.astype(np.uint64))
        )
        if self._kept is not None:
            sequence = _permute(sequence, self._whole, domain, self._kept[domain])
        return sequence

    def _spread(self, quota: Ints) -> tuple[Ints, Ints]:
        """Domains (b,) of a batch with so many of each, and which of the domain's own it is:
        every domain is spread over the batch, so that ranks and micro-batches see similar shares.
        """
        key = quota.tobytes()
        known = self._spreads.get(key)
        if known is None:
            if len(self._spreads) >= _KEPT:
                self._spreads.clear()
            domain = np.arange(len(quota)).repeat(quota)
            nth = np.arange(self.batch) - (np.cumsum(quota) - quota)[domain]
            order = ((nth + 0.5) / quota[domain]).argsort(kind="stable")
            known = self._spreads[key] = domain[order], nth[order]
        return known

    def _upcoming(
        self, domain: Ints, nth: Ints, counts: Ints, after: Ints, weights: NDArray[np.float64]
    ) -> Ints:
        """(b,) sequences of the `nth` (b,) draws of `domain` (b,) after `counts` (K,), all of them
        before `after` (K,). Where one is not known yet, computes those of the draws that follow as
        well."""
        first, end, start, known = self._ahead
        if np.count_nonzero((counts < first) | (after > end)):
            goes_on = not np.count_nonzero((counts < first) | (counts > end))
            least, most = _AHEAD
            self._following = min(2 * self._following, most) if goes_on else least
            ahead = after - counts + np.ceil(self._following * weights).astype(np.int64)  # (K,)
            first, end, start = counts, counts + ahead, np.cumsum(ahead) - ahead - counts
            which = np.repeat(np.arange(len(ahead)), ahead)
            known = self.sequence(which, np.arange(len(which)) - start[which])
            self._ahead = first, end, start, known
        return known[(start + counts)[domain] + nth]

    def _edges(self, weights: NDArray[np.float64]) -> Ints:
        """(K + 1,) cumulative weights in units of 2⁻³² sequences, from 0 to exactly b."""
        asked = weights.tobytes()
        if asked == self._asked[0]:
            return self._asked[1]
        cumulative = np.concatenate([[0.0], np.cumsum(weights)])
        if not (weights.min() >= 0 and abs(cumulative[-1] - 1) < 1e-6):  # a NaN is neither
            raise ValueError(f"not a mixture: {np.asarray(weights).tolist()}")
        edges = np.rint(cumulative / cumulative[-1] * (self.batch * _ONE)).astype(np.int64)
        self._asked = asked, edges
        return edges


def _floor_sum(n: int, m: int, a: int, b: Ints) -> Ints:
    """Σ_{i<n} ⌊(a i + b) / m⌋ for every b ≥ 0, in O(log m) like Euclid's algorithm. a and m are
    common to all b."""
    total = np.zeros_like(b)
    count = np.full_like(b, n)
    while True:
        total += count * (count - 1) // 2 * (a // m) + count * (b // m)
        a, b = a % m, b % m
        top = a * count + b
        count, b = top // m, top % m
        if not count.any():
            return total
        m, a = a, m


def _key(seed: int, name: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little"
    )


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): every input bit moves every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _permute(position: Ints, sizes: Ints, domain: Ints, key: NDArray[np.uint64]) -> Ints:
    """A permutation of 0 … size − 1 chosen by key, elementwise, with the size of `domain`: Feistel
    on the next power of 2, walked until inside."""
    bits = np.ceil(np.log2(sizes)).astype(np.uint64)[domain]
    size = sizes.astype(np.uint64)[domain]
    pieces = (slice(start, start + _PIECE) for start in range(0, len(bits), _PIECE))
    x, found = position.astype(np.uint64), np.empty_like(bits)
    for piece in pieces:
        found[piece] = _feistel(x[piece], bits[piece], key[piece])
    outside = np.flatnonzero(found >= size)
    while len(outside):
        walked = _feistel(found[outside], bits[outside], key[outside])
        found[outside] = walked
        outside = outside[walked >= size[outside]]
    return found.astype(np.int64)


def _feistel(
    x: NDArray[np.uint64], bits: NDArray[np.uint64], key: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """A permutation of 0 … 2^bits − 1 chosen by key, elementwise."""
    one, low = np.uint64(1), bits // np.uint64(2)
    below, above = (one << low) - one, (one << (bits - low)) - one
    right, left = x & below, x >> low
    for turn in _ROUND:
        round_key = key + np.uint64(turn)
        right ^= _mix(left ^ round_key) & below
        left ^= _mix(right ^ ~round_key) & above
    return (left << low) | right
