"""Mixtures from sizes alone: free, and the bar that many published methods fail to clear.

natural n_k / Σ n; uniform; temperature n_k^{1/τ}; UniMax (Chung et al. 2023, https://arxiv.org/abs/2304.09151):
every domain the same number of tokens, but none repeated for more than N epochs.

K domains; `sizes` (K,) are tokens of the training split, `budget` the tokens of the run.
"""

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from doremi_train.config import STRICT, PositiveFloat
from doremi_train.methods import simplex


@dataclass(frozen=True, config=STRICT)
class Options:
    temperature: PositiveFloat = 2.0
    """Temperature τ of the mixture of that name: 1 is natural, large is uniform."""

    max_epochs: PositiveFloat = 4.0
    """Most passes of the final run over a domain; what is above goes to the others."""


def natural(sizes: Tensor, budget: float, options: Options) -> Tensor:
    """Weights in proportion to size."""
    return simplex.normalize(sizes)


def uniform(sizes: Tensor, budget: float, options: Options) -> Tensor:
    """Weights that are the same for every domain, whatever its size."""
    return simplex.uniform(len(sizes))


def temperature(sizes: Tensor, budget: float, options: Options) -> Tensor:
    """∝ n_k^{1/τ}, computed in log space."""
    return torch.softmax(sizes.double().log() / options.temperature, dim=0)


def unimax(sizes: Tensor, budget: float, options: Options) -> Tensor:
    """Water-filling, smallest domain first: b_k = min(budget left / domains left, N · n_k).

    Raises ValueError where the budget exceeds N epochs of all the data.
    """
    if budget > options.max_epochs * float(sizes.sum()):
        raise ValueError(
            f"a budget of {budget:.3g} tokens is more than max_epochs={options.max_epochs:g} "
            f"epochs of all {float(sizes.sum()):.3g} tokens; raise it, or train for fewer tokens"
        )
    filled = torch.zeros(len(sizes), dtype=torch.float64)
    left = float(budget)
    for done, k in enumerate(torch.argsort(sizes, stable=True).tolist()):
        filled[k] = min(left / (len(sizes) - done), options.max_epochs * float(sizes[k]))
        left -= float(filled[k])
    return simplex.normalize(filled)
