"""Clusters against the most naive forms."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doremi_train.methods import clusters


def unit(rows: int, dimensions: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((rows, dimensions))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def test_rounding_keeps_cosines_and_zero() -> None:
    vectors = unit(50, 512, 0)
    whole = clusters.quantized(vectors * 7).astype(np.int64)
    cosine = whole @ whole.T / clusters.UNIT**2
    np.testing.assert_allclose(cosine, vectors @ vectors.T, atol=1e-3)
    assert not clusters.quantized(np.zeros((2, 8))).any()


@pytest.mark.parametrize("dimensions", [8, 512, clusters.DIMENSIONS])
def test_products_are_exact_whatever_the_batch(dimensions: int) -> None:
    """Also of the longest vectors that rounding makes, one against itself, where the sum is
    largest."""
    documents = clusters.quantized(unit(300, dimensions, 1))
    worst = np.full((1, dimensions), 0.5 + int(clusters.UNIT / np.sqrt(dimensions)))
    documents = np.concatenate([documents, clusters.quantized(worst), documents[:3]])
    centres = documents[::7]
    label, cosine = clusters.nearest(documents, centres)
    exact = documents.astype(np.int64) @ centres.astype(np.int64).T
    assert exact.max() <= 2**24
    np.testing.assert_array_equal(label, exact.argmax(1))
    np.testing.assert_array_equal((cosine * clusters.UNIT**2).round(), exact.max(1))
    one = [clusters.nearest(row[None], centres)[0][0] for row in documents]
    np.testing.assert_array_equal(label, one)


def test_means_are_directions_of_sums() -> None:
    documents = clusters.quantized(unit(40, 16, 2))
    label = np.arange(40) % 3
    label[label == 1] = 0
    means = clusters.means(documents, label, 3)
    for cluster in (0, 2):
        total = documents[label == cluster].astype(np.float64).sum(0)
        expected = np.rint(total * clusters.UNIT / np.linalg.norm(total))
        np.testing.assert_array_equal(means[cluster], expected)
    assert not means[1].any()


def test_polishing_ends_where_nothing_moves_and_drops_what_is_empty() -> None:
    middle = unit(4, 32, 3)
    near = middle[np.arange(200) % 4] + 0.1 * unit(200, 32, 4)
    documents = clusters.quantized(near)
    far = -clusters.quantized(middle[:1])  # nearest to none
    fit = clusters.polished(documents, np.concatenate([far, documents[:4]]).astype(np.int16), 20)
    assert len(fit.centres) == 4
    assert len({tuple(fit.label[k::4]) for k in range(4)}) == 4
    np.testing.assert_array_equal(fit.label, clusters.nearest(documents, fit.centres)[0])
    total = sum(
        int(row.astype(np.int64) @ fit.centres[k].astype(np.int64))
        for row, k in zip(documents, fit.label, strict=True)
    )
    assert fit.total == total


def test_merging_leaves_domains_of_the_least_size() -> None:
    middle = unit(3, 64, 5)
    centres = clusters.quantized(middle[np.repeat(np.arange(3), 5)] + 0.2 * unit(15, 64, 6))
    alone = clusters.quantized(unit(1, 64, 7))  # far from all, and tiny
    both = np.concatenate([centres, alone])
    tokens = np.array([100] * 5 + [300] * 5 + [200] * 5 + [3])
    label = clusters.merged(both, tokens, 3, least=50)
    np.testing.assert_array_equal(label[:15], np.repeat([2, 0, 1], 5))  # the largest first
    assert label[15] in range(3)
    assert clusters.merged(both, tokens, 4, least=1)[15] == 3
    assert set(clusters.merged(both, tokens, 1, least=50)) == {0}
    # More than there can be: as many as have the size.
    sizes = np.bincount(clusters.merged(both, tokens, 16, least=400), tokens)
    assert 1 < len(sizes) < 16 and sizes.min() >= 400
    assert len(set(clusters.merged(both, tokens, 4, least=10**9))) == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=2, max_size=30))
def test_adjusted_rand_is_that_of_counting_pairs(cells: list[tuple[int, int]]) -> None:
    a, b = (np.array(side) for side in zip(*cells, strict=True))
    table = np.zeros((4, 3))
    np.add.at(table, (a, b), 1)
    pairs = list(itertools.combinations(range(len(cells)), 2))
    both = sum(a[i] == a[j] and b[i] == b[j] for i, j in pairs)
    first, second = (sum(x[i] == x[j] for i, j in pairs) for x in (a, b))
    expected = first * second / len(pairs)
    largest = (first + second) / 2
    found = clusters.adjusted_rand(table)
    if largest == expected:
        assert found == 1
    else:
        assert found == pytest.approx((both - expected) / (largest - expected))
    assert clusters.adjusted_rand(table.T) == pytest.approx(found)


def test_words_that_only_one_domain_has_tell_it_apart() -> None:
    #                   of all  rare  of 0  of 1
    counts = np.array([[1000, 1, 300, 0], [1000, 0, 0, 300], [2000, 1, 4, 4]])
    scores = clusters.telling(counts)
    assert scores[0].argmax() == 2 and scores[1].argmax() == 3
    assert abs(scores[0, 1]) < 2 < scores[0, 2]


def test_levels_have_equally_many_words_and_equal_scores_stay_together() -> None:
    scores, tokens = np.arange(90.0), np.full(90, 10)
    order = np.random.default_rng(0).permutation(90)
    cuts = clusters.cuts(scores[order], tokens[order], 3)
    np.testing.assert_array_equal(cuts, [30, 60])
    same = clusters.cuts(np.array([1.0, 1, 1, 2]), np.array([5, 5, 5, 5]), 2)
    np.testing.assert_array_equal(same, [2])
    np.testing.assert_array_equal(clusters.cuts(np.zeros(5), np.ones(5, int), 3), [0, 0])
