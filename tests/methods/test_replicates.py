"""The noise of runs on the same mixture, and scales of metrics, by hand."""

import math

import numpy as np
import pytest

from doremi_train.methods import replicates

POINTS = np.array([[0.5, 0.5], [0.2, 0.8], [0.5, 0.5], [0.2, 0.8], [0.2, 0.8], [1.0, 0.0]])
METRICS = np.array([[1.0, 5.0], [2.0, 1.0], [1.2, np.nan], [2.3, 3.0], [2.6, np.nan], [7.0, 7.0]])


def test_deviations_are_pooled_over_mixtures_and_skip_what_is_missing() -> None:
    found = replicates.pooled(POINTS, METRICS)
    # 0.1² + 0.1² of the first mixture, 0.3² + 0.3² of the second, and 1 + 2 degrees of freedom.
    assert found.deviation == pytest.approx([math.sqrt(0.2 / 3), math.sqrt(2)])
    assert found.freedom.tolist() == [3, 1]
    alone = replicates.pooled(POINTS[[0, 1, 5]], METRICS[[0, 1, 5]])
    assert np.isnan(alone.deviation).all() and alone.freedom.tolist() == [0, 0]


def test_a_scale_is_the_larger_of_natural_s_deviation_and_the_pooled_one() -> None:
    quiet = replicates.scale(POINTS, METRICS, np.array([0.5, 0.5]))
    assert quiet == pytest.approx([math.sqrt(0.2 / 3), math.sqrt(2)])  # natural's is 0.1 √2
    noisy = replicates.scale(POINTS, METRICS, np.array([0.2004, 0.7996]))  # weights were rounded
    assert noisy == pytest.approx([0.3, math.sqrt(2)])
    elsewhere = replicates.scale(POINTS, METRICS, np.array([0.9, 0.1]))
    assert elsewhere == pytest.approx(quiet)
    assert np.isnan(replicates.scale(POINTS[:2], METRICS[:2], np.array([0.5, 0.5]))).all()
