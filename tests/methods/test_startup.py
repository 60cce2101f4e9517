"""Where the start of a run ends, on planted curves.

K domains, T steps.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from doremi_train.methods import doremi, simplex, startup
from doremi_train.methods.doremi import Options, State, Stats

FIRST = torch.tensor([2.0, 1.0, 0.5, 0.2, 0.0], dtype=torch.float64)  # λ_0
LAST = torch.tensor([0.10, 0.14, 0.10, 0.12, 0.11], dtype=torch.float64)


def falling(steps: int, time: float, flat: int = 0, noise: float = 0.0, seed: int = 0) -> Tensor:
    """λ (T, K) from FIRST to LAST as e^(−t / time), after `flat` steps in which it stays."""
    t = (torch.arange(steps, dtype=torch.float64) - flat).clamp_min(0)
    generator = torch.Generator().manual_seed(seed)
    more = noise * torch.randn(steps, len(FIRST), generator=generator, dtype=torch.float64)
    return LAST + (FIRST - LAST) * torch.exp(-t / time)[:, None] + more


def ends(gains: Tensor) -> int | None:
    """First step after which the start is said to be over."""
    curve = startup.empty(gains.shape[1])
    for t, row in enumerate(gains, start=1):
        curve = startup.add(curve, row)
        if startup.over(curve):
            return t
    return None


@pytest.mark.parametrize("steps", [400, 4000])
@pytest.mark.parametrize("time", [5, 20, 50])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_it_ends_when_the_fall_is_over_however_long_the_run(
    steps: int, time: int, noise: float
) -> None:
    """Late enough: at most a fifth is left of the fall. Soon enough: within six of its times."""
    found = ends(falling(steps, time, noise=noise))
    assert found is not None and math.exp(-found / time) <= 1 / 5 and found <= 6 * time + 8
    assert found == ends(falling(2 * steps, time, noise=noise)[:steps])


@pytest.mark.parametrize("flat", [10, 60, 100])
def test_a_start_that_has_not_begun_to_fall_is_waited_for(flat: int) -> None:
    found = ends(falling(1000, 20, flat, noise=0.05))
    assert found is not None and flat + 2 * 20 <= found <= 2 * flat + 6 * 20


def test_two_domains_that_cross_do_not_end_it() -> None:
    """What was highest is learned first and is lowest then: for some steps all are the same."""
    t = torch.arange(400, dtype=torch.float64)
    quick, slow = 6 * torch.exp(-t / 10), 3 * torch.exp(-t / 60)
    gains = torch.stack([quick, slow, slow, slow, slow], 1)
    nearest = int(gains[:60].std(1).argmin())
    found = ends(gains)
    assert float(gains[nearest].std()) < 0.1 * float(gains[0].std())  # a trap
    assert found is not None and found > 2 * nearest and math.exp(-found / 60) < 0.25


@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
def test_a_curve_that_never_falls_has_no_end(noise: float) -> None:
    generator = torch.Generator().manual_seed(1)
    gains = FIRST + noise * torch.randn(400, 5, generator=generator, dtype=torch.float64)
    assert ends(gains) is None


def test_a_curve_that_rises_or_falls_evenly_has_no_end() -> None:
    part = torch.arange(400, dtype=torch.float64)[:, None] / 400
    assert ends(FIRST * part) is None
    assert ends(FIRST * (1 - part)) is None


@settings(deadline=None, max_examples=20)
@given(st.integers(-30, 30), st.floats(-5, 5), st.integers(0, 1 << 20))
def test_unit_and_level_change_nothing(power: int, level: float, seed: int) -> None:
    gains = falling(200, 10, noise=0.05, seed=seed)
    assert ends(gains) == ends(gains * 2.0**power)
    moving = level * torch.arange(200, dtype=torch.float64)[:, None] / 200
    assert ends(gains + moving) == ends(gains)


# In DoReMi


def played(gains: Tensor, options: Options) -> list[State]:
    states = [doremi.init(gains.shape[1], len(gains), options)]
    for row in gains:
        stats = Stats(10 * row, torch.full_like(row, 10))
        states.append(doremi.update(states[-1], stats, options))
    return states


@pytest.mark.parametrize("average_from", [0.0, 0.9])
def test_until_then_the_weights_stay_and_are_not_averaged(average_from: float) -> None:
    """After it they are those of a run that begins there."""
    gains = falling(400, 20, noise=0.02)
    begins = ends(gains)
    assert begins is not None and begins < 200
    states = played(gains, Options(warmup="auto", average_from=average_from))
    later = played(gains[begins:], Options())
    assert all(torch.equal(s.weights, simplex.uniform(5)) for s in states[: begins + 1])
    for state, expected in zip(states[begins:], later, strict=True):
        assert torch.equal(state.weights, expected.weights)
    averaged = [s.weights for s in states[1 + max(begins, int(400 * average_from)) :]]
    torch.testing.assert_close(doremi.result(states[-1]), torch.stack(averaged).mean(0))


def test_half_of_the_run_is_the_most_that_is_left_out() -> None:
    states = played(FIRST.expand(101, 5), Options(warmup="auto"))
    assert int(states[-1].moves_after) == 50 and int(states[-1].averaged) == 51
    assert torch.equal(states[50].weights, simplex.uniform(5))
    assert not torch.equal(states[51].weights, simplex.uniform(5))
    assert doremi.result(played(FIRST.expand(1, 5), Options(warmup="auto"))[-1]).sum() == 1
