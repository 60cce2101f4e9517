"""Mixtures from sizes alone, and points on the simplex."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_train.methods import heuristics, simplex
from doremi_train.methods.heuristics import Options

SIZES = torch.tensor([100, 900, 9000])


def test_natural_is_in_proportion_to_size() -> None:
    assert heuristics.natural(SIZES, 1.0, Options()).tolist() == pytest.approx([0.01, 0.09, 0.9])


def test_temperature_runs_from_natural_to_uniform() -> None:
    natural = heuristics.temperature(SIZES, 1.0, Options(temperature=1.0))
    torch.testing.assert_close(natural, heuristics.natural(SIZES, 1.0, Options()))
    flat = heuristics.temperature(SIZES, 1.0, Options(temperature=1e9))
    torch.testing.assert_close(flat, simplex.uniform(3), rtol=0, atol=1e-8)
    root = heuristics.temperature(SIZES, 1.0, Options(temperature=2.0))
    torch.testing.assert_close(root, simplex.normalize(SIZES.double().sqrt()))


def test_unimax_fills_the_smallest_first_and_shares_the_rest() -> None:
    weights = heuristics.unimax(SIZES, 3000.0, Options(max_epochs=4.0))
    assert (weights * 3000).tolist() == pytest.approx([400, 1300, 1300])


def test_unimax_is_uniform_where_no_cap_binds_and_natural_where_all_do() -> None:
    assert heuristics.unimax(SIZES, 30.0, Options()).tolist() == pytest.approx([1 / 3] * 3)
    everything = heuristics.unimax(SIZES, 40_000.0, Options())
    torch.testing.assert_close(everything, heuristics.natural(SIZES, 1.0, Options()))


def test_unimax_refuses_a_budget_beyond_all_epochs() -> None:
    with pytest.raises(ValueError, match=r"than max_epochs=4 epochs"):
        heuristics.unimax(SIZES, 40_001.0, Options())


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=8), st.floats(0.01, 1), st.floats(0.5, 20)
)
def test_unimax_never_repeats_beyond_the_cap_and_no_open_domain_gets_less(
    sizes: list[int], part: float, cap: float
) -> None:
    budget = part * cap * sum(sizes)
    tokens = heuristics.unimax(torch.tensor(sizes), budget, Options(max_epochs=cap)) * budget
    most = float(tokens.max())
    for size, got in zip(sizes, tokens.tolist(), strict=True):
        assert got <= cap * size * (1 + 1e-9)
        assert got == pytest.approx(most) or got == pytest.approx(cap * size)


@pytest.mark.parametrize("values", [[1.0, -0.1], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_what_is_not_a_mixture_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="not a mixture"):
        simplex.normalize(values)


def test_effective_number_of_domains() -> None:
    assert simplex.effective_domains(simplex.uniform(5)) == pytest.approx(5)
    assert simplex.effective_domains(torch.tensor([1.0, 0.0])) == pytest.approx(1)


def test_total_variation_is_between_none_and_all() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert simplex.total_variation(a, a) == 0 and simplex.total_variation(a, b) == 1
