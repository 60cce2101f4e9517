"""Objectives: by hand, their gradients, and what they refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_train.methods.objective import Options, objective

NAMES = ["loss", "code", "accuracy"]
NATURAL = np.array([2.0, 4.0, 0.5])
METRICS = torch.tensor([[1.8, 4.4, 0.6], [2.0, 4.0, 0.5]], dtype=torch.float64)


def test_mean_and_worst_by_hand() -> None:
    weights = {"loss": 1.0, "code": 2.0, "accuracy": -1.0}
    mean = objective(Options(metrics=weights), NAMES, NATURAL)
    assert mean.score(METRICS).tolist() == pytest.approx([(1.8 + 8.8 - 0.6) / 4, (2 + 8 - 0.5) / 4])
    worst = objective(Options("worst", weights), NAMES, NATURAL)
    assert worst.score(METRICS).tolist() == pytest.approx([8.8, 8.0])
    all_alike = objective(Options(), NAMES[:2], NATURAL[:2])
    assert all_alike.score(METRICS[:, :2]).tolist() == pytest.approx([3.1, 3.0])


def test_what_does_not_count_may_be_anything() -> None:
    one = objective(Options("worst", {"loss": 1.0}), NAMES, NATURAL)
    assert one.score(METRICS).tolist() == pytest.approx([1.8, 2.0])


def test_guards_in_parts_of_natural() -> None:
    guard = {"code": 0.04, "accuracy": 0.1}
    guarded = objective(Options(metrics={"accuracy": -1.0}, guard=guard), NAMES, NATURAL)
    assert guarded.beyond(METRICS).numpy() == pytest.approx(np.array([[0, 0.06, 0], [0, 0, 0]]))
    fallen = torch.tensor([[9.0, 4.0, 0.4]], dtype=torch.float64)  # of an accuracy less is worse
    assert guarded.beyond(fallen).numpy() == pytest.approx(np.array([[0, 0, 0.1]]))


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 9), min_size=3, max_size=3), st.sampled_from(["mean", "worst"]))
def test_gradients_are_those_of_differences(values: list[float], reduce: str) -> None:
    options = Options(reduce, {"loss": 1.0, "code": 0.5, "accuracy": -2.0}, {"code": 0.01})  # type: ignore[arg-type]
    one, point = objective(options, NAMES, NATURAL), torch.tensor([values], dtype=torch.float64)
    large = sorted((one.weights * values).tolist())
    if large[-1] - large[-2] < 1e-3 or abs(values[1] / 4 - 1.01) < 1e-3:
        return  # at an edge there is no gradient
    assert torch.autograd.gradcheck(
        lambda x: one.score(x) + one.beyond(x).sum(-1), point.requires_grad_()
    )


def test_unknown_metrics_and_none_are_refused() -> None:
    with pytest.raises(KeyError, match="moon"):
        objective(Options(metrics={"moon": 1.0}), NAMES, NATURAL)
    with pytest.raises(KeyError, match="moon"):
        objective(Options(guard={"moon": 0.1}), NAMES, NATURAL)
    with pytest.raises(ValueError, match="every weight is 0"):
        objective(Options(metrics={"loss": 0.0}), NAMES, NATURAL)
