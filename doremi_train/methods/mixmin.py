"""MixMin: the mixture of experts that the target needs (Thudi et al. 2025,
https://arxiv.org/abs/2502.10510).

A model p_k is trained on each domain alone. The model of a mixture λ of the data is taken for the
mixture of these:
  λ* = argmin −E_target log Σ_k λ_k p_k(y|x),  low ≤ λ ≤ high, Σ λ = 1
over the tokens of a target set, which is convex. A new domain costs one more model.

It is solved by expectation maximisation: with r_k the mean over tokens of λ_k p_k / Σ_j λ_j p_j,
the next λ maximises Σ_k r_k log λ_k, which within the box is clip(s · r, low, high). No step makes
the objective worse.

K domains, N tokens of the target. Losses are nats.
"""

from typing import NamedTuple

import numpy as np
from pydantic.dataclasses import dataclass

from doremi_train.config import STRICT, Fraction
from doremi_train.methods.box import Box, Floats, distance, project

STEPS = 20_000


@dataclass(frozen=True, config=STRICT)
class Options:
    floor: Fraction = 0.0
    """Least weight of a domain, as far as the caps leave it."""


class Solution(NamedTuple):
    weights: Floats  # (K,)
    loss: float  # of the mixed experts at these, nats per token


def solve(losses: Floats, within: Box) -> Solution:
    """The best mixture, from losses (K, N) of every expert on the target's tokens."""
    best = losses.min(0)
    likelihood = np.exp(best - losses)  # (K, N) relative to each token's best expert: no overflow
    weights = project(np.full(len(losses), 1 / len(losses)), within)
    for _ in range(STEPS):
        share = weights * (likelihood / (weights @ likelihood)).mean(1)
        following = project(share, within)
        if distance(following, weights) < 1e-9:
            weights = following
            break
        weights = following
    return Solution(weights, mixed(losses, weights))


def mixed(losses: Floats, weights: Floats) -> float:
    """Mean loss of the mixture (K,) of experts with losses (K, N)."""
    best = losses.min(0)
    return float((best - np.log(weights @ np.exp(best - losses))).mean())
