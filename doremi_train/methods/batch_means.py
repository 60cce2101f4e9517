"""Batch means: how well the average of a run that goes on is known (Law and Carson 1979,
https://doi.org/10.1287/opre.27.5.1011).

The mean of m pieces of a curve has a Student t interval, if pieces are long enough to be
independent. How far they are from that is r, the correlation of neighbours (not below 0, and of all
columns together), and the interval is wider by √((1 + r) / (1 − r)), as for an autoregression. Of a
curve that drifts evenly it is then about half of what it went through.

K columns, P pieces.
"""

import math

import scipy
from torch import Tensor

LEVEL = 0.95


def half_width(means: Tensor) -> float:
    """Half-width of the 95 % interval of the average of pieces with these means (P, K), of the
    column that is known least; infinite of fewer than three pieces."""
    count = len(means)
    if count < 3:
        return math.inf
    apart = means - means.mean(0)
    square = float((apart**2).sum())
    if square == 0:
        return 0.0
    neighbours = max(0.0, float((apart[1:] * apart[:-1]).sum()) / square)
    wider = math.sqrt((1 + neighbours) / (1 - neighbours))
    t = float(scipy.stats.t.ppf((1 + LEVEL) / 2, count - 1))
    return t * wider * float(means.std(0).max()) / math.sqrt(count)
