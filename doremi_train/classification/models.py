"""A text classifier, small from scratch or any transformers encoder, and its training with
importance-weighted losses.

Classifiers are many and small where language models are few and large: each is trained on one
process, so the batch's sums of `methods.importance` need no exchange here.

N examples, B of a batch, L ids of the longest one, C classes.
"""

import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from doremi_train.config import (
    STRICT,
    Count,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    UserError,
    judged,
)
from doremi_train.data.tokens import tokenizer

_BUCKETS = 1 << 15  # of hashed words and pairs of words
_VOCABULARY, _WIDTH, _LAYERS = 4096, 128, 2  # of an encoder from scratch


@dataclass(frozen=True, config=STRICT)
class ClassifierOptions:
    model: str = "ngrams"
    """Classifier: ngrams, encoder (a small transformer from scratch), or a transformers folder.
    `ngrams` is logistic regression on words and pairs of words."""

    length: Positive = 128
    """Tokens of a text that are read; of ngrams, words."""

    epochs: Positive = 8
    """Epochs, of which the best one by accuracy on validation is taken."""

    least_steps: Count = 200
    """Steps at least: a small set is passed over as often as these take."""

    batch_size: Positive = 128
    """Examples of a step."""

    learning_rate: PositiveFloat = 0.03
    """Learning rate of the first step; it falls linearly to 0."""

    weight_decay: NonNegativeFloat = 0.01
    """Decay of the parameters."""


class Table(NamedTuple):
    """Examples as a model reads them."""

    ids: Tensor  # (N, L) int64, 0 beyond the length
    length: Tensor  # (N,)
    label: Tensor  # (N,) int64

    def take(self, rows: NDArray[np.int64]) -> "Table":
        return Table(*(column[torch.from_numpy(rows)] for column in self))


class Kind(NamedTuple):
    """A family of models over the same ids."""

    encode: Callable[[Sequence[str]], list[list[int]]]
    build: Callable[[int], nn.Module]  # from classes; (ids (B, L), mask (B, L)) → logits (B, C)

    def table(self, texts: Sequence[str], labels: NDArray[np.int64]) -> Table:
        encoded = self.encode(texts)
        ids = torch.zeros(
            len(encoded), max(1, *(len(tokens) for tokens in encoded)), dtype=torch.int64
        )
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        return Table(
            ids, torch.tensor([len(tokens) for tokens in encoded]), torch.from_numpy(labels)
        )


def kind(options: ClassifierOptions, texts: Sequence[str]) -> Kind:
    """The family of `options.model`; what it has to learn of the language first, such as a
    vocabulary, it learns from `texts`. Raises UserError where the model is neither known nor a
    folder that transformers loads."""
    if options.model == "ngrams":
        return Kind(lambda texts: [_ngrams(text, options.length) for text in texts], _Ngrams)
    if options.model == "encoder":
        return _small_encoder(options, texts)
    return _folder(options)


# ── Models ──────────────────────────────────────────────────────────────────────────


def _ngrams(text: str, length: int) -> list[int]:
    """Words and pairs of neighbouring words, hashed to 1 … _BUCKETS, each once."""
    words = text.lower().split()[:length]
    grams = dict.fromkeys([*words, *(f"{a} {b}" for a, b in pairwise(words))])
    return [zlib.crc32(gram.encode()) % _BUCKETS + 1 for gram in grams]


class _Ngrams(nn.Module):
    """Logistic regression on the n-grams that a text has, which together have length 1."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Embedding(_BUCKETS + 1, classes)
        nn.init.zeros_(self.weight.weight)
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        scale = mask.sum(1, keepdim=True).clamp_min(1).rsqrt()
        return (self.weight(ids) * (mask * scale)[:, :, None]).sum(1) + self.bias


class _Transformer(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.inner(input_ids=ids, attention_mask=mask.long()).logits.float()


def _small_encoder(options: ClassifierOptions, texts: Sequence[str]) -> Kind:
    from transformers import BertConfig, BertForSequenceClassification

    # Id 0 ends a document: here it begins every text, and fills.
    learned = tokenizer.learn(texts, _VOCABULARY)

    def build(classes: int) -> nn.Module:
        shape: dict[str, Any] = {
            "vocab_size": tokenizer.vocabulary_size(learned),
            "hidden_size": _WIDTH,
            "num_hidden_layers": _LAYERS,
            "num_attention_heads": _WIDTH // 64,
            "intermediate_size": 4 * _WIDTH,
            "max_position_embeddings": options.length + 1,
            "num_labels": classes,
        }
        return _Transformer(BertForSequenceClassification(BertConfig(**shape)))

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [[0, *ids[: options.length].tolist()] for ids in tokenizer.encode(learned, texts)]

    return Kind(encode, build)


def _folder(options: ClassifierOptions) -> Kind:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    folder = Path(options.model)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"classify.model={options.model!r}: must be ngrams, encoder, or a local transformers "
            "folder with config.json and safetensors"
        )
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    logging.set_verbosity_error()  # that a classifier's head is new is no news
    logging.disable_progress_bar()

    def build(classes: int) -> nn.Module:
        how = local | {"use_safetensors": True, "dtype": torch.float32, "num_labels": classes}
        return _Transformer(
            AutoModelForSequenceClassification.from_pretrained(
                folder, ignore_mismatched_sizes=True, **how
            )
        )

    remedy = "it is not an encoder that transformers loads; give another, or ngrams or encoder"
    with judged(f"classify.model={options.model!r}", remedy):
        words = AutoTokenizer.from_pretrained(folder, **local)
        build(2)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return words(list(texts), truncation=True, max_length=options.length)["input_ids"]

    return Kind(encode, build)
