"""Gaussian process over mixtures, against the textbook's formulas."""

import numpy as np
import pytest
import scipy
import torch
from numpy.testing import assert_allclose
from scipy.stats import spearmanr

from doremi_train.methods import process
from doremi_train.methods.process import gaussian_process


def test_the_mean_is_the_textbook_s_at_the_likeliest_of_the_grid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "LENGTHS", np.array([0.3, 1.0]))
    monkeypatch.setattr(process, "NOISES", np.array([1e-4, 1e-1]))
    random = np.random.default_rng(0)
    points, others = random.dirichlet(np.ones(3), 20), random.dirichlet(np.ones(3), 7)
    losses = np.stack([np.sin(9 * points[:, 0]), random.standard_normal(20)], axis=1)

    def kernel(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
        squares = ((np.sqrt(a)[:, None] - np.sqrt(b)) ** 2).sum(-1)
        return np.exp(-squares / (2 * length**2))

    expected, mean = [], losses.mean(0)
    for column in (losses - mean).T:
        tried = []
        for length in (0.3, 1.0):
            for noise in (1e-4, 1e-1):
                covariance = kernel(points, points, length) + noise * np.eye(20)
                scale = column @ np.linalg.solve(covariance, column) / 20
                likelihood = scipy.stats.multivariate_normal(cov=scale * covariance).logpdf(column)
                mean_there = kernel(others, points, length) @ np.linalg.solve(covariance, column)
                tried.append((likelihood, mean_there))
        expected.append(max(tried, key=lambda one: one[0])[1])
    found = gaussian_process(points, losses)
    assert_allclose(found.predict(others), mean + np.array(expected).T, atol=1e-6)
    assert torch.autograd.gradcheck(found.losses, torch.from_numpy(others).requires_grad_())
    assert torch.isfinite(found.losses(torch.eye(3, dtype=torch.float64))).all()


def test_lengths_differ_by_loss() -> None:
    points = np.random.default_rng(0).dirichlet(np.ones(3), 40)
    losses = np.stack([np.sin(40 * points[:, 0]), points[:, 1]], axis=1)
    found = gaussian_process(points, losses)
    assert found.length[0] < 0.5 * found.length[1]
    assert spearmanr(found.predict(points)[:, 0], losses[:, 0]).statistic > 0.97
