"""D-optimal designs: against all subsets, with replicates, within caps; and on RegMix's runs, half
of which are then enough."""

from itertools import combinations

import numpy as np
import pytest
import scipy
from helpers import regmix
from numpy.testing import assert_allclose

from doremi_train.methods import box, design, swarm
from doremi_train.methods.box import Box, Floats
from doremi_train.methods.saturating import saturating


def volume(points: Floats, within: Box) -> float:
    """log det of the information."""
    rows = np.column_stack([np.ones(len(points)), 1 - np.exp(-((4 * points / within.high) ** 0.6))])
    return float(np.linalg.slogdet(rows.T @ rows + 1e-3 * np.eye(rows.shape[1]))[1])


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_the_best_of_all_subsets(seed: int) -> None:
    random = np.random.default_rng(seed)
    within = Box(np.zeros(3), np.array([1.0, 0.9, 0.8]))
    candidates, given = random.dirichlet(np.ones(3), 14), np.full((1, 3), 1 / 3)
    chosen = design.choose(candidates, 5, within, random, given)
    assert len(set(chosen.tolist())) == 5
    found = volume(np.vstack([given, candidates[chosen]]), within)
    everything = [
        volume(np.vstack([given, candidates[list(rows)]]), within)
        for rows in combinations(range(14), 5)
    ]
    assert found > np.quantile(everything, 0.995) and found > max(everything) - 0.1


def test_the_determinant_s_update_is_exact() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((6, 4))
    whole = rows.T @ rows + np.eye(4)
    for sign, other in ((1, random.standard_normal(4)), (-1, rows[2])):
        inverse, factor = design._with(np.linalg.inv(whole), other, sign)
        changed = whole + sign * np.outer(other, other)
        assert_allclose(inverse, np.linalg.inv(changed), atol=1e-10)
        assert factor == pytest.approx(np.linalg.det(changed) / np.linalg.det(whole))


def test_a_design_has_anchors_and_replicates_within_caps() -> None:
    natural = np.array([0.6, 0.25, 0.1, 0.05])
    within = box.box(natural * 1e6, 1.5e6, 4.0, 0.01)
    points = design.design(natural, within, 20, np.random.default_rng(0))
    assert points.shape == (20, 4)
    assert all(box.inside(point, within) for point in points)
    assert_allclose(points.sum(1), 1, atol=1e-12)
    assert_allclose(points[:2], [natural, natural], atol=1e-12)
    assert_allclose(points[2], box.project(np.full(4, 0.25), within))
    _, count = np.unique(points.round(6), axis=0, return_counts=True)
    assert sorted(count.tolist()) == [1] * 16 + [2, 2]
    distance = box.distance(points[3:], natural)
    assert distance[-1] == distance.max() and np.array_equal(
        points[-1], points[3 + distance.argmax()]
    )
    assert np.array_equal(points, design.design(natural, within, 20, np.random.default_rng(0)))
    # The same number drawn at random spans less.
    drawn = swarm.design(natural, within, 20, np.random.default_rng(0))
    assert volume(points, within) > volume(drawn, within) + 0.5


@pytest.mark.parametrize("runs", [1, 2, 3, 5, 6])
def test_few_runs_have_no_replicates_and_none_is_refused(runs: int) -> None:
    free = Box(np.zeros(3), np.ones(3))
    points = design.design(np.array([0.5, 0.3, 0.2]), free, runs, np.random.default_rng(0))
    assert len(points) == runs
    assert len(np.unique(points.round(12), axis=0)) == (runs if runs < 6 else runs - 2)
    with pytest.raises(ValueError, match="runs=0"):
        design.design(np.array([0.5, 0.3, 0.2]), free, 0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="runs=4: there are 3 candidates"):
        design.choose(np.eye(3), 4, free, np.random.default_rng(0))


@regmix.needed
@pytest.mark.acceptance
def test_34_designed_of_regmix_s_runs_rank_as_68_drawn() -> None:
    """Eight designs from other starts, sixteen draws: the interval of the difference of their
    means (Welch's) leaves no more than a loss of 0.003, at
    both sizes."""
    train, free = regmix.runs("train", "1m"), Box(np.zeros(17), np.ones(17))
    unseen = {size: regmix.runs("test", size) for size in ("1m", "60m")}

    def figures(rows: Floats) -> list[float]:
        fit = saturating(train.points[rows], train.losses[rows])
        return [
            regmix.ranked(fit.predict(one.points), one.losses).spearman for one in unseen.values()
        ]

    designed = np.array(
        [figures(design.choose(train.points, 34, free, np.random.default_rng(s))) for s in range(8)]
    )
    drawn = np.array([figures(np.random.default_rng(s).permutation(512)[:68]) for s in range(16)])
    between = scipy.stats.ttest_ind(designed, drawn, equal_var=False).confidence_interval(0.95)
    assert (designed.mean(0) >= drawn.mean(0)).all(), (designed.mean(0), drawn.mean(0))
    assert (between.low > -0.003).all(), between
