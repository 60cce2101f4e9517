"""Forecasts of metrics that may be missing in some runs, with what the fits say of runs that they
have not seen.

Metrics that are there in the same runs are fitted together, since a law chooses its form by all of
them.

N runs, K domains, M metrics, R mixtures.
"""

from collections.abc import Iterator
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from doremi_train.methods import regressors, swarm
from doremi_train.methods.box import Floats
from doremi_train.methods.conformal import Intervals, intervals
from doremi_train.methods.fits import Fit, Known, Smooth

LEVEL = 0.95
Numbers = NDArray[np.int_]


class Part(NamedTuple):
    """Metrics that are there in the same runs."""

    metrics: Numbers  # their numbers among the M
    fit: Fit
    between: Intervals


class Forecast(NamedTuple):
    """Fits of all metrics."""

    parts: list[Part]
    unseen: Floats  # (N, M) what fits to the other runs predict; nan where it was not measured
    turn: Floats  # (M,) −1 where more is better, of which fits are of the negative; else 1

    @property
    def metrics(self) -> int:
        """M."""
        return self.unseen.shape[1]

    def predict(self, points: Floats) -> Floats:
        """(R, K) → (R, M)."""
        found = np.empty((len(points), self.metrics))
        for part in self.parts:
            found[:, part.metrics] = part.fit.predict(points)
        return found * self.turn

    def between(self, points: Floats) -> tuple[Floats, Floats, Floats]:
        """(R, K) → predicted (R, M), and the ends of 95 % intervals."""
        predicted = self.predict(points)
        half = np.empty_like(predicted)
        for part in self.parts:
            turned = predicted[:, part.metrics] * self.turn[part.metrics]
            half[:, part.metrics] = part.between.half(turned, LEVEL)
        return predicted, predicted - half, predicted + half

    @property
    def smooth(self) -> bool:
        """Whether every fit can be differentiated."""
        return all(hasattr(part.fit, "losses") for part in self.parts)

    def losses(self, points: Tensor) -> Tensor:
        """(…, K) → (…, M) in float64, with a gradient."""
        columns: dict[int, Tensor] = {}
        for part in self.parts:
            found = cast(Smooth, part.fit).losses(points)  # where they are `smooth`
            found = found * torch.from_numpy(self.turn[part.metrics])
            columns |= dict(zip(part.metrics.tolist(), found.unbind(-1), strict=True))
        return torch.stack([columns[metric] for metric in range(self.metrics)], dim=-1)


def alike(values: Floats) -> Iterator[tuple[Numbers, Numbers]]:
    """Runs and metrics of (N, M) that belong together: metrics that are there in the same runs."""
    patterns, group = np.unique(np.isfinite(values), axis=1, return_inverse=True)
    for number in range(patterns.shape[1]):
        yield np.flatnonzero(patterns[:, number]), np.flatnonzero(group == number)


def forecast(
    points: Floats, values: Floats, known: Known, regressor: str, turn: Floats
) -> Forecast:
    """Fits to runs (N, K) and their metrics (N, M), nan where one is missing; `turn` (M,) is −1
    where more is better, since laws are of losses, and else 1."""
    parts, unseen, turned = [], np.full_like(values, np.nan), values * turn
    for runs, metrics in alike(values):
        given = points[runs], turned[np.ix_(runs, metrics)]
        fit = regressors.REGRESSORS[regressor](*given, known)
        folds = swarm.out_of_fold(*given, regressor, np.random.default_rng(0), known)
        unseen[np.ix_(runs, metrics)] = folds
        parts.append(Part(metrics, fit, intervals(folds, given[1])))
    return Forecast(parts, unseen * turn, turn)
