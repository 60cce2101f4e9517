"""GREATS: greedy selection of a batch by its effect on the validation loss (Wang et al., NeurIPS
2024).

Of N candidates with gradients g_i (of the mean loss of their tokens), k are picked for a step of
size η against their mean gradient, so each counts η/k. The drop in validation loss, to second
order, is greedily made large:

    φ_i = (η/k) ⟨g_i, g_val⟩
    k times: i* = argmax φ, and φ_i ← φ_i − (η/k)² ⟨g_i, H g_i*⟩ for all that are left.

The second term keeps what is alike from being picked twice. As published, H is the identity and a
pick counts η: then the term is too small to change any pick (tested). So here H ≈ λ I with λ
measured along the gradient (`gradients.directional.curvature`), and a cosine cap refuses what is
nearly the same as a pick. With an optimiser that multiplies gradients by P, g_val is P g_val, and
λ = ⟨P g, H P g⟩ / ⟨g, g⟩.

N candidates, k picks, R numbers of a sketch. Everything here is float64 on the host, the same on
every process.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from doremi_train.config import STRICT, PositiveFloat


@dataclass(frozen=True, config=STRICT)
class Options:
    curvature: Literal["calibrated", "identity"] = "calibrated"
    """Curvature of the loss: measured along the gradient, or the identity, as published."""

    cosine_cap: PositiveFloat | None = 0.95
    """Cosine to a pick above which a candidate is left out, while there are others; null: none is.
    """


class Picks(NamedTuple):
    picked: Tensor  # (k,) into the candidates, in the order of picking
    score: Tensor  # (k,) first-order term of each pick, nats
    penalty: Tensor  # (k,) what the picks before took off it

    @property
    def ratio(self) -> float:
        """All penalties over the size of all scores."""
        return float(self.penalty.sum() / self.score.abs().sum().clamp_min(1e-300))


def pick(
    gain: Tensor,
    gram: Tensor,
    count: int,
    step_size: float,
    curvature: float,
    cosine_cap: float | None,
) -> Picks:
    """The greedy, from gain (N,) = ⟨g_i, g_val⟩ and gram (N, N).

    `step_size` is what one pick counts. A candidate without gradient (no token carries a loss) or
    with one that is not finite is never picked, so there may be fewer than `count` picks.
    """
    # Of so few, torch is slower.
    values, products = (tensor.double().cpu().numpy() for tensor in (gain, gram))
    norms = np.sqrt(products.diagonal())
    left = np.isfinite(values) & np.isfinite(norms) & (norms > 0)
    apart = left.copy()  # from every pick
    first = step_size * values
    penalty = np.zeros_like(first)
    taken = np.zeros_like(first)
    index: list[int] = []
    while len(index) < count and left.any():
        best = int(np.where(apart if apart.any() else left, first - penalty, -np.inf).argmax())
        index.append(best)
        left[best] = apart[best] = False
        if cosine_cap is not None:
            apart &= ~(products[best] > cosine_cap * norms * norms[best])
        taken[best] = penalty[best]
        penalty += step_size**2 * curvature * products[best]
    picked = torch.tensor(index, dtype=torch.int64)
    return Picks(picked, torch.from_numpy(first)[picked], torch.from_numpy(taken)[picked])


def top(scores: Tensor, count: int) -> Picks:
    """The highest of scores (N,); ties go to the first, and what is not finite is never picked."""
    scores = scores.double().cpu()
    order = torch.where(torch.isfinite(scores), scores, -torch.inf).argsort(
        descending=True, stable=True
    )
    picked = order[torch.isfinite(scores)[order]][:count]
    return Picks(picked, scores[picked], torch.zeros(len(picked), dtype=torch.float64))
