"""Boosted trees (lightgbm), as RegMix fits losses with them (Liu et al. 2024,
https://arxiv.org/abs/2407.01492).

K domains, N runs, M losses, R mixtures.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from doremi_train.methods.box import Floats
from doremi_train.methods.fits import UNKNOWN, Known

RATE, ROUNDS = 0.01, 1000  # RegMix's


class Trees(NamedTuple):
    """Boosted trees of each loss."""

    each: Sequence[Any]  # lightgbm's Booster

    def predict(self, points: Floats) -> Floats:
        return np.stack(
            [np.asarray(one.predict(points, num_threads=1), np.float64) for one in self.each],
            axis=1,
        )


def lightgbm(points: Floats, losses: Floats, known: Known = UNKNOWN) -> Trees:
    """Trees with RegMix's rate and number: (N, K), (N, M)."""
    return boosted(points, losses, RATE, ROUNDS)


def boosted(points: Floats, losses: Floats, rate: float, rounds: int) -> Trees:
    """Trees with leaves of 3 runs, for there are tens of runs and not hundreds."""
    import lightgbm as trees

    options = {
        "learning_rate": rate, "num_leaves": 8, "min_data_in_leaf": 3, "num_threads": 1, "seed": 0,
        "deterministic": True, "force_row_wise": True, "verbosity": -1,
    }  # fmt: skip
    return Trees(
        [
            trees.train(options, trees.Dataset(points, column), num_boost_round=rounds)
            for column in losses.T
        ]
    )


def installed() -> bool:
    """Whether there is lightgbm."""
    try:
        import lightgbm  # noqa: F401
    except ImportError:
        return False
    return True
