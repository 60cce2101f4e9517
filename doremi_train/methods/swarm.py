"""Swarm regression: many small runs, a fit of each validation loss, the best mixture under caps.

RegMix (Liu et al. 2024, https://arxiv.org/abs/2407.01492), data mixing laws (Ye et al. 2024,
https://arxiv.org/abs/2403.16952), rounds as in CLIMB (Diao et al. 2025, https://arxiv.org/abs/2504.13161):
  1. mixtures from Dirichlet(√prior · s), s log-spaced from 0.1 to 5, within caps; the caller trains a run on each;
  2. each loss fitted by itself, L_j(p) = c_j + k_j exp(t_jᵀ p) or trees or a Gaussian process, and only then averaged;
  3. p* = argmin mean_j L_j(p) + λ KL(p‖prior), low ≤ p ≤ high, Σ p = 1: convex for the exponential form, else the mean
     of the best of many simulated mixtures;
  4. what the fits say of runs that they have not seen tells whether to believe them, and how far: gates, an interval.
The caller trains p* as well, and takes it only where it does what was predicted.

K domains, N runs, M losses in nats per token, R mixtures. Arrays are float64; a mixture is a row that sums to 1.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import scipy  # each part is imported when it is first used
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from doremi_train.config import STRICT, Fraction, NonNegativeFloat, Positive

Floats = NDArray[np.float64]

STRENGTHS = (0.1, 5.0)  # of the Dirichlet: from one domain alone to all of them
RUNS_PER_DOMAIN = 3  # with which the exponential form ranks mixtures well
SIMULATED = 100_000
BEST = 128  # simulated mixtures that are averaged
FOLDS = 10
LEAST_SPEARMAN = 0.5  # below, out of fold, a fit is no guide


@dataclass(frozen=True, config=STRICT)
class Options:
    regressor: Literal["log_linear", "lightgbm", "gaussian_process"] = "log_linear"
    runs: Positive | None = None  # drawn in every round, beside the anchors; null: 3 for each domain
    kl: NonNegativeFloat = 0.05  # λ: nats of loss per nat of KL(p‖prior)
    floor: Fraction = 0.0  # least weight of a domain


# ── Where mixtures may be ───────────────────────────────────────────────────────────


class Box(NamedTuple):
    """Mixtures p with low ≤ p ≤ high."""

    low: Floats  # (K,)
    high: Floats  # (K,)


def box(sizes: Floats, budget: float, max_epochs: float, floor: float, key: str = "swarm.floor") -> Box:
    """At most `max_epochs` passes over each of `sizes` (K,) tokens in a run of `budget` tokens, and at least `floor`
    where the cap leaves it.

    Raises ValueError where no mixture is within; `key` is the floor's.
    """
    high = np.minimum(max_epochs * sizes / budget, 1.0)
    low = np.minimum(floor, high)
    if high.sum() < 1:
        raise ValueError(
            f"a budget of {budget:.3g} tokens is more than mixture.max_epochs={max_epochs:g} epochs of all "
            f"{sizes.sum():.3g} tokens; raise it, or train for fewer tokens"
        )
    if low.sum() > 1:
        raise ValueError(f"{key}={floor:g} for {len(sizes)} domains is more than all; allowed: at most 1 / domains")
    return Box(low, high)


def project(points: Floats, within: Box) -> Floats:
    """(…, K) → the mixtures in the box that are nearest in KL divergence, clip(s · point, low, high) with the s that
    makes the sum 1: what a cap takes away goes to the others in proportion."""
    positive = np.maximum(points / points.max(-1, keepdims=True), 1e-280)
    lowest = np.full((*points.shape[:-1], 1), -700.0)  # of log s
    highest = -lowest
    for _ in range(64):  # bisection to the last bit
        middle = (lowest + highest) / 2
        above = np.clip(np.exp(middle) * positive, *within).sum(-1, keepdims=True) > 1
        lowest, highest = np.where(above, lowest, middle), np.where(above, middle, highest)
    return np.clip(np.exp(lowest) * positive, *within)


def on_grid(point: Floats, within: Box) -> Floats:
    """The mixture (K,) in multiples of 2⁻⁴⁵ with a sum of exactly 1: it reads back from any file as the same bits, and
    has the same address on machines whose last bits differ."""
    units = np.floor(point * 2.0**45)
    short = round(2.0**45 - units.sum())
    units[np.argsort(point - within.high, kind="stable")[:short]] += 1  # where there is most room below the cap
    return units * 2.0**-45


def inside(point: Floats, within: Box) -> bool:
    """Whether a mixture (K,) keeps caps and floors, to 1e-12."""
    return bool((point >= within.low - 1e-12).all() and (point <= within.high + 1e-12).all())


def distance(a: Floats, b: Floats) -> Floats:
    """Total variation ½ Σ |a − b| over the last axis."""
    return np.abs(a - b).sum(-1) / 2


def divergence(points: Floats, prior: Floats) -> Floats:
    """KL(p‖prior) of (…, K) mixtures, in nats."""
    return (points * np.log(np.maximum(points, 1e-300) / prior)).sum(-1)


class Space(NamedTuple):
    """Mixtures of V virtual domains, each a frozen mixture of domains: after some were added, dropped or split, what
    did not change is one of them, and the others are themselves (Olmix)."""

    spread: Floats  # (V, K) rows are mixtures, no domain is in two

    def expand(self, points: Floats) -> Floats:
        """(…, V) → (…, K)."""
        return points @ self.spread

    def reduce(self, points: Floats) -> Floats:
        """(…, K) → (…, V)."""
        return points @ (self.spread > 0).T.astype(float)

    def holds(self, point: Floats) -> bool:
        """Whether a mixture (K,) keeps what is frozen."""
        return bool(distance(self.expand(self.reduce(point)), point) < 1e-9)

    def box(self, within: Box) -> Box:
        """Of the virtual domains, so that every domain is in its own."""
        inside = self.spread > 0
        ratio = np.where(inside, self.spread, 1)
        low = np.where(inside, within.low / ratio, 0).max(1)
        high = np.where(inside, within.high / ratio, np.inf).min(1)
        if (low > high).any() or low.sum() > 1 or high.sum() < 1:
            raise ValueError("what swarm.frozen keeps together does not fit within mixture.max_epochs and swarm.floor")
        return Box(low, np.minimum(high, 1))


def space(frozen: Floats) -> Space:
    """`frozen` (K,) is the relative weight of the domains that keep their proportions, and 0 for the others."""
    kept = frozen > 0
    rows = np.eye(len(frozen))[~kept]
    return Space(np.vstack([frozen / frozen.sum(), rows]) if kept.any() else rows)


# ── Design ──────────────────────────────────────────────────────────────────────────


def design(prior: Floats, within: Box, count: int, generator: np.random.Generator) -> Floats:
    """(N, K) mixtures from sparse to even, within the box."""
    strengths = np.geomspace(*STRENGTHS, count) if count > 1 else np.ones(1)
    drawn = generator.standard_gamma(strengths[:, None] * np.sqrt(prior)) + 1e-300 * prior  # never all 0
    # A trace of the prior, so that what a cap takes from the only domain has somewhere to go.
    return project((1 - 1e-6) * drawn / drawn.sum(1, keepdims=True) + 1e-6 * prior, within)


def explore(fit: "Fit", prior: Floats, within: Box, kl: float, count: int, generator: np.random.Generator) -> Floats:
    """(N, K) of a further round: from the simulated mixtures that the fit takes for the best."""
    best = _best_simulated(fit, prior, within, kl, max(BEST, count), generator)
    return best[generator.permutation(len(best))[:count]]


# ── Fits ────────────────────────────────────────────────────────────────────────────


class Fit(Protocol):
    """What was learned from N runs."""

    def predict(self, points: Floats) -> Floats:
        """(R, K) → (R, M)."""


class LogLinear(NamedTuple):
    """L_j(p) = c_j + exp(t_jᵀ p). Since Σ p = 1, log k_j is a constant in every entry of t_j."""

    floor: Floats  # (M,) c
    slope: Floats  # (M, K) t

    def predict(self, points: Floats) -> Floats:
        return self.floor + np.exp(points @ self.slope.T)

    def gradient(self, point: Floats) -> Floats:
        """(K,) of the mean over losses."""
        return np.exp(self.slope @ point) @ self.slope / len(self.floor)


class Separate(NamedTuple):
    """A predictor (R, K) → (R,) for each loss."""

    losses: Sequence[Callable[[Floats], Floats]]

    def predict(self, points: Floats) -> Floats:
        return np.stack([predict(points) for predict in self.losses], axis=1)


def log_linear(points: Floats, losses: Floats) -> LogLinear:
    """Robust least squares from several starts: (N, K), (N, M) → c, t."""
    found = np.array([_log_linear(points, column) for column in losses.T])  # (M, 1 + K)
    return LogLinear(found[:, 0], found[:, 1:])


def _log_linear(points: Floats, losses: Floats) -> Floats:
    """(N, K), (N,) → c and t (K,) in one. Residuals are in units of the losses' spread; those beyond a tenth of it
    hardly count (Cauchy), since a run that went wrong must not bend the others."""
    lowest, spread = losses.min(), max(1.4826 * scipy.stats.median_abs_deviation(losses), 1e-9)
    domains = points.shape[1]
    ridge = 1e-3 * (np.eye(domains) - 1 / domains)  # holds t of a domain that no run shows at the others' mean

    def above(x: Floats) -> Floats:
        return np.exp(np.minimum(points @ x[1:], 50))  # a trial step may go far

    def residuals(x: Floats) -> Floats:
        return np.concatenate([(x[0] + above(x) - losses) / spread, ridge @ x[1:]])

    def jacobian(x: Floats) -> Floats:
        slopes = above(x)[:, None] * points / spread
        return np.block([[np.full((len(points), 1), 1 / spread), slopes], [np.zeros((domains, 1)), ridge]])

    tried = []
    for gap in (0.1, 1.0, 10.0):  # of c below the lowest loss; for a given c, log(L − c) is linear in p
        floor = np.clip(lowest - gap * spread, 0.01 * lowest, lowest - 1e-3 * spread)
        rows = np.vstack([points, 0.1 * (np.eye(domains) - 1 / domains)])
        start = scipy.linalg.lstsq(rows, np.concatenate([np.log(losses - floor), np.zeros(domains)]))[0]
        lower, upper = np.full(1 + domains, -np.inf), np.full(1 + domains, np.inf)
        lower[0], upper[0] = 0, lowest  # a loss is never below 0
        tried.append(
            scipy.optimize.least_squares(
                residuals, [floor, *start], jacobian, (lower, upper), loss="cauchy", f_scale=0.1, max_nfev=200
            )
        )
    return min(tried, key=lambda result: result.cost).x


def lightgbm(points: Floats, losses: Floats) -> Separate:
    """Boosted trees with RegMix's rate and number; leaves of 3 runs, for there are tens of them and not hundreds."""
    return Separate([_lightgbm(points, column) for column in losses.T])


