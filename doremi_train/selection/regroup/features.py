"""What documents are compared by: their words, hashed and projected, or a sentence encoder; and
their likeness to good text.

P documents of a batch, m buckets of words, n distinct words, D dimensions.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from doremi_train.config import UserError
from doremi_train.methods import clusters, ngram
from doremi_train.selection.documents import kernels
from doremi_train.selection.documents.baselines import embedded
from doremi_train.selection.documents.parts import Batch, Document, batched
from doremi_train.selection.documents.scorers import UNSEEN

BUCKETS = 2**17  # m, of words
GRAMS = 2**15  # of 1- and 2-grams, for levels
READ = 8192  # bytes of a text that an encoder is given, which cuts it by its tokens


def tallied(batch: Batch) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """(buckets and counts (n,) of the distinct words of each document, its first (P + 1,))."""
    hashes, bounds = batch.tokens.hashes, batch.bounds
    buckets, counts = np.empty(len(hashes), np.int32), np.empty(len(hashes), np.int32)
    first = np.empty(len(bounds), np.int64)
    n = kernels.tally(hashes, bounds, _seen(), buckets, counts, first)
    return buckets[:n], counts[:n], first


@lru_cache(1)
def _seen() -> NDArray[np.int64]:
    return np.zeros(BUCKETS, np.int64)


def vectors(
    buckets: NDArray[np.int32],
    counts: NDArray[np.int32],
    first: NDArray[np.int64],
    weights: NDArray[np.float32],
    dimensions: int,
) -> NDArray[np.int16]:
    """(P, D) of documents by their counts of words, and the words' weights (m,)."""
    out = np.empty((len(first) - 1, dimensions), np.int16)
    kernels.project(buckets, counts, first, weights, float(clusters.UNIT), out)
    return out


def encoded(batch: Batch, encoder: str | None) -> NDArray[np.int16]:
    """(P, D) vectors of a batch by a sentence encoder; (P, 0) without one. Each text by itself and
    on one thread, so that the others of its batch, and the cores, change no bit."""
    if encoder is None:
        return np.empty((len(batch.start), 0), np.int16)
    import torch

    texts = [batch.part(p)[:READ] for p in range(len(batch.start))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return clusters.quantized(embedded(texts, encoder, "regroup.encoder", together=1))
    finally:
        torch.set_num_threads(threads)


def good_ratios(
    documents: list[bytes], grams: NDArray[np.int64], known: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """(GRAMS, 1) log-ratio of each n-gram, good text against the sample's counts (GRAMS,). Raises
    UserError where no more words of it are `known` (m,) of the sample than chance makes so."""
    counts, words = np.zeros(GRAMS, np.int64), np.zeros(BUCKETS, np.int64)
    for batch in batched((Document(row, 0, "", t) for row, t in enumerate(documents)), None):
        kernels.count(batch.tokens.hashes, batch.bounds, counts)
        buckets, times, _ = tallied(batch)
        np.add.at(words, buckets, times)
    chance = float(known.mean())  # two words fall into one bucket
    if words[known].sum() <= min(2 * chance, (1 + chance) / 2) * words.sum():
        raise UserError(
            "regroup.good: shares no word with the corpus, so that nothing is more like it than "
            "the rest; give good text of the corpus' languages"
        )
    return ngram.log_ratio(counts, grams, 0.0, UNSEEN / int(counts.sum())).astype(np.float32)[
        :, None
    ]
