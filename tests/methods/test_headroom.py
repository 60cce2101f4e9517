"""Headroom: the gain of a known law with its interval, what natural's curve makes of it, and
RegMix's public runs."""

import numpy as np
import pytest
from helpers import laws, regmix

from doremi_train.methods import design, headroom
from doremi_train.methods.box import Box, Floats
from doremi_train.methods.fits import Known
from doremi_train.methods.headroom import Gain, Lowest, Runs
from doremi_train.methods.objective import Objective
from doremi_train.methods.optimum import minimise
from doremi_train.methods.saturating import Saturating, saturating

NATURAL = np.array([0.1, 0.5, 0.3, 0.1])
BOX = Box(np.zeros(4), np.array([0.8, 1.0, 1.0, 0.4]))
TOKENS = np.array([1.0, 2.0, 4.0, 8.0])


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def mean_of(weights: Floats) -> Objective:
    many = len(weights)
    return Objective("mean", weights, np.ones(many), np.full(many, np.inf), weights < 0)


def planted(runs: int, noise: float, seed: int = 0) -> tuple[Saturating, Runs]:
    true = laws.truth(random().dirichlet(np.ones(4), 30), np.ones(4), np.inf)
    points = design.design(NATURAL, BOX, runs, np.random.default_rng(seed), replicates=1)
    losses = true.predict(points)
    return true, Runs(points, losses + noise * np.random.default_rng(seed).normal(size=(runs, 3)))


# ── The gain ────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_the_interval_holds_the_gain_of_a_known_law() -> None:
    noise, wanted = 0.003, mean_of(np.array([1.0, 0.0, 0.0]))
    true, seen = planted(10, noise)
    starts = np.vstack([NATURAL, random().dirichlet(np.ones(4), 8)])
    optimum = minimise(lambda points: wanted.score(true.losses(points)), BOX, starts)
    natural, lowest = wanted.scores(true.predict(np.stack([NATURAL, optimum])))
    best = headroom.lowest(seen, Known(natural=NATURAL), BOX, wanted, random())
    found = headroom.gain(float(wanted.scores(seen.metrics[:1])[0]), best, noise)
    assert 0 < found.low <= natural - lowest <= found.high
    assert abs(found.mean - (natural - lowest)) < 0.2 * (natural - lowest)
    assert (best.mixture <= BOX.high + 1e-9).all() and best.mixture.sum() == pytest.approx(1)


def test_what_can_be_gained_of_an_accuracy_is_what_of_its_loss_can() -> None:
    _, seen = planted(3, 0.003)
    losses = Runs(seen.points, seen.metrics[:, :1])
    rising = Runs(seen.points, 2 - seen.metrics[:, :1])
    less, more = (
        headroom.lowest(runs, Known(natural=NATURAL), BOX, mean_of(np.array([weight])), random())
        for runs, weight in ((losses, 1.0), (rising, -1.0))
    )
    assert more.mixture == pytest.approx(less.mixture, abs=1e-6)
    assert (more.score, more.half) == pytest.approx((less.score - 2, less.half), abs=1e-6)
    assert more.seen == pytest.approx(less.seen - 2)


def test_of_too_few_runs_there_is_no_interval_and_no_verdict() -> None:
    _, seen = planted(3, 0.0)
    best = headroom.lowest(seen, Known(natural=NATURAL), BOX, mean_of(np.ones(3)), random())
    found = headroom.gain(2.01, best, 0.1)
    assert best.half == found.high == np.inf
    speed = headroom.speed_up(TOKENS, 2 + TOKENS**-0.5, found)
    assert speed is not None and speed.high == np.inf
    assert headroom.worth([(speed.low - 1) * 1e9, np.inf], 1e12) is None


def test_what_a_run_reached_bounds_the_gain_less_its_luck() -> None:
    best = Lowest(NATURAL, score=2.9, half=1.0, seen=2.5, tried=1)
    assert headroom.gain(3.0, best, 0.0) == pytest.approx(Gain(0.5, 0.5, 1.1))
    lucky = headroom.gain(3.0, best._replace(tried=20), 0.1)
    assert lucky.low == pytest.approx(0.5 - 3.0233 * np.hypot(0.1, 0.1), abs=1e-4)
    own = headroom.gain(3.0, best._replace(seen=np.inf, half=0.3), 0.2, runs=4)
    assert own.high == pytest.approx(0.1 + np.hypot(0.3, 1.95996 * 0.1), abs=1e-4)
    assert own.low == 0 > headroom.gain(3.0, best._replace(seen=np.inf), 0, inside=False).low


# ── What it is worth ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("floor", "scale", "power"), [(2, 1, 0.3), (1.5, 0.5, 0.8), (0, 3, 0.1)])
def test_the_speed_up_is_that_of_the_curve(floor: float, scale: float, power: float) -> None:
    scores, gained = floor + scale * TOKENS**-power, 0.1
    left = scale * 8**-power
    exact = (left / (left - gained)) ** (1 / power) if left > gained else np.inf
    found = headroom.speed_up(TOKENS, scores, Gain(gained, 0.0, 100.0))
    assert found is not None and found.low == pytest.approx(1)
    assert found.mean == pytest.approx(exact, rel=0.03) and found.high == np.inf


def test_a_curve_that_says_nothing_gives_no_speed_up() -> None:
    gained = Gain(0.1, 0.0, 0.2)
    assert headroom.speed_up(TOKENS, np.full(4, 2.0), gained) is None
    assert headroom.speed_up(TOKENS, 2 + 0.1 * TOKENS, gained) is None
    assert headroom.speed_up(TOKENS[:2], 2 + TOKENS[:2] ** -0.5, gained) is None


def test_a_swarm_is_worth_it_where_both_ends_are_above_its_cost() -> None:
    assert headroom.worth([2.0, 9.0], 1.0) is True
    assert headroom.worth([0.0, 1.0], 1.0) is False
    assert headroom.worth([0.5, 9.0], 1.0) is None


# ── Public runs ─────────────────────────────────────────────────────────────────────


@regmix.needed
@pytest.mark.acceptance
@pytest.mark.parametrize(("counted", "count"), [(range(13), 9), ([8], 17)], ids=["mean", "pile_cc"])
def test_intervals_of_a_few_public_runs_hold_what_768_say(counted: list[int], count: int) -> None:
    """Runs of a design among 200, and natural and uniform as the fit to all says."""
    train, test = regmix.runs("train", "1m"), regmix.runs("test", "1m")
    points = np.vstack([train.points, test.points])
    within, natural = Box(np.zeros(17), points.max(0)), train.points.mean(0)
    known, wanted = Known(natural=natural), mean_of(np.isin(np.arange(13), counted).astype(float))
    judge = saturating(points, np.vstack([train.losses, test.losses]), known)
    anchors = np.stack([natural, np.full(17, 1 / 17)])
    pool = random().permutation(512)[:200]
    chosen = pool[design.choose(train.points[pool], count, within, random(), anchors)]
    runs = Runs(
        np.vstack([anchors, train.points[chosen]]),
        np.vstack([judge.predict(anchors), train.losses[chosen]]),
    )
    starts = np.vstack([anchors, random().dirichlet(np.ones(17), 8)])
    optimum = minimise(lambda mixed: wanted.score(judge.losses(mixed)), within, starts)
    uniform, lowest = wanted.scores(judge.predict(np.stack([anchors[1], optimum])))
    found = headroom.gain(
        float(uniform), headroom.lowest(runs, known, within, wanted, random()), 0.0
    )
    assert 0 < found.low <= uniform - lowest <= found.high
    assert abs(found.mean - (uniform - lowest)) < 0.15
