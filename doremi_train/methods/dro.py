"""Group DRO towards target losses: dynamic batch loading (Sheared LLaMA, Xia et al. 2023, arXiv
2310.06694).

Every domain has a loss ℓ_ref that is to be reached (that of a reference model). Every m steps, with
ℓ the domain's loss since the last time:
  Δ_k = max(ℓ_k − ℓ_ref,k, 0);  α_k ← α_k exp(η Δ_k) / Σ_j α_j exp(η Δ_j)
and the next m steps are drawn from α. Until the warm-up is over the prior is drawn from.

The paper measures ℓ on held-out text; here it is the loss of the training batches when they were
drawn, which costs nothing and is the same where text is seen for the first time. A domain that was
not drawn keeps its last Δ.

K domains, B sequences, T tokens a sequence.
"""

from typing import NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from doremi_train.config import STRICT, NonNegativeFloat
from doremi_train.methods import online, simplex
from doremi_train.methods.online import Drawn, Stats, observe, result, sampling, token_wise, weigh

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


@dataclass(frozen=True, config=STRICT)
class Options(online.Options):
    step_size: NonNegativeFloat = 1.0  # η
    target_losses: tuple[float, ...] = ()  # (K,) ℓ_ref, nats per token


class State(NamedTuple):
    weights: Tensor  # (K,) of the next batch
    drawn: Tensor  # (K,) tokens so far
    step: Tensor  # ()
    steps: Tensor  # () of the run
    alpha: Tensor  # (K,) before caps
    excess: Tensor  # (K,) Δ as used last, nats per token
    loss: Tensor  # (K,) sums since then
    tokens: Tensor  # (K,)


def init(domains: int, steps: int, options: Options) -> State:
    weights, drawn = online.start(options, steps)
    zeros = torch.zeros(domains, dtype=torch.float64)
    return State(
        weights, *drawn, torch.tensor(options.prior, dtype=torch.float64), zeros, zeros, zeros
    )


def update(state: State, stats: Stats, options: Options) -> State:
    """The mixture of the next batch, from the losses since the last change of α."""
    drawn = online.add(Drawn(state.drawn, state.step, state.steps), stats)
    loss, tokens = state.loss + stats.loss, state.tokens + stats.tokens
    alpha, excess = state.alpha, state.excess
    if int(drawn.step) % options.every == 0:
        target = torch.tensor(options.target_losses, dtype=torch.float64)
        above = (loss / tokens.clamp_min(1) - target).clamp_min(0)
        excess = torch.where(tokens > 0, above, excess)
        if not online.warming(drawn, options):
            alpha = simplex.exponentiated(alpha, options.step_size * excess, 0.0)
        loss, tokens = torch.zeros_like(loss), torch.zeros_like(tokens)
    return State(online.within(alpha, drawn, options), *drawn, alpha, excess, loss, tokens)


def record(state: State, stats: Stats) -> dict[str, Tensor]:
    """The mixture of the next batch, what moved it, and the tokens of this one."""
    return {"weights": state.weights, "excess_loss": state.excess, "tokens": stats.tokens.long()}