def _lightgbm(points: Floats, losses: Floats) -> Callable[[Floats], Floats]:
    import lightgbm as trees

    options = {
        "learning_rate": 0.01, "num_leaves": 8, "min_data_in_leaf": 3, "num_threads": 1, "seed": 0,
        "deterministic": True, "force_row_wise": True, "verbosity": -1,
    }  # fmt: skip
    fitted = trees.train(options, trees.Dataset(points, losses), num_boost_round=1000)
    return lambda others: np.asarray(fitted.predict(others), dtype=np.float64)


def gaussian_process(points: Floats, losses: Floats) -> Separate:
    """A squared exponential of the Hellinger distance, with noise: length and noise by maximum likelihood."""
    return Separate([_gaussian_process(points, column) for column in losses.T])


def _gaussian_process(points: Floats, losses: Floats) -> Callable[[Floats], Floats]:
    roots, mean = np.sqrt(points), losses.mean()

    def kernel(others: Floats, length: float) -> Floats:
        squares = ((np.sqrt(others)[:, None] - roots) ** 2).sum(-1)
        return np.exp(-squares / (2 * length**2))

    def factor(logs: Floats) -> tuple[Floats, bool]:
        length, noise = np.exp(logs)
        return scipy.linalg.cho_factor(kernel(points, length) + (noise + 1e-10) * np.eye(len(points)))

    def cost(logs: Floats) -> float:
        """−2 log likelihood, at the variance that suits it best."""
        cholesky = factor(logs)
        variance = (losses - mean) @ scipy.linalg.cho_solve(cholesky, losses - mean) / len(losses)
        return len(losses) * np.log(max(variance, 1e-300)) + 2 * np.log(np.diag(cholesky[0])).sum()

    bounds = [(np.log(0.05), np.log(20)), (np.log(1e-6), np.log(10))]
    starts = [np.log([length, noise]) for length in (0.3, 1.0, 3.0) for noise in (1e-4, 1e-1)]
    best = min(
        (scipy.optimize.minimize(cost, s, bounds=bounds, method="L-BFGS-B") for s in starts), key=lambda r: r.fun
    ).x
    weights = scipy.linalg.cho_solve(factor(best), losses - mean)
    return lambda others: mean + kernel(others, np.exp(best[0])) @ weights


