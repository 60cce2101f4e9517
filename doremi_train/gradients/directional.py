"""Curvature along a direction of the parameters, by differences of gradients."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from doremi_train.gradients.factors import Direction


def curvature(
    model: nn.Module, gradient: Callable[[], Direction], along: Direction, size: float = 1e-3
) -> float:
    """⟨G, H G⟩ for G = `along`, from the slopes ⟨gradient(), G⟩ at θ ± ε G with |ε G| = size ·
    |θ|."""
    epsilon = relative_step(model, along, size)

    def slope() -> Tensor:
        with torch.enable_grad():
            here = gradient()
        return torch.stack(
            [(here[name].double() * part).sum() for name, part in along.items()]
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
