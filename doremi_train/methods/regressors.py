"""Regressors of a swarm: losses of K domains from mixtures of V."""

from typing import NamedTuple

import numpy as np
import scipy

from doremi_train.methods.box import Floats
from doremi_train.methods.corrected import corrected
from doremi_train.methods.fits import UNKNOWN, Known, Regressor
from doremi_train.methods.process import gaussian_process
from doremi_train.methods.saturating import saturating
from doremi_train.methods.trees import lightgbm


class LogLinear(NamedTuple):
    """L_j(p) = c_j + exp(t_jᵀ p). Since Σ p = 1, log k_j is a constant in every entry of t_j."""

    floor: Floats  # (M,) c
    slope: Floats  # (M, K) t

    def predict(self, points: Floats) -> Floats:
        return self.floor + np.exp(points @ self.slope.T)

    def gradient(self, point: Floats) -> Floats:
        """(K,) of the mean over losses."""
        return np.exp(self.slope @ point) @ self.slope / len(self.floor)


def log_linear(points: Floats, losses: Floats, known: Known = UNKNOWN) -> LogLinear:
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


REGRESSORS: dict[str, Regressor] = {
    "log_linear": log_linear,
    "lightgbm": lightgbm,
    "gaussian_process": gaussian_process,
    "saturating": saturating,
    "corrected": corrected,
}
"""Fits of one loss that falls with the part of the first domain, asked about a mixture between:

>>> import numpy as np
>>> from doremi_train.methods.regressors import REGRESSORS
>>> part = np.linspace(0, 1, 9)
>>> points = np.stack([part, 1 - part], axis=1)  # (N, K) mixtures of nine runs
>>> losses = 2 + np.exp(-part[:, None])  # (N, M) nats
>>> for name in ("log_linear", "gaussian_process", "saturating"):
...     fit = REGRESSORS[name](points, losses)
...     print(name, fit.predict(np.array([[0.3, 0.7]])).round(2).tolist())
log_linear [[2.74]]
gaussian_process [[2.74]]
saturating [[2.74]]
"""
