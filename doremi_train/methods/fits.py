"""What a regressor of mixtures is given, and what it gives back.

K domains, N runs, M losses, R mixtures.
"""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from doremi_train.methods.box import Floats


class Known(NamedTuple):
    """What is known about the runs beside mixtures and losses."""

    passes: Floats | None = None  # (K,) D / n: passes over a domain by a run on it alone
    natural: Floats | None = None  # (K,) the mixture in proportion to sizes


UNKNOWN = Known()


class Fit(Protocol):
    """What was learned from N runs."""

    def predict(self, points: Floats) -> Floats:
        """(R, K) → (R, M)."""


class Smooth(Fit, Protocol):
    """A fit that can be differentiated."""

    def losses(self, points: Tensor) -> Tensor:
        """(R, K) → (R, M) in float64, with a gradient."""


class Regressor(Protocol):
    """A way to fit: points (N, K), losses (N, M), and what is known beside them where the form
    makes use of it."""

    def __call__(self, points: Floats, losses: Floats, known: Known = ...) -> Fit: ...


def at(points: Floats, mixture: Floats) -> NDArray[np.bool_]:
    """(N,) which runs were on a mixture (K,), to a thousandth of total variation."""
    return np.abs(points - mixture).sum(1) < 2e-3


def replicates(points: Floats, losses: Floats) -> Floats:
    """(M,) σ of runs on the same mixture, pooled; 0 where none is repeated."""
    _, group = np.unique(points, axis=0, return_inverse=True)
    count = np.bincount(group)
    mean = np.stack([np.bincount(group, column) for column in losses.T], axis=1) / count[:, None]
    left = ((losses - mean[group]) ** 2).sum(0)
    return np.sqrt(left / max(len(points) - len(count), 1))
