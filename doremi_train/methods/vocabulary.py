"""A vocabulary adapted to a target, from sub-words to phrases (Chang et al. 2024,
https://arxiv.org/abs/2409.14705).

1. start from the tokens of any tokeniser; add sub-words, words and phrases of the target;
2. prune to the size wanted in a few geometric steps, each time the tokens whose removal changes the
   utility least, and count again how the rest tokenises the text:
   H_v = −(1 / l_v) Σ_j P(j) log P(j), l_v the mean length of a token;
3. tokenise by longest match over bytes; the 256 single bytes stay, so that every text can be
   written.

Most of a large vocabulary never occurs in a small target, so P is a mixture of target and raw
frequencies. K tokens.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import numpy as np
from annotated_types import Gt, Le
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from doremi_train.config import STRICT, Fraction, Positive

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

BYTES = tuple(bytes([value]) for value in range(256))
_WORDS = re.compile(r" ?[^\s]+")


@dataclass(frozen=True, config=STRICT)
class Options:
    size: Positive = 10_000
    """Tokens |v| in the end, the 256 bytes among them."""

    steps: Positive = 10
    """Steps t of pruning."""

    learned: Annotated[int, Gt(0), Le(10_000_000)] = 10_000
    """Sub-words, words and phrases that are learned of the target."""

    words: Annotated[int, Gt(0), Le(64)] = 4
    """Words of a phrase, at most."""

    characters: Positive = 40
    """Characters of a phrase, at most."""

    count: Positive = 2
    """Occurrences of a phrase, at least."""

    target_share: Fraction = 0.5
    """Part μ of the target in the frequencies; the rest is that of a sample of the raw corpus."""

    start: str | None = None
    """Tokens to start from: a tokenizer.json, a local transformers folder or a .tiktoken file."""

    sample: Positive = 10_000_000
    """Bytes of the sample of the raw corpus."""

    length: Literal["plain", "used"] = "plain"
    """Which mean length of a token counts: over the vocabulary, or as it is used."""


def phrases(texts: Iterable[str], options: Options) -> Counter[bytes]:
    """How often each run of words comes that may be a token: with the space before it, never across
    lines."""
    counts: Counter[str] = Counter()
    for text in texts:
        for line in text.splitlines():
            words = _WORDS.findall(line)
            for many in range(1, options.words + 1):
                counts.update("".join(words[i : i + many]) for i in range(len(words) - many + 1))
    return Counter(
        {
            phrase.encode(): n
            for phrase, n in counts.items()
            if n >= options.count and len(phrase) <= options.characters
        }
    )


def sizes(start: int, end: int, steps: int) -> list[int]:
    """Vocabulary sizes after each step: a geometric sequence from `start`, left out, to `end`."""
    return [round(start * (end / start) ** (step / steps)) for step in range(1, steps + 1)]


def utility(frequencies: Floats, lengths: Integers, length: str = "plain") -> float:
    """H_v in nats per byte, of relative frequencies P (K,) and token lengths (K,) in bytes."""
    p = frequencies[frequencies > 0]
    mean = lengths.mean() if length == "plain" else float((frequencies * lengths).sum())
    return float(-(p * np.log(p)).sum() / mean)


def changes(frequencies: Floats, lengths: Integers, length: str = "plain") -> Floats:
    """(K,) |H_v without token j − H_v|, had its occurrences never been. That of a token that is
    alone is infinite."""
    p = frequencies
    plogp = p * np.log(np.where(p > 0, p, 1))
    entropy = -plogp.sum()
    rest = 1 - p
    with np.errstate(divide="ignore", invalid="ignore"):
        left = (entropy + plogp) / rest + np.log(rest)
        if length == "plain":
            mean = (lengths.sum() - lengths) / (len(lengths) - 1)
        else:
            mean = ((p * lengths).sum() - p * lengths) / rest
        change = np.abs(left / mean - utility(p, lengths, length))
    return np.where(np.isfinite(change), change, np.inf)


def prune(
    tokens: Sequence[bytes], frequencies: Floats, size: int, length: str = "plain"
) -> list[bytes]:
    """The `size` tokens that are left, in their order; single bytes are never removed. Equal
    changes: the later token in the order of bytes goes first. Raises ValueError where the size has
    no room for the bytes."""
    if size < len(BYTES):
        raise ValueError(f"a vocabulary of {size} has no room for the {len(BYTES)} single bytes")
    lengths = np.array([len(token) for token in tokens])
    change = changes(frequencies, lengths, length)
    removable = sorted(
        (j for j in range(len(tokens)) if lengths[j] > 1),
        key=lambda j: (-change[j], tokens[j]),
        reverse=True,
    )
    gone = set(removable[: max(len(tokens) - size, 0)])
    return [token for j, token in enumerate(tokens) if j not in gone]


def mixture(target: Integers, raw: Integers, share: float) -> Floats:
    """P (K,) of counts (K,) in the target and in a sample of the raw corpus."""
    parts = [(share, target), (1 - share, raw)]
    total = sum(
        (weight * counts / counts.sum() for weight, counts in parts if counts.sum()),
        np.zeros(len(target)),
    )
    return total / total.sum()
