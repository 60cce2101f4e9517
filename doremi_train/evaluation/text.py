"""Figures of the text itself: repeated bigrams and shared shingles, over a sample of each
domain."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from doremi_train.data.batches import fixed_sequences
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import detectors
from doremi_train.evaluation.detectors import Finding

SAMPLE = 2**17  # training tokens of a domain that are looked at
BUCKETS = 2**14  # of hashed bigrams
SHINGLE = 24  # tokens that are hardly the same by chance
KEPT = 8  # one of so many shingles is compared, chosen by its hash wherever it stands
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ / golden ratio, odd: spreads neighbouring numbers
Floats = NDArray[np.float64]
Tokens = NDArray[np.int64]


def of_the_text(names: Sequence[str], samples: list[Tokens]) -> list[Finding]:
    """What the domains share, seen in a sample of the text of each."""
    bigrams = [[_bigrams(tokens[half::2]) for half in range(2)] for tokens in samples]
    return detectors.duplicate(names, bigrams, _shared([_shingles(tokens) for tokens in samples]))


def sample(store: TokenStore, length: int) -> list[Tokens]:
    """Training sequences (n, length + 1) of each domain, about SAMPLE tokens, evenly spread over
    it."""
    domain, sequence = fixed_sequences(store, "train", length, max(2, SAMPLE // length))
    tokens = store.gather("train", domain, sequence, length)
    return [tokens[domain == k] for k in range(len(store.domains))]


def _bigrams(tokens: Tokens) -> Tokens:
    """Counts (BUCKETS,) of hashed pairs of neighbours in (n, T + 1)."""
    pairs = tokens.astype(np.uint64)
    hashed = (pairs[:, :-1] * MULTIPLIER + pairs[:, 1:]) * MULTIPLIER >> np.uint64(
        64 - BUCKETS.bit_length() + 1
    )
    return np.bincount(hashed.ravel().astype(np.int64), minlength=BUCKETS)


def _shingles(tokens: Tokens) -> NDArray[np.uint64]:
    """Different hashes of SHINGLE neighbouring tokens in (n, T + 1), one of KEPT, sorted."""
    rows = tokens.astype(np.uint64)
    width = min(SHINGLE, rows.shape[1])
    hashed = np.zeros_like(rows[:, width - 1 :])
    for start in range(width):
        hashed = hashed * MULTIPLIER + rows[:, start : start + hashed.shape[1]] + np.uint64(1)
    hashed = (hashed ^ (hashed >> np.uint64(32))) * MULTIPLIER
    return np.unique(hashed[hashed % np.uint64(64 * KEPT) // np.uint64(64) == 0])


def _shared(shingles: Sequence[NDArray[np.uint64]]) -> Floats:
    """Part (K, K) of the smaller domain's shingles that are in the other too."""
    shared = np.zeros((len(shingles), len(shingles)))
    for a, mine in enumerate(shingles):
        for b, other in enumerate(shingles[:a]):
            both = np.intersect1d(mine, other, assume_unique=True)
            shared[a, b] = shared[b, a] = len(both) / max(min(len(mine), len(other)), 1)
    return shared
