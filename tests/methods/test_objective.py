"""Objectives: by hand, their gradients, and what they refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_train.methods.objective import Options, higher, objective, standardised

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


# ── Metrics of different scales ─────────────────────────────────────────────────────


MIXED = Options(metrics={"loss": 1.0, "code": 1.0, "accuracy": -2.0}, standardise=True)
SCALE = np.array([0.1, 0.02, 0.05])


def test_standardised_metrics_by_hand() -> None:
    one = standardised(objective(MIXED, NAMES, NATURAL), NAMES, SCALE)
    # −2 of the loss, 20 and so 10 of the code, and 2 of the accuracy, of which more is better.
    assert one.score(METRICS).tolist() == pytest.approx([(-2 + 10 - 2 * 2) / 4, 0])
    assert one.unit == "standard deviations" and not one.plain
    worst = standardised(objective(Options("worst", MIXED.metrics), NAMES, NATURAL), NAMES, SCALE)
    assert worst.score(METRICS).tolist() == pytest.approx([10, 0])
    unclipped = one._replace(clip=np.inf)
    assert unclipped.scores(METRICS.numpy())[0] == pytest.approx((-2 + 20 - 2 * 2) / 4)


@pytest.mark.parametrize("reduce", ["mean", "worst"])
@pytest.mark.parametrize("scaled", [False, True])
def test_turned_metrics_are_the_same_figure(reduce: str, scaled: bool) -> None:
    options = Options(reduce, MIXED.metrics, {"code": 0.01, "accuracy": 0.02})  # type: ignore[arg-type]
    one = objective(options, NAMES, NATURAL)
    one = standardised(one, NAMES, SCALE) if scaled else one
    other = one.turned()
    assert (other.weights >= 0).all() and one.turn.tolist() == [1, 1, -1]
    values = METRICS.numpy() + np.array([0, 0.2, -0.15])
    for penalised in (False, True):
        there = other.scores(values * one.turn, penalised)
        assert there == pytest.approx(one.scores(values, penalised), rel=1e-12)


@settings(deadline=None)
@given(
    st.lists(st.floats(-0.2, 0.2), min_size=3, max_size=3),
    st.floats(0.1, 100) | st.floats(-100, -0.1),
    st.floats(-9, 9),
)
def test_the_unit_of_a_metric_does_not_count(
    apart: list[float], factor: float, offset: float
) -> None:
    """A percentage instead of a part, or an error instead of an accuracy."""
    names, values = NAMES, NATURAL + np.array(apart)
    one = standardised(objective(MIXED, names, NATURAL), names, SCALE)
    factors, offsets = np.array([1, 1, factor]), np.array([0, 0, offset])
    weights = {"loss": 1.0, "code": 1.0, "accuracy": -2.0 if factor > 0 else 2.0}
    other = objective(Options(metrics=weights), names, NATURAL * factors + offsets)
    other = standardised(other, names, SCALE * np.abs(factors))
    there = other.scores((values * factors + offsets)[None])
    assert there == pytest.approx(one.scores(values[None]), rel=1e-6, abs=1e-6)


def test_standardised_metrics_have_gradients_within_the_clip() -> None:
    one = standardised(objective(MIXED, NAMES, NATURAL), NAMES, SCALE)
    point = torch.tensor([[1.8, 4.1, 0.6]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(one.score, point)


def test_a_metric_without_a_scale_is_refused_where_it_counts() -> None:
    one = objective(Options(metrics={"loss": 1.0}), NAMES, NATURAL)
    scored = standardised(one, NAMES, np.array([0.1, np.nan, 0.0])).score(METRICS)
    assert scored.tolist() == pytest.approx([-2, 0])
    for lacking, said in ((np.nan, "loss is not known of two"), (0.0, "loss is the same in all")):
        with pytest.raises(ValueError, match=said):
            standardised(one, NAMES, np.array([lacking, 1.0, 1.0]))


# ── Of which more is better ─────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("arc_easy/acc", True), ("hellaswag_acc_norm,none", True), ("MMLU accuracy", True),
        ("squad/exact_match", True), ("squad_f1", True), ("humaneval pass@10", True),
        ("code_loss", False), ("acc_loss", False), ("arc/acc_stderr", False), ("bpb", False),
        ("accounting", False), ("emails", False), ("mean", False), ("f10", False),
    ],
)  # fmt: skip
def test_names_say_of_what_more_is_better(name: str, more: bool) -> None:
    assert higher(name) is more


def test_what_more_is_better_of_counts_below_zero_and_is_guarded_so() -> None:
    one = objective(Options(), NAMES, NATURAL, scores=NAMES)
    assert one.weights.tolist() == [1, 1, -1]
    guarded = objective(
        Options(metrics={"loss": 1.0}, guard={"accuracy": 0.1}), NAMES, NATURAL, scores=NAMES
    )
    assert guarded.weights.tolist() == [1, 0, 0] and guarded.more.tolist() == [False, False, True]
    changed = torch.tensor([[2.0, 4.0, 0.4], [2.0, 4.0, 0.9]], dtype=torch.float64)
    assert guarded.beyond(changed)[:, 2].tolist() == pytest.approx([0.1, 0])
    with pytest.raises(ValueError, match="accuracy is something of which more is better"):
        objective(Options(metrics={"accuracy": 1.0}), NAMES, NATURAL, scores=NAMES)
    # Of a domain's loss less is better, whatever its name is.
    assert objective(Options(), NAMES, NATURAL).weights.tolist() == [1, 1, 1]
