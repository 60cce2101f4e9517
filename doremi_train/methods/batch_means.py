"""Batch means: how well the average of a run that goes on is known (Law and Carson 1979,
https://doi.org/10.1287/opre.27.5.1011).

The mean of m pieces of a curve has a Student t interval, if pieces are long enough to be
independent. How far they are from that is r, the correlation of neighbours (not below 0, and of all
columns together): of the m there are in effect m (1 − r) / (1 + r), and so many are counted, also
among the degrees of freedom. A curve that still drifts has r near 1, and is not known at all.

K columns, P pieces.
"""

import math

import scipy
from torch import Tensor

LEVEL = 0.95


def half_width(means: Tensor) -> float:
    """Half-width of the 95 % interval of the average of pieces with these means (P, K), of the
    column that is known least; infinite of pieces that count for two or fewer."""
    count = len(means)
    if count < 3:
        return math.inf
    apart = means - means.mean(0)
    square = float((apart**2).sum())
    if square == 0:
        return 0.0
    neighbours = max(0.0, float((apart[1:] * apart[:-1]).sum()) / square)
    effective = count * (1 - neighbours) / (1 + neighbours)
    if effective <= 2:
        return math.inf
    deviation = float(means.std(0).max())
    t = float(scipy.stats.t.ppf((1 + LEVEL) / 2, effective - 1))
    return t * deviation / math.sqrt(effective)
