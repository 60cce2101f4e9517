"""Start of a run: where the curve of its gains says only what is learned first.

A model that knows nothing yet differs most between domains, and the difference falls as it learns.
What is looked at is the spread over domains of a piece's mean of λ (`pieces`), √(mean_k (λ[k] −
λ̄)²). The start is over when over the last half of the run so far the spread was on average at most
`LEFT` of the largest piece's, and no more is the spread of what changed from its first piece to its
last: where two domains cross, all are the same for a while. A number on all gains changes nothing,
nor does the unit.

K domains, P pieces.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from doremi_train.methods import pieces

LEFT = 0.25  # of the largest spread


class Curve(NamedTuple):
    sums: Tensor  # (P, K) λ summed over the steps of each piece
    highest: Tensor  # () largest spread of a piece when it was full
    steps: Tensor  # () in the curve


def empty(domains: int) -> Curve:
    """Curve before the first step."""
    sums = pieces.empty(domains)
    return Curve(sums, sums.new_zeros(()), torch.tensor(0))


def add(curve: Curve, gains: Tensor) -> Curve:
    """The curve with the gains (K,) of one step more."""
    steps = int(curve.steps) + 1
    sums = pieces.add(curve.sums, steps, gains)
    full = pieces.means(sums, steps)
    highest = torch.maximum(curve.highest, _spread(full[-1])) if len(full) else curve.highest
    return Curve(sums, highest, torch.tensor(steps))


def over(curve: Curve) -> bool:
    """Whether the start is over by now; asked whenever a piece is full, and said of no curve of
    fewer than `pieces.FEWEST`."""
    full = pieces.means(curve.sums, int(curve.steps))
    if len(full) < pieces.FEWEST:
        return False
    late = full[len(full) - len(full) // 2 :]
    most = torch.maximum(_spread(late).mean(), _spread(late[-1] - late[0]))
    return bool(most <= LEFT * curve.highest)


def _spread(means: Tensor) -> Tensor:
    """(…,) standard deviation of (…, K) over domains."""
    return means.std(-1, correction=0)
