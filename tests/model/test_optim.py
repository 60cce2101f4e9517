"""Schedules are the paper's; norms and biases do not decay."""

import itertools

import pytest
import torch
from torch import nn

from doremi_train.config import UserError, load
from doremi_train.model.optim import OptimizerOptions, build, learning_rate


@pytest.mark.parametrize("steps", [1000, 200_000])
@pytest.mark.parametrize(("part", "expected"), [(0.2, 7.1e-4), (0.5, 3.4e-4), (1.0, 1e-4)])
def test_exponential_decay_passes_the_figures_of_the_paper(
    part: float, expected: float, steps: int
) -> None:
    assert learning_rate(int(part * steps), steps, OptimizerOptions()) == pytest.approx(
        expected, rel=0.01
    )


@pytest.mark.parametrize("schedule", ["exponential", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 7, 800, 12_345])
def test_the_last_step_has_exactly_the_end_value(schedule: str, steps: int) -> None:
    assert learning_rate(
        steps, steps, load(OptimizerOptions, {"schedule": schedule})
    ) == pytest.approx(1e-4, rel=1e-12)


@pytest.mark.parametrize("schedule", ["exponential", "cosine", "constant"])
def test_warmup_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    options = load(OptimizerOptions, {"schedule": schedule})
    rates = [learning_rate(step, 1000, options) for step in range(1, 1001)]
    assert rates[:60] == pytest.approx([1e-3 * step / 60 for step in range(1, 61)])
    assert max(rates) == rates[59] == pytest.approx(1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[59:]))


def test_cosine_is_half_way_down_at_half_way() -> None:
    assert learning_rate(
        500, 1000, OptimizerOptions(schedule="cosine", warmup=0.0)
    ) == pytest.approx((1e-3 + 1e-4) / 2)


def test_constant_stays() -> None:
    assert {
        learning_rate(s, 100, OptimizerOptions(schedule="constant", warmup=0.0))
        for s in range(1, 101)
    } == {1e-3}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_only_matrices_decay_and_every_parameter_is_there_once(optimizer: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    groups = build(model, load(OptimizerOptions, {"optimizer": optimizer})).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decays) == sum(len(group["params"]) for group in groups) == 5
    assert all(decays[id(p)] == (0.01 if p.ndim > 1 else 0.0) for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_frozen_parameters_are_left_out_and_a_step_lowers_the_loss(optimizer: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    model.bias.requires_grad_(False)
    optimiser = build(
        model, load(OptimizerOptions, {"optimizer": optimizer, "learning_rate": 0.01})
    )
    before = (model.weight.detach().clone(), model.bias.detach().clone())
    losses = []
    for _ in range(5):
        loss = (model(torch.eye(4)) - 1).square().sum()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(model.weight, before[0]) and torch.equal(model.bias, before[1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup", 1.0),
        ("schedule", "linear"),
    ],
)
def test_what_makes_no_schedule_is_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"training.{key}="):
        load(OptimizerOptions, {key: value}, "training")
