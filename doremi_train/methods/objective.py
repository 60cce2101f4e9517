"""What a mixture is for: which figures it is to lower, and which it must not spoil.

A figure is one of M metrics, and less is better; where more is better, as of an accuracy, its
weight is below 0. `mean` is Σ w_m L_m / Σ |w_m|; `worst` is max_m w_m L_m of those that count,
which asks for metrics of one unit. A guard says what part of its value with natural a metric may
lose at most.

M metrics, R mixtures.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from doremi_train.config import STRICT, Fraction
from doremi_train.methods.box import Floats

STEEP = 1e3  # of what is lost beyond a guard, against the score


@dataclass(frozen=True, config=STRICT)
class Options:
    reduce: Literal["mean", "worst"] = "mean"
    """How metrics become one figure: their weighted mean, or the largest, weighted."""

    metrics: dict[str, float] | None = None
    """Metrics that count, {metric: weight}; the weight is below 0 where more is better; null: all
    of objective.over alike."""

    guard: dict[str, Fraction] | None = None
    """What part of its value with natural a metric may lose at most, {metric: part}, as in {code:
    0.005}; null: any."""

    over: Literal["domains", "tasks", "scores"] = "domains"
    """What counts where metrics is null: the loss of every domain (in stage=fit every column), bits
    per byte of the gold answers of every task of downstream.*, or no score, so that one is named.
    """

    scores: tuple[str, ...] | None = None
    """Files and folders with scores of the small runs that you evaluate yourself: results of
    lm-evaluation-harness, or {model folder: {metric: value}}; null: none."""


class Objective(NamedTuple):
    """One figure of M metrics; less is better."""

    reduce: Literal["mean", "worst"]
    weights: Floats  # (M,)
    natural: Floats  # (M,) the metrics of the natural mixture
    guard: Floats  # (M,) part that may be lost; infinite where there is none
    unit: str = "nats per token"  # of the score, for messages

    def score(self, metrics: Tensor) -> Tensor:
        """(R, M) → (R,) in float64, with a gradient."""
        weights = torch.from_numpy(self.weights)
        if self.reduce == "mean":
            return metrics @ weights / weights.abs().sum()
        counted = torch.from_numpy(np.flatnonzero(self.weights))
        return (metrics * weights)[..., counted].amax(-1)

    def beyond(self, metrics: Tensor) -> Tensor:
        """(R, M) → (R, M) what is lost beyond the guards, in parts of the value with natural; 0
        within them. It has a gradient."""
        return (self.lost(metrics) - torch.from_numpy(self.guard)).clamp_min(0)

    def lost(self, metrics: Tensor) -> Tensor:
        """(R, M) → (R, M) what is lost against natural, in parts of its value; below 0 it is
        gained."""
        natural = torch.from_numpy(self.natural)
        worse = (metrics - natural) / natural.abs().clamp_min(1e-12)
        return worse * torch.from_numpy(np.where(self.weights < 0, -1.0, 1.0))

    def penalised(self, metrics: Tensor) -> Tensor:
        """(R, M) → (R,) the score, and steeply more beyond the guards."""
        return self.score(metrics) + STEEP * self.beyond(metrics).sum(-1)

    def scores(self, metrics: Floats, penalised: bool = False) -> Floats:
        """The same without a gradient: (R, M) → (R,)."""
        given = torch.from_numpy(np.asarray(metrics, np.float64))
        return (self.penalised(given) if penalised else self.score(given)).numpy()

    @property
    def plain(self) -> bool:
        """Whether it is the mean of all metrics, and no more."""
        alike = bool((self.weights == self.weights[0]).all() and self.weights[0] > 0)
        return self.reduce == "mean" and alike and not np.isfinite(self.guard).any()


def objective(
    options: Options, names: Sequence[str], natural: Floats, counted: Sequence[str] | None = None
) -> Objective:
    """The objective over the metrics (M,) of these names, of which natural has these values; where
    no weights are given those of `counted` count alike, and without it all.

    Raises KeyError with the name of a metric that is not there, ValueError where none counts."""
    alike = dict.fromkeys(names if counted is None else counted, 1.0)
    asked = alike if options.metrics is None else options.metrics
    guards = options.guard or {}
    for name in (*asked, *guards):
        if name not in names:
            raise KeyError(name)
    weights = np.array([asked.get(name, 0.0) for name in names])
    if not weights.any():
        raise ValueError("every weight is 0")
    guard = np.array([guards.get(name, np.inf) for name in names])
    return Objective(options.reduce, weights, natural, guard)
