"""ADO: adaptive data optimization (Jiang et al. 2024, https://arxiv.org/abs/2410.11820).

Every domain has a law L_k(n) = ε_k + β_k n^{−α_k}, fitted again and again to its losses so far;
what the next sample teaches about it is −dL_k/dn = α_k (L_k(n) − ε_k) / n. With a prior μ and π_t
the mixture of step t:
  h_t = 0.9 h_{t−1} + 0.1 π_t        what it was drawn from lately, to which learning is credited
  ρ_t ∝ μ · √h_t · (−dL/dn), at least δ
  ρ̄_t = (1 − 1/(t+1)) ρ̄_{t−1} + ρ_t / (t+1)
  π_{t+1} = 0.9 ρ̄_{t-1} + 0.1 ρ_t
Until the warm-up is over the prior is drawn from.

As in the paper's code n counts the steps of the run, and α is taken for 0.05 at least. The law is
found on a grid of α (for each of which ε and β are linear least squares) instead of by descent from
many starts, so that it is the same on every machine; the losses are means over a hundredth of the
run.

K domains, B sequences, T tokens a sequence, N pieces of the run, A values of α.
"""

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

PIECES = 100  # of a run, N
RECENT, SMOOTH = 0.9, 0.9  # of h, and the part of ρ̄ in π
EXPONENTS = torch.linspace(0.01, 0.8, 80, dtype=torch.float64)  # (A,)
LEAST_EXPONENT = 0.05
# Of the sum of squares: errors that are no nearer to each other than losses are rounded.
_SAME = 1e-10

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


class Law(NamedTuple):
    floor: Tensor  # (K,) ε, nats
    above: Tensor  # (K,) L − ε at the last n that was fitted
    exponent: Tensor  # (K,) α


class State(NamedTuple):
    weights: Tensor  # (K,) of the next batch
    drawn: Tensor  # (K,) tokens so far
    step: Tensor  # ()
    steps: Tensor  # () of the run
    recent: Tensor  # (K,) h
    average: Tensor  # (K,) ρ̄
    speed: Tensor  # (K,) −dL/dn, nats a step; 0 before the first fit
    law: Tensor  # (3, K) ε, L − ε at `fitted`, α
    fitted: Tensor  # () the n of the last fit; 0 before it
    loss: Tensor  # (N, K) sums of losses of every piece
    tokens: Tensor  # (N, K)


def init(domains: int, steps: int, options: Options) -> State:
    weights, drawn = online.start(options, steps)
    prior = torch.tensor(options.prior, dtype=torch.float64)
    pieces = torch.zeros(PIECES, domains, dtype=torch.float64)
    law = torch.zeros(3, domains, dtype=torch.float64)
    return State(
        weights, *drawn, prior, prior, torch.zeros_like(prior), law, torch.tensor(0), pieces, pieces
    )


def update(state: State, stats: Stats, options: Options) -> State:
    """The mixture of the next batch, from the losses of this one and those before."""
    drawn = online.add(Drawn(state.drawn, state.step, state.steps), stats)
    t = int(drawn.step)
    here = torch.zeros(PIECES, 1, dtype=torch.float64)
    here[(t - 1) * PIECES // int(drawn.steps)] = 1
    state = state._replace(
        drawn=drawn.tokens,
        step=drawn.step,
        recent=RECENT * state.recent + (1 - RECENT) * stats.tokens / stats.tokens.sum(),
        loss=state.loss + here * stats.loss,
        tokens=state.tokens + here * stats.tokens,
    )
    prior = torch.tensor(options.prior, dtype=torch.float64)
    if online.warming(drawn, options):
        return state._replace(weights=online.within(prior, drawn, options))
    if t % options.every == 0 or not state.fitted:
        state = state._replace(law=torch.stack(_fit(state, options)), fitted=drawn.step)
    law = Law(*state.law)
    exponent = law.exponent.clamp_min(LEAST_EXPONENT)
    speed = exponent * law.above * (t / int(state.fitted)) ** -law.exponent / t
    wanted = prior * state.recent.sqrt() * speed
    wanted = torch.where(wanted.sum() > 0, wanted, prior)  # where nothing is learned any more
    wanted = (wanted / wanted.sum()).clamp_min(options.floor)
    wanted = wanted / wanted.sum()
    mixed = SMOOTH * state.average + (1 - SMOOTH) * wanted
    return state._replace(
        weights=online.within(mixed, drawn, options),
        average=state.average + (wanted - state.average) / (t + 1),
        speed=speed,
    )


def _fit(state: State, options: Options) -> Law:
    """Law of the pieces of the run so far, but for the first half of the warm-up, where the loss
    falls by other laws."""
    begun = int(state.step) * PIECES // int(state.steps) + 1
    skipped = min(int(options.warmup / 2 * PIECES), begun - 2) if begun > 2 else 0
    n = (torch.arange(PIECES, dtype=torch.float64) + 0.5) * int(state.steps) / PIECES
    kept = slice(skipped, min(begun, PIECES))
    return fit(n[kept], state.loss[kept], state.tokens[kept], float(state.step))


def fit(n: Tensor, loss: Tensor, tokens: Tensor, now: float) -> Law:
    """Least squares of ε + β n^{−α} to the mean losses of pieces at n (N,): loss (N, K) is summed
    over tokens (N, K), which are their weights. Neither ε nor what is above it is below 0."""
    x = (n / now) ** -EXPONENTS[:, None]  # (A, N)
    y = loss / tokens.clamp_min(1)
    total, of_y, of_yy = tokens.sum(0), (tokens * y).sum(0), (tokens * y * y).sum(0)  # (K,)
    of_x, of_xx, of_xy = x @ tokens, x**2 @ tokens, x @ (tokens * y)  # (A, K)
    above = (of_xy * total - of_x * of_y) / (of_xx * total - of_x**2).clamp_min(1e-300)
    above = above.clamp_min(0)
    floor = (of_y - above * of_x) / total.clamp_min(1e-300)
    above = torch.where(floor < 0, of_xy / of_xx.clamp_min(1e-300), above)
    floor = floor.clamp_min(0)
    error = (
        of_yy
        - 2 * floor * of_y
        - 2 * above * of_xy
        + floor**2 * total
        + 2 * floor * above * of_x
        + above**2 * of_xx
    )
    # Through two pieces goes a law of every α: the slowest that fits as well is taken, not what
    # rounding puts first.
    best = (error <= error.amin(0) + _SAME * of_yy).int().argmax(0)  # (K,)
    k = torch.arange(len(best))
    return Law(floor[best, k], above[best, k], EXPONENTS[best])


def record(state: State, stats: Stats) -> dict[str, Tensor]:
    """The mixture of the next batch, what moved it, and the tokens of this one."""
    return {"weights": state.weights, "learning_speed": state.speed, "tokens": stats.tokens.long()}
