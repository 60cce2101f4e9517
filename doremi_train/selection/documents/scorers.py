"""How well each part serves each target: the methods of selection.

A method observes the raw corpus once, as sums over parts; is fitted to these sums and the targets'
text; and scores every part. It is made anew in every process from arrays alone. B documents, P
parts, m buckets, C columns (targets).
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from doremi_train.config import UserError
from doremi_train.data.tokens import tokenizer as tokenizers
from doremi_train.methods import ngram
from doremi_train.selection.documents import granular, kernels
from doremi_train.selection.documents.parts import Batch, Document, batch
from doremi_train.selection.options import SelectionOptions

Arrays = dict[str, NDArray]
Targets = Mapping[str, list[bytes]]  # documents of every column
BUCKETS = 2**13  # of the words by which distributions are compared, whatever the method

# Of a count, for n-grams that a target has not: between 0.01 and 1 hidden documents are found best.
UNSEEN = 0.1
NO_TEXT = "selection: the raw corpus holds no training text; give files that hold text"


class Scorer(Protocol):
    """A method of selection."""

    def sums(self) -> Arrays:
        """What `observe` adds to, of nothing."""

    def observe(self, batch: Batch, sums: Arrays) -> None:
        """Add what the method has to know of the raw corpus."""

    def together(self, first: Arrays, second: Arrays) -> Arrays:
        """The sums over the union of two parts of the corpus."""

    def fit(self, targets: Targets, sums: Arrays) -> Arrays:
        """The model, from the targets and the sums over the corpus."""

    def score(self, batch: Batch, model: Arrays) -> NDArray[np.float64]:
        """(P, C) scores: the larger, the rather taken."""

    def tokens(self, batch: Batch) -> NDArray[np.int64]:
        """(P,) tokens, as budgets count them."""

    def words(self, sums: Arrays) -> NDArray[np.int64] | None:
        """(BUCKETS,) of the corpus's words and pairs of words, where the sums tell them."""


class Random:
    """Every part alike: the baseline of baselines."""

    def __init__(self, options: SelectionOptions) -> None:
        self.options = options

    def sums(self) -> Arrays:
        return {}

    def observe(self, batch: Batch, sums: Arrays) -> None:
        return None

    def together(self, first: Arrays, second: Arrays) -> Arrays:
        return {name: first[name] + second[name] for name in first}

    def fit(self, targets: Targets, sums: Arrays) -> Arrays:
        return {"columns": np.zeros(len(targets))}

    def score(self, batch: Batch, model: Arrays) -> NDArray[np.float64]:
        return np.zeros((len(batch.start), len(model["columns"])))

    def tokens(self, batch: Batch) -> NDArray[np.int64]:
        """Words, or the tokens that the source holds."""
        return np.diff(batch.bounds)

    def words(self, sums: Arrays) -> NDArray[np.int64] | None:
        return None


