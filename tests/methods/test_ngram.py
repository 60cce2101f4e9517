"""N-gram importance resampling against the published package, ten-line oracles and the law it
samples by."""

import hashlib
import itertools
import json
import math
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from doremi_train.methods import ngram

# The log ratios that data-selection 1.0.3 learned from TEXTS (target: the first two), summed by it
# over each text.
TEXTS = (
    "Alice went down the rabbit-hole, and the rabbit went on; down, down, down!",
    "Élan vital: the RABBIT's hole was 12,5 metres deep… (Alice counted.)",
    "A committee may not act unless a quorum of its members is present; no member votes twice.",
    "the quorum of the rabbit",
)
GOLDEN = (15.592683252539835, 16.42544036688108, -493.8853852707768, -69.86660896708783)
NOISE = [-1.2181865066255964, -0.11338007893401299]  # of ids 1 and 2^63 and seed 0
PEER = os.environ.get("DATA_SELECTION_PYTHON")


def exact_scores(target: list[str], raw: list[str]) -> list[float]:
    buckets = [
        np.concatenate([ngram.exact_buckets(t, 10_000) for t in side]) for side in (target, raw)
    ]
    counts = [np.bincount(one, minlength=10_000) for one in buckets]
    ratio = ngram.log_ratio(*counts)
    return [float(ratio[ngram.exact_buckets(text, 10_000)].sum()) for text in raw]


# Exact mode


@pytest.mark.parametrize(("gram", "bucket"), [("alice", 6720), ("alice went", 114)])
def test_buckets_are_those_of_the_package(gram: str, bucket: int) -> None:
    assert ngram.exact_bucket(gram, 10_000) == bucket


def test_exact_buckets_hold_every_word_and_every_pair() -> None:
    words = ["alice", "'", "s", "cat", ",", "alice", "!?"]
    assert ngram.exact_words("Alice's cat, ALICE!?") == words
    grams = words + [" ".join(pair) for pair in itertools.pairwise(words)]
    expected = Counter(int(hashlib.sha256(gram.encode()).hexdigest(), 16) % 97 for gram in grams)
    assert Counter(ngram.exact_buckets("Alice's cat, ALICE!?", 97).tolist()) == expected
    assert len(ngram.exact_buckets("  \n", 97)) == 0


def test_weights_are_those_of_the_package() -> None:
    np.testing.assert_allclose(
        exact_scores(list(TEXTS[:2]), list(TEXTS)), GOLDEN, rtol=0, atol=1e-9
    )


@pytest.mark.acceptance
def test_weights_on_real_text_are_those_of_the_package(tmp_path: Path) -> None:
    if PEER is None:
        pytest.skip(
            "DATA_SELECTION_PYTHON names no interpreter of an environment with data-selection 1.0.3"
        )
    import pydoc_data.topics as topics

    texts = [re.sub(r"\x1b", "", text) for text in topics.topics.values()]
    for name, part in (("target", texts[:7]), ("raw", texts)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in part)
        )
    code = (
        "from data_selection import HashedNgramDSIR as D\nimport json, numpy as np\n"
        "d = D(['raw.jsonl'], ['target.jsonl'], 'cache', num_proc=1)\n"
        "d.fit_importance_estimator(num_tokens_to_fit='all'); d.compute_importance_weights()\n"
        "print(json.dumps(np.load('cache/log_importance_weights/0.npy').tolist()))"
    )
    done = subprocess.run(
        [PEER, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    np.testing.assert_allclose(
        exact_scores(texts[:7], texts), json.loads(done.stdout), rtol=0, atol=1e-9
    )


# Weights


def test_a_target_that_is_the_raw_corpus_gives_no_weight_at_all() -> None:
    counts = np.random.default_rng(0).integers(0, 100, 1000)
    for mixing in (0.0, 0.3):
        assert np.abs(ngram.log_ratio(counts, 7 * counts, mixing)).max() < 1e-12
    assert exact_scores(list(TEXTS), list(TEXTS)) == [0.0] * len(TEXTS)


@pytest.mark.slow
def test_mixing_is_the_one_that_held_out_text_likes_best() -> None:
    rng = np.random.default_rng(1)
    raw = rng.integers(1, 1000, 200)
    p = raw * np.exp(rng.normal(0, 1, 200))
    halves = tuple(rng.multinomial(400, p / p.sum()) for _ in "ab")
    found = ngram.held_out_mixing(halves, raw)  # type: ignore[arg-type]

    def likelihood(mixing: float) -> float:
        total = 0.0
        for seen, held in (halves, halves[::-1]):
            for one, other, all_ in zip(seen, held, raw, strict=True):
                total += other * math.log(
                    (1 - mixing) * one / seen.sum() + mixing * all_ / raw.sum()
                )
        return total

    grid = np.linspace(0.001, 0.999, 999)
    assert abs(found - grid[np.argmax([likelihood(mixing) for mixing in grid])]) <= 1e-3


def test_mixing_is_all_where_halves_have_nothing_in_common() -> None:
    raw = np.ones(4, np.int64)
    assert ngram.held_out_mixing((np.array([9, 0, 0, 0]), np.array([0, 9, 0, 0])), raw) > 0.99


def test_kl_is_zero_of_the_same_and_positive_of_others() -> None:
    p, q = np.array([10, 0, 5]), np.array([1, 1, 20])
    a, b = (p + 0.5) / 16.5, (q + 0.5) / 23.5
    assert ngram.kl(p, p) == 0
    assert math.isclose(
        ngram.kl(p, q), math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True))
    )


