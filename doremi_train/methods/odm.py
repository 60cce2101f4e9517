"""ODM: online data mixing (Albalak et al. 2023, https://arxiv.org/abs/2312.02406), EXP3 with losses
as rewards.

With the exploration rate E_t = min(1/K, √(ln K / (K t))), after step t:
  R̂_k ← 0.9 R̂_k + 0.1 · L_k / π_k    L_k: loss of the batch from domain k, as part of the whole
  π_k = (1 − K E_{t+1}) exp(E_t R̂_k) / Σ_j exp(E_t R̂_j) + E_{t+1}
Until the warm-up is over the prior is drawn from.

L_k counts a domain as often as it was drawn, so L_k / π_k is its loss per token on average; one
that is absent has reward 0, and the division makes up for it.

K domains, B sequences, T tokens a sequence.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from doremi_train.methods import online
from doremi_train.methods.online import (
    Drawn,
    Options,
    Stats,
    observe,
    result,
    sampling,
    token_wise,
    weigh,
)

KEPT = 0.9  # of R̂ from step to step

__all__ = [
    "Options",
    "Stats",
    "init",
    "observe",
    "record",
    "result",
    "sampling",
    "token_wise",
    "update",
    "weigh",
]


class State(NamedTuple):
    weights: Tensor  # (K,) of the next batch
    drawn: Tensor  # (K,) tokens so far
    step: Tensor  # ()
    steps: Tensor  # () of the run
    reward: Tensor  # (K,) R̂, nats per token


def init(domains: int, steps: int, options: Options) -> State:
    weights, drawn = online.start(options, steps)
    return State(weights, *drawn, torch.zeros(domains, dtype=torch.float64))


def exploration(step: int, domains: int) -> float:
    """E_t of step t, from 1."""
    return min(1 / domains, math.sqrt(math.log(domains) / (domains * step)))


def update(state: State, stats: Stats, options: Options) -> State:
    """The mixture of the next batch, from the losses of this one."""
    drawn = online.add(Drawn(state.drawn, state.step, state.steps), stats)
    t, domains = int(drawn.step), len(state.weights)
    seen = torch.where(state.weights > 0, stats.loss / stats.tokens.sum() / state.weights, 0)
    reward = KEPT * state.reward + (1 - KEPT) * seen
    if online.warming(drawn, options):
        wanted = torch.tensor(options.prior, dtype=torch.float64)
    else:
        explored = exploration(t + 1, domains)
        wanted = (1 - domains * explored) * torch.softmax(
            exploration(t, domains) * reward, 0
        ) + explored
    return State(online.within(wanted, drawn, options), *drawn, reward)


def record(state: State, stats: Stats) -> dict[str, Tensor]:
    """The mixture of the next batch, what moved it, and the tokens of this one."""
    return {"weights": state.weights, "reward": state.reward, "tokens": stats.tokens.long()}
