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
    rows = losses.detach().double().sum(1)
    loss = rows.new_zeros(domains).index_add_(0, domain, rows)
    # Counted by adding: torch.bincount would make the host wait for the device.
    return Stats(
        loss, torch.zeros_like(loss).index_add_(0, domain, torch.full_like(rows, losses.shape[1]))
    )


def update(state: State, stats: Stats, options: Options) -> State:
    return state


def weigh(
    state: State,
    domain: Tensor,
    tokens: Tensor,
    options: Options,
    losses: Tensor | None = None,
    reference: Tensor | None = None,
) -> Tensor:
    return (1 / tokens.sum()).expand(len(domain), 1)


def sampling(state: State, options: Options) -> Tensor:
    return state.weights


def record(state: State, stats: Stats) -> dict[str, Tensor]:
    return {}