REGRESSORS: dict[str, Callable[[Floats, Floats], Fit]] = {
    "log_linear": log_linear,
    "lightgbm": lightgbm,
    "gaussian_process": gaussian_process,
}


# ── Optimum ─────────────────────────────────────────────────────────────────────────


def solve(fit: Fit, prior: Floats, within: Box, kl: float, generator: np.random.Generator) -> Floats:
    """(K,) the mixture of least mean loss + λ KL(p‖prior) within the box."""
    if isinstance(fit, LogLinear):
        return _convex(fit, prior, within, kl)
    return _best_simulated(fit, prior, within, kl, BEST, generator).mean(0)


def _convex(fit: LogLinear, prior: Floats, within: Box, kl: float) -> Floats:
    """Mirror descent: each step minimises the linearised loss + λ KL(p‖prior) + KL(p‖here) / step, in closed form."""
    point, step = project(prior, within), 1.0
    for _ in range(10_000):
        gradient, here = fit.gradient(point), np.log(np.maximum(point, 1e-300))
        while True:
            log = (here / step + kl * np.log(prior) - gradient) / (1 / step + kl)
            following = project(np.exp(log - log.max()), within)
            moved, turned = following - point, np.log(np.maximum(following, 1e-300)) - here
            # The loss bends no more than KL / step does: in differences, which rounding leaves alone.
            if moved @ (fit.gradient(following) - gradient) <= moved @ turned / step:
                break
            step /= 2
        if distance(following, point) < 1e-11:
            return following
        point, step = following, 1.5 * step
    return point


