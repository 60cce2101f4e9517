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
# Draws whose sequences are computed together: for a few most of the time would be Python's.
_AHEAD = 2048
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
        none = np.zeros(len(names) + 1, dtype=np.int64)
        self._ahead = none[1:], none, none[:0]  # see `_upcoming`

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
        domain = np.arange(len(quota)).repeat(quota)
        nth = np.arange(self.batch) - before[domain]
        # Spread every domain over the batch, so that ranks and micro-batches see similar shares.
        order = ((nth + 0.5) / quota[domain]).argsort(kind="stable")
        domain, nth = domain[order], nth[order]
        return Draw(
            domain,
            self._upcoming(domain, counts[domain] + nth, counts, quota, weights),
            counts + quota,
        )

    def sequence(self, domain: Ints, number: Ints) -> Ints:
        """(B,) the sequence that is draw `number` (B,), from 0, of `domain` (B,)."""
        epoch, position = np.divmod(number, self.sizes[domain])
        sequence = _permute(
            position, self.sizes[domain], self._keys[domain] ^ _mix(epoch.astype(np.uint64))
        )
        if self._kept is not None:
            sequence = _permute(sequence, self._whole[domain], self._kept[domain])
        return sequence

    def _upcoming(
        self, domain: Ints, number: Ints, counts: Ints, quota: Ints, weights: NDArray[np.float64]
    ) -> Ints:
        """(B,) as `sequence`. Where one is not known yet, computes those of the next _AHEAD draws
        as well."""
        # (K,) draws from which on they are known, (K + 1,) where they stand, (·,).
        first, edges, known = self._ahead
        at = (edges[:-1] - first)[domain] + number
        if ((at < edges[domain]) | (at >= edges[domain + 1])).any():
            ahead = quota + np.ceil(_AHEAD * weights).astype(np.int64)  # (K,)
            first, edges = counts, np.concatenate([[0], np.cumsum(ahead)])
            which = np.repeat(np.arange(len(ahead)), ahead)
            known = self.sequence(which, (first - edges[:-1])[which] + np.arange(len(which)))
            self._ahead = first, edges, known
            at = (edges[:-1] - first)[domain] + number
        return known[at]

    def _edges(self, weights: NDArray[np.float64]) -> Ints:
        """(K + 1,) cumulative weights in units of 2⁻³² sequences, from 0 to exactly b."""
        cumulative = np.concatenate([[0.0], np.cumsum(weights)])
        if not (weights.min() >= 0 and abs(cumulative[-1] - 1) < 1e-6):  # a NaN is neither
            raise ValueError(f"not a mixture: {np.asarray(weights).tolist()}")
        return np.rint(cumulative / cumulative[-1] * (self.batch * _ONE)).astype(np.int64)


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
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _permute(position: Ints, size: Ints, key: NDArray[np.uint64]) -> Ints:
    """A permutation of 0 … size − 1 chosen by key, elementwise: Feistel on the next power of 2,
    walked until inside."""
    bits = np.ceil(np.log2(size)).astype(np.uint64)
    low = bits // np.uint64(2)
    masks = [(np.uint64(1) << low) - np.uint64(1), (np.uint64(1) << (bits - low)) - np.uint64(1)]
    x = position.astype(np.uint64)
    outside = np.ones(len(x), dtype=bool)
    while outside.any():
        right, left = x & masks[0], x >> low
        for turn in range(len(_ROUND)):
            round_key = key + np.uint64(_ROUND[turn])
            right = right ^ (_mix(left ^ round_key) & masks[0])
            left = left ^ (_mix(right ^ ~round_key) & masks[1])
        x = np.where(outside, (left << low) | right, x)
        outside = x >= size.astype(np.uint64)
    return x.astype(np.int64)
