"""Non-negative least squares of many problems against Lawson and Hanson's, one by one."""

import numpy as np
import pytest
import scipy
from numpy.testing import assert_allclose

from doremi_train.methods import nnls
from doremi_train.methods.box import Floats


def problems(size: int, seed: int, rows: int = 30) -> tuple[Floats, Floats, Floats]:
    """Forty problems: Gram matrices and targets, and what scipy finds."""
    random = np.random.default_rng(seed)
    given = random.standard_normal((40, rows, size)) + random.standard_normal((40, rows, 1))
    right = random.standard_normal((40, rows))
    found = np.array([scipy.optimize.nnls(*one)[0] for one in zip(given, right, strict=True)])
    turned = np.swapaxes(given, 1, 2)
    return turned @ given / rows, (turned @ right[..., None])[..., 0] / rows, found


@pytest.mark.parametrize("size", [1, 3, 17])
def test_the_solution_is_lawson_and_hanson_s_from_any_start(size: int) -> None:
    gram, target, found = problems(size, size)
    random = np.random.default_rng(0).random(target.shape) < 0.5
    for start in (np.ones(target.shape, bool), np.zeros(target.shape, bool), random):
        kept = start.copy()
        solved, free = nnls.solve(gram, target, start)
        assert_allclose(solved, found, atol=1e-9)
        assert np.array_equal(free, found > 0) and np.array_equal(start, kept)


def test_targets_may_be_of_any_size_and_columns_empty() -> None:
    gram, target, found = problems(5, 0)
    gram[:, 2], gram[:, :, 2], gram[:, 2, 2], target[:, 2] = 0, 0, 0.1, 0
    expected, _ = nnls.solve(gram, target, target > 0)
    for scale in (1e-12, 1e12):
        solved, _ = nnls.solve(gram, scale * target, target > 0)
        assert_allclose(solved, scale * expected, rtol=1e-9, atol=1e-20)
    nothing, _ = nnls.solve(gram, 0 * target, target > 0)
    assert not nothing.any() and not expected[:, 2].any() and found.any()


def test_what_goes_in_a_circle_is_solved_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, target, found = problems(6, 1)
    monkeypatch.setattr(nnls, "ROUNDS", 1)
    solved, free = nnls.solve(gram, target, np.ones(target.shape, bool))
    assert_allclose(solved, found, atol=1e-9)
    assert np.array_equal(free, found > 0) and not free.all(1).any()
