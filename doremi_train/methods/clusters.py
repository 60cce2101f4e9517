"""Domains from text: spherical k-means (Dhillon and Modha 2001), whose clusters are merged by
average linkage on the cosine, and named by log-odds (Monroe et al. 2008, "Fightin' Words").

1. documents are unit vectors, rounded to integers of length UNIT;
2. a centre is the direction of the sum of its documents; each document goes to the nearest centre;
3. centres are merged by average linkage on 1 − cosine, until K domains have a least size; what is
   smaller then goes to the nearest of them;
4. a word tells a domain apart by its z-score: log-odds against all domains, with a prior of theirs.

Vectors are integers, so short that every sum of products is an exact float32: it does not matter in
which order they are added, by how many threads, nor how documents were divided into batches.

N documents, D dimensions, F fine clusters, K domains, W words.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.cluster import hierarchy

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

# Length of a vector. Rounding adds √D / 2 at most, and (UNIT + √1024 / 2)² = 2^24 is where float32
# ends to hold every integer.
UNIT = 4080
DIMENSIONS = 1024  # at most
_ROWS = 2**14  # of documents that are compared together


def quantized(vectors: NDArray) -> NDArray[np.int16]:
    """Vectors (N, D) of any length as integers of length UNIT; 0 stays 0."""
    length = np.sqrt((vectors.astype(np.float64) ** 2).sum(1, keepdims=True))
    return np.rint(vectors * (UNIT / np.where(length > 0, length, 1))).astype(np.int16)


def nearest(documents: NDArray[np.int16], centres: NDArray[np.int16]) -> tuple[Integers, Floats]:
    """((N,) the centre (F, D) of largest cosine to each document (N, D), the first of equal ones;
    (N,) that cosine)."""
    label = np.empty(len(documents), np.int64)
    cosine = np.empty(len(documents))
    across = np.ascontiguousarray(centres.T, np.float32)
    for first in range(0, len(documents), _ROWS):
        rows = slice(first, first + _ROWS)
        products = documents[rows].astype(np.float32) @ across
        label[rows] = products.argmax(1)
        cosine[rows] = products.max(1)
    return label, cosine / UNIT**2


def means(documents: NDArray[np.int16], label: Integers, clusters: int) -> NDArray[np.int16]:
    """(F, D) the directions of the sums of each cluster's documents (N, D); 0 of an empty one."""
    sums = np.zeros((clusters, documents.shape[1]), np.int64)
    order = np.argsort(label, kind="stable")
    present, begin = np.unique(label[order], return_index=True)
    for cluster, rows in zip(present, np.split(order, begin[1:]), strict=True):
        sums[cluster] = documents[rows].sum(0, dtype=np.int64)
    return quantized(sums)


class Fit(NamedTuple):
    centres: NDArray[np.int16]  # (F, D) none of them without documents
    label: Integers  # (N,)
    total: int  # the sum of the products of documents and their centres: larger is better


def polished(documents: NDArray[np.int16], centres: NDArray[np.int16], rounds: int) -> Fit:
    """Rounds of k-means over all documents (N, D), from centres (F, D), until nothing moves;
    clusters that have no document are dropped."""
    label, _ = nearest(documents, centres)
    for _ in range(rounds):
        present, label = np.unique(label, return_inverse=True)
        centres = means(documents, label, len(present))
        before, (label, _) = label, nearest(documents, centres)
        if (label == before).all():
            break
    present, label = np.unique(label, return_inverse=True)
    centres = centres[present]
    total = sum(
        int((documents[a : a + _ROWS].astype(np.int64) * centres[label[a : a + _ROWS]]).sum())
        for a in range(0, len(documents), _ROWS)
    )
    return Fit(centres, label, total)