# Sampling


def test_gumbel_top_k_samples_without_replacement_in_proportion_to_w() -> None:
    """χ² of the ordered draws of 3 of 6 items against successive sampling."""
    w = np.array([1.0, 2.0, 3.0, 5.0, 8.0, 0.5])
    scores, items, draws = np.log(w), ngram.mixed(np.arange(6, dtype=np.uint64)), 40_000
    seen = Counter(
        tuple(np.argsort(-ngram.keys(scores, items, 1.0, seed))[:3].tolist())
        for seed in range(draws)
    )
    observed, expected = [], []
    for triple in itertools.permutations(range(6), 3):
        probability, rest = 1.0, w.sum()
        for item in triple:
            probability, rest = probability * w[item] / rest, rest - w[item]
        observed.append(seen[triple])
        expected.append(draws * probability)
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_noise_is_standard_gumbel_and_belongs_to_the_document() -> None:
    ids = np.arange(100_000, dtype=np.uint64)  # ids in a row are the hardest for a hash
    noise = ngram.noise(ids, 3)
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-3
    assert np.array_equal(noise[::-7], ngram.noise(ids[::-7], 3))
    assert abs(np.corrcoef(noise, ngram.noise(ids, 4))[0, 1]) < 0.02
    # Fixed for ever: a selection made today is made again tomorrow.
    assert ngram.noise(np.array([1, 2**63], np.uint64), 0).tolist() == pytest.approx(
        NOISE, abs=1e-12
    )


@given(st.lists(st.floats(allow_nan=False), min_size=2, max_size=20))
def test_order_of_keys_is_the_order_of_numbers(values: list[float]) -> None:
    order = ngram.ordered(np.array(values))
    for (x, i), (y, j) in itertools.combinations(zip(values, order.tolist(), strict=True), 2):
        assert (x < y, x == y) == (i < j, i == j)


@settings(deadline=None)
@given(st.data())
def test_a_cut_is_the_descending_order_up_to_the_budget(data: st.DataObject) -> None:
    """For any documents, groups, costs and parts, also with equal keys, against a sort."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    n, groups = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 3))
    values = rng.choice(
        rng.normal(size=data.draw(st.integers(1, 60))) * 10.0 ** rng.integers(-5, 5), n
    )
    group, cost = (
        rng.integers(0, groups, n),
        rng.integers(1, data.draw(st.sampled_from([2, 50])), n),
    )
    budgets = np.array([rng.integers(0, cost[group == g].sum() + 1) for g in range(groups)])
    order = ngram.ordered(values)
    parts = np.array_split(np.arange(n), data.draw(st.integers(1, 4)))

    cut = ngram.start(budgets)
    while cut.bits < 64:
        cut = ngram.narrow(cut, sum(ngram.digits(cut, order[p], group[p], cost[p]) for p in parts))  # type: ignore[arg-type]
    inside = []
    for part in parts:
        chosen, cut = ngram.chosen(cut, order[part], group[part], cost[part])
        inside += chosen.tolist()

    for g in range(groups):
        left, expected = budgets[g], set()
        for i in sorted(np.flatnonzero(group == g), key=lambda i: (-values[i], i)):
            if cost[i] > left:
                break
            left -= cost[i]
            expected.add(i)
        assert {i for i in np.flatnonzero(inside) if group[i] == g} == expected


def test_effective_sample_size_is_the_same_for_any_division() -> None:
    scores = np.random.default_rng(0).normal(0, 3, 1000) + 900  # whose weights no float holds
    w = np.exp(scores - 900)
    expected = w.sum() ** 2 / (w**2).sum()
    for parts in (1, 3, 1000):
        total = ngram.mass(np.empty(0))
        for part in np.array_split(scores, parts):
            total = ngram.together(total, ngram.mass(part))
        assert math.isclose(ngram.effective_sample_size(total), expected)
    assert math.isclose(ngram.effective_sample_size(ngram.mass(np.zeros(7))), 7)
