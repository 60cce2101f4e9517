"""What a mixture is for: which figures it is to lower, and which it must not spoil.

A figure is one of M metrics, and less is better; where more is better, as of an accuracy, its
weight is below 0. `mean` is Σ w_m L_m / Σ |w_m|; `worst` is max_m w_m L_m of those that count. Both
ask for metrics of one unit, or for standardised ones, t_m = (L_m − L_m(natural)) / s_m, clipped at
±10, where s_m is the larger of two standard deviations: of the runs on natural, and of replicates
pooled over mixtures (marin's mixprior, https://github.com/marin-community/marin). A guard says what
part of its value with natural a metric may lose at most.

M metrics, R mixtures.
"""

import re
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass
from torch import Tensor

from doremi_train.config import STRICT, Fraction
from doremi_train.methods.box import Floats

STEEP = 1e3  # of what is lost beyond a guard, against the score
CLIP = 10.0  # standard deviations beyond which a standardised metric counts no more
# Words in names of scores of which more is better, and those that say otherwise.
_MORE = (
    r"acc|accuracy|exact_match|em|f1|mcc|auc|auroc|bleu|rouge[l\d]*|recall|precision|pass@\d+|"
    r"win_?rate"
)
_LESS = r"loss|nll|nats|bpb|bits_per_byte|ppl|perplexity|error|stderr"


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

    standardise: bool = False
    """Whether metrics count in standard deviations from natural, clipped at 10, so that those of
    different scales are one figure; runs on the same mixture say what these are."""

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
    more: NDArray[np.bool_]  # (M,) where more is better
    unit: str = "nats per token"  # of the score, for messages
    scale: Floats | None = None  # (M,) of standardised metrics; None: they are as they are
    clip: float = CLIP

    def score(self, metrics: Tensor) -> Tensor:
        """(R, M) → (R,) in float64, with a gradient."""
        weights = torch.from_numpy(self.weights)
        if self.scale is not None:
            apart = metrics - torch.from_numpy(self.natural)
            metrics = (apart / torch.from_numpy(self.scale)).clamp(-self.clip, self.clip)
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
        return worse * torch.from_numpy(self.turn)

    def penalised(self, metrics: Tensor) -> Tensor:
        """(R, M) → (R,) the score, and steeply more beyond the guards."""
        return self.score(metrics) + STEEP * self.beyond(metrics).sum(-1)

    def scores(self, metrics: Floats, penalised: bool = False) -> Floats:
        """The same without a gradient: (R, M) → (R,)."""
        given = torch.from_numpy(np.asarray(metrics, np.float64))
        return (self.penalised(given) if penalised else self.score(given)).numpy()

    @property
    def turn(self) -> Floats:
        """(M,) −1 where more is better, and 1 elsewhere: what laws of losses are to be given."""
        return np.where(self.more, -1.0, 1.0)

    def turned(self) -> "Objective":
        """The same figure of metrics times `turn`, of all of which less is better."""
        turn, nowhere = self.turn, np.zeros_like(self.more)
        return self._replace(weights=self.weights * turn, natural=self.natural * turn, more=nowhere)

    @property
    def plain(self) -> bool:
        """Whether it is the mean of all metrics, and no more."""
        alike = bool((self.weights == self.weights[0]).all() and self.weights[0] > 0)
        bare = self.scale is None and not np.isfinite(self.guard).any()
        return self.reduce == "mean" and alike and bare


def higher(name: str) -> bool:
    """Whether the name of a score says that more of it is better, as of an accuracy.

    >>> [higher(name) for name in ("arc_easy/acc", "hellaswag_acc_norm", "code", "acc_loss")]
    [True, True, False, False]
    """
    return _says(_MORE, name) and not _says(_LESS, name)


def _says(words: str, name: str) -> bool:
    return re.search(rf"(?<![a-z])({words})(?![a-z\d])", name.lower()) is not None


def objective(
    options: Options,
    names: Sequence[str],
    natural: Floats,
    counted: Sequence[str] | None = None,
    scores: Collection[str] = (),
) -> Objective:
    """The objective over the metrics (M,) of these names, of which natural has these values; where
    no weights are given those of `counted` count alike, and without it all. Of `scores` the names
    say whether more is better. Metrics are as they are until they are `standardised`.

    Raises KeyError with the name of a metric that is not there, ValueError where none counts, or a
    weight asks for less of what more is better of."""
    upwards = {name for name in scores if higher(name)}
    alike = {n: -1.0 if n in upwards else 1.0 for n in (names if counted is None else counted)}
    asked = alike if options.metrics is None else options.metrics
    guards = options.guard or {}
    for name in (*asked, *guards):
        if name not in names:
            raise KeyError(name)
    wrong = next((name for name, weight in asked.items() if weight > 0 and name in upwards), None)
    if wrong is not None:
        raise ValueError(
            f"{wrong} is something of which more is better, by its name, and a weight above 0 asks "
            "for less; give one below 0, or another name"
        )
    weights = np.array([asked.get(name, 0.0) for name in names])
    if not weights.any():
        raise ValueError("every weight is 0; give one that counts")
    guard = np.array([guards.get(name, np.inf) for name in names])
    named = np.array([name in upwards for name in names], bool)
    more = np.where(weights == 0, named, weights < 0)
    return Objective(options.reduce, weights, natural, guard, more)


def standardised(wanted: Objective, names: Sequence[str], scale: Floats) -> Objective:
    """The same of standardised metrics, whose scales are (M,). Raises ValueError naming a metric
    that counts and has none."""
    for name, size, weight in zip(names, scale.tolist(), wanted.weights.tolist(), strict=True):
        if weight and not size > 0:
            lacks = "is the same in all" if size == 0 else "is not known of two"
            raise ValueError(f"{name} {lacks} runs on the same mixture, which its scale is made of")
    # What does not count may have none.
    known = np.where(wanted.weights == 0, 1.0, scale)
    return wanted._replace(scale=known, unit="standard deviations")
