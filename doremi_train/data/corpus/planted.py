"""The planted corpus: domains whose faults are known, to see that the detectors find them and
nothing else.

| domain | what it is | what is to be found |
|---|---|---|
| `easy`, `hard` | made-up languages of 200 and 5000 words | nothing |
| `big` | one of 1000 words, a quarter of all text | nothing |
| `related_a`, `related_b` | the same words, each followed by others than in the other | nothing |
| `copy` | the documents of `easy` once more | duplicate |
| `twin_a`, `twin_b` | one language, other documents | duplicate |
| `noise` | characters drawn at random | noise |
| `trivial` | one sentence again and again: periodic | trivial |
| `repeated` | a language of only 18 kB: the default proxy sees it more than 15 times | repeated |

A language has words of its own syllables. They come in classes that follow each other in a fixed
order (its grammar), frequent ones first (Zipf), and each word has a few favourites to follow it
(its habits): a small model learns the syllables first, then the words, then the grammar, and goes
on learning habits for long.

Everything is drawn from PCG64's raw stream, which numpy promises never to change: the same bytes on
every machine.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from doremi_train.config import fingerprint

RECIPE = 2  # raise when the text changes: prepared data of the older recipe is then not reused
VALIDATION = 4  # documents of a domain kept for validation, at least
WORDS = 150  # of a document in a language
CLASSES = 4  # of words
FAVOURITES = 3  # of a word, to follow it
ENDS = 0.1  # part of the words that end a sentence
SENTENCE = "the quick brown fox jumps over the lazy dog and runs away. "
# Printable ASCII: the tokeniser finds no pairs worth a token of their own.
NOISE = "".join(map(chr, range(32, 127)))
NOISE_DOCUMENT = 1000  # characters


class Language(NamedTuple):
    name: str  # the seed of its syllables and words
    words: int
    habit: float  # part of the words that are a favourite of the word before
    variety: str = ""  # of one name: with favourites of its own


_DOMAINS: dict[str, tuple[Language | None, int]] = {  # language and characters
    "big": (Language("big", 1000, 0.6), 2_400_000),
    "copy": (None, 800_000),
    "easy": (Language("easy", 200, 0.8), 800_000),
    "hard": (Language("hard", 5000, 0.4), 600_000),
    "noise": (None, 300_000),
    "related_a": (Language("related", 1000, 0.6, "a"), 700_000),
    "related_b": (Language("related", 1000, 0.6, "b"), 700_000),
    "repeated": (Language("repeated", 1000, 0.6), 18_000),
    "trivial": (None, 1_200_000),
    "twin_a": (Language("twin", 1000, 0.6), 700_000),
    "twin_b": (Language("twin", 1000, 0.6), 700_000),
}


def domains() -> tuple[str, ...]:
    """Names of the domains, sorted."""
    return tuple(_DOMAINS)


def size(domain: str) -> int:
    """Bytes of its text, about."""
    return _DOMAINS[domain][1]


def version(domain: str) -> str:
    """Changes with the text."""
    return fingerprint([RECIPE, domain, _DOMAINS[domain]])


def texts(domain: str, split: str, fraction: float) -> list[str]:
    """Documents of `split` (`train` or `validation`); `fraction` of them, evenly spread, are for
    validation."""
    documents = _documents(domain)
    count = min(max(round(fraction * len(documents)), VALIDATION), len(documents) - 1)
    held = {number * len(documents) // count for number in range(count)}
    return [
        text for number, text in enumerate(documents) if (number in held) == (split == "validation")
    ]


@cache
def _documents(domain: str) -> list[str]:
    """All different, so that none has to be dropped because its text is on the other side too: a
    copy is divided as what it copies."""
    language, characters = _DOMAINS[domain]
    if language is not None:
        return _write(language, domain, characters)
    if domain == "copy":
        return _documents("easy")
    if domain == "noise":
        letters = (_draws("noise", characters) * len(NOISE)).astype(int).tolist()
        text = "".join(map(NOISE.__getitem__, letters))
        return [
            text[start : start + NOISE_DOCUMENT] for start in range(0, characters, NOISE_DOCUMENT)
        ]
    documents: list[str] = []
    while characters > 0:
        documents.append(SENTENCE * (10 + len(documents)))
        characters -= len(documents[-1])
    return documents


def _write(language: Language, domain: str, characters: int) -> list[str]:
    """Documents of WORDS words each, word by word in all of them at once."""
    lexicon = _lexicon(language)
    pieces = [word + end for word in lexicon for end in (" ", ". ")]
    count = characters // (WORDS * (sum(map(len, pieces)) // len(pieces)))
    # Words of a class: those whose number leaves the same remainder.
    members = language.words // CLASSES
    zipf = np.cumsum(1 / (np.arange(members) + 2.7))
    habits = _draws(f"{language.name}{language.variety} habits", language.words * FAVOURITES)
    favourites = (habits * members).astype(int)
    drawn = _draws(f"{domain} documents", WORDS * count * 4).reshape(WORDS, 4, count)
    word = (drawn[0, 0] * language.words).astype(int)
    lines = []
    for habit, frequency, favourite, end in drawn:
        any_ = np.searchsorted(zipf, frequency * zipf[-1])
        # Squared, so that the first favourite comes more often than the last.
        own = favourites[word * FAVOURITES + (favourite**2 * FAVOURITES).astype(int)]
        word = np.where(habit < language.habit, own, any_) * CLASSES + (word + 1) % CLASSES
        lines.append(2 * word + (end < ENDS))
    return ["".join(map(pieces.__getitem__, line)) for line in np.array(lines).T.tolist()]


def _lexicon(language: Language) -> list[str]:
    """Different words of one to four syllables, of which every language has 40 of its own."""
    consonants, vowels, last = "bcdfghjklmnpqrstvwxyz", "aeiou", "nrslt" + " " * 5
    draws = iter(_draws(f"{language.name} words", 100 * language.words).tolist())
    syllables = [
        "".join(
            letters[int(next(draws) * len(letters))] for letters in (consonants, vowels, last)
        ).strip()
        for _ in range(40)
    ]
    words: dict[str, None] = {}
    while len(words) < language.words:
        words[
            "".join(syllables[int(next(draws) * 40)] for _ in range(1 + int(next(draws) * 4)))
        ] = None
    return list(words)


def _draws(key: str, count: int) -> NDArray[np.float64]:
    """(count,) numbers from 0 to below 1, a stream of its own for every key."""
    raw = np.random.PCG64(int(fingerprint([RECIPE, key]), 16)).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
