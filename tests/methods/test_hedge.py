"""Step sizes that follow from the gains: regret against the best fixed choice, and what they do not
depend on.

K choices, T rounds.
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from doremi_train.methods import doremi, hedge, simplex
from doremi_train.methods.doremi import Options, State, Stats

AUTO = Options(step_size="auto", smoothing=0.0)


def means(gains: Tensor) -> Stats:
    """Sums of a batch of ten tokens a domain with these mean gains (K,)."""
    return Stats(10 * gains, torch.full_like(gains, 10))


def played(gains: Tensor, options: Options = AUTO) -> list[State]:
    """States before and after each row of gains (T, K)."""
    states = [doremi.init(gains.shape[1], len(gains), options)]
    for row in gains:
        states.append(doremi.update(states[-1], means(row), options))
    return states


def regret(gains: Tensor, states: list[State]) -> float:
    """What the best fixed choice gains above α_{t−1} on λ_t, t = 1 … T."""
    before = torch.stack([state.weights for state in states[:-1]])
    return float(gains.sum(0).max() - (before * gains).sum())


def widest(gains: Tensor) -> float:
    return float((gains.max(1).values - gains.min(1).values).max())


# Each makes gains (T, K) of a seed: stationary, or of somebody who wants the weights to be wrong.


def stationary(rounds: int, choices: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    means = torch.rand(choices, generator=generator, dtype=torch.float64)
    noise = torch.randn(rounds, choices, generator=generator, dtype=torch.float64)
    return means + 0.3 * noise


def growing(rounds: int, choices: int, seed: int) -> Tensor:
    """Every range is a record."""
    base = stationary(rounds, choices, seed).clamp(0, 1)
    return base * 1.01 ** torch.arange(rounds, dtype=torch.float64)[:, None]


def switching(rounds: int, choices: int, seed: int) -> Tensor:
    """The leader so far gains nothing, all others one: what undoes following the leader."""
    gains, total = torch.zeros(rounds, choices, dtype=torch.float64), torch.zeros(choices)
    total = total.double() + torch.rand(choices, generator=torch.Generator().manual_seed(seed)) / 99
    for t in range(rounds):
        gains[t] = 1
        gains[t, total.argmax()] = 0
        total += gains[t]
    return gains


def waiting(rounds: int, choices: int, seed: int) -> Tensor:
    """One choice is best by far, and then the others are until the end."""
    gains = torch.zeros(rounds, choices, dtype=torch.float64)
    gains[: rounds // 3, seed % choices] = 1
    gains[rounds // 3 :] = 1
    gains[rounds // 3 :, seed % choices] = 0
    return gains


def against_the_weights(rounds: int, choices: int, seed: int) -> Tensor:
    """The domain with the most weight gains nothing, that with the least gains one."""
    state, rows = doremi.init(choices, rounds, AUTO), []
    for _ in range(rounds):
        row = torch.zeros(choices, dtype=torch.float64)
        row[state.weights.argmin()] = 1 + seed % 2
        rows.append(row)
        state = doremi.update(state, means(row), AUTO)
    return torch.stack(rows)


def spiking(rounds: int, choices: int, seed: int) -> Tensor:
    """Ranges of very different size."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (6 * torch.rand(rounds, 1, generator=generator, dtype=torch.float64) - 3)
    return size * torch.rand(rounds, choices, generator=generator, dtype=torch.float64)


MAKERS = [stationary, growing, switching, waiting, against_the_weights, spiking]


@pytest.mark.parametrize("maker", MAKERS)
@settings(deadline=None, max_examples=6)
@given(st.integers(1, 80), st.integers(1, 9), st.integers(0, 1 << 20), st.sampled_from([0, 1e-3]))
def test_the_regret_is_within_its_bound(
    maker: Callable[[int, int, int], Tensor], rounds: int, choices: int, seed: int, smoothing: float
) -> None:
    gains = maker(rounds, choices, seed)
    states = played(gains, Options(step_size="auto", smoothing=smoothing))
    bound = hedge.regret_bound(widest(gains), choices, rounds, smoothing)
    assert regret(gains, states) <= bound + 1e-9 * widest(gains)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_regret_of_any_gains_is_within_its_bound(data: st.DataObject) -> None:
    rounds, choices = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 4))
    row = st.lists(st.floats(-1e6, 1e6), min_size=choices, max_size=choices)
    gains = torch.tensor(
        data.draw(st.lists(row, min_size=rounds, max_size=rounds)), dtype=torch.float64
    )
    bound = hedge.regret_bound(widest(gains), choices, rounds)
    assert regret(gains, played(gains)) <= bound + 1e-9 * float(gains.abs().max())


def test_a_step_size_that_is_given_breaks_the_bound_at_another_scale() -> None:
    """The bound says something: the paper's η of 1 fails it both ways, and auto does not."""
    for scale in (1e-3, 1e3):
        gains = scale * waiting(300, 4, 0)
        bound = hedge.regret_bound(widest(gains), 4, 300)
        given = regret(gains, played(gains, Options(step_size=1.0, smoothing=0.0)))
        assert regret(gains, played(gains)) <= bound < given


