"""The ordinary language-model objective: the mean loss over all tokens of the global batch, drawn
from a fixed mixture.

K domains, B sequences, T tokens a sequence. It keeps the same shape as the papers' objectives, so
that one loop trains them all.
"""

from typing import NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from doremi_train.config import STRICT
from doremi_train.methods import simplex

token_wise = False


@dataclass(frozen=True, config=STRICT)
class Options:
    """The mixture of the run."""

    weights: tuple[float, ...]  # (K,) on the simplex


class Stats(NamedTuple):
    """Sums over a batch, per domain."""

    loss: Tensor  # (K,) nats
    tokens: Tensor  # (K,)


class State(NamedTuple):
    weights: Tensor  # (K,) never changes


def init(domains: int, steps: int, options: Options) -> State:
    return State(torch.tensor(options.weights, dtype=torch.float64))


def observe(
    losses: Tensor, reference: Tensor | None, domain: Tensor, domains: int, options: Options
) -> Stats:
    """Sums of a batch: losses (B, T), domain (B,) ids below K."""
    return Stats(*simplex.sums(losses, domain, domains))


def update(state: State, stats: Stats, options: Options) -> State:
    return state


def weigh(state: State, domain: Tensor, tokens: Tensor, options: Options) -> Tensor:
    """(B, 1) the same weight for every token of a batch that has `tokens` (K,)."""
    return (1 / tokens.sum()).expand(len(domain), 1)


def sampling(state: State, options: Options) -> Tensor:
    return state.weights


def record(state: State, stats: Stats) -> dict[str, Tensor]:
    """Nothing: nothing moves."""
    return {}


def result(state: State) -> None:
    """None: the mixture is given, not learned."""
