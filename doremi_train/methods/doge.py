"""DoGE: domain reweighting with generalization estimation (Fan et al. 2023,
https://arxiv.org/abs/2310.15393).

Algorithm 1, and its form with a target set:
α_0 = 1/K. For t = 1 … T:
  1. a batch, uniform over domains; g_k is the gradient of the mean loss over domain k's tokens;
  2. W_t[k] = ⟨g_k, g_target⟩, for a target set; or without one ⟨g_k, Σ_{j≠k} g_j⟩, what helps the
     other domains too;
  3. α' = α_{t−1} · exp(η/μ W_t);  α_t = (1 − c) α' / Σ α' + c / K;
  4. one optimiser step on Σ_k α_t[k] g_k.
The result is ᾱ = (1/T) Σ_{t=1..T} α_t.

The paper's η is the learning rate; here η/μ is one number that stays. The paper's code divides W_t
by the mean norm of the g_k, so that it is in units of a gradient and not of a gradient squared: so
is it here, unless told otherwise.

It is an objective (see `methods`) whose sums are not of losses alone: the caller adds up the
gradient of each domain over micro-batches and ranks, and puts what `align` says of the whole batch
into `Stats`.

K domains, B sequences, T tokens a sequence, P numbers of a parameter. Sums and weights are float64.
"""

from typing import NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from doremi_train.config import STRICT, Fraction, NonNegativeFloat
from doremi_train.methods import simplex

token_wise = False


@dataclass(frozen=True, config=STRICT)
class Options:
    step_size: NonNegativeFloat = 0.1
    """Step size η/μ of the exponentiated update."""

    smoothing: Fraction = 1e-3
    """Part c of the uniform mixture in α; 0 in the paper."""

    normalize: bool = True
    """Whether gradients are divided by their mean norm, as the paper's code does."""


class Stats(NamedTuple):
    """Sums over a batch, per domain, and what the caller fills in of the gradients of the whole
    batch."""

    loss: Tensor  # (K,) nats
    tokens: Tensor  # (K,)
    alignment: Tensor  # (K,) ⟨g_k, g_target⟩
    square: Tensor  # (K,) |g_k|²


class State(NamedTuple):
    weights: Tensor  # (K,) α_t on the simplex
    weight_sum: Tensor  # (K,) α_1 + … + α_t
    alignment: Tensor  # (K,) W_t as used by the last update
    step: Tensor  # () t


def init(domains: int, steps: int, options: Options) -> State:
    zeros = torch.zeros(domains, dtype=torch.float64)
    return State(simplex.uniform(domains), zeros, zeros, torch.tensor(0))


def observe(
    losses: Tensor, reference: Tensor | None, domain: Tensor, domains: int, options: Options
) -> Stats:
    """Sums of a batch: losses (B, T), domain (B,) ids below K."""
    loss, tokens = simplex.sums(losses, domain, domains)
    return Stats(loss, tokens, torch.zeros_like(loss), torch.zeros_like(loss))


def align(gradients: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """(K,) ⟨g_k, g_target⟩ and (K,) |g_k|² of one parameter, from gradients (K, P) of the domains'
    mean losses and that of the target (P,); without one the target of a domain is the sum of the
    others. They add up over parameters."""
    wide = gradients.double()
    square = wide.square().sum(1)
    if target is None:
        return wide @ wide.sum(0) - square, square
    return wide @ target.double(), square


def update(state: State, stats: Stats, options: Options) -> State:
    """One exponentiated-gradient step; a domain that is not in the batch is aligned with nothing, W
    is 0."""
    alignment = stats.alignment
    if options.normalize:
        norms = stats.square[stats.tokens > 0].sqrt()
        alignment = alignment / norms.mean().clamp_min(1e-12)
    weights = simplex.exponentiated(state.weights, options.step_size * alignment, options.smoothing)
    return State(weights, state.weight_sum + weights, alignment, state.step + 1)


def weigh(state: State, domain: Tensor, tokens: Tensor, options: Options) -> Tensor:
    """(B, 1) weight of every token of a sequence, such that Σ weight · ℓ has the gradient Σ_k
    α_t[k] g_k."""
    return (state.weights / tokens.clamp_min(1))[domain, None]


def sampling(state: State, options: Options) -> Tensor:
    return simplex.uniform(len(state.weights))


def record(state: State, stats: Stats) -> dict[str, Tensor]:
    """What a stranger needs to recompute every α_t: W_t, beside α_t itself and the tokens it came
    from."""
    return {"weights": state.weights, "alignment": state.alignment, "tokens": stats.tokens.long()}


def result(state: State) -> Tensor:
    """(K,) ᾱ, the average of α_t over the run."""
    return state.weight_sum / state.step
