"""Forecasts where metrics are missing in some runs: each is fitted to the runs that have it."""

import numpy as np
import pytest
import torch

from doremi_train.methods import regressors
from doremi_train.methods.fits import Known
from doremi_train.methods.forecast import forecast

NATURAL = np.array([0.5, 0.3, 0.2])
RANDOM = np.random.default_rng(0)
POINTS = RANDOM.dirichlet(np.ones(3), 20)
VALUES = np.stack([np.exp(-POINTS[:, k]) + 1 + k for k in range(3)], axis=1)
HOLES = VALUES.copy()
HOLES[:4, 1] = np.nan  # the middle one, so that its place among the others counts
KNOWN = Known(natural=NATURAL)
LESS = np.ones(3)


def test_each_metric_is_fitted_to_the_runs_that_have_it() -> None:
    found = forecast(POINTS, HOLES, KNOWN, "saturating", LESS)
    outer = regressors.REGRESSORS["saturating"](POINTS, VALUES[:, [0, 2]], KNOWN)
    middle = regressors.REGRESSORS["saturating"](POINTS[4:], VALUES[4:, [1]], KNOWN)
    predicted = found.predict(POINTS)
    np.testing.assert_array_equal(predicted[:, [0, 2]], outer.predict(POINTS))
    np.testing.assert_array_equal(predicted[:, [1]], middle.predict(POINTS))
    np.testing.assert_array_equal(np.isnan(found.unseen), np.isnan(HOLES))
    middle_, low, high = found.between(POINTS)
    np.testing.assert_array_equal(middle_, predicted)
    assert (low < predicted).all() and (predicted < high).all()


@pytest.mark.slow
def test_with_a_gradient_it_is_the_same() -> None:
    found = forecast(POINTS, HOLES, KNOWN, "saturating", LESS)
    assert found.smooth and not forecast(POINTS, HOLES, KNOWN, "log_linear", LESS).smooth
    points = torch.from_numpy(POINTS).requires_grad_()
    losses = found.losses(points)
    np.testing.assert_allclose(losses.detach().numpy(), found.predict(POINTS), rtol=1e-12)
    (slope,) = torch.autograd.grad(losses.sum(), points)
    assert slope.isfinite().all() and slope.abs().max() > 0


def test_what_more_is_better_of_is_fitted_as_a_loss_and_told_as_it_is() -> None:
    turn = np.array([1.0, -1.0, 1.0])
    found = forecast(POINTS, HOLES * turn, KNOWN, "saturating", turn)
    losses = forecast(POINTS, HOLES, KNOWN, "saturating", LESS)
    for mine, plain in zip(found.between(POINTS), losses.between(POINTS), strict=True):
        np.testing.assert_allclose(mine[:, [0, 2]], plain[:, [0, 2]])
    _, low, high = losses.between(POINTS)
    np.testing.assert_allclose(found.between(POINTS)[1][:, 1], -high[:, 1])
    np.testing.assert_allclose(found.between(POINTS)[2][:, 1], -low[:, 1])
    np.testing.assert_allclose(found.unseen, losses.unseen * turn)
    given = torch.from_numpy(POINTS)
    np.testing.assert_allclose(found.losses(given).numpy(), found.predict(POINTS), rtol=1e-12)