class NGrams(Random):
    """Importance resampling by hashed 1- and 2-grams (`methods.ngram`), log ratio per gram."""

    def sums(self) -> Arrays:
        return {"counts": np.zeros(self.options.m, np.int64)}

    def observe(self, batch: Batch, sums: Arrays) -> None:
        for hashes, bounds in self.grains(batch):
            kernels.count(hashes, bounds, sums["counts"])

    def fit(self, targets: Targets, sums: Arrays) -> Arrays:
        raw, ratios = sums["counts"], []
        if not raw.any():
            raise UserError(NO_TEXT)
        for documents in targets.values():
            target, mixing = self.count(documents), self.options.mixing
            if mixing == "held_out":
                first, second = halves(documents)
                mixing = ngram.held_out_mixing((self.count(first), self.count(second)), raw)
            ratios.append(ngram.log_ratio(target, raw, mixing, UNSEEN / max(int(target.sum()), 1)))
        return {"table": np.stack(ratios, 1).astype(np.float32)}  # (m, C)

    def count(self, documents: list[bytes]) -> NDArray[np.int64]:
        """(m,) of a target."""
        sums = self.sums()
        self.observe(whole(documents), sums)
        return sums["counts"]

    def score(self, batch: Batch, model: Arrays) -> NDArray[np.float64]:
        scores = np.zeros((len(batch.start), model["table"].shape[1]))
        grams = np.zeros(len(batch.start), np.int64)
        for hashes, bounds in self.grains(batch):
            kernels.score(hashes, bounds, model["table"], scores)
            grams += np.maximum(2 * np.diff(bounds) - 1, 0)
        return scores / np.maximum(grams, 1)[:, None]

    def grains(self, batch: Batch) -> list[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        """The ways to write a batch as tokens, each as `features`: one, where nothing else is
        said."""
        return [self.features(batch)]

    def features(self, batch: Batch) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Token hashes (n,) and the first token of each part (P + 1,)."""
        if batch.text is None:
            raise UserError(
                "selection.features=words: these files hold tokens, not text; give "
                "selection.features=tokens and their tokeniser as selection.tokenizer"
            )
        return batch.tokens.hashes, batch.bounds


class WordGrams(NGrams):
    """N-grams of words, which the diagnostics count too: neighbouring buckets are one of their
    coarser ones."""

    def words(self, sums: Arrays) -> NDArray[np.int64] | None:
        return None if self.options.m % BUCKETS else sums["counts"].reshape(BUCKETS, -1).sum(1)


class TokenGrams(NGrams):
    """N-grams of the ids of any tokeniser. Files that hold tokens already need no text at all."""

    def features(self, batch: Batch) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        if batch.text is None:
            return batch.tokens.hashes, batch.bounds
        encoded = token_ids(str(self.options.tokenizer), batch)
        bounds = np.cumsum([0, *map(len, encoded)])
        return ngram.mixed(
            np.concatenate([*encoded, np.empty(0, np.uint32)]).astype(np.uint64)
        ), bounds

    def tokens(self, batch: Batch) -> NDArray[np.int64]:
        return np.diff(self.features(batch)[1])


class GranularGrams(NGrams):
    """N-grams of tokens of every grain, hashed with the vocabulary's fingerprint."""

    def features(self, batch: Batch) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        return self.grains(batch)[-1]

    def grains(self, batch: Batch) -> list[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        """The longest match; where every granularity is asked for, after those of tokens of at most
        one word, two, …"""
        super().features(batch)  # refuses tokens
        assert batch.text is not None
        salt, tries = _opened(str(self.options.vocabulary))
        grains = []
        for numbers, trie in tries if self.options.granularity == "every" else tries[-1:]:
            ids, first = kernels.segment(batch.text, batch.start, batch.end, trie)
            grains.append((ngram.mixed(numbers[ids] ^ salt), first))
        return grains


class ExactGrams(NGrams):
    """What the package `data-selection` computes: log w is a sum over a whole document, and short
    ones are left out."""

    def observe(self, batch: Batch, sums: Arrays) -> None:
        for buckets in self._buckets(batch):
            sums["counts"] += np.bincount(buckets, minlength=self.options.m)

    def fit(self, targets: Targets, sums: Arrays) -> Arrays:
        ratios = [
            ngram.log_ratio(self.count(documents), sums["counts"]) for documents in targets.values()
        ]
        return {"table": np.stack(ratios, 1)}

    def score(self, batch: Batch, model: Arrays) -> NDArray[np.float64]:
        return np.array([model["table"][buckets].sum(0) for buckets in self._buckets(batch)])

    def tokens(self, batch: Batch) -> NDArray[np.int64]:
        return np.array([(len(buckets) + 1) // 2 for buckets in self._buckets(batch)])

    def _buckets(self, batch: Batch) -> list[NDArray[np.int64]]:
        self.features(batch)  # refuses tokens
        texts = (batch.part(p).decode() for p in range(len(batch.start)))
        return [ngram.exact_buckets(text, self.options.m) for text in texts]


def whole(documents: list[bytes]) -> Batch:
    """Target documents as a batch of uncut parts."""
    return batch([Document(row, 0, "", text) for row, text in enumerate(documents)], None)


def halves(documents: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Every other document; of a single one its first and its second half."""
    if len(documents) > 1:
        return documents[::2], documents[1::2]
    text = documents[0].decode()
    return [text[: len(text) // 2].encode()], [text[len(text) // 2 :].encode()]


def token_ids(name: str, batch: Batch) -> list[NDArray[np.uint32]]:
    """Ids of every part of a batch of text."""
    texts = [batch.part(p).decode() for p in range(len(batch.start))]
    return tokenizers.encode(_tokenizer(name), texts)


@lru_cache(2)
def _tokenizer(name: str) -> tokenizers.Tokenizer:
    return tokenizers.load(name)


@lru_cache(2)
def _opened(path: str) -> tuple[np.uint64, list[tuple[NDArray[np.uint64], kernels.Trie]]]:
    """(fingerprint, for each number of words that a token has at most: the tokens' numbers, and the
    tokens)."""
    tokens, print_ = granular.load(path)
    words = np.array([max(len(token.split()), 1) for token in tokens])
    parts = [np.flatnonzero(words <= most) for most in np.unique(words)]
    return np.uint64(int(print_, 16)), [
        (part.astype(np.uint64), kernels.trie([tokens[number] for number in part]))
        for part in parts
    ]
