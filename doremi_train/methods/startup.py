"""Start of a run: where the curve of its gains says only what is learned first.

A model that knows nothing yet differs most between domains, and the difference falls as it learns.
The curve of λ (K,) over the steps is kept in at most `PIECES` pieces of equal length, of which two
become one when there is no room, so that a piece is an eighth to a sixteenth of the run so far,
however long. What is looked at is the spread over domains of a piece's mean, √(mean_k (λ[k] −
λ̄)²). The start is over when over the last half of the run so far the spread was on average at most
`LEFT` of the largest piece's, and no more is the spread of what changed from its first piece to its
last: where two domains cross, all are the same for a while. A number on all gains changes nothing,
nor does the unit.

K domains, P pieces.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PIECES = 16
FEWEST = 8  # pieces to judge by
LEFT = 0.25  # of the largest spread


class Curve(NamedTuple):
    sums: Tensor  # (P, K) λ summed over the steps of each piece
    highest: Tensor  # () largest spread of a piece when it was full
    steps: Tensor  # () in the curve


def empty(domains: int) -> Curve:
    """Curve before the first step."""
    sums = torch.zeros(PIECES, domains, dtype=torch.float64)
    return Curve(sums, sums.new_zeros(()), torch.tensor(0))


def length(steps: int) -> int:
    """Steps of a piece, of a curve of so many: the least power of two with which there is room."""
    return 1 << max(0, -(-steps // PIECES) - 1).bit_length()


def add(curve: Curve, gains: Tensor) -> Curve:
    """The curve with the gains (K,) of one step more."""
    steps, sums = int(curve.steps) + 1, curve.sums.clone()
    size = length(steps)
    if size > length(steps - 1) and steps > 1:
        sums[: PIECES // 2] = sums[0::2] + sums[1::2]
        sums[PIECES // 2 :] = 0
    last = (steps - 1) // size
    sums[last] += gains
    highest = curve.highest
    if steps % size == 0:
        highest = torch.maximum(highest, _spread(sums[last] / size))
    return Curve(sums, highest, torch.tensor(steps))


def over(curve: Curve) -> bool:
    """Whether the start is over by now; asked whenever a piece is full, and said of no curve of
    fewer than `FEWEST` pieces."""
    steps = int(curve.steps)
    size = length(steps)
    full = steps // size
    if steps % size or full < FEWEST:
        return False
    late = curve.sums[full - full // 2 : full] / size
    most = torch.maximum(_spread(late).mean(), _spread(late[-1] - late[0]))
    return bool(most <= LEFT * curve.highest)


def _spread(means: Tensor) -> Tensor:
    """(…,) standard deviation of (…, K) over domains."""
    return means.std(-1, correction=0)
