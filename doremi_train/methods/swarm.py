"""Swarm regression: many small runs, a fit of each validation loss, the best mixture under caps.

RegMix (Liu et al. 2024, https://arxiv.org/abs/2407.01492), data mixing laws (Ye et al. 2024,
https://arxiv.org/abs/2403.16952), rounds as in CLIMB (Diao et al. 2025, https://arxiv.org/abs/2504.13161):
  1. mixtures from Dirichlet(√prior · s), s log-spaced from 0.1 to 5, within caps; the caller trains
     a run on each;
  2. each loss fitted by itself, L_j(p) = c_j + k_j exp(t_jᵀ p) or trees or a Gaussian process, and
     only then averaged;
  3. p* = argmin mean_j L_j(p) + λ KL(p‖prior), low ≤ p ≤ high, Σ p = 1: convex for the exponential
     form, else the mean of the best of many simulated mixtures;
  4. what the fits say of runs that they have not seen tells whether to believe them, and how far:
     gates, an interval.
The caller trains p* as well, and takes it only where it does what was predicted.

K domains, N runs, M losses in nats per token, R mixtures. Arrays are float64; a mixture is a row
that sums to 1.
"""

from typing import Annotated, Literal, NamedTuple

import numpy as np
import scipy  # each part is imported when it is first used
from annotated_types import Gt, Le
from pydantic.dataclasses import dataclass
from torch import Tensor

from doremi_train.config import STRICT, Fraction, NonNegativeFloat
from doremi_train.methods import box, regressors
from doremi_train.methods.box import Box, Floats
from doremi_train.methods.corrected import Corrected
from doremi_train.methods.fits import UNKNOWN, Fit, Known
from doremi_train.methods.objective import Objective
from doremi_train.methods.optimum import optimum
from doremi_train.methods.regressors import LogLinear
from doremi_train.methods.saturating import Saturating

STRENGTHS = (0.1, 5.0)  # of the Dirichlet: from one domain alone to all of them
RUNS_PER_DOMAIN = 3  # with which the exponential form ranks mixtures well
SIMULATED = 100_000
BEST = 128  # simulated mixtures that are averaged
FOLDS = 10
LEAST_SPEARMAN = 0.5  # below, out of fold, a fit is no guide


@dataclass(frozen=True, config=STRICT)
class Options:
    regressor: Literal["log_linear", "lightgbm", "gaussian_process", "saturating", "corrected"] = (
        "saturating"
    )
    """What fits the loss of each domain."""

    design: Literal["random", "optimal"] = "random"
    """How the mixtures of the first round are drawn: at random from sparse to even, or those of
    many that tell most about the law (D-optimal)."""

    runs: Annotated[int, Gt(0), Le(1_000_000)] | None = None
    """Runs drawn in every round, beside natural and uniform; null: 3 for each domain."""

    kl: NonNegativeFloat = 0.05
    """Pull λ towards the prior, in nats of loss per nat of KL(p‖prior)."""

    floor: Fraction = 0.0
    """Least weight of a domain."""


# ── Design ──────────────────────────────────────────────────────────────────────────


def design(prior: Floats, within: Box, count: int, generator: np.random.Generator) -> Floats:
    """(N, K) mixtures from sparse to even, within the box."""
    strengths = np.geomspace(*STRENGTHS, count) if count > 1 else np.ones(1)
    # Never all 0.
    drawn = generator.standard_gamma(strengths[:, None] * np.sqrt(prior)) + 1e-300 * prior
    # A trace of the prior, so that what a cap takes from the only domain has somewhere to go.
    return box.project((1 - 1e-6) * drawn / drawn.sum(1, keepdims=True) + 1e-6 * prior, within)


def explore(
    fit: "Fit", prior: Floats, within: Box, kl: float, count: int, generator: np.random.Generator
) -> Floats:
    """(N, K) of a further round: from the simulated mixtures that the fit takes for the best."""
    best = _best_simulated(fit, prior, within, kl, max(BEST, count), generator)
    return best[generator.permutation(len(best))[:count]]


class Judged(NamedTuple):
    """A fit whose metrics are judged by one figure of them."""

    fit: Fit
    wanted: Objective

    def predict(self, points: Floats) -> Floats:
        """(R, K) → (R, 1)."""
        return self.wanted.scores(self.fit.predict(points), penalised=True)[:, None]


# ── Optimum ─────────────────────────────────────────────────────────────────────────


def solve(
    fit: Fit, prior: Floats, within: Box, kl: float, generator: np.random.Generator
) -> Floats:
    """(K,) the mixture of least mean loss + λ KL(p‖prior) within the box."""
    if isinstance(fit, LogLinear):
        return _convex(fit, prior, within, kl)
    bare = fit.fit if isinstance(fit, Judged) else fit
    if isinstance(bare, Saturating | Corrected):
        cost = fit.wanted.penalised if isinstance(fit, Judged) else _mean
        return optimum(bare, cost, within, np.maximum(prior, 1e-9), kl, generator)
    return _best_simulated(fit, prior, within, kl, BEST, generator).mean(0)


def _mean(losses: Tensor) -> Tensor:
    return losses.mean(-1)