def merged(centres: NDArray[np.int16], tokens: Integers, domains: int, least: float) -> Integers:
    """(F,) the domain, from 0, of each fine cluster: the fewest that average linkage leaves apart
    such that `domains` of them have `least` tokens, or as many as there can be; smaller ones go to
    the nearest of those. Domains are numbered by their tokens, the largest first."""
    f = len(centres)
    if f == 1 or domains == 1:
        return np.zeros(f, np.int64)
    unit = centres.astype(np.float64) / UNIT
    tree = hierarchy.linkage(_distances(unit), "average")
    best, most = np.zeros(f, np.int64), 0
    for count in range(1, f + 1):
        cut = hierarchy.fcluster(tree, count, "maxclust") - 1
        large = int((np.bincount(cut, tokens) >= max(least, 1)).sum())
        if large > most:
            best, most = cut, large
        if large >= domains:
            break
    sizes = np.bincount(best, tokens)
    kept = np.argsort(-sizes, kind="stable")[: min(max(most, 1), domains)]
    middle = np.stack(
        [(unit[best == k] * np.maximum(tokens[best == k], 1)[:, None]).sum(0) for k in kept]
    )
    middle /= np.maximum(np.linalg.norm(middle, axis=1, keepdims=True), 1e-12)
    label = (unit @ middle.T).argmax(1)
    for number, k in enumerate(kept):
        label[best == k] = number
    order = np.argsort(-np.bincount(label, tokens, len(kept)), kind="stable")
    return np.argsort(order)[label]


def _distances(unit: Floats) -> Floats:
    """(F (F − 1) / 2,) 1 − cosine of every two centres, as `hierarchy.linkage` takes them."""
    cosine = unit @ unit.T
    return np.maximum(1 - cosine[np.triu_indices(len(unit), 1)], 0)


def centre_distances(centres: NDArray[np.int16], tokens: Integers, label: Integers) -> Floats:
    """(K, K) 1 − cosine of the domains' mean directions."""
    middle = domain_means(centres, tokens, label)
    return np.maximum(1 - middle @ middle.T, 0)


def domain_means(centres: NDArray[np.int16], tokens: Integers, label: Integers) -> Floats:
    """(K, D) the unit mean direction of each domain, of its fine clusters by their tokens."""
    k = int(label.max()) + 1
    middle = np.zeros((k, centres.shape[1]))
    np.add.at(middle, label, centres.astype(np.float64) * np.maximum(tokens, 1)[:, None])
    return middle / np.maximum(np.linalg.norm(middle, axis=1, keepdims=True), 1e-12)


def adjusted_rand(table: NDArray) -> float:
    """The adjusted Rand index of two partitions (Hubert and Arabie 1985), from how many documents
    (A, B) are in each pair of their cells; 1 where both are one cell."""
    table = np.asarray(table, np.float64)

    def pairs(counts: NDArray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    together, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = rows * columns / max(pairs(table.sum()), 1)
    largest = (rows + columns) / 2
    return (together - expected) / (largest - expected) if largest > expected else 1.0


def telling(counts: NDArray, prior: float = 0.01) -> Floats:
    """(K, W) z-scores of the log-odds of each word in a domain against all the others, from counts
    (K, W). The prior is `prior` of the words' counts in all domains, and a hundredth more."""
    counts = np.asarray(counts, np.float64)
    every = counts.sum(0)
    weight = prior * every + 0.01
    total = weight.sum()

    def log_odds(of: Floats) -> Floats:
        part = of + weight
        return np.log(part) - np.log(of.sum(-1, keepdims=True) + total - part)

    rest = every - counts
    spread = np.sqrt(1 / (counts + weight) + 1 / (rest + weight))
    return (log_odds(counts) - log_odds(rest)) / spread


def cuts(scores: NDArray, tokens: Integers, levels: int) -> Floats:
    """(levels − 1,) the scores that begin the second level and those above it, such that each has
    about as many tokens. Documents (N,) of one score are in one level."""
    value, which = np.unique(scores, return_inverse=True)
    size = np.bincount(which, tokens)
    before = np.cumsum(size) - size
    wanted = tokens.sum() * np.arange(1, levels) / levels
    return value[np.minimum(np.searchsorted(before, wanted), len(value) - 1)]
