"""Names of domains: the words that tell them apart, never two alike."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from doremi_train.methods import clusters

WORDS = 3  # of a name
SHOWN = 8  # words that are told of a domain
LONGEST = 40  # characters of a name made of words
VOCABULARY = 50_000  # words that are counted
_WORD = re.compile(r"[^\W\d_]+")
# Scripts without spaces (`kernels.UNSPACED`): their words are not known, pairs of characters are.
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U00031fff]+"
)


def words_of(text: str) -> set[str]:
    """The words of a text, of three letters at least; of a script without spaces pairs of
    characters."""
    found: set[str] = set()
    for run in _WORD.findall(text.lower()):
        for part in _UNSPACED.findall(run):
            found.update(part[n : n + 2] for n in range(len(part) - 1))
        found.update(word for word in _UNSPACED.split(run) if 3 <= len(word) <= 20)
    return found


def telling_words(texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """The words that tell each domain apart from the others, by some of its texts: the best first,
    at most SHOWN."""
    counts = [Counter(word for text in own for word in words_of(text)) for own in texts]
    every = Counter[str]()
    for own in counts:
        every.update(own)
    # Of equally frequent ones the first by the alphabet.
    words = sorted(every, key=lambda word: (-every[word], word))[:VOCABULARY]
    if not words:
        return [[] for _ in texts]
    table = np.array([[own[word] for word in words] for own in counts])
    # Alone there is nothing to be told from: what is frequent then names it.
    scores = clusters.telling(table) if len(texts) > 1 else table
    told = []
    for row, own in zip(scores, table, strict=True):
        order = np.argsort(-row, kind="stable")[:SHOWN]
        told.append([words[n] for n in order if row[n] > 0 and own[n]])
    return told


def named(words: Sequence[Sequence[str]], prefixes: Sequence[str], taken: set[str]) -> list[str]:
    """A name for each domain from its words, none of them alike or `taken`; those chosen are taken
    then."""
    names = []
    for own, prefix in zip(words, prefixes, strict=True):
        parts = [prefix] if prefix else []
        room = LONGEST
        for word in own[:WORDS]:
            room -= len(word) + 1
            if room >= 0:
                parts.append(word)
        name = "-".join(parts) or "domain"
        plain, number = name, 2
        while name in taken:
            name, number = f"{plain}-{number}", number + 1
        taken.add(name)
        names.append(name)
    return names


def is_junk(texts: Sequence[str]) -> bool:
    """Whether less than half of what is no space in the texts of a domain are letters and
    digits."""
    characters = "".join("".join(text.split()) for text in texts)
    return bool(characters) and sum(map(str.isalnum, characters)) < len(characters) / 2
