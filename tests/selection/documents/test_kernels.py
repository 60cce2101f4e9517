"""The compiled loops against the same thing written naively, in Python's own numbers."""

import itertools
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_train.methods import ngram
from doremi_train.selection.documents import kernels, scorers
from doremi_train.selection.options import SelectionOptions

pytest.importorskip("numba")

MASK = 2**64 - 1
TEXTS = [
    "Alice's CAT, alice!?  went_2 Élan\u0301 naïve…\n",
    "",
    "   \t ",
    "日本語のテキスト 한국어 文。ไทย हिन्दी Ωμέγα ΣΟΦΟΣ İstanbul 𝒳😀x",
    "a b a b a b",
    "x",
]


def naive_words(text: str) -> list[str]:
    """Runs of letters, digits and marks; of what is neither these nor space; single characters of
    some scripts."""
    words, before = [], kernels.SPACE
    for character in text:
        kind = kernels.OTHER
        if character.isspace():
            kind = kernels.SPACE
        elif re.match(r"\w", character) or unicodedata.category(character).startswith("M"):
            unspaced = any(low <= ord(character) < high for low, high in kernels.UNSPACED)
            kind = kernels.ALONE if unspaced else kernels.WORD
        if kind != kernels.SPACE:
            if kind != before or kind == kernels.ALONE:
                words.append("")
            words[-1] += character.lower()[0]
        before = kind
    return words


def naive_hash(word: str) -> int:
    value = int(kernels.START)
    for character in word:
        value = (value ^ ord(character)) * int(kernels.PRIME) & MASK
    return value


def mix(value: int) -> int:
    return int(ngram.mixed(np.array([value & MASK], np.uint64))[0])


def naive_buckets(hashes: list[int], buckets: int) -> list[int]:
    grams = [mix(h) for h in hashes] + [mix(mix(a) + b) for a, b in itertools.pairwise(hashes)]
    return [(gram >> 32) * buckets >> 32 for gram in grams]


def split(texts: list[str]) -> "kernels.Tokens":
    return kernels.split(*kernels.joined([text.encode() for text in texts]))


def test_words_of_a_batch_are_those_of_its_documents() -> None:
    tokens = split(TEXTS)
    for d, text in enumerate(TEXTS):
        found = tokens.hashes[tokens.first[d] : tokens.first[d + 1]].tolist()
        assert found == [naive_hash(word) for word in naive_words(text)], text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_words_of_any_text(texts: list[str]) -> None:
    texts = [
        "".join(c for c in text if not 0xD800 <= ord(c) < 0xE000 and known(c)) for text in texts
    ]
    tokens = split(texts)
    expected = [naive_hash(word) for text in texts for word in naive_words(text)]
    assert tokens.hashes.tolist() == expected
    start = 0
    for d, text in enumerate(texts):  # a token ends where the bytes up to it hold all tokens so far
        for i in range(tokens.first[d], tokens.first[d + 1]):
            head = text.encode()[: tokens.ends[i] - start].decode()
            assert len(naive_words(head)) == i - tokens.first[d] + 1
        start += len(text.encode())


def known(character: str) -> bool:
    """Not where the table ends: there nothing is a letter."""
    return ord(character) < 0x34000


def test_nothing_beyond_the_table_of_letters_is_one() -> None:
    beyond = [*range(0x34000, 0xE0000), *range(0xE1000, 0x110000)]
    assert not any(chr(code).isalnum() or chr(code).isspace() for code in beyond)


def test_counts_and_scores_are_those_of_every_gram() -> None:
    tokens, table = split(TEXTS), np.random.default_rng(0).normal(size=(101, 3))
    counts, sums = np.zeros(101, np.int64), np.zeros((len(TEXTS), 3))
    kernels.count(tokens.hashes, tokens.first, counts)
    kernels.score(tokens.hashes, tokens.first, table, sums)
    grams = [naive_buckets([naive_hash(word) for word in naive_words(text)], 101) for text in TEXTS]
    assert (
        counts.tolist() == np.bincount([b for part in grams for b in part], minlength=101).tolist()
    )
    np.testing.assert_allclose(sums, [table[g].sum(0) for g in grams], rtol=0, atol=1e-12)


def test_counts_of_the_method_tell_those_of_the_diagnostics() -> None:
    scorer = scorers.WordGrams(SelectionOptions(method="ngram"))
    sums, counted = scorer.sums(), np.zeros(scorers.BUCKETS, np.int64)
    batch = scorers.whole([text.encode() for text in TEXTS])
    scorer.observe(batch, sums)
    kernels.count(batch.tokens.hashes, batch.bounds, counted)
    told = scorer.words(sums)
    assert told is not None and counted.any() and told.tolist() == counted.tolist()
    other = scorers.WordGrams(SelectionOptions(method="ngram", buckets=10_000))
    assert other.words(other.sums()) is None  # not a multiple: counted beside


def test_a_room_is_taken_by_batch_after_batch() -> None:
    room = kernels.Room()
    for text in (*TEXTS, *reversed(TEXTS)):
        batch, alone = kernels.joined([text.encode()]), split([text])
        for found, wanted in zip(kernels.split(*batch, room), alone, strict=True):
            assert found.tolist() == wanted.tolist()


def test_ids_are_of_the_words_and_their_order() -> None:
    def ids(*texts: str) -> list[int]:
        tokens, out = split(list(texts)), np.empty(len(texts), np.uint64)
        kernels.identify(tokens.hashes, tokens.first, out)
        return out.tolist()

    one, same, other, longer = ids("the cat  sat", "The CAT sat", "sat the cat", "the cat sat .")
    assert one == same and len({one, other, longer}) == 3
    assert ids("x", "the cat sat")[1] == one


@pytest.mark.parametrize("n", [0, 12, 13, 14, 40])
def test_shared_runs_are_counted(n: int) -> None:
    rng = np.random.default_rng(n)
    hashes = rng.integers(0, 2**63, n).astype(np.uint64)
    runs = {tuple(hashes[i : i + kernels.SHINGLE].tolist()) for i in range(n - kernels.SHINGLE + 1)}
    target = np.concatenate([hashes[5:30], rng.integers(0, 2**63, 50).astype(np.uint64)])
    known = kernels.known(target, np.array([0, len(target)]))
    copies = {
        tuple(target[i : i + kernels.SHINGLE].tolist())
        for i in range(len(target) - kernels.SHINGLE + 1)
    }
    assert (
        kernels.overlap(np.concatenate([hashes, hashes]), np.array([0, n, 2 * n]), known).tolist()
        == [len(runs & copies)] * 2
    )


def test_nothing_stands_before_a_compiled_loop() -> None:
    kernels.require_numba()
    for function in kernels.LOOPS:
        assert getattr(kernels, function.__name__).py_func is function
