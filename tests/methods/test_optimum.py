"""Optimum of a fit within caps, against a naive solver, on kinks, and from where nothing is."""

import numpy as np
import pytest
import torch
from helpers.laws import truth
from numpy.testing import assert_allclose
from scipy.optimize import minimize
from torch import Tensor

from doremi_train.methods import box, optimum
from doremi_train.methods.box import Box, Floats
from doremi_train.methods.saturating import Saturating, saturating

K, M = 5, 4
FREE = Box(np.zeros(K), np.ones(K))
CAPPED = Box(np.full(K, 0.02), np.array([0.3, 1.0, 0.25, 1.0, 0.5]))
OBJECTIVES = {
    "mean": lambda losses: losses.mean(-1),
    "worst": lambda losses: losses.max(-1).values,
    "weighted": lambda losses: losses @ torch.tensor([0.5, 0.1, 0.0, 0.4], dtype=torch.float64),
}


def law(seed: int, harm: float = 0.0) -> Saturating:
    random = np.random.default_rng(seed)
    return Saturating(
        *(torch.from_numpy(part) for part in (
            random.uniform(1, 8, K), random.uniform(1.5, 2.5, M), random.uniform(0.5, 1.5, M),
            random.choice([0.3, 1.0, 4.0], M), random.choice([0.6, 1.0], M), np.full(M, 1.5),
            random.uniform(0, 2, (M, K)) + 2 * np.eye(M, K),
            harm * random.uniform(0, 0.3, (M, K)),
        ))
    )  # fmt: skip


def naive(cost: object, within: Box) -> float:
    """Least cost of fifty tries of scipy's, without gradients."""

    def value(point: Floats) -> float:
        return float(cost(torch.from_numpy(np.clip(point, 0, 1))[None]))  # type: ignore[operator]

    starts = box.project(np.random.default_rng(1).dirichlet(np.ones(K), 10), within)
    return min(
        minimize(
            value, start, bounds=list(zip(*within, strict=True)), method="SLSQP",
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1}, options={"ftol": 1e-12},
        ).fun
        for start in starts
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("within", [FREE, CAPPED], ids=["free", "capped"])
@pytest.mark.parametrize("harm", [0.0, 3.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_optimum_is_as_low_as_a_naive_solver_s(name: str, harm: float, within: Box) -> None:
    fit, prior = law(len(name), harm), np.full(K, 1 / K)

    def cost(points: Tensor) -> Tensor:
        pull = (points * (points.clamp_min(1e-300) * K).log()).sum(-1)
        return OBJECTIVES[name](fit.losses(points)) + 0.01 * pull

    found = optimum.optimum(fit, OBJECTIVES[name], within, prior, 0.01, np.random.default_rng(0))
    assert abs(found.sum() - 1) < 1e-12 and box.inside(found, within)
    assert float(cost(torch.from_numpy(found)[None])) < naive(cost, within) + 2e-5


def test_the_known_optimum_is_recovered_from_runs() -> None:
    points = np.random.default_rng(3).dirichlet(np.full(K, 0.7), 80)
    true, prior = truth(points, np.ones(K), np.inf), np.full(K, 1 / K)
    fit = saturating(points, true.predict(points))
    best, found = (
        optimum.optimum(one, OBJECTIVES["mean"], FREE, prior, 0.0, np.random.default_rng(0))
        for one in (true, fit)
    )
    assert box.distance(best, found) < 0.02
    value = true.predict(np.stack([best, found, prior])).mean(1)
    assert value[0] <= value[1] < value[0] + 0.01 * (value[2] - value[0])


def test_a_corner_and_a_cap_are_reached() -> None:
    def cost(points: Tensor) -> Tensor:
        return points @ torch.arange(K, dtype=torch.float64)

    starts = np.full((1, K), 1 / K)
    assert_allclose(optimum.minimise(cost, FREE, starts), np.eye(K)[0], atol=1e-9)
    assert_allclose(
        optimum.minimise(cost, CAPPED, starts), [0.3, 0.64, 0.02, 0.02, 0.02], atol=1e-9
    )
