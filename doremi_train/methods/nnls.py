"""Non-negative least squares of many small problems at once, from their Gram matrices.

Block principal pivoting (Portugal, Júdice & Vicente 1994; Kim & Park 2011,
https://doi.org/10.1137/110821172): guess which coefficients are above 0, solve for them, exchange
all that came out on the wrong side, and repeat; where that stops to help, exchange one at a time,
which ends after finitely many steps.

P problems, J coefficients.
"""

import numpy as np
import scipy
from numpy.typing import NDArray

from doremi_train.methods.box import Floats

Flags = NDArray[np.bool_]
TRIES = 3  # exchanges of all without progress, before one at a time
TOLERANCE = 1e-10  # of a problem whose entries are about 1
ROUNDS = 200  # after which rounding goes in a circle


def solve(gram: Floats, target: Floats, start: Flags) -> tuple[Floats, Flags]:
    """argmin ½ xᵀ G x − bᵀ x, x ≥ 0, of positive definite `gram` (P, J, J) with a diagonal near 1
    and `target` (P, J): x (P, J), and which of its entries are free. `start` (P, J) is a guess of
    these: the answer does not depend on it, the time does."""
    solved, free = np.zeros_like(target), start.copy()
    size = np.abs(target).max(1, keepdims=True) + 1e-300
    todo, tries = np.arange(len(target)), np.full(len(target), TRIES)
    fewest = np.full(len(target), target.shape[1] + 1)
    last = np.arange(target.shape[1])
    for _ in range(ROUNDS):
        if not len(todo):
            break
        now = free[todo]
        x = _on(gram[todo], target[todo] / size[todo], now)
        slope = (gram[todo] @ x[..., None])[..., 0] - target[todo] / size[todo]
        wrong = np.where(now, x < -TOLERANCE, slope < -TOLERANCE)
        count = wrong.sum(1)
        better = count < fewest[todo]
        tries[todo] = np.where(better, TRIES, tries[todo] - 1)
        fewest[todo] = np.minimum(count, fewest[todo])
        single = last == np.where(wrong, last, -1).max(1, keepdims=True)
        free[todo] = now ^ np.where((tries[todo] < 0)[:, None], single & wrong, wrong)
        solved[todo] = np.maximum(x, 0) * size[todo]
        todo = todo[count > 0]
    for problem in todo:  # with Lawson and Hanson's, one by one
        factor = scipy.linalg.cholesky(gram[problem])
        right = scipy.linalg.solve_triangular(factor, target[problem], trans="T")
        solved[problem] = scipy.optimize.nnls(factor, right)[0]
        free[problem] = solved[problem] > 0
    return solved, free


def _on(gram: Floats, target: Floats, free: Flags) -> Floats:
    """(P, J) the least squares of the free coefficients; the others are 0."""
    part = gram * (free[:, :, None] & free[:, None, :])
    diagonal = np.arange(free.shape[1])
    part[:, diagonal, diagonal] += ~free
    found = np.linalg.solve(part, (target * free)[..., None])[..., 0]
    return np.asarray(found, dtype=np.float64)
