"""Derivatives along a direction of the parameters, forward and by differences."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from doremi_train.gradients.factors import Direction


def forward_derivative(
    model: nn.Module, losses: Callable[[Callable[..., Any]], Tensor], direction: Direction
) -> Tensor:
    """⟨g_i, G⟩ by forward-mode differentiation, exact, at the cost of about three forwards.

    `losses(call)` is to compute the losses (n, …) with `call(…)` in the place of `model(…)`.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters() if name in direction}

    def at(values: dict[str, Tensor]) -> Tensor:
        return losses(
            lambda *inputs, **named: torch.func.functional_call(model, values, inputs, named)
        )

    # The fused kernels of attention have no forward derivative.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.func.jvp(at, (parameters,), (dict(direction),))[1]


@torch.no_grad()
def forward_difference(
    model: nn.Module, losses: Callable[[], Tensor], direction: Direction, size: float = 1e-3
) -> Tensor:
    """⟨g_i, G⟩ about, by two forwards at θ ± ε G with |ε G| = size · |θ|: for scoring only."""
    epsilon = relative_step(model, direction, size)
    above, below = (_moved(model, direction, step, losses) for step in (epsilon, -epsilon))
    return (above - below) / (2 * epsilon)


def curvature(
    model: nn.Module, gradient: Callable[[], Direction], along: Direction, size: float = 1e-3
) -> float:
    """⟨G, H G⟩ for G = `along`, from the slopes ⟨gradient(), G⟩ at θ ± ε G with |ε G| = size ·
    |θ|."""
    epsilon = relative_step(model, along, size)

    def slope() -> Tensor:
        with torch.enable_grad():
            found = gradient()
        return torch.stack(
            [(found[name].double() * part).sum() for name, part in along.items()]
        ).sum()

    above, below = (_moved(model, along, step, slope) for step in (epsilon, -epsilon))
    return float(above - below) / (2 * epsilon)


def relative_step(model: nn.Module, direction: Direction, size: float) -> float:
    """ε such that |ε G| = size · |θ|, over the parameters that G has."""
    parameters = dict(model.named_parameters())
    length, along = (
        sum(float(part.detach().double().square().sum()) for part in parts) ** 0.5
        for parts in ([parameters[name] for name in direction], direction.values())
    )
    if along == 0:
        raise ValueError("the direction is 0")
    return size * length / along


def _moved(
    model: nn.Module, direction: Direction, step: float, function: Callable[[], Tensor]
) -> Tensor:
    """function() at θ + step · G; θ is put back bit for bit."""
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].detach().clone() for name in direction}
    with torch.no_grad():
        try:
            for name, along in direction.items():
                parameters[name].add_(along, alpha=step)
            return function()
        finally:
            for name, value in kept.items():
                parameters[name].copy_(value)
