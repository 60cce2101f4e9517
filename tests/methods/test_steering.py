"""Steering by a law: against scipy's solvers, as far as it goes, within caps; effects and their
intervals."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy
import torch
from helpers.laws import truth
from numpy.testing import assert_allclose

from doremi_train.methods import steering
from doremi_train.methods.box import Box, Floats
from doremi_train.methods.fits import Known
from doremi_train.methods.saturating import Saturating
from doremi_train.methods.steering import Curves, steer, steerable, wish


def law(random: np.random.Generator, domains: int, metrics: int) -> Saturating:
    """Any law, half of them with harm."""
    passes = np.exp(random.normal(1, 1, domains))
    knee = random.choice([np.inf, 0.0, 1.5], metrics)
    helped = random.exponential(1, (metrics, domains)) * (random.random((metrics, domains)) < 0.6)
    harmed = random.exponential(0.1, (metrics, domains)) * (knee < np.inf)[:, None]
    parts = (
        passes, random.normal(2, 1, metrics), random.normal(0, 0.5, metrics),
        random.choice([0.3, 1.0, 4.0], metrics), random.choice([0.35, 0.6, 1.0], metrics), knee,
        helped, harmed,
    )  # fmt: skip
    return Saturating(*(torch.from_numpy(np.asarray(part, np.float64)) for part in parts))


def oracle(
    cost: Callable[[Floats], tuple[float, Floats]],
    limited: Callable[[Floats], tuple[Floats, Floats]],
    starts: list[Floats],
    within: Box,
) -> Floats | None:
    """(K,) the least cost that SLSQP finds from several starts, where `limited` is at most 0."""
    best, least = None, np.inf
    for start in starts:
        found = scipy.optimize.minimize(
            cost, start, jac=True, method="SLSQP",
            bounds=list(zip(within.low + 1e-12, within.high, strict=True)),
            constraints=[
                {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
                {
                    "type": "ineq",
                    "fun": lambda w: -limited(w)[0],
                    "jac": lambda w: -limited(w)[1],
                },
            ],
            options={"maxiter": 500, "ftol": 1e-13},
        ).x  # fmt: skip
        kept = limited(found)[0].max(initial=0) < 1e-7 and abs(found.sum() - 1) < 1e-8
        if kept and cost(found)[0] < least:
            best, least = found, cost(found)[0]
    return best


class Case:
    """A law, a start and a wish drawn at random."""

    def __init__(self, seed: int, asked: float) -> None:
        random = np.random.default_rng(seed)
        domains, metrics = int(random.integers(2, 20)), int(random.integers(1, 8))
        self.law = law(random, domains, metrics)
        self.start = random.dirichlet(np.ones(domains))
        high = np.minimum(np.maximum(1.5 * self.start, random.random(domains)), 1)
        self.within = Box(np.zeros(domains), high)
        self.now = self.law.predict(self.start[None])[0]
        self.metric = int(random.integers(metrics))
        better = np.zeros(metrics)
        better[self.metric] = asked * (self.now - self.law.floor.numpy())[self.metric]
        self.held = random.random(metrics) < 0.7
        self.wish = wish(self.now, better, self.held, 0.005)
        self.starts = [0.9 * self.start + 0.1 * random.dirichlet(np.ones(domains)) for _ in "123"]
        self.mixture = steer(self.law, self.start, self.wish, self.within)

    def over(self, counted: Floats) -> Callable[[Floats], tuple[Floats, Floats]]:
        """What log gaps of some metrics are beyond their targets, and slopes."""
        curves = Curves.of(self.law, counted)
        floor = self.law.floor.numpy()[counted]
        limit = np.log(self.wish.target[counted] - floor)

        def both(w: Floats) -> tuple[Floats, Floats]:
            local = curves.at(np.maximum(w, 1e-13))
            return local.value - limit, local.slope

        return both

    def moved(self, w: Floats) -> tuple[float, Floats]:
        return float(((w - self.start) ** 2).sum() / 2), w - self.start


@pytest.mark.parametrize("asked", [0.01, 0.05])
@pytest.mark.parametrize("seed", range(12))
def test_it_is_what_sequential_least_squares_find(seed: int, asked: float) -> None:
    case = Case(seed, asked)
    counted = np.flatnonzero(np.isfinite(case.wish.target))
    found = oracle(case.moved, case.over(counted), [*case.starts, case.mixture], case.within)
    if found is None:
        pytest.skip("SLSQP finds no mixture that grants the wish")
    assert case.over(counted)(case.mixture)[0].max() < 1e-7
    assert_allclose(case.mixture, found, atol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_what_cannot_be_granted_goes_as_far_as_it_goes(seed: int) -> None:
    case = Case(seed, 0.999)
    assert case.mixture.sum() == pytest.approx(1, abs=1e-9)
    held = np.flatnonzero(case.held & (np.arange(len(case.now)) != case.metric))
    curve = Curves.of(case.law, np.array([case.metric]))

    def cost(w: Floats) -> tuple[float, Floats]:
        local = curve.at(np.maximum(w, 1e-13))
        return float(local.value[0]), local.slope[0]

    assert case.over(held)(case.mixture)[0].max(initial=0) < 1e-6
    found = oracle(cost, case.over(held), case.starts, case.within)
    if found is not None:
        assert cost(case.mixture)[0] < cost(found)[0] + 1e-4


def test_nothing_asked_moves_nothing_also_on_the_walls() -> None:
    random = np.random.default_rng(0)
    given, start = law(random, 6, 3), np.array([0.5, 0.3, 0.2, 0, 0, 0])
    within = Box(np.zeros(6), np.array([0.5, 1, 1, 1, 0, 1e-3]))
    now = given.predict(start[None])[0]
    for held in (np.ones(3, bool), np.zeros(3, bool)):
        found = steer(given, start, wish(now, np.zeros(3), held, 0.0), within)
        assert np.array_equal(found, start)
    found = steer(given, start, wish(now, np.array([1e-4, 0, 0]), held, 0.0), within)
    assert_allclose(found, start, atol=1e-2)
    assert (found <= within.high).all() and found[4] == 0


def test_random_wishes_end_within_the_box() -> None:
    for seed in range(200):
        case = Case(1000 + seed, float(np.random.default_rng(seed).choice([0.0, 0.2, 0.9])))
        assert np.isfinite(case.mixture).all() and abs(case.mixture.sum() - 1) < 1e-9
        assert (case.mixture >= 0).all() and (case.mixture <= case.within.high).all()


def test_curves_are_the_law_and_its_derivatives() -> None:
    given, w = law(np.random.default_rng(3), 5, 6), np.full(5, 0.2)
    local = Curves.of(given, np.arange(6)).at(w)
    gap = (given.losses(torch.from_numpy(w)) - given.floor).log()
    assert_allclose(local.value, gap, rtol=1e-12)

    def log(point: torch.Tensor) -> torch.Tensor:
        return (given.losses(point) - given.floor).log()

    point = torch.from_numpy(w)
    assert_allclose(local.slope, torch.autograd.functional.jacobian(log, point), atol=1e-10)
    for metric in range(6):
        second = torch.autograd.functional.hessian(lambda p, m=metric: log(p)[m], point)
        assert_allclose(np.diag(local.bend[metric]), second, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_the_front_goes_from_one_best_to_the_other(seed: int) -> None:
    case = Case(seed + 20, 0.1)
    given = law(np.random.default_rng(seed), len(case.start), 2)
    found = given.predict(steering.front(given, case.start, (0, 1), case.within, 7))
    first, second = found.T
    assert (np.diff(first) > -1e-6).all() and (np.diff(second) < 1e-6).all()
    ends = [steering.best(given, case.start, m, case.within) for m in (0, 1)]
    assert_allclose(first[0], given.predict(ends[0][None])[0, 0], atol=1e-4)
    assert_allclose(second[-1], given.predict(ends[1][None])[0, 1], atol=1e-4)
    draws = np.random.default_rng(1).dirichlet(np.ones(len(case.start)), 4000)
    draws = given.predict(draws[(draws <= case.within.high).all(1)])
    for point in found:  # nothing drawn is better in both
        assert not (draws < point - 1e-4).all(1).any()


# ── Effects ─────────────────────────────────────────────────────────────────────────


def test_an_effect_is_what_one_percent_does() -> None:
    points = np.random.default_rng(0).dirichlet(np.ones(5), 60)
    given = steerable(points, truth(points, np.ones(5), np.inf).predict(points), np.zeros(3, bool))
    start = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
    moved = np.append(0.99 * start[:4], 0.01)  # the others give in proportion
    expected = given.law.predict(moved[None])[0] - given.law.predict(start[None])[0]
    assert_allclose(steering.effects(given, start).change[4], expected, atol=1e-12)
    alone = steering.effects(given, np.eye(5)[0])
    assert_allclose(alone.change[0], 0, atol=1e-12)  # there is no more to get


def test_where_more_is_better_the_law_is_of_what_is_below_0() -> None:
    points = np.random.default_rng(0).dirichlet(np.ones(5), 40)
    losses = truth(points, np.ones(5), np.inf).predict(points)
    some = np.array([False, True, False])
    plain = steerable(points, losses, np.zeros(3, bool))
    turned = steerable(points, losses * np.where(some, -1, 1), some)
    assert_allclose(turned.law.predict(points), plain.law.predict(points))


@pytest.mark.slow
def test_metrics_that_are_missing_in_runs_are_fitted_to_the_others() -> None:
    points = np.random.default_rng(0).dirichlet(np.ones(5), 40)
    losses = truth(points, np.ones(5), np.inf).predict(points)
    holes = losses.copy()
    holes[:9, 1] = np.nan
    found = steerable(points, holes, np.zeros(3, bool)).law
    alone = steerable(points[9:], losses[9:, 1:2], np.zeros(1, bool)).law
    assert_allclose(found.predict(points)[:, 1], alone.predict(points)[:, 0])
    both = steerable(points, losses[:, [0, 2]], np.zeros(2, bool)).law
    assert_allclose(found.predict(points)[:, [0, 2]], both.predict(points))


@pytest.mark.slow
def test_intervals_hold_most_of_the_true_effects() -> None:
    held, start = [], np.full(5, 0.2)
    for seed in range(3):
        random = np.random.default_rng(seed)
        points = random.dirichlet(np.ones(5), 40)
        true = truth(points, np.ones(5), np.inf)
        noisy = true.predict(points) + 0.02 * random.standard_normal((40, 3))
        found = steering.effects(steerable(points, noisy, np.zeros(3, bool), Known()), start)
        exact = steering._changes(true, start)
        held.append(np.abs(found.change - exact) <= found.half)
    assert 0.8 < np.mean(held) <= 1
    few = steerable(np.full((1, 5), 0.2), np.ones((1, 2)), np.zeros(2, bool))
    assert np.isinf(steering.effects(few, start).half).all()