def _best_simulated(
    fit: Fit, prior: Floats, within: Box, kl: float, count: int, generator: np.random.Generator
) -> Floats:
    """(count, K) of simulated mixtures, best first."""
    simulated = design(prior, within, SIMULATED, generator)
    score = fit.predict(simulated).mean(1) + kl * divergence(simulated, prior)
    return simulated[np.argsort(score, kind="stable")[:count]]


# ── Trust ───────────────────────────────────────────────────────────────────────────


def out_of_fold(points: Floats, losses: Floats, regressor: str, generator: np.random.Generator) -> Floats:
    """(N, M) what fits to the other runs predict for each."""
    predicted = np.empty_like(losses)
    for fold in np.array_split(generator.permutation(len(points)), min(FOLDS, len(points))):
        others = np.setdiff1d(np.arange(len(points)), fold)
        predicted[fold] = REGRESSORS[regressor](points[others], losses[others]).predict(points[fold])
    return predicted


class Diagnostics(NamedTuple):
    """Of mean losses out of fold."""

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
    """95 % Student-t interval of the mean loss of a new run, from the errors (N,) out of fold of the half of the runs
    that is nearest; `near` (N,) is their distance from it. Errors at far corners say little about it."""
    half = errors[np.argsort(near, kind="stable")[: max(len(near) // 2, min(len(near), 8))]]
    width = float(scipy.stats.t.ppf(0.975, len(half)) * np.sqrt((half**2).mean() * (1 + 1 / len(half))))
    return predicted - width, predicted + width


def gates(found: Diagnostics, point: Floats, points: Floats) -> list[str]:
    """Why a proposal (K,) of a fit to runs on `points` (N, K) is not to be believed; empty where it may be."""
    between = distance(points[:, None], points)
    lonely = (between + np.diag(np.full(len(points), np.inf))).min(1).max()
    nearest = distance(points, point).min()
    refused = []
    if found.spearman < LEAST_SPEARMAN:
        refused.append(f"out of fold the fit ranks runs with a Spearman correlation of {found.spearman:.2f} only")
    if found.regret_at_1 > found.blind_regret:
        refused.append(
            f"the run that the fit would choose is {found.regret_at_1:.4f} nats per token above the best, and an "
            f"average run only {found.blind_regret:.4f}"
        )
    if nearest > lonely:
        refused.append(f"it is farther from every run ({nearest:.2f}) than any run is from its nearest ({lonely:.2f})")
    return refused


def confirm(realised: float, between: tuple[float, float]) -> list[str]:
    """Why a proposal is refused once it was trained. A loss below the interval is a surprise, but no reason."""
    if realised <= between[1]:
        return []
    return [f"it reached {realised:.4f} nats per token, above the {between[0]:.4f} to {between[1]:.4f} predicted"]
