"""The adapted vocabulary: made from a tokeniser, a target and a sample of the raw corpus, kept as
one JSON file."""

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers

from doremi_train.config import UserError, fingerprint, read_object
from doremi_train.data.tokens import tokenizer as tokenizers
from doremi_train.files import write_json
from doremi_train.methods import vocabulary
from doremi_train.selection.documents import kernels

TYPE = "longest match over bytes"


def make(
    start: Sequence[bytes], target: list[bytes], raw: list[bytes], options: vocabulary.Options
) -> tuple[list[bytes], list[dict[str, Any]]]:
    """(tokens, a line for every step of pruning). Raises UserError where the size has no room for
    the bytes."""
    if options.size < len(vocabulary.BYTES):
        raise UserError(f"vocabulary.size={options.size}: the 256 single bytes stay; give more")
    tokens = list(dict.fromkeys([*vocabulary.BYTES, *start, *learned(target, options)]))
    log: list[dict[str, Any]] = []

    def observe() -> NDArray[np.float64]:
        frequencies = vocabulary.mixture(
            count(tokens, target), count(tokens, raw), options.target_share
        )
        lengths = np.array([len(token) for token in tokens])
        line: dict[str, Any] = {
            "step": len(log),
            "tokens": len(tokens),
            "used": int((frequencies > 0).sum()),
        }
        for length in ("plain", "used"):
            line[f"utility_{length}"] = vocabulary.utility(frequencies, lengths, length)
        log.append(line)
        return frequencies

    frequencies = observe()
    for size in (
        vocabulary.sizes(len(tokens), options.size, options.steps)
        if len(tokens) > options.size
        else ()
    ):
        tokens = vocabulary.prune(tokens, frequencies, size, options.length)
        frequencies = observe()
    return tokens, log


def learned(target: list[bytes], options: vocabulary.Options) -> list[bytes]:
    """V_task: sub-words and words that BPE finds in the target, and its words and phrases, the
    frequent ones first."""
    texts = [document.decode() for document in target]
    phrases = vocabulary.phrases(texts, options)
    best = sorted(phrases, key=lambda phrase: (-phrases[phrase], phrase))[: options.learned // 2]
    return [*best, *tokens_of(tokenizers.learn(texts, max(options.learned - len(best), 257)))]


def count(tokens: Sequence[bytes], texts: list[bytes]) -> NDArray[np.int64]:
    """(K,) how often each token comes."""
    text, offsets = kernels.joined(texts)
    ids, _ = kernels.segment(text, offsets[:-1], offsets[1:], kernels.trie(tokens))
    return np.bincount(ids, minlength=len(tokens))


# ── Files ─────────────────────────────────────────────────────────────────────────


def save(path: Path, tokens: Sequence[bytes]) -> str:
    """Write a vocabulary, its tokens in the alphabet of byte-level tokenisers; returns its
    fingerprint."""
    vocab = {
        "".join(_LETTERS[byte] for byte in token): number for number, token in enumerate(tokens)
    }
    content = {"version": "1.0", "model": {"type": TYPE, "vocab": vocab}}
    print_ = fingerprint(content)
    write_json(path, content | {"fingerprint": print_})
    return print_


def load(path: str) -> tuple[list[bytes], str]:
    """(tokens, fingerprint) of a file that `save` wrote. Raises UserError where it is none, or was
    changed."""
    given, remedy = f"selection.vocabulary={path}", "give vocabulary.json of stage=vocabulary"
    content = read_object(Path(path), given, remedy)
    try:
        print_ = content.pop("fingerprint")
        vocab = content["model"]["vocab"]
        tokens = [bytes(_BYTES[letter] for letter in token) for token in vocab]
        whole = fingerprint(content) == print_ and list(vocab.values()) == list(range(len(vocab)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{given}: not a vocabulary ({error!r}); {remedy}") from None
    if not whole:
        raise UserError(
            f"selection.vocabulary={path}: was changed after it was written; make it again"
        )
    return tokens, print_


def start(path: str) -> list[bytes]:
    """The tokens of a tokenizer.json, a local transformers folder or a .tiktoken file, special ones
    left out."""
    if not path.endswith(".tiktoken"):
        return tokens_of(tokenizers.load(path))
    try:
        lines = Path(path).read_text().splitlines()
        return [base64.b64decode(line.split()[0], validate=True) for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError, binascii.Error) as error:
        raise UserError(
            f"vocabulary.start={path}: not a .tiktoken file ({error}); give another tokeniser"
        ) from None


def tokens_of(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every token but the special ones: byte-level, byte fallback, and the signs of
    the other kinds for a space before (▁) or none (##)."""
    special = {
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    }
    names = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    described = json.loads(tokenizer.to_str())
    if "ByteLevel" in json.dumps([described["pre_tokenizer"], described["decoder"]]):
        plain = [name for name, _ in names if name not in special and set(name) <= _BYTES.keys()]
        return [bytes(_BYTES[letter] for letter in name) for name in plain if name]
    tokens = []
    for name, _ in names:
        if name in special:
            continue
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            tokens.append(bytes([int(name[3:5], 16)]))
        else:
            tokens.append(name.removeprefix("##").replace("▁", " ").encode())
    return [token for token in tokens if token]


def _alphabet() -> dict[int, str]:
    """The printable letter that byte-level tokenisers write for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)
    }


_LETTERS = _alphabet()
_BYTES = {letter: byte for byte, letter in _LETTERS.items()}
assert set(_BYTES) == set(pre_tokenizers.ByteLevel.alphabet())
