"""Forecasts of metrics that may be missing in some runs, with what the fits say of runs that they
have not seen.

Metrics that are there in the same runs are fitted together, since a law chooses its form by all of
them.

N runs, K domains, M metrics, R mixtures.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from doremi_train.methods import regressors, swarm
from doremi_train.methods.box import Floats
from doremi_train.methods.fits import Fit, Known


class Part(NamedTuple):
    """Metrics that are there in the same runs."""

    metrics: NDArray[np.int_]
    runs: NDArray[np.int_]
    fit: Fit


class Forecast(NamedTuple):
    """Fits of all metrics."""

    parts: list[Part]
    unseen: Floats  # (N, M) what fits to the other runs predict; nan where it was not measured
    half: Floats  # (M,) of intervals of 95 %, by split conformal prediction out of fold

    def predict(self, points: Floats) -> Floats:
        """(R, K) → (R, M)."""
        found = np.empty((len(points), len(self.half)))
        for part in self.parts:
            found[:, part.metrics] = part.fit.predict(points)
        return found

    def between(self, points: Floats) -> tuple[Floats, Floats, Floats]:
        """(R, K) → predicted (R, M), and the ends of 95 % intervals."""
        predicted = self.predict(points)
        return predicted, predicted - self.half, predicted + self.half

    @property
    def smooth(self) -> bool:
        """Whether every fit can be differentiated."""
        return all(hasattr(part.fit, "losses") for part in self.parts)

    def losses(self, points: Tensor) -> Tensor:
        """(…, K) → (…, M) in float64, with a gradient."""
        columns: dict[int, Tensor] = {}
        for part in self.parts:
            found: Tensor = part.fit.losses(points)  # type: ignore[attr-defined]
            columns |= dict(zip(part.metrics.tolist(), found.unbind(-1), strict=True))
        return torch.stack([columns[metric] for metric in range(len(self.half))], dim=-1)


def forecast(points: Floats, values: Floats, known: Known, regressor: str) -> Forecast:
    """Fits to runs (N, K) and their metrics (N, M), nan where one is missing."""
    there = np.isfinite(values)
    patterns, group = np.unique(there, axis=1, return_inverse=True)
    parts, unseen = [], np.full_like(values, np.nan)
    for number in range(patterns.shape[1]):
        runs, metrics = np.flatnonzero(patterns[:, number]), np.flatnonzero(group == number)
        given = points[runs], values[np.ix_(runs, metrics)]
        parts.append(Part(metrics, runs, regressors.REGRESSORS[regressor](*given, known)))
        random = np.random.default_rng(0)
        unseen[np.ix_(runs, metrics)] = swarm.out_of_fold(*given, regressor, random, known)
    errors = np.abs(values - unseen)
    return Forecast(parts, unseen, np.array([_quantile(column) for column in errors.T]))


def _quantile(errors: Floats) -> float:
    """What 95 % of new errors are below, from errors (N,) of which some are nan."""
    there = np.sort(errors[np.isfinite(errors)])
    rank = int(np.ceil(0.95 * (len(there) + 1)))
    return float(there[min(rank, len(there)) - 1])