def _convex(fit: LogLinear, prior: Floats, within: Box, kl: float) -> Floats:
    """Mirror descent: each step minimises the linearised loss + λ KL(p‖prior) + KL(p‖here) / step,
    in closed form."""
    point, step = box.project(prior, within), 1.0
    for _ in range(10_000):
        gradient, here = fit.gradient(point), np.log(np.maximum(point, 1e-300))
        while True:
            log = (here / step + kl * np.log(prior) - gradient) / (1 / step + kl)
            following = box.project(np.exp(log - log.max()), within)
            moved, turned = following - point, np.log(np.maximum(following, 1e-300)) - here
            # The loss bends no more than KL / step does: in differences, which rounding leaves
            # alone.
            if moved @ (fit.gradient(following) - gradient) <= moved @ turned / step:
                break
            step /= 2
        if box.distance(following, point) < 1e-11:
            return following
        point, step = following, 1.5 * step
    return point


def _best_simulated(
    fit: Fit, prior: Floats, within: Box, kl: float, count: int, generator: np.random.Generator
) -> Floats:
    """(count, K) of simulated mixtures, best first."""
    simulated = design(prior, within, SIMULATED, generator)
    score = fit.predict(simulated).mean(1) + kl * box.divergence(simulated, prior)
    return simulated[np.argsort(score, kind="stable")[:count]]


# ── Trust ───────────────────────────────────────────────────────────────────────────


def out_of_fold(
    points: Floats,
    losses: Floats,
    regressor: str,
    generator: np.random.Generator,
    known: Known = UNKNOWN,
) -> Floats:
    """(N, M) what fits to the other runs predict for each; runs on one mixture are left out
    together."""
    predicted, fold = np.empty_like(losses), np.empty(len(points), int)
    parts = np.array_split(generator.permutation(len(points)), min(FOLDS, len(points)))
    for number, part in enumerate(parts):
        fold[part] = number
    _, first, same = np.unique(points, axis=0, return_index=True, return_inverse=True)
    fold = fold[first[same.ravel()]]
    for number in np.unique(fold):
        out = fold == number
        fit = regressors.REGRESSORS[regressor](points[~out], losses[~out], known)
        predicted[out] = fit.predict(points[out])
    return predicted


class Diagnostics(NamedTuple):
    """What mean losses out of fold say of a fit."""

    spearman: float  # rank correlation of predicted and realised
    regret_at_1: float  # nats per token: what choosing by the fit costs against the best run
    blind_regret: float  # what choosing blindly would cost on average
    optimism: float  # realised − predicted of the run that the fit would choose


def diagnose(predicted: Floats, realised: Floats) -> Diagnostics:
    """Mean losses (N,) of runs, out of fold and realised."""
    chosen, best = int(predicted.argmin()), realised.min()
    alike = np.ptp(predicted) == 0 or np.ptp(realised) == 0
    return Diagnostics(
        spearman=0.0 if alike else float(scipy.stats.spearmanr(predicted, realised).statistic),
        regret_at_1=float(realised[chosen] - best),
        blind_regret=float(realised.mean() - best),
        optimism=float(realised[chosen] - predicted[chosen]),
    )


def interval(predicted: float, near: Floats, errors: Floats) -> tuple[float, float]:
    """95 % Student-t interval of the mean loss of a new run, from the errors (N,) out of fold of
    the half of the runs that is nearest; `near` (N,) is their distance from it. Errors at far
    corners say little about it."""
    half = errors[np.argsort(near, kind="stable")[: max(len(near) // 2, min(len(near), 8))]]
    width = float(
        scipy.stats.t.ppf(0.975, len(half)) * np.sqrt((half**2).mean() * (1 + 1 / len(half)))
    )
    return predicted - width, predicted + width


def gates(
    trust: Diagnostics, point: Floats, points: Floats, unit: str = "nats per token"
) -> list[str]:
    """Why a proposal (K,) of a fit to runs on `points` (N, K) is not to be believed; empty where it
    may be."""
    between = box.distance(points[:, None], points)
    lonely = (between + np.diag(np.full(len(points), np.inf))).min(1).max()
    nearest = box.distance(points, point).min()
    refused = []
    if trust.spearman < LEAST_SPEARMAN:
        refused.append(
            f"out of fold the fit ranks runs with a Spearman correlation of {trust.spearman:.2f} "
            "only"
        )
    if trust.regret_at_1 > trust.blind_regret:
        refused.append(
            f"the run that the fit would choose is {trust.regret_at_1:.4f} {unit} above "
            f"the best, and an average run only {trust.blind_regret:.4f}"
        )
    if nearest > lonely:
        refused.append(
            f"it is farther from every run ({nearest:.2f}) than any run is from its nearest "
            f"({lonely:.2f})"
        )
    return refused


def confirm(
    realised: float, between: tuple[float, float], unit: str = "nats per token"
) -> list[str]:
    """Why a proposal is refused once it was trained. A loss below the interval is a surprise, but
    no reason."""
    if realised <= between[1]:
        return []
    return [
        f"it reached {realised:.4f} {unit}, above the {between[0]:.4f} to "
        f"{between[1]:.4f} predicted"
    ]
