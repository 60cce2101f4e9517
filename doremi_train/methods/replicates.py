"""Replicates: what runs on the same mixture say of the noise of metrics, and of their scales.

M metrics, N runs, K domains.
"""

from typing import NamedTuple

import numpy as np

from doremi_train.methods.box import Floats, distance

NEAR = 1e-3  # total variation within which a mixture is natural, where tables round weights


class Pooled(NamedTuple):
    """Standard deviation between runs on the same mixture."""

    deviation: Floats  # (M,) nan where no mixture has two runs
    freedom: Floats  # (M,) degrees of freedom that it was estimated with


def pooled(points: Floats, metrics: Floats) -> Pooled:
    """The deviation of runs (N, K) with metrics (N, M), nan where one is missing, pooled over all
    mixtures that have two runs or more."""
    alike = np.unique(points.round(9), axis=0, return_inverse=True)[1].ravel()
    squares, freedom = np.zeros(metrics.shape[1]), np.zeros(metrics.shape[1])
    for group in np.flatnonzero(np.bincount(alike) > 1):
        some = metrics[alike == group]
        count = np.isfinite(some).sum(0)
        mean = np.nansum(some, axis=0) / np.maximum(count, 1)
        squares += np.nansum((some - mean) ** 2, axis=0)
        freedom += np.maximum(count - 1, 0)
    known = freedom > 0
    return Pooled(np.sqrt(np.where(known, squares, np.nan) / np.where(known, freedom, 1)), freedom)


def scale(points: Floats, metrics: Floats, natural: Floats) -> Floats:
    """(M,) in units of which metrics are standardised: the deviation of the runs on natural (K,),
    or the pooled one where that is larger; nan where no mixture has two runs."""
    reference = pooled(np.zeros((len(points), 1)), _on(natural, points, metrics))
    return np.fmax(reference.deviation, pooled(points, metrics).deviation)


def _on(natural: Floats, points: Floats, metrics: Floats) -> Floats:
    """(N, M) the metrics of the runs on natural, and nan for others."""
    return np.where((distance(points, natural) < NEAR)[:, None], metrics, np.nan)
