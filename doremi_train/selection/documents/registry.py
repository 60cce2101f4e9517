"""The methods of selection, by name."""

from collections.abc import Callable

from doremi_train.selection.documents.baselines import BM25, Classifier, Embedding
from doremi_train.selection.documents.scorers import (
    ExactGrams,
    GranularGrams,
    NGrams,
    Random,
    Scorer,
    TokenGrams,
    WordGrams,
)
from doremi_train.selection.options import SelectionOptions

FEATURES: dict[str, type[NGrams]] = {
    "words": WordGrams,
    "tokens": TokenGrams,
    "granular": GranularGrams,
}
"""What n-grams are made of:

>>> from doremi_train.selection.documents.registry import FEATURES
>>> FEATURES["tokens"].__name__
'TokenGrams'
"""

METHODS: dict[str, Callable[[SelectionOptions], Scorer]] = {
    "ngram": lambda options: (ExactGrams if options.exact else FEATURES[options.features])(options),
    "random": Random,
    "bm25": BM25,
    "classifier": Classifier,
    "embedding": Embedding,
}
"""The scorer that options ask for:

>>> from doremi_train.selection.documents.registry import METHODS
>>> from doremi_train.selection.options import SelectionOptions
>>> type(METHODS["ngram"](SelectionOptions(features="words"))).__name__
'WordGrams'
"""