@pytest.mark.parametrize("maker", [stationary, waiting, switching])
def test_with_a_range_that_is_known_at_once_it_is_hedge(
    maker: Callable[[int, int, int], Tensor],
) -> None:
    """The closed form of the paper of hedge, and its bound S √(T ln K / 2)."""
    rounds, choices = 200, 5
    gains = maker(rounds, choices, 3)
    gains = torch.cat([torch.zeros(1, choices, dtype=torch.float64), gains])
    gains[0, 0], span = widest(gains), widest(gains)
    eta = math.sqrt(8 * math.log(choices) / len(gains)) / span
    states = played(gains)
    for state, total in zip(states[1:], gains.cumsum(0), strict=True):
        torch.testing.assert_close(
            state.weights, torch.softmax(eta * total, 0), rtol=1e-9, atol=1e-12
        )
        assert float(state.step_size) == pytest.approx(eta, rel=1e-12)
    after = gains[1:]  # against weights that know the first round
    lost = float(
        after.sum(0).max() - (torch.stack([s.weights for s in states[1:-1]]) * after).sum()
    )
    assert lost <= span * math.sqrt(len(gains) * math.log(choices) / 2) + span


def test_a_larger_range_later_gives_the_weights_of_all_gains_so_far() -> None:
    gains = growing(60, 4, 1)
    for state, total in zip(played(gains)[1:], gains.cumsum(0), strict=True):
        torch.testing.assert_close(
            state.weights, torch.softmax(state.step_size * total, 0), rtol=1e-9, atol=1e-12
        )


# What the weights do not depend on


@pytest.mark.parametrize("power", [-40, -3, 1, 40])
def test_the_unit_of_the_gains_changes_no_bit(power: int) -> None:
    options, gains = Options(step_size="auto", warmup="auto"), stationary(100, 4, 0)
    gains[:10, 0] += 5  # a start
    for one, other in zip(played(gains, options), played(gains * 2.0**power, options), strict=True):
        assert torch.equal(one.weights, other.weights)
        assert torch.equal(one.moves_after, other.moves_after)
        assert float(one.step_size) == float(other.step_size) * 2.0**power


@settings(deadline=None, max_examples=20)
@given(st.floats(1e-6, 1e6), st.floats(-10, 10), st.integers(0, 1 << 20))
def test_neither_scale_nor_shift_changes_the_weights(scale: float, shift: float, seed: int) -> None:
    gains = stationary(50, 5, seed)
    moved = scale * (gains + shift)
    torch.testing.assert_close(
        played(moved)[-1].weights, played(gains)[-1].weights, rtol=1e-6, atol=1e-9
    )


def test_the_paper_s_form_depends_on_both_number_and_unit() -> None:
    """Else the tests above would say nothing."""
    gains, paper = stationary(50, 5, 0), Options()
    apart = [played(scale * gains, paper)[-1].weights for scale in (1.0, 4.0)]
    assert simplex.total_variation(*apart) > 0.01


def test_domains_that_never_differ_stay_uniform() -> None:
    for state in played(torch.full((30, 4), 0.7, dtype=torch.float64)):
        assert torch.equal(state.weights, simplex.uniform(4)) and float(state.step_size) == 0


def test_one_domain_has_all_the_weight_and_no_regret() -> None:
    states = played(stationary(20, 1, 0))
    assert [state.weights.tolist() for state in states] == [[1.0]] * 21
    assert hedge.regret_bound(0.0, 1, 20) == 0


def test_more_rounds_are_taken_in_smaller_steps() -> None:
    span = torch.tensor(2.0, dtype=torch.float64)
    sizes = [float(hedge.step_size(span, 8, rounds)) for rounds in (100, 400, 1600)]
    assert sizes == [pytest.approx(math.sqrt(8 * math.log(8) / 100) / 2 / f) for f in (1, 2, 4)]


# What is recorded


def test_the_trace_has_the_step_size_and_where_the_average_begins() -> None:
    gains = stationary(40, 3, 0)
    states = played(gains, Options(step_size="auto", warmup=0.25))
    lines = [doremi.record(state, means(row)) for state, row in zip(states[1:], gains, strict=True)]
    assert [float(line["step_size"]) > 0 for line in lines] == [False] * 10 + [True] * 30
    assert all("average_from" not in line for line in lines)
    (waited,) = {
        int(
            doremi.record(played(gains, Options(warmup="auto"))[-1], means(gains[-1]))[
                "average_from"
            ]
        )
    }
    assert waited == 21  # of a curve that never falls
    assert doremi.record(played(gains, Options())[-1], means(gains[-1])).keys() == {
        "weights",
        "excess_loss",
        "tokens",
    }
