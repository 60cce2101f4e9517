"""LESS against naive float64 oracles, its projection, its store, and whole commands on planted
tasks."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from doremi_train.methods import less
from doremi_train.methods.less import Moments, Options

# The direction


def state(
    t: int, scale: float, shape: tuple[int, ...]
) -> tuple[torch.optim.AdamW, torch.nn.Parameter, Tensor]:
    """AdamW without decay after t − 1 real steps in float64 (of which the last few hundred decide),
    its parameter, and the gradient of the next."""
    generator = torch.Generator().manual_seed(t)
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = torch.optim.AdamW(
        [parameter], lr=3e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    for _ in range(t - 1):
        parameter.grad = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return (
        optimizer,
        parameter,
        scale * torch.randn(shape, generator=generator, dtype=torch.float64),
    )


def moments(optimizer: torch.optim.AdamW, parameter: torch.nn.Parameter) -> Moments:
    found = optimizer.state.get(parameter) or {
        "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter),
        "step": 0,
    }  # fmt: skip
    return Moments(found["exp_avg"], found["exp_avg_sq"], int(found["step"]), (0.9, 0.999), 1e-8)


@pytest.mark.parametrize("t", [1, 105, 1000])
@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0])
def test_adamw_moves_by_the_direction(t: int, scale: float) -> None:
    optimizer, parameter, gradient = state(t, scale, (5, 7))
    expected = less.direction(gradient, moments(optimizer, parameter), Options())
    with torch.no_grad():
        parameter.zero_()  # its difference then loses no digits
    parameter.grad = gradient
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), -3e-2 * expected, rtol=1e-12, atol=0)


def test_switches_give_the_printed_form_and_the_released_code() -> None:
    optimizer, parameter, g = state(105, 1e-4, (11,))
    found = moments(optimizer, parameter)
    m, v = 0.9 * found.first + 0.1 * g, 0.999 * found.second + 0.001 * g**2
    printed = (m / (1 - 0.9**105)) / (v / (1 - 0.999**105) + 1e-8).sqrt()
    released = m / torch.sqrt(v + 1e-8)  # get_adam_gradient of the published code
    torch.testing.assert_close(
        less.direction(g, found, Options(epsilon="inside")), printed, rtol=1e-12, atol=0
    )
    both = Options(epsilon="inside", bias_correction=False)
    torch.testing.assert_close(less.direction(g, found, both), released, rtol=1e-12, atol=0)
    assert not torch.allclose(printed, released) and not torch.allclose(
        printed, less.direction(g, found, Options())
    )


def test_directions_of_a_batch_are_those_of_its_examples() -> None:
    optimizer, parameter, _ = state(3, 1.0, (4, 3))
    gradients = torch.randn(6, 4, 3, dtype=torch.float64)
    found = moments(optimizer, parameter)
    one_by_one = torch.stack([less.direction(g, found, Options()) for g in gradients])
    assert torch.equal(less.direction(gradients, found, Options()), one_by_one)


# Aggregation


def test_the_order_of_sums_and_maxima_matters() -> None:
    """Two checkpoints, two examples, three subtasks by hand: other orders give other numbers, and
    another ranking."""
    cosines = torch.tensor(
        [[[0.9, 0.0, 0.0], [0.5, 0.1, 0.4]], [[-0.6, 0.0, 0.3], [0.3, 0.1, 0.0]]]
    )
    rates = torch.tensor([2.0, 1.0])
    found = less.score(less.influence(cosines, rates))
    torch.testing.assert_close(found, torch.tensor([1.2, 1.3]))
    of_maxima = (rates[:, None] * cosines.amax(2)).sum(0)
    means = (rates[:, None] * cosines.mean(2)).sum(0)
    torch.testing.assert_close(of_maxima, torch.tensor([2.1, 1.3]))
    torch.testing.assert_close(means, torch.tensor([0.5, 0.8]))
    assert less.top(found, 1).item() == 1 and less.top(of_maxima, 1).item() == 0


def test_ties_go_to_the_first_and_what_has_no_score_is_never_taken() -> None:
    scores = torch.tensor([0.5, math.nan, 0.7, 0.5, math.inf, -math.inf])
    assert less.top(scores, 2).tolist() == [2, 0]
    assert less.top(scores, 6).tolist() == [2, 0, 3]


# Projection


def projected(
    values: Tensor, cuts: list[int], size: int = 64, seed: int = 0, name: str = "layer.weight"
) -> Tensor:
    projection = less.Projection(len(values), size, seed, values)
    for start, end in itertools.pairwise([0, *cuts, values.shape[1]]):
        projection.add(name, values.shape[1], start, values[:, start:end])
    return projection.result()


def test_a_projection_has_the_same_bits_in_any_batch_and_however_it_is_cut() -> None:
    values = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    whole = projected(values, [])
    for cuts in ([500], [1, 2, 63, 64, 65, 700], [31, 97, 998]):
        assert torch.equal(projected(values, cuts), whole)
    assert torch.equal(torch.cat([projected(values[:2], [300]), projected(values[2:], [])]), whole)
    assert not torch.equal(projected(values, [], seed=1), whole)
    assert not torch.equal(projected(values, [], name="other"), whole)


def test_a_projection_is_a_matrix_of_one_sign_a_column() -> None:
    matrix = projected(torch.eye(1000, dtype=torch.float64), [])  # (1000, 64)
    assert torch.equal(matrix.abs().sum(1), torch.ones(1000, dtype=torch.float64))
    assert set(matrix.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert abs(matrix.sum().item()) < 4 * 1000**0.5
    values = torch.randn(3, 1000, dtype=torch.float64)
    torch.testing.assert_close(projected(values, [123]), values @ matrix, rtol=1e-12, atol=1e-12)


def test_a_projection_keeps_inner_products_on_average() -> None:
    pair = torch.randn(2, 3000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    pair[1] += pair[0]
    found = torch.tensor(
        [float(torch.prod(projected(pair, [], seed=seed), 0).sum()) for seed in range(200)]
    )
    exact, error = float(pair[0] @ pair[1]), float(found.std()) / 200**0.5
    assert abs(float(found.mean()) - exact) < 4 * error
    # The variance of a projection to k numbers is about (|x|²|y|² + ⟨x, y⟩²) / k.
    expected = float((pair[0].square().sum() * pair[1].square().sum() + exact**2) / 64) ** 0.5
    assert 0.7 * expected < float(found.std()) < 1.3 * expected


def test_the_projection_of_a_stored_feature_is_that_of_years_ago() -> None:
    """Features on disk are met with gradients projected later: the projection may never change."""
    found = projected(torch.arange(1, 101, dtype=torch.float64)[None], [], size=8, seed=3)
    assert found.tolist() == [[229.0, -429.0, 251.0, -9.0, -82.0, 337.0, -314.0, -103.0]]
