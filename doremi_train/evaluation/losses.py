"""Loss per domain on fixed sequences, independent of mixture and seed: those of validation, where
nothing else is said.

K domains, N sequences, T tokens a sequence.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from doremi_train.config import STRICT, Positive
from doremi_train.data.batches import Store, fixed_sequences, read
from doremi_train.data.sampler import Ints
from doremi_train.parallel import comm


@dataclass(frozen=True, config=STRICT)
class EvaluationOptions:
    sequences: Positive = 32
    """Sequences per domain, evenly spread over its validation split."""

    every: Positive | None = None
    """Steps between evaluations while training; null: a 20th of the run."""


class Sums(NamedTuple):
    loss: Tensor  # (K,) nats
    tokens: Tensor  # (K,)


@torch.no_grad()
def measure(
    model: nn.Module,
    store: Store,
    length: int,
    batch: int,
    options: EvaluationOptions,
    device: torch.device,
    trained_on: tuple[Ints, Ints] | None = None,
) -> dict[str, Any]:
    """The entry of `evaluation.json` for one model: loss per domain, bits per byte, their mean and
    worst.

    `trained_on`: domain (N,) and sequence (N,) of training sequences to measure on instead of
    validation.
    """
    world, domains = comm.world(), len(store.domains)
    split = "train" if trained_on else "validation"
    domain, sequence = trained_on or fixed_sequences(store, split, length, options.sequences)
    mine = np.arange(world.rank, len(domain), world.size)
    # Every rank makes the same number of calls, because under sharding each is a collective;
    # repeats count 0.
    calls = math.ceil(math.ceil(len(domain) / world.size) / batch)
    sums = Sums(
        torch.zeros(domains, dtype=torch.float64), torch.zeros(domains, dtype=torch.float64)
    )
    training = model.training
    model.eval()
    for call in range(calls):
        rows = mine[call * batch : (call + 1) * batch]
        shown = rows if len(rows) else mine[:1] if len(mine) else np.zeros(1, dtype=np.int64)
        micro = read(store, split, domain[shown], sequence[shown], length)
        losses = model(micro.tokens.to(device)).double().sum(1).cpu()[: len(rows)]
        sums.loss.index_add_(0, micro.domain[: len(rows)], losses)
        sums.tokens.index_add_(0, micro.domain[: len(rows)], micro.carrying[: len(rows)].double())
    model.train(training)
    total = comm.all_reduce_sum(Sums(*(s.to(device) for s in sums)))[0]
    return summary(store, total.loss, total.tokens)


def summary(store: Store, loss: Tensor, tokens: Tensor) -> dict[str, Any]:
    """Sums (K,) of losses in nats and of tokens → per-domain and headline figures.

    Bits per byte use the mean bytes per token of the domain's whole validation split; null where
    the bytes are unknown.
    """
    means = (loss / tokens).tolist()
    figures: dict[str, Any] = {}
    for k, (name, width) in enumerate(
        zip(store.domains, store.bytes_per_token("validation"), strict=True)
    ):
        bits = means[k] / math.log(2) / width if width > 0 else None
        figures[name] = {"loss": means[k], "bits_per_byte": bits, "tokens": int(tokens[k])}
    return {
        "domains": figures,
        "mean_loss": math.fsum(means) / len(means),
        "worst_loss": max(means),
    }
