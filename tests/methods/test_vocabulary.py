"""The adapted vocabulary: its utility against the formula, what pruning keeps, and any bytes there
and back."""

import base64
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import run_here
from helpers.corpus import documents, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from doremi_train.config import UserError
from doremi_train.methods import vocabulary
from doremi_train.selection.documents import granular, kernels

pytest.importorskip("numba")


def naive_segment(text: bytes, tokens: list[bytes]) -> list[bytes]:
    found, known = [], set(tokens)
    while text:
        found.append(next(text[:size] for size in range(len(text), 0, -1) if text[:size] in known))
        text = text[len(found[-1]) :]
    return found


def segment(texts: list[bytes], tokens: list[bytes]) -> list[list[bytes]]:
    text, offsets = kernels.joined(texts)
    ids, first = kernels.segment(text, offsets[:-1], offsets[1:], kernels.trie(tokens))
    return [[tokens[i] for i in ids[a:b]] for a, b in itertools.pairwise(first)]


# The method


@pytest.mark.parametrize("length", ["plain", "used"])
def test_utility_of_uniform_tokens_is_ln_k_over_l(length: str) -> None:
    found = vocabulary.utility(np.full(50, 1 / 50), np.full(50, 3), length)
    assert math.isclose(found, math.log(50) / 3)


def test_utility_is_the_formula() -> None:
    p, lengths = np.array([0.5, 0.2, 0.3, 0.0]), np.array([1, 2, 4, 9])
    entropy = -math.fsum(x * math.log(x) for x in (0.5, 0.2, 0.3))
    assert math.isclose(vocabulary.utility(p, lengths), entropy / 4)
    assert math.isclose(vocabulary.utility(p, lengths, "used"), entropy / 2.1)


@pytest.mark.parametrize("length", ["plain", "used"])
def test_change_of_a_removal_is_the_difference_of_two_utilities(length: str) -> None:
    rng = np.random.default_rng(0)
    p, lengths = rng.dirichlet(np.ones(20)), rng.integers(1, 10, 20)
    p[3] = 0
    p /= p.sum()
    for j, change in enumerate(vocabulary.changes(p, lengths, length)):
        rest = np.delete(p, j) / np.delete(p, j).sum()
        without = vocabulary.utility(rest, np.delete(lengths, j), length)
        assert math.isclose(
            change, abs(without - vocabulary.utility(p, lengths, length)), abs_tol=1e-12
        )


def test_pruning_removes_what_changes_least_and_never_a_byte() -> None:
    tokens = [*vocabulary.BYTES, b"the", b"th", b"of the", b"zq", b"rare word"]
    counts = np.array([1] * 256 + [900, 3, 300, 0, 0])
    left = vocabulary.prune(tokens, counts / counts.sum(), 258)
    assert left[:256] == list(vocabulary.BYTES) and len(left) == 258
    assert b"the" in left and b"of the" in left
    assert vocabulary.prune(tokens, counts / counts.sum(), 256) == list(vocabulary.BYTES)
    with pytest.raises(ValueError, match="256 single bytes"):
        vocabulary.prune(tokens, counts / counts.sum(), 255)


def test_sizes_are_a_geometric_sequence() -> None:
    assert vocabulary.sizes(16000, 1000, 4) == [8000, 4000, 2000, 1000]


def test_phrases_are_runs_of_words_on_one_line() -> None:
    options = vocabulary.Options(words=2, count=2, characters=12)
    found = vocabulary.phrases(["a bc d\na bc", "x a bc d", "incomprehensibilities " * 3], options)
    assert found == {b"a": 2, b" bc": 3, b"a bc": 2, b" d": 2, b" bc d": 2}


# Longest match


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.binary(max_size=40), min_size=1, max_size=4),
    st.lists(st.binary(min_size=1, max_size=5), max_size=9),
)
def test_any_bytes_there_and_back_by_the_longest_tokens(
    texts: list[bytes], more: list[bytes]
) -> None:
    tokens = list(dict.fromkeys([*vocabulary.BYTES, *more, *(text[:4] for text in texts if text)]))
    found = segment(texts, tokens)
    assert [b"".join(part) for part in found] == texts
    assert found == [naive_segment(text, tokens) for text in texts]


def test_a_made_vocabulary_keeps_its_promises(tmp_path: Path) -> None:
    target = [text.encode() for text in documents(3, "nopqrst", 60, 8000)]
    raw = [text.encode() for text in documents(2, "hijklmno", 60, 8000)]
    options = vocabulary.Options(size=400, steps=4, learned=1200)
    tokens, log = granular.make([b"start here", b"nop"], target, raw, options)
    assert tokens[:256] == list(vocabulary.BYTES) and len(tokens) == len(set(tokens)) == 400
    assert [line["tokens"] for line in log][1:] == vocabulary.sizes(log[0]["tokens"], 400, 4)
    assert any(b" " in token.strip() for token in tokens)  # a phrase
    counts = [
        Counter(t for part in segment(texts, tokens) for t in part) for texts in (target, raw)
    ]
    p = np.array([sum(0.5 * c[t] / c.total() for c in counts) for t in tokens])
    lengths = np.array([len(token) for token in tokens])
    assert math.isclose(log[-1]["utility_plain"], vocabulary.utility(p, lengths))
    assert math.isclose(log[-1]["utility_used"], vocabulary.utility(p, lengths, "used"))
    path = tmp_path / "vocabulary.json"
    print_ = granular.save(path, tokens)
    assert granular.load(str(path)) == (tokens, print_)
    path.write_text(path.read_text().replace(": 300", ": 301", 1))
    with pytest.raises(UserError, match="was changed"):
        granular.load(str(path))


