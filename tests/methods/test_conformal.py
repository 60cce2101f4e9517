"""Intervals of predictions: what they promise on noise, and on RegMix's unseen mixtures."""

import numpy as np
import pytest
from helpers import regmix
from numpy.testing import assert_allclose

from doremi_train.methods import conformal, swarm
from doremi_train.methods.box import Floats
from doremi_train.methods.saturating import saturating


def noisy(count: int, seed: int) -> tuple[Floats, Floats]:
    """Predictions and losses of two metrics, with errors as √(L − 2) and of other sizes."""
    random = np.random.default_rng(seed)
    predicted = 2.0 + 0.2 * np.log(2) + random.exponential(1.0, (count, 2))
    error = random.standard_normal((count, 2)) * [0.01, 0.2] * np.sqrt(predicted - 2)
    return predicted, predicted + error


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_they_hold_as_often_as_they_say_for_low_and_for_high_losses(level: float) -> None:
    found = conformal.intervals(*noisy(1000, 0))
    predicted, losses = noisy(20_000, 1)
    held = np.abs(losses - predicted) <= found.half(predicted, level)
    assert_allclose(held.mean(0), level, atol=0.02)
    low = predicted < np.median(predicted, axis=0)
    assert_allclose([held[low].mean(), held[~low].mean()], level, atol=0.03)
    narrow, wide = found.half(predicted, level).mean(0)
    assert 15 < wide / narrow < 25


def test_by_hand() -> None:
    unseen, losses = np.array([[1.0], [2.0], [4.0]]), np.array([[1.1], [1.8], [4.3]])
    found = conformal.intervals(unseen, losses)
    assert_allclose([found.low, found.least], [[0.8], [0.2]])
    scaled = np.array([0.1, 0.2, 0.3]) / np.sqrt([0.2, 1.2, 3.2])
    expected = np.quantile(scaled, 0.9) * np.sqrt([3.0, 0.2])
    assert_allclose(found.half(np.array([[3.8], [0.1]]), 0.9)[:, 0], expected, rtol=1e-6)


def test_runs_that_are_all_alike_give_a_width_of_nothing() -> None:
    same = np.full((5, 1), 3.0)
    assert conformal.intervals(same, same).half(same, 0.95).max() < 1e-6


@regmix.needed
@pytest.mark.parametrize(
    ("size", "count", "seed"),
    [
        ("1m", 34, 0),
        *(
            pytest.param(size, count, seed, marks=pytest.mark.acceptance)
            for size, counts in {"1m": (34, 102, 256), "60m": (34, 102, 180)}.items()
            for count in counts
            for seed in range(3)
        ),
    ],
)
def test_95_percent_hold_90_to_98_of_regmix_s_losses(size: str, count: int, seed: int) -> None:
    """Of 60M there are 256 runs: those that are not fitted are predicted."""
    if size == "1m":
        seen, unseen = regmix.runs("train", size).draw(count, seed), regmix.runs("test", size)
    else:
        every = regmix.runs("test", size).draw(256, seed)
        seen, unseen = (
            regmix.Runs(*(part[rows] for part in every))
            for rows in (slice(count), slice(count, None))
        )
    apart = swarm.out_of_fold(*seen, "saturating", np.random.default_rng(seed))
    found = conformal.intervals(apart, seen.losses)
    predicted = saturating(*seen).predict(unseen.points)
    held = np.abs(unseen.losses - predicted) <= found.half(predicted, 0.95)
    assert 0.90 <= held.mean() <= 0.98
