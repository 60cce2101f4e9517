"""What mixtures that a run adapts while it goes on have in common: where they begin, and the caps
that they keep.

A method of this kind is an objective (see `methods`) that draws the next batch from its weights and
takes the plain mean of the losses. All it remembers is in its state, so a run that continues draws
the same.

K domains, B sequences, T tokens a sequence.
"""

from typing import NamedTuple, Protocol

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from doremi_train.config import STRICT, Fraction, Positive
from doremi_train.methods import simplex
from doremi_train.methods.box import Box, project

token_wise = False


@dataclass(frozen=True, config=STRICT)
class Options:
    prior: tuple[float, ...] = ()  # (K,) where it begins
    # (K,) largest part of the run's tokens: what mixture.max_epochs allows.
    high: tuple[float, ...] = ()
    floor: Fraction = 0.01  # least weight of a domain at any time, as far as `high` leaves it
    warmup: Fraction = 0.05  # part of the run on the prior
    every: Positive = 10  # steps between updates of ado's fits, and of dro's weights


class Stats(NamedTuple):
    """Sums over a batch, per domain."""

    loss: Tensor  # (K,) nats
    tokens: Tensor  # (K,)


class Drawn(NamedTuple):
    """What a run has drawn so far."""

    tokens: Tensor  # (K,)
    step: Tensor  # () steps done
    steps: Tensor  # () of the whole run

    @property
    def share(self) -> Tensor:
        """(K,) parts of all tokens drawn."""
        return self.tokens / self.tokens.sum()


class Running(Protocol):
    """What the states of all these methods begin with."""

    @property
    def weights(self) -> Tensor: ...  # (K,) of the next batch
    @property
    def drawn(self) -> Tensor: ...  # (K,) tokens so far
    @property
    def step(self) -> Tensor: ...  # () steps done
    @property
    def steps(self) -> Tensor: ...  # () of the whole run


def observe(
    losses: Tensor, reference: Tensor | None, domain: Tensor, domains: int, options: Options
) -> Stats:
    """Sums of a batch: losses (B, T), domain (B,) ids below K."""
    return Stats(*simplex.sums(losses, domain, domains))


def weigh(state: Running, domain: Tensor, tokens: Tensor, options: Options) -> Tensor:
    """(B, 1) the same weight for every token of a batch that has `tokens` (K,)."""
    return (1 / tokens.sum()).expand(len(domain), 1)


def sampling(state: Running, options: Options) -> Tensor:
    return state.weights


def result(state: Running) -> Tensor:
    """(K,) the part of all tokens that was drawn from each domain."""
    return Drawn(state.drawn, state.step, state.steps).share


def start(options: Options, steps: int) -> tuple[Tensor, Drawn]:
    """The prior (K,) as far as it may be, and nothing drawn."""
    prior = torch.tensor(options.prior, dtype=torch.float64)
    drawn = Drawn(torch.zeros_like(prior), torch.tensor(0), torch.tensor(steps))
    return within(prior, drawn, options), drawn


def add(drawn: Drawn, stats: Stats) -> Drawn:
    return drawn._replace(tokens=drawn.tokens + stats.tokens, step=drawn.step + 1)


def warming(drawn: Drawn, options: Options) -> bool:
    return int(drawn.step) < options.warmup * int(drawn.steps)


def within(wanted: Tensor, drawn: Drawn, options: Options) -> Tensor:
    """(K,) the mixture nearest to `wanted` (K,) with which the rest of the run can go on to its
    end: no domain then gets more than its part of the whole run."""
    done = int(drawn.step) / int(drawn.steps)
    if done >= 1:
        return wanted
    used = drawn.share * done if drawn.step else drawn.tokens
    high = (
        (torch.tensor(options.high, dtype=torch.float64) - used).clamp_min(0) / (1 - done)
    ).clamp_max(1)
    high = high / high.sum().clamp_max(1)  # a sequence that was rounded up is missing at the end
    low = high.clamp_max(options.floor)
    return torch.from_numpy(project(wanted.numpy(), Box(low.numpy(), high.numpy())))
