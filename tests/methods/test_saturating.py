"""The saturating law: recovered where it is true, as its formula by hand, and what it ranks of
RegMix's runs."""

import numpy as np
import pytest
import torch
from helpers import regmix
from helpers.laws import truth
from numpy.testing import assert_allclose
from scipy.stats import spearmanr

from doremi_train.methods import saturating as law
from doremi_train.methods.box import Floats
from doremi_train.methods.fits import Known
from doremi_train.methods.saturating import Saturating, saturating

PASSES = np.array([1.0, 3.0, 10.0, 2.0, 6.0])  # D / n


def mixtures(count: int, seed: int) -> Floats:
    return np.random.default_rng(seed).dirichlet(np.full(5, 0.7), count)


def test_the_formula_by_hand() -> None:
    floor, constant, rate, power, knee = given = 2.0, 1.0, 4.0, 0.6, 1.5
    parts = [[2.0, 10.0], *([each] for each in given), [[0.5, 0.0]], [[0.0, 0.1]]]
    one = Saturating(*(torch.tensor(part, dtype=torch.float64) for part in parts))
    w = np.array([0.3, 0.7])
    e = w * [2, 10]
    exponent = constant - 0.5 * (1 - np.exp(-((rate * e[0]) ** power)))
    exponent += 0.1 * np.log1p(np.exp(np.log(1 + e[1]) - knee)) ** 2
    assert_allclose(one.predict(w[None]), [[floor + np.exp(exponent)]], rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_without_harm_parameters_and_order_are_recovered(seed: int) -> None:
    points, test = mixtures(60, seed), mixtures(500, 99)
    true = truth(points, np.ones(5), np.inf, seed)
    found = saturating(points, true.predict(points))
    assert found.rate.tolist() == true.rate.tolist() and found.power.tolist() == [0.6] * 3
    assert_allclose(found.floor, true.floor, rtol=1e-3)
    assert_allclose(found.help, true.help, rtol=0.02, atol=0.02)
    assert_allclose(found.predict(test), true.predict(test), atol=0.01)
    for one, other in zip(found.predict(test).T, true.predict(test).T, strict=True):
        assert spearmanr(one, other).statistic > 0.9999


def test_harm_of_repetition_is_recovered_from_exposures() -> None:
    points, test = mixtures(80, 1), mixtures(500, 99)
    true = truth(points, PASSES, 1.5)
    found = saturating(points, true.predict(points), Known(passes=PASSES))
    assert found.knee.tolist() == [1.5] * 3
    # Of the domain with most passes, in the loss whose floor is found.
    assert_allclose(found.harm[0, 2], true.harm[0, 2], rtol=0.02)
    for one, other in zip(found.predict(test).T, true.predict(test).T, strict=True):
        assert spearmanr(one, other).statistic > 0.998
    # Whoever takes weights for exposures sees less.
    blind = saturating(points, true.predict(points)).predict(test)
    error = [np.abs(p - true.predict(test)).mean() for p in (found.predict(test), blind)]
    assert 3 * error[0] < error[1]


def test_the_unit_of_passes_changes_nothing_without_harm() -> None:
    """A trillion tokens of which a run reads a millionth are fitted as well."""
    points, test = mixtures(40, 4), mixtures(100, 99)
    losses = truth(points, PASSES, np.inf).predict(points)
    found = [saturating(points, losses, Known(passes=PASSES * unit)) for unit in (1, 1e-6)]
    assert_allclose(found[1].rate, found[0].rate * 1e6, rtol=1e-12)
    assert_allclose(found[1].predict(test), found[0].predict(test), rtol=1e-3)


def test_noise_of_real_runs_costs_little() -> None:
    points, test = mixtures(30, 2), mixtures(500, 99)
    true = truth(points, np.ones(5), np.inf)
    noise = 0.01 * np.random.default_rng(0).standard_normal((30, 3))
    found = saturating(points, true.predict(points) + noise)
    both = found.predict(test).mean(1), true.predict(test).mean(1)
    assert spearmanr(*both).statistic > 0.97


@pytest.mark.parametrize("knee", [np.inf, 1.5])
def test_the_gradient_is_that_of_differences(knee: float) -> None:
    points = mixtures(8, 3)
    true = truth(points, PASSES, knee)
    assert torch.autograd.gradcheck(true.losses, torch.from_numpy(points).requires_grad_())
    corner = torch.eye(5, dtype=torch.float64).requires_grad_()
    true.losses(corner).sum().backward()
    assert torch.isfinite(corner.grad).all()


def test_natural_sets_the_floor_s_unit_where_it_was_run() -> None:
    points = mixtures(20, 4)
    losses = truth(points, np.ones(5), np.inf).predict(points)
    points[:2], losses[0], losses[1] = 0.2, 4.0, 4.2  # natural, twice
    found = law._logs(points, losses, Known(natural=np.full(5, 0.2)))
    low = losses.min(0)
    assert_allclose(low - found.floor.reshape(-1, 3)[5], np.maximum(4.1 - low, 0.3 / 2**0.5))
    noisy = law._logs(points, losses, Known())
    assert_allclose(
        low - noisy.floor.reshape(-1, 3)[5],
        np.maximum(np.median(losses, axis=0) - low, 3 * 0.2 / 2**0.5),
    )


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_or_equal_runs_give_a_finite_law(count: int) -> None:
    points = mixtures(count, 5)
    losses = np.full((count, 2), 3.0)
    assert_allclose(saturating(points, losses).predict(mixtures(9, 6)), 3.0, atol=1e-3)
    losses += points[:, :2]
    assert np.isfinite(saturating(points, losses).predict(mixtures(9, 6))).all()


def test_what_is_solved_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    points = mixtures(30, 7)
    losses = truth(points, PASSES, 1.5).predict(points)
    whole = saturating(points, losses)
    monkeypatch.setattr(law, "NUMBERS", 1)
    for one, other in zip(saturating(points, losses), whole, strict=True):
        assert_allclose(one, other, rtol=1e-6, atol=1e-9)


# ── RegMix's runs ───────────────────────────────────────────────────────────────────


@regmix.needed
def test_34_of_regmix_s_runs_rank_256_unseen_mixtures() -> None:
    found = regmix.on_unseen(saturating, 34, 0)
    assert found["1m"].spearman > 0.96 and found["1m"].single > 0.95
    assert found["60m"].spearman > 0.93


@regmix.needed
@pytest.mark.acceptance
def test_the_law_ranks_regmix_s_runs() -> None:
    """Three draws each of two, six and thirty runs a domain."""
    for count, least in {34: (0.96, 0.87, 0.93, 0.87), 102: (0.97, 0.89, 0.94, 0.89)}.items():
        found = [regmix.on_unseen(saturating, count, seed) for seed in range(3)]
        mean = [
            float(np.mean([getattr(one[size], figure) for one in found]))
            for size in ("1m", "60m")
            for figure in ("spearman", "best_third")
        ]
        assert all(a >= b for a, b in zip(mean, least, strict=True)), (count, mean)
