"""Intervals of predicted losses, from what a fit got wrong out of fold (cross-conformal prediction:
Vovk 2015; Barber et al. 2021, https://arxiv.org/abs/1905.02928).

Errors grow with the loss above its floor: they are taken in parts of a width √(L − low), of each
loss's own size, and one quantile over all losses together is as good as its runs times its losses.

K domains, N runs, M losses, R mixtures.
"""

from typing import NamedTuple

import numpy as np

from doremi_train.methods.box import Floats

BELOW = (
    0.2  # how far below the lowest prediction errors would vanish, in parts of the median's lead
)


class Intervals(NamedTuple):
    """Half widths of M losses, as a function of what is predicted."""

    low: Floats  # (M,) where a width would be 0
    least: Floats  # (M,) of L − low; below what was predicted for the runs, it is as there
    size: Floats  # (M,) root mean square of the scaled errors
    scaled: Floats  # (N M,) sizes of all errors in these units, sorted

    def half(self, predicted: Floats, level: float) -> Floats:
        """(…, M) half widths in which a new run's losses are with probability `level`."""
        width = np.sqrt(np.maximum(predicted - self.low, self.least)) * self.size
        return np.quantile(self.scaled, level) * width


def intervals(unseen: Floats, losses: Floats) -> Intervals:
    """Intervals from predictions out of fold and losses, (N, M) each."""
    lowest = unseen.min(0)
    least = BELOW * (np.median(unseen, axis=0) - lowest) + 1e-9 * np.abs(lowest) + 1e-300
    low = lowest - least
    error = np.abs(losses - unseen) / np.sqrt(unseen - low)
    size = np.sqrt((error**2).mean(0)) + 1e-300
    return Intervals(low, least, size, np.sort((error / size).ravel()))
