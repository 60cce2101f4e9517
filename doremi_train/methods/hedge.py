"""Hedge: the exponentiated update as a game of T rounds against the best of K fixed choices, whose
step size follows from the gains (Freund and Schapire 1997,
https://doi.org/10.1006/jcss.1997.1504; Cesa-Bianchi and Lugosi 2006, theorem 2.2).

With gains λ_t (K,) and S_t, the largest range max_k λ_s[k] − min_k λ_s[k] of any s ≤ t:
  η_t = √(8 ln K / T) / S_t
  α_t ∝ exp(η_t Σ_{s≤t} λ_s) ∝ α_{t−1}^(η_t / η_{t−1}) · exp(η_t λ_t)
Gains times a number, or plus one, give the same α. Where the range stays what it was in the first
round, the last line is the update with a fixed step size, and the regret at most S √(T ln K / 2);
where it is not known ahead, the bound is `regret_bound`.

AdaHedge (de Rooij et al. 2014), which asks for no T, was tried on recorded gains: once they are
small its η is 1 to 2, and a domain has all the weight (docs/measured.md).

K choices, T rounds.
"""

import math

import torch
from torch import Tensor


def spread(gains: Tensor) -> Tensor:
    """() range of gains (K,)."""
    return gains.max() - gains.min()


def step_size(span: Tensor, choices: int, rounds: int) -> Tensor:
    """() η for the range `span` () so far, in one over its unit; 0 where no two gains differed,
    for then there is nothing to move by."""
    wanted = math.sqrt(8 * math.log(choices) / rounds)
    return torch.where(span > 0, wanted / span.clamp_min(torch.finfo(span.dtype).tiny), 0.0)


def regret_bound(span: float, choices: int, rounds: int, smoothing: float = 0.0) -> float:
    """Most that the best choice gains above the weights, Σ_t (λ_t[k] − α_{t−1} · λ_t), in `rounds`
    rounds or fewer where η is for that many, if no range was above `span`.

    The potential costs ln K / η_T. A round costs η S² / 8 where the range was known; a new record
    of up to twice the old one costs η_{t−1} s² / 8 ≤ η_T S² / 4; and those that are higher cost no
    more than themselves, 2 S together. Every smoothing by c costs −ln(1 − c) / η_T.
    """
    pace = math.sqrt(8 * math.log(choices) / rounds)
    if pace == 0:
        return 0.0
    forgotten = -math.log1p(-smoothing) * rounds / pace
    return span * (math.log(choices) / pace + rounds * pace / 4 + 2 + forgotten)
