"""Contents of mixtures by other names."""

import numpy as np

from doremi_train.methods.content import translated

RANDOM = np.random.default_rng(0)


def simplex(rows: int, columns: int) -> np.ndarray:
    return RANDOM.dirichlet(np.ones(columns), rows)


def test_the_same_content_by_other_names_is_the_same_mixture() -> None:
    """Domains that were merged, and one that was split in like halves."""
    known = simplex(4, 30)
    merged = np.stack([0.3 * known[0] + 0.7 * known[1], known[2], known[3], known[3]])
    points = simplex(5, 4)
    weights, outside = translated(points, merged, known)
    a, b, c, d = points.T
    np.testing.assert_allclose(weights, np.stack([0.3 * a, 0.7 * a, b, c + d], 1), atol=1e-6)
    np.testing.assert_allclose(outside, 0, atol=1e-6)


def test_what_is_in_none_is_outside() -> None:
    known = np.pad(simplex(3, 10), ((0, 0), (0, 10)))
    others = np.concatenate([known[:1], np.pad(simplex(1, 10), ((0, 0), (10, 0)))])
    weights, outside = translated(np.array([[1.0, 0], [0.6, 0.4], [0, 1]]), others, known)
    np.testing.assert_allclose(outside, [0, 0.4, 1], atol=1e-6)
    np.testing.assert_allclose(weights.sum(1), 1)
    assert (weights >= 0).all() and weights[1, 0] > 0.5


def test_the_nearest_is_no_farther_than_any_other() -> None:
    known, other = simplex(4, 12), simplex(1, 12)
    weights, outside = translated(np.ones((1, 1)), other, known)
    distance = ((other - weights @ known) ** 2).sum()
    for trial in simplex(500, 4):
        assert ((other[0] - trial @ known) ** 2).sum() >= distance - 1e-9
    assert 0 < outside[0] < 1
