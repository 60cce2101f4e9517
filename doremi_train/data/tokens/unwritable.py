"""Text that a tokeniser cannot write: what becomes unknown tokens, or is dropped.

White space is not counted: many tokenisers separate words by it and write none.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer, pre_tokenizers

from doremi_train.data.tokens import tokenizer as tokenizers

# Parts of a tokeniser that drop no character.
_KEEPING = {
    "ByteLevel", "Digits", "FixedLength", "Lowercase", "Metaspace", "NFC", "NFD", "NFKC", "NFKD",
    "Prepend", "Punctuation", "Replace", "Sequence", "Split", "UnicodeScripts",
}  # fmt: skip


class Written(NamedTuple):
    """What became of a text."""

    tokens: np.ndarray  # (n,)
    lost: int  # UTF-8 bytes of it that the tokeniser cannot write


class Measure:
    """A tokeniser that says how much of each text it cannot write."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._witness: Tokenizer | None = None
        if not writes_all(tokenizer):
            self._witness, self._unknown = _witness(tokenizer)

    def encode(self, texts: Sequence[str]) -> Iterator[Written]:
        """Tokens of each text, and what is lost of it; raises as `tokenizer.encode`."""
        if self._witness is None:
            for tokens in tokenizers.encode(self._tokenizer, texts):
                yield Written(tokens, 0)
            return
        seen = tokenizers.encodings(self._witness, texts, offsets=True)
        if self._witness is self._tokenizer:
            written = [np.array(encoding.ids, np.uint32) for encoding in seen]
        else:
            written = tokenizers.encode(self._tokenizer, texts)
        for text, tokens, encoding in zip(texts, written, seen, strict=True):
            yield Written(tokens, _lost(text, encoding, self._unknown))


def writes_all(tokenizer: Tokenizer) -> bool:
    """Whether every text has tokens of its own for sure: all bytes are in the vocabulary, and
    nothing comes before that could drop a character."""
    parts = json.loads(tokenizer.to_str())
    model, vocabulary = parts["model"], tokenizer.get_vocab(with_added_tokens=False)
    before = [*_parts(parts["normalizer"]), *_parts(parts["pre_tokenizer"])]
    if any(
        part["type"] not in _KEEPING
        or part.get("behavior") == "Removed"
        or (part["type"] == "Replace" and not part["content"])
        for part in before
    ):
        return False
    if model["type"] != "BPE" or model.get("continuing_subword_prefix"):
        return False
    if any(part["type"] == "ByteLevel" for part in before):
        suffix = model.get("end_of_word_suffix")
        return not suffix and all(b in vocabulary for b in pre_tokenizers.ByteLevel.alphabet())
    return bool(model.get("byte_fallback")) and all(
        f"<0x{byte:02X}>" in vocabulary for byte in range(256)
    )


def _parts(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if part is not None:
        yield part
        for inner in part.get("normalizers", part.get("pretokenizers", ())):
            yield from _parts(inner)


def _witness(tokenizer: Tokenizer) -> tuple[Tokenizer, int | None]:
    """The tokeniser, or where its BPE drops what it does not know one that has a token for that;
    and the id of its unknown token."""
    parts = json.loads(tokenizer.to_str())
    model = parts["model"]
    if model["type"] == "BPE" and model.get("unk_token") is None:
        name, number = "<unwritable>", tokenizers.vocabulary_size(tokenizer)
        model |= {"unk_token": name, "vocab": {**model["vocab"], name: number}}
        return tokenizers.parse(json.dumps(parts)), number
    if model.get("unk_id") is not None:
        return tokenizer, int(model["unk_id"])
    unknown = model.get("unk_token")
    return tokenizer, None if unknown is None else tokenizer.token_to_id(unknown)


def _lost(text: str, encoding: Encoding, unknown: int | None) -> int:
    """UTF-8 bytes of the characters that no token stands for, or an unknown one; but for white
    space."""
    ids = np.array(encoding.ids, np.int64)
    spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    known = ids != (-1 if unknown is None else unknown)
    written = _covered(spans[known], len(text)) & ~_covered(spans[~known], len(text))
    if written.all():
        return 0
    lost = [text[i] for i in np.flatnonzero(~written)]
    return sum(len(character.encode()) for character in lost if not character.isspace())


def _covered(spans: np.ndarray, length: int) -> np.ndarray:
    """(length,) whether a character lies in one of the spans (n, 2)."""
    depth = np.zeros(length + 1, np.int64)
    np.add.at(depth, spans[:, 0], 1)
    np.add.at(depth, spans[:, 1], -1)
    return depth.cumsum()[:-1] > 0
