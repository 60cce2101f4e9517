"""The saturating law, corrected by what boosted trees find in it: with few runs the law ranks best,
with many the trees, and this is never much below either.

Where lightgbm is not installed, a Gaussian process takes the trees' place. Three predictions are
weighed by folds, one share for all losses: the law; the law and trees of what it leaves; and trees
of the losses alone.

K domains, N runs, M losses, R mixtures.
"""

from typing import NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor

from doremi_train.methods import process, trees
from doremi_train.methods.box import Floats
from doremi_train.methods.fits import UNKNOWN, Fit, Known
from doremi_train.methods.process import Process
from doremi_train.methods.saturating import Saturating, saturating

FOLDS = 5
RATE, ROUNDS = 0.1, 100  # of trees; a tenth of the time that RegMix's take, and as good


class Corrected(NamedTuple):
    """A mean of three predictions."""

    law: Saturating
    left: Fit  # of what the law leaves
    alone: Fit  # of the losses
    shares: Floats  # (3,) of the law, of the law with `left`, and of `alone`; their sum is 1

    def losses(self, points: Tensor) -> Tensor:
        """(R, K) → (R, M) in float64. The gradient is that of the law and the processes: trees have
        none."""
        found = self.shares[:2].sum() * self.law.losses(points)
        for share, fit in zip(self.shares[1:], (self.left, self.alone), strict=True):
            if isinstance(fit, Process):
                found = found + share * fit.losses(points)
            else:
                found = found + share * torch.from_numpy(fit.predict(points.detach().numpy()))
        return found

    def predict(self, points: Floats) -> Floats:
        return self.shares @ self._each(points)

    def _each(self, points: Floats) -> Floats:
        """(R, 3, M)."""
        law = self.law.predict(points)
        return np.stack([law, law + self.left.predict(points), self.alone.predict(points)], axis=1)


def corrected(points: Floats, losses: Floats, known: Known = UNKNOWN) -> Corrected:
    """Fit of the three, and their shares by what fits to the other folds predict."""
    fold = np.random.default_rng(0).permutation(len(points)) % min(FOLDS, len(points))
    unseen = np.empty((len(points), 3, losses.shape[1]))
    for one in range(fold.max() + 1):
        rest = fold != one
        unseen[~rest] = _parts(points[rest], losses[rest], known)._each(points[~rest])
    return _parts(points, losses, known)._replace(shares=_shares(unseen, losses))


def _parts(points: Floats, losses: Floats, known: Known) -> Corrected:
    law = saturating(points, losses, known)
    left = losses - law.predict(points)
    return Corrected(law, _learn(points, left), _learn(points, losses), np.array([1.0, 0.0, 0.0]))


def _learn(points: Floats, values: Floats) -> Fit:
    if trees.installed():
        return trees.boosted(points, values, RATE, ROUNDS)
    return process.gaussian_process(points, values)


def _shares(unseen: Floats, losses: Floats) -> Floats:
    """(3,) least squares of the losses (N, M), each in units of its spread, on predictions (N, 3,
    M), with shares of 0 or more that sum to 1."""
    spread = losses.std(0) + 1e-12
    rows = np.moveaxis(unseen / spread, 1, -1).reshape(-1, unseen.shape[1])
    heavy = 1e3 * np.sqrt(len(rows))  # of the row that says what they sum to
    given = np.vstack([rows, np.full((1, unseen.shape[1]), heavy)])
    found, _ = scipy.optimize.nnls(given, np.append((losses / spread).ravel(), heavy))
    return found / found.sum()
