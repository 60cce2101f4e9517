"""Best mixture within caps, of any differentiable objective of what a fit predicts.

From several starts at once exponentiated gradients, with steps that shrink: they stay in the
simplex, and kinks, as of the worst of several losses, do not stop them. Sequential least squares
then sharpen the best.

K domains, M losses, S starts.
"""

from collections.abc import Callable

import numpy as np
import scipy
import torch
from torch import Tensor

from doremi_train.methods import box
from doremi_train.methods.box import Box, Floats
from doremi_train.methods.fits import Smooth

STARTS = 8  # drawn, beside the given mixture and uniform
STEPS = np.geomspace(1.0, 1e-3, 300)  # in log weights, of what is worth about the mean

Cost = Callable[[Tensor], Tensor]


def optimum(
    fit: Smooth,
    objective: Cost,
    within: Box,
    prior: Floats,
    kl: float,
    generator: np.random.Generator,
) -> Floats:
    """(K,) argmin objective(L(p)) + λ KL(p‖prior) within the box; `objective` is of losses (…, M) →
    (…), and `prior` (K,) above 0."""
    log = torch.from_numpy(np.log(prior))

    def cost(points: Tensor) -> Tensor:
        pull = (points * (points.clamp_min(1e-300).log() - log)).sum(-1)
        return objective(fit.losses(points)) + kl * pull

    drawn = generator.dirichlet(np.ones(len(prior)), STARTS)
    return minimise(cost, within, np.vstack([prior, np.full(len(prior), 1 / len(prior)), drawn]))


def minimise(cost: Cost, within: Box, starts: Floats) -> Floats:
    """(K,) the mixture of least cost (…, K) → (…) within the box, from mixtures (S, K)."""
    points = box.project(starts, within)
    best, lowest = points, np.full(len(points), np.inf)
    for step in STEPS:
        value, slope = _slope(cost, points)
        better = value < lowest
        best, lowest = np.where(better[:, None], points, best), np.where(better, value, lowest)
        slope = slope - (points * slope).sum(1, keepdims=True)
        worth = (points * np.abs(slope)).sum(1, keepdims=True) + 1e-300
        # A domain near 0 may have a slope without bounds: no weight moves by more than the step.
        points = box.project(points * np.exp(-step * np.clip(slope / worth, -1, 1)), within)
    return _sharpened(cost, within, best[lowest.argmin()])


def _slope(cost: Cost, points: Floats) -> tuple[Floats, Floats]:
    """Costs and their gradients at mixtures (S, K)."""
    given = torch.from_numpy(points).requires_grad_()
    value = cost(given)
    (slope,) = torch.autograd.grad(value.sum(), given)
    return value.detach().numpy(), slope.numpy()


def _sharpened(cost: Cost, within: Box, point: Floats) -> Floats:
    """The point (K,), or what is below it nearby."""

    def both(tried: Floats) -> tuple[float, Floats]:
        value, slope = _slope(cost, np.clip(tried, *within)[None])
        return float(value[0]), slope[0]

    found = scipy.optimize.minimize(
        both, point, jac=True, method="SLSQP", bounds=list(zip(*within, strict=True)),
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-14, "maxiter": 200},
    ).x  # fmt: skip
    if not np.isfinite(found).all():
        return point
    found = box.project(np.clip(found, *within), within)
    return found if both(found)[0] < both(point)[0] else point
