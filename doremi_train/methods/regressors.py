"""Regressors of a swarm: losses of K domains from mixtures of V."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import scipy

from doremi_train.methods.box import Floats


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
    solved = np.array([_log_linear(points, column) for column in losses.T])  # (M, 1 + K)
    return LogLinear(solved[:, 0], solved[:, 1:])


def _log_linear(points: Floats, losses: Floats) -> Floats:
    """(N, K), (N,) → c and t (K,) in one. Residuals are in units of the losses' spread; those
    beyond a tenth of it hardly count (Cauchy), since a run that went wrong must not bend the
    others."""
    lowest, spread = losses.min(), max(1.4826 * scipy.stats.median_abs_deviation(losses), 1e-9)
    domains = points.shape[1]
    # Holds t of a domain that no run shows at the others' mean.
    ridge = 1e-3 * (np.eye(domains) - 1 / domains)

    def above(x: Floats) -> Floats:
        return np.exp(np.minimum(points @ x[1:], 50))  # a trial step may go far

    def residuals(x: Floats) -> Floats:
        return np.concatenate([(x[0] + above(x) - losses) / spread, ridge @ x[1:]])

    def jacobian(x: Floats) -> Floats:
        slopes = above(x)[:, None] * points / spread
        return np.block(
            [[np.full((len(points), 1), 1 / spread), slopes], [np.zeros((domains, 1)), ridge]]
        )

    tried = []
    # Of c below the lowest loss; for a given c, log(L − c) is linear in p.
    for gap in (
        0.1,
        1.0,
        10.0,
    ):
        floor = np.clip(lowest - gap * spread, 0.01 * lowest, lowest - 1e-3 * spread)
        rows = np.vstack([points, 0.1 * (np.eye(domains) - 1 / domains)])
        start = scipy.linalg.lstsq(
            rows, np.concatenate([np.log(losses - floor), np.zeros(domains)])
        )[0]
        lower, upper = np.full(1 + domains, -np.inf), np.full(1 + domains, np.inf)
        lower[0], upper[0] = 0, lowest  # a loss is never below 0
        tried.append(
            scipy.optimize.least_squares(
                residuals,
                [floor, *start],
                jacobian,
                (lower, upper),
                loss="cauchy",
                f_scale=0.1,
                max_nfev=200,
            )
        )
    return min(tried, key=lambda result: result.cost).x


def lightgbm(points: Floats, losses: Floats) -> Separate:
    """Boosted trees with RegMix's rate and number; leaves of 3 runs, for there are tens of them and
    not hundreds."""
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
    """A squared exponential of the Hellinger distance, with noise: length and noise by maximum
    likelihood."""
    return Separate([_gaussian_process(points, column) for column in losses.T])


def _gaussian_process(points: Floats, losses: Floats) -> Callable[[Floats], Floats]:
    roots, mean = np.sqrt(points), losses.mean()

    def kernel(others: Floats, length: float) -> Floats:
        squares = ((np.sqrt(others)[:, None] - roots) ** 2).sum(-1)
        return np.exp(-squares / (2 * length**2))

    def factor(logs: Floats) -> tuple[Floats, bool]:
        length, noise = np.exp(logs)
        return scipy.linalg.cho_factor(
            kernel(points, length) + (noise + 1e-10) * np.eye(len(points))
        )

    def cost(logs: Floats) -> float:
        """−2 log likelihood, at the variance that suits it best."""
        cholesky = factor(logs)
        variance = (losses - mean) @ scipy.linalg.cho_solve(cholesky, losses - mean) / len(losses)
        return len(losses) * np.log(max(variance, 1e-300)) + 2 * np.log(np.diag(cholesky[0])).sum()

    bounds = [(np.log(0.05), np.log(20)), (np.log(1e-6), np.log(10))]
    starts = [np.log([length, noise]) for length in (0.3, 1.0, 3.0) for noise in (1e-4, 1e-1)]
    best = min(
        (scipy.optimize.minimize(cost, s, bounds=bounds, method="L-BFGS-B") for s in starts),
        key=lambda r: r.fun,
    ).x
    weights = scipy.linalg.cho_solve(factor(best), losses - mean)
    return lambda others: mean + kernel(others, np.exp(best[0])) @ weights


REGRESSORS: dict[str, Callable[[Floats, Floats], Fit]] = {
    "log_linear": log_linear,
    "lightgbm": lightgbm,
    "gaussian_process": gaussian_process,
}
"""Fits of one loss that falls with the part of the first domain, asked about a mixture between:

>>> import numpy as np
>>> from doremi_train.methods.regressors import REGRESSORS
>>> part = np.linspace(0, 1, 9)
>>> points = np.stack([part, 1 - part], axis=1)  # (N, K) mixtures of nine runs
>>> losses = 2 + np.exp(-part[:, None])  # (N, M) nats
>>> for name in ("log_linear", "gaussian_process"):
...     fit = REGRESSORS[name](points, losses)
...     print(name, fit.predict(np.array([[0.3, 0.7]])).round(2).tolist())
log_linear [[2.74]]
gaussian_process [[2.74]]
"""
