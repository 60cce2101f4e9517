"""Curves in pieces, and how well the average of one is known.

K columns, P pieces.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from doremi_train.methods import batch_means, doremi, pieces
from doremi_train.methods.doremi import Options, State, Stats


def curve(rows: Tensor) -> Tensor:
    """(P, K) of rows (T, K)."""
    sums = pieces.empty(rows.shape[1])
    for number, row in enumerate(rows, start=1):
        sums = pieces.add(sums, number, row)
    return sums


def noise(steps: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, columns, generator=generator, dtype=torch.float64)


def smooth(steps: int, columns: int, seed: int, kept: float) -> Tensor:
    """An autoregression of deviation 1: each step keeps the part `kept` of the one before."""
    rows = noise(steps, columns, seed)
    for t in range(1, steps):
        rows[t] = kept * rows[t - 1] + math.sqrt(1 - kept**2) * rows[t]
    return rows


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.integers(0, 1 << 20))
def test_pieces_hold_every_step_once_and_are_an_eighth_to_a_sixteenth(
    steps: int, seed: int
) -> None:
    rows = noise(steps, 3, seed)
    sums, size = curve(rows), pieces.length(steps)
    expected = [part.sum(0) for part in rows.split(size)]
    assert len(expected) <= pieces.PIECES and (size == 1 or len(expected) > pieces.PIECES // 2)
    torch.testing.assert_close(sums[: len(expected)], torch.stack(expected))
    assert torch.equal(sums[len(expected) :], torch.zeros_like(sums[len(expected) :]))
    full = pieces.means(sums, steps)
    assert len(full) == (0 if steps % size else len(expected))
    torch.testing.assert_close(full, torch.stack(expected)[: len(full)] / size)


# Intervals of an average


def test_the_interval_of_independent_pieces_is_student_s() -> None:
    """By hand, of pieces whose neighbours are as unlike as can be."""
    means = torch.tensor([[1.0, 0.5], [2.0, 0.5], [1.0, 0.5], [2.0, 0.5]], dtype=torch.float64)
    assert batch_means.half_width(means) == pytest.approx(
        3.182446305284263 * math.sqrt(1 / 3) / 2, rel=1e-12
    )
    # In another order neighbours are alike: r is (1 - 1 + 1) / 4.
    means = means[[0, 2, 1, 3]]
    assert batch_means.half_width(means) == pytest.approx(
        3.182446305284263 * math.sqrt(1 / 3) / 2 * math.sqrt(1.25 / 0.75), rel=1e-12
    )


@pytest.mark.parametrize(
    ("kept", "least", "width"), [(0.0, 0.90, 0.1), (0.9, 0.88, 0.4), (0.99, 0.85, 1.2)]
)
def test_the_interval_holds_the_mean_about_as_often_as_it_says(
    kept: float, least: float, width: float
) -> None:
    """Whatever the memory of the curve, of 200 curves of one column each."""
    rows = smooth(1024, 200, 0, kept)
    means = rows.view(16, 64, 200).mean(1)
    halves = [batch_means.half_width(column[:, None]) for column in means.T]
    held = [abs(float(mean)) <= half for mean, half in zip(rows.mean(0), halves, strict=True)]
    assert sum(held) / 200 >= least
    assert sorted(halves)[100] < width


@pytest.mark.parametrize("drift", [1e-6, 1e-3, 1.0])
def test_what_drifts_is_known_to_about_half_of_what_it_went_through(drift: float) -> None:
    """Gone on with for as long again, its average would be half of that elsewhere; without the
    correlation of pieces it would seem known to a sixth."""
    rows = drift * torch.arange(160, dtype=torch.float64)[:, None] * torch.ones(1, 3).double()
    for steps in (8, 16, 64, 160):
        half = batch_means.half_width(pieces.means(curve(rows[:steps]), steps))
        assert 0.35 < half / (drift * steps) < 0.6


def test_what_never_moves_is_known_and_of_two_pieces_nothing_is() -> None:
    assert batch_means.half_width(torch.full((8, 3), 0.25, dtype=torch.float64)) == 0
    assert batch_means.half_width(noise(2, 3, 0)) == math.inf


# In DoReMi


def played(gains: Tensor, options: Options) -> list[State]:
    """States up to the one that is settled, if any is."""
    states = [doremi.init(gains.shape[1], len(gains), options)]
    for row in gains:
        if doremi.settled(states[-1], options):
            break
        stats = Stats(10 * row, torch.full_like(row, 10))
        states.append(doremi.update(states[-1], stats, options))
    return states


def steady(steps: int, seed: int) -> Tensor:
    """Gains of a game near its end: whoever had more gains less next time."""
    gains = torch.zeros(steps, 4, dtype=torch.float64)
    drawn, ahead = 0.3 * noise(steps, 4, seed), torch.zeros(4, dtype=torch.float64)
    for t in range(steps):
        gains[t] = 1 + drawn[t] - 0.5 * ahead
        ahead = ahead + gains[t] - gains[t].mean()
    return gains


@pytest.mark.slow
def test_it_is_settled_when_the_average_is_known_and_not_before() -> None:
    gains = steady(3000, 0)
    ends = {}
    for wanted in (0.04, 0.02, 0.01):
        options = Options(settled=wanted)
        states = played(gains, options)
        ends[wanted] = int(states[-1].step)
        assert doremi.settled(states[-1], options)
        assert not any(doremi.settled(state, options) for state in states[:-1])
        whole = doremi.result(played(gains, Options())[-1])
        # Of four domains at 95 %, and the whole run is not known better than to a part of it.
        assert float((doremi.result(states[-1]) - whole).abs().max()) < 2 * wanted
    assert 750 <= ends[0.04] <= ends[0.02] <= ends[0.01] < 3000


def test_weights_that_have_hardly_moved_yet_are_not_taken_for_settled() -> None:
    """A quarter of the steps is looked at, though the interval is narrow from the first."""
    gains = 1e-3 * noise(400, 4, 0)
    states = played(gains, Options(settled=0.01))
    assert int(states[-1].step) >= 100 and doremi.settled(states[-1], Options(settled=0.01))


def test_weights_that_drift_do_not_settle_and_null_never_ends() -> None:
    gains = torch.tensor([[0.1, 0.0, 0.0, 0.0]], dtype=torch.float64).expand(200, 4)
    assert len(played(gains, Options(step_size=0.1, settled=0.05))) == 201
    assert len(played(steady(300, 0), Options())) == 301
    same = played(steady(300, 0), Options(settled=1e-9))
    for one, other in zip(same, played(steady(300, 0), Options()), strict=True):
        assert torch.equal(one.weights, other.weights)


def test_the_start_is_not_among_what_is_averaged() -> None:
    options = Options(warmup=0.5, settled=0.05)
    states = played(steady(400, 0), options)
    assert int(states[-1].step) >= 300 and math.isinf(float(states[200].half_width))
    assert "half_width" not in doremi.record(states[200], Stats(*torch.ones(2, 4).double()))
    line = doremi.record(states[-1], Stats(*torch.ones(2, 4).double()))
    assert float(line["half_width"]) <= 0.05
