"""Guards against a run by hand, and that intervals hold what noise makes."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from doremi_train.methods import guards
from doremi_train.methods.guards import Noise
from doremi_train.methods.objective import Options, objective


def test_the_noise_is_that_of_runs_on_one_mixture_pooled() -> None:
    points = np.array([[0.5, 0.5], [0.2, 0.8], [0.5, 0.5], [0.2, 0.8], [0.2, 0.8], [1.0, 0.0]])
    metrics = np.array([[1.0], [2.0], [1.2], [2.3], [2.6], [7.0]])
    found = guards.noise(points, metrics, metrics + 9)
    # 0.1² + 0.1² of the first mixture, 0.3² + 0.3² of the second, and 1 + 2 degrees of freedom.
    assert found.freedom == 3 and found.deviation == pytest.approx([math.sqrt(0.2 / 3)])


def test_without_repeated_runs_it_is_what_fits_leave() -> None:
    points, metrics = np.array([[0.5, 0.5], [0.2, 0.8]]), np.array([[1.0, 4.0], [2.0, 4.0]])
    found = guards.noise(points, metrics, metrics + np.array([[0.3, 0.0], [-0.4, 0.1]]))
    assert found.freedom == 2
    assert_allclose(found.deviation, [math.sqrt(0.25 / 2), math.sqrt(0.01 / 2)])


def test_what_is_lost_by_hand() -> None:
    options = Options(metrics={"accuracy": -1.0}, guard={"loss": 0.01})
    wanted = objective(options, ["loss", "accuracy"], np.array([2.0, 0.5]))
    noise = Noise(np.array([0.02, 0.01]), 4)
    held = guards.held(wanted, np.array([2.1, 0.6]), noise, 2)
    assert_allclose(held.lost, [0.05, -0.2])  # of an accuracy more is a gain
    half = stats.t.ppf(0.975, 4) * math.sqrt(1.5) * np.array([0.01, 0.02])
    assert_allclose(held.low, held.lost - half)
    assert_allclose(held.high, held.lost + half)


@pytest.mark.parametrize("naturals", [1, 3])
def test_intervals_hold_the_truth_as_often_as_they_say(naturals: int) -> None:
    random, held = np.random.default_rng(0), []
    for _ in range(2000):
        natural = 3.0 + 0.05 * random.standard_normal(naturals).mean()
        wanted = objective(Options(guard={"loss": 0.01}), ["loss"], np.array([natural]))
        repeated = 3.5 + 0.05 * random.standard_normal((4, 1))
        noise = guards.noise(np.full((4, 2), 0.5), repeated, repeated)
        found = guards.held(wanted, 3.3 + 0.05 * random.standard_normal(1), noise, naturals)
        held.append(bool(found.low[0] <= 0.1 <= found.high[0]))
    assert 0.93 < np.mean(held) < 0.97