# Start vocabularies


def test_tokens_of_other_tokenisers_are_bytes(tmp_path: Path) -> None:
    from doremi_train.data.tokens import tokenizer as tokenizers

    learned = tokenizers.learn(["the cat the cat Ünï"] * 5, 300)
    found = granular.tokens_of(learned)
    assert (
        set(vocabulary.BYTES) <= set(found) and b" cat" in found and b"<|endoftext|>" not in found
    )
    pieces = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("<0x0A>", -2.0), ("é", -3.0)], 0, True)
    )
    assert granular.tokens_of(pieces)[1:] == [b" the", b"\n", "é".encode()]
    lines = [
        base64.b64encode(token).decode() + f" {n}"
        for n, token in enumerate([b"a", b"\xff", b" the"])
    ]
    (tmp_path / "x.tiktoken").write_text("\n".join(lines) + "\n")
    assert granular.start(str(tmp_path / "x.tiktoken")) == [b"a", b"\xff", b" the"]
    (tmp_path / "bad.tiktoken").write_text("no base64!\n")
    with pytest.raises(UserError, match="not a .tiktoken file"):
        granular.start(str(tmp_path / "bad.tiktoken"))


# The stage


@pytest.mark.slow
def test_the_stage_makes_a_vocabulary_that_a_selection_uses(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "raw/mixed/train.jsonl",
        [*documents(2, "hijklmno", 200, 40_000), *documents(3, "nopqrst", 300, 8000)],
    )
    stream = documents(3, "nopqrst", 300, 10**6)
    for _ in range(100):
        next(stream)
    target = write_jsonl(tmp_path / "target.jsonl", [next(stream) for _ in range(6)])
    common = [
        f"data.root={tmp_path / 'raw'}",
        f"selection.targets={{t: [{target}]}}",
        f"store={tmp_path / 'store'}",
    ]
    made = run_here(
        "stage=vocabulary",
        *common,
        "vocabulary.size=500",
        "vocabulary.learned=1000",
        f"run_dir={tmp_path / 'v'}",
    )
    assert made.code == 0 and "H_v" in made.out, made
    folder = tmp_path / "v" / "vocabulary"
    content: Any = json.loads((folder / "vocabulary.json").read_text())
    assert len(content["model"]["vocab"]) == 500 and len(content["fingerprint"]) == 16
    assert (folder / "vocabulary.svg").read_text().startswith("<svg")
    assert len(json.loads((folder / "result.json").read_text())["steps"]) == 11
    chosen = run_here(
        "stage=select", *common, "selection=ngram", "selection.features=granular",
        "selection.documents=15", f"selection.vocabulary={folder / 'vocabulary.json'}",
        f"run_dir={tmp_path / 's'}", "selection.workers=1",
    )  # fmt: skip
    assert chosen.code == 0, chosen
    assert "Utility of the vocabulary" in (tmp_path / "s" / "select" / "report.html").read_text()
    import pyarrow.parquet as pq

    texts = [json.loads(line)["text"] for line in (tmp_path / "raw/mixed/train.jsonl").open()]
    rows = [
        row
        for row in pq.read_table(tmp_path / "s/select/t/sidecar.parquet").to_pylist()
        if row["selected"]
    ]
    assert (
        len(rows) == 15 and sum(not set(texts[row["row"]]) - set("nopqrst ") for row in rows) >= 13
    )


def test_every_granularity_is_the_longest_match_of_shorter_phrases_too(tmp_path: Path) -> None:
    from doremi_train.methods import ngram
    from doremi_train.selection.documents.registry import METHODS
    from doremi_train.selection.documents.scorers import whole
    from doremi_train.selection.options import SelectionOptions

    tokens = [*vocabulary.BYTES, b"of", b" the", b"of the", b"of the end"]
    print_ = granular.save(tmp_path / "v.json", tokens)
    texts = [b"of the end of the day", b"", b"the"]
    expected = [
        [
            [
                tokens.index(t)
                for t in naive_segment(text, [t for t in tokens if len(t.split()) <= most])
            ]
            for text in texts
        ]
        for most in (1, 2, 3)
    ]
    table = np.random.default_rng(0).normal(size=(997, 1))
    given = {"features": "granular", "vocabulary": str(tmp_path / "v.json"), "buckets": 997}
    for granularity, grains in (("every", expected), ("longest", expected[-1:])):
        scorer: Any = METHODS["ngram"](SelectionOptions("ngram", granularity=granularity, **given))
        sums, grams = np.zeros((3, 1)), np.zeros(3)
        for (hashes, first), parts in zip(scorer.grains(whole(texts)), grains, strict=True):
            salted = np.array([i for part in parts for i in part], np.uint64) ^ np.uint64(
                int(print_, 16)
            )
            assert hashes.tolist() == ngram.mixed(salted).tolist()
            assert np.diff(first).tolist() == [len(part) for part in parts]
            kernels.score(hashes, first, table, sums)
            grams += [max(2 * len(part) - 1, 0) for part in parts]
        found = scorer.score(whole(texts), {"table": table})
        np.testing.assert_allclose(
            found[:, 0], sums[:, 0] / np.maximum(grams, 1), rtol=0, atol=1e-12
        )


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="not a vocabulary"):
        granular.load(str(tmp_path / "x.json"))
    with pytest.raises(UserError, match="vocabulary.size=200"):
        granular.make([], [b"x"], [b"x"], vocabulary.Options(size=200))
