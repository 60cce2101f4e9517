"""Document selection by n-gram importance resampling (DSIR; Xie et al. 2023,
https://arxiv.org/abs/2302.03169).

1. features z(x) of a document: how often its 1- and 2-grams fall into each of m hash buckets;
2. p̂, q̂: bucket frequencies of the target and of the raw corpus;
3. log w(x) = Σ_j z_j(x) · (log p̂_j − log q̂_j);
4. k documents without replacement, with probability ∝ w: the largest k of log w + Gumbel noise.

*Exact mode* computes what the package `data-selection` does: `exact_buckets`, and `log_ratio` as it
stands. There log w is a sum over the document, whose spread of hundreds of nats drowns the noise:
it is top-k in disguise. The default divides by the length and by a temperature, and takes a floor
of the size of a count: far below one, a few n-grams that the target happens not to have decide.
Mixing p̂ with q̂, as a held-out half of the target likes best, is an option.

The corpus may be larger than any memory: documents are met in parts, and everything global is a sum
over parts (counts, `mass`, `digits`), so that it does not matter how they were divided, nor who
looked at them.

N documents, m buckets, G groups with a budget of their own, C columns of scores.
"""

import hashlib
import itertools
import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Hashes = NDArray[np.uint64]

FLOOR = 1e-8  # added to every frequency in exact mode
DIGIT = 8  # bits of a key that one look at all documents settles

# ── Features of exact mode ──────────────────────────────────────────────────────────

_WORDS = re.compile(r"\w+|[^\w\s]+")


def exact_words(text: str) -> list[str]:
    """Lower-cased runs of word characters, and of what is neither word nor space."""
    return _WORDS.findall(text.lower())


def exact_buckets(text: str, buckets: int) -> Integers:
    """(2n − 1,) buckets of the n words of a text and of their n − 1 pairs."""
    words = exact_words(text)
    pairs = (f"{first} {second}" for first, second in itertools.pairwise(words))
    return np.array([exact_bucket(gram, buckets) for gram in (*words, *pairs)], np.int64)


@lru_cache(2**18)
def exact_bucket(gram: str, buckets: int) -> int:
    """SHA-256 of a gram, as a number, modulo the buckets."""
    return int(hashlib.sha256(gram.encode()).hexdigest(), 16) % buckets


# ── Weights ─────────────────────────────────────────────────────────────────────────


def log_ratio(target: NDArray, raw: NDArray, mixing: float = 0.0, floor: float = FLOOR) -> Floats:
    """(m,) log p̂ − log q̂ in nats from counts (m,). Both are raised by `floor`; p̂ is (1 − mixing)
    · p̂ + mixing · q̂."""
    q = raw / raw.sum()
    p = (1 - mixing) * (target / target.sum()) + mixing * q
    return np.log(p + floor) - np.log(q + floor)


def held_out_mixing(halves: tuple[NDArray, NDArray], raw: NDArray) -> float:
    """The Jelinek-Mercer λ under which each half of the target, counts (m,), is likeliest by the
    other half and q̂.

    The likelihood is concave in λ: its slope is brought to zero by bisection. At most 0.999, so
    that p̂ never vanishes.
    """
    q = raw / raw.sum() + FLOOR
    p = [half / half.sum() for half in halves]
    # Counts held out; rise and base of their p̂.
    terms = [
        (halves[1], q - p[0], p[0]),
        (halves[0], q - p[1], p[1]),
    ]
    low, high = 1e-3, 0.999
    for _ in range(40):
        middle = (low + high) / 2
        slope = sum(
            float((held * rise / (base + middle * rise)).sum()) for held, rise, base in terms
        )
        low, high = (middle, high) if slope > 0 else (low, middle)
    return (low + high) / 2


def kl(p: NDArray, q: NDArray) -> float:
    """KL(p ‖ q) in nats of the distributions behind two counts (m,): half a count is added to every
    bucket."""
    first, second = (p + 0.5) / (p + 0.5).sum(), (q + 0.5) / (q + 0.5).sum()
    return float((first * (np.log(first) - np.log(second))).sum())


# ── Sampling without replacement ────────────────────────────────────────────────────


def noise(ids: Hashes, seed: int) -> Floats:
    """(N,) standard Gumbel noise, by the seed and a document's id (N,) alone: the same in every
    order."""
    bits = mixed(ids ^ mixed(np.array([seed], np.uint64)))
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # inside (0, 1)
    return -np.log(-np.log(uniform))


