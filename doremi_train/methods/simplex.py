"""Points on the probability simplex, what every mixture is made of; and sums by domain, what is
learned from.

K domains, B sequences, T tokens a sequence.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(domains: int) -> Tensor:
    """(K,) float64, 1/K each."""
    return torch.full((domains,), 1 / domains, dtype=torch.float64)


def normalize(values: Tensor | Sequence[float]) -> Tensor:
    """(K,) non-negative → (K,) float64 with sum 1.

    Raises ValueError where an entry is negative or not finite, or all are 0.
    """
    point = torch.as_tensor(values, dtype=torch.float64)
    if not torch.isfinite(point).all() or (point < 0).any() or point.sum() <= 0:
        raise ValueError(
            f"not a mixture: {point.tolist()}; entries must be finite and ≥ 0, with one above 0"
        )
    return point / point.sum()


def sums(losses: Tensor, domain: Tensor, domains: int) -> tuple[Tensor, Tensor]:
    """(…, K) sums of losses (…, B, T), and (K,) how many tokens they are of, for ids (B,) below
    `domains`. Float64, without a gradient."""
    # Rows first, then domains: the sum of a sequence does not depend on the batch it came in.
    rows = losses.detach().double().sum(-1)
    total = rows.new_zeros(*rows.shape[:-1], domains).index_add_(-1, domain, rows)
    # Counted by adding: torch.bincount would make the host wait for the device.
    length = rows.new_full((len(domain),), losses.shape[-1])
    return total, length.new_zeros(domains).index_add_(0, domain, length)


def exponentiated(
    weights: Tensor, gain: Tensor, smoothing: float, power: float | Tensor = 1.0
) -> Tensor:
    """(K,) one exponentiated-gradient step: ∝ α^power exp(gain), then the part `smoothing` of it
    made uniform."""
    # softmax in log space: exp(gain) overflows float64 beyond 709, softmax never does.
    raised = torch.softmax(power * weights.log() + gain, dim=0)
    return (1 - smoothing) * raised + smoothing / len(weights)


def entropy(weights: Tensor) -> float:
    """H(α) = −Σ α log α in nats; 0 log 0 = 0."""
    return float(torch.special.entr(weights).sum())


def effective_domains(weights: Tensor) -> float:
    """exp(H(α)): K for the uniform mixture, 1 for a one-hot."""
    return math.exp(entropy(weights))


def total_variation(a: Tensor, b: Tensor) -> float:
    """½ Σ |a − b|, in [0, 1]."""
    return float((a - b).abs().sum() / 2)
