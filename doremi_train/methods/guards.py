"""Guards of an objective held against a run: what it loses against natural, with the interval that
the noise of runs leaves.

A run and natural's mean of n runs have the noise σ each, so what is lost, (L − L_natural) /
|L_natural|, has σ √(1 + 1/n) / |L_natural|, and its interval is Student's.

M metrics, N runs, V domains.
"""

from typing import NamedTuple

import numpy as np
import scipy
import torch

from doremi_train.methods import replicates
from doremi_train.methods.box import Floats
from doremi_train.methods.objective import Objective

LEVEL = 0.95


class Noise(NamedTuple):
    """The noise of metrics between runs that differ in their seed alone."""

    deviation: Floats  # (M,)
    freedom: int  # degrees of freedom that it was estimated with


class Held(NamedTuple):
    """What a run loses against natural of each metric, in parts of natural's; below 0 it gains."""

    lost: Floats  # (M,)
    low: Floats  # (M,) ends of its interval
    high: Floats


def noise(points: Floats, metrics: Floats, unseen: Floats) -> Noise:
    """The noise of runs (N, V) with metrics (N, M): pooled over those on the same mixture. Where no
    mixture has two, the root mean square of what fits to the other runs (`unseen`, (N, M)) leave,
    which has the error of the fit in it too and is rather too large."""
    found = replicates.pooled(points, metrics)
    freedom = int(found.freedom.max())
    if freedom:
        return Noise(found.deviation, freedom)
    return Noise(np.sqrt(((metrics - unseen) ** 2).mean(0)), len(points))


def held(wanted: Objective, metrics: Floats, noise: Noise, naturals: int) -> Held:
    """What a run with metrics (M,) loses, where natural's are the mean of `naturals` runs."""
    lost = wanted.lost(torch.from_numpy(metrics[None]))[0].numpy()
    quantile = float(scipy.stats.t.ppf((1 + LEVEL) / 2, noise.freedom))
    size = np.maximum(np.abs(wanted.natural), 1e-12)
    half = quantile * noise.deviation * np.sqrt(1 + 1 / naturals) / size
    return Held(lost, lost - half, lost + half)