def of_copies(ids: Hashes, copies: Hashes) -> Hashes:
    """(N,) ids of documents of which some are copies of others, numbered from 0 (N,): each draws
    noise of its own, whatever their order."""
    return np.where(copies == 0, ids, mixed(ids ^ mixed(copies)))


def mixed(values: Hashes) -> Hashes:
    """SplitMix64's output function: a bijection of 64-bit numbers that leaves no pattern."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keys(scores: Floats, ids: Hashes, temperature: float, seed: int) -> Floats:
    """(N,) log w + Gumbel noise of scores (N,) in nats: the documents with the largest are a sample
    ∝ w."""
    return scores / temperature + noise(ids, seed)


def ordered(values: Floats) -> Hashes:
    """(N,) whole numbers in the order of floats (N,): from their sign and bits."""
    bits = (values + 0.0).view(np.uint64)  # −0 is 0
    negative = bits >> np.uint64(63) == 1
    return np.where(negative, ~bits, bits | np.uint64(2**63))


class Cut(NamedTuple):
    """The end of each group's budget in the descending order of keys: settled digit by digit, as
    in a radix sort."""

    prefix: Hashes  # (G,) leading digits of the first key that does not fit any more
    left: Integers  # (G,) budget that is left for keys with this prefix
    bits: int  # settled so far; of 64


def start(budgets: Integers) -> Cut:
    """Nothing settled. Budgets (G,) are documents or tokens, of which the groups must have as
    many."""
    return Cut(np.zeros(len(budgets), np.uint64), budgets.astype(np.int64), 0)


def digits(cut: Cut, order: Hashes, group: Integers, cost: Integers) -> Integers:
    """(G, 2^DIGIT) cost (N,) of the documents that share the prefix of their group (N,), by the
    next digit of `order` (N,). A sum over documents: that of all of them is what `narrow` wants."""
    known = order >> np.uint64(64 - cut.bits) if cut.bits else np.zeros_like(order)
    same = known == cut.prefix[group]
    digit = (order[same] >> np.uint64(64 - cut.bits - DIGIT)).astype(np.int64) & (2**DIGIT - 1)
    sums = np.zeros((len(cut.prefix), 2**DIGIT), np.int64)
    np.add.at(sums, (group[same], digit), cost[same])
    return sums


def narrow(cut: Cut, sums: Integers) -> Cut:
    """Settle one digit more: that at which the sum (G, 2^DIGIT), from the largest digit down,
    passes what is left."""
    above = sums[:, ::-1].cumsum(1)[:, ::-1] - sums  # (G, D) cost of larger digits
    fits = above + sums <= cut.left[:, None]
    digit = np.where(fits.all(1), 0, sums.shape[1] - 1 - np.argmin(fits[:, ::-1], 1))
    left = cut.left - np.take_along_axis(above, digit[:, None], 1)[:, 0]
    return Cut(cut.prefix << np.uint64(DIGIT) | digit.astype(np.uint64), left, cut.bits + DIGIT)


def chosen(
    cut: Cut, order: Hashes, group: Integers, cost: Integers
) -> tuple[NDArray[np.bool_], Cut]:
    """(N,) which documents are in, by a cut whose 64 bits are settled; and the cut for the
    documents after them.

    Keys above the cut are in. Equal ones (copies, without noise) are, in their order, as long as
    they fit.
    """
    inside = order > cut.prefix[group]
    left = cut.left.copy()
    for n in np.flatnonzero(order == cut.prefix[group]):
        inside[n] = cost[n] <= left[group[n]]
        left[group[n]] = left[group[n]] - cost[n] if inside[n] else 0
    return inside, cut._replace(left=left)


class Mass(NamedTuple):
    """Sums of weights and of their squares, apart from a scale that keeps them finite."""

    top: float  # the largest log weight
    weights: float  # Σ w / e^top
    squares: float  # Σ w² / e^(2 top)


def mass(log_weights: Floats) -> Mass:
    """Sums of log weights (N,)."""
    if not len(log_weights):
        return Mass(-np.inf, 0.0, 0.0)
    top = float(log_weights.max())
    scaled = np.exp(log_weights - top)
    return Mass(top, float(scaled.sum()), float((scaled**2).sum()))


def together(first: Mass, second: Mass) -> Mass:
    """The mass of the union."""
    low, high = sorted((first, second))
    if low.weights == 0:
        return high
    shrink = np.exp(low.top - high.top)
    return Mass(
        high.top, high.weights + low.weights * shrink, high.squares + low.squares * shrink**2
    )


def effective_sample_size(corpus: Mass) -> float:
    """(Σ w)² / Σ w²: of how many equally weighted documents the weighted corpus is worth."""
    return corpus.weights**2 / corpus.squares
