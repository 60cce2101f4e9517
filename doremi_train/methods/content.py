"""What a mixture is made of, whatever its domains are called: runs that were made under old names
say something of mixtures under new ones.

1. The content of a domain is the part of its words in each fine cluster (`clusters`); that of a
   mixture the weighted sum of its domains'.
2. To a mixture under new names belongs that of the runs' domains whose content is nearest (least
   squares on the simplex), and what the fit of the runs says of it.
3. What that one has not is outside all that was seen: half the sum of the absolute differences.

R mixtures, K domains of the runs, J domains by other names, F fine clusters.
"""

import numpy as np
import scipy
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ONE = 1e3  # how much more than a cluster the sum of the weights counts


def translated(points: Floats, others: Floats, known: Floats) -> tuple[Floats, Floats]:
    """((R, K) the mixtures of domains with contents `known` (K, F) that are nearest to mixtures
    `points` (R, J) of domains with contents `others` (J, F); (R,) the part that is outside: 0 where
    the content is the same, 1 where nothing is)."""
    contents = points @ others
    rows = np.concatenate([known.T, np.full((1, len(known)), ONE)])
    weights = np.empty((len(points), len(known)))
    for place, content in enumerate(contents):
        weights[place] = scipy.optimize.nnls(rows, np.append(content, ONE))[0]
    weights /= weights.sum(1, keepdims=True)
    return weights, np.abs(contents - weights @ known).sum(1) / 2
