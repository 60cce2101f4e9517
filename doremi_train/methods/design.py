"""D-optimal choice of the runs of a swarm: those whose columns of the saturating law span the
greatest volume (Fedorov 1972), so that its coefficients are known best.

Columns are 1 − exp(−(4 w / cap)^0.6), which bend where weights are usual; volume does not depend
on their scale. Runs are added one by one, then each is exchanged for the best there is, until
nothing gains. Every step is a rank-one update: (A + x xᵀ)⁻¹, and det(A + x xᵀ) = det A · (1 + xᵀ
A⁻¹ x).

K domains, C candidates, R runs, J = K + 1 columns.
"""

import numpy as np
from numpy.typing import NDArray

from doremi_train.methods import box, swarm
from doremi_train.methods.box import Box, Floats

RATE, POWER = 4.0, 0.6
PRIOR = 1e-3  # of the information before the first run
SWEEPS = 20
CANDIDATES = 2000  # that a design chooses from
GAIN = 1 + 1e-9  # of the determinant, below which an exchange is none


def design(
    natural: Floats, within: Box, runs: int, generator: np.random.Generator, replicates: int = 2
) -> Floats:
    """(R, K) mixtures within the box: natural `replicates` times, uniform once, a D-optimal choice
    beside them, and the one of these that is farthest from natural again, `replicates` times in
    all: noise differs by mixture. Runs that are too few for the replicates have none.

    Raises ValueError for less than one run.
    """
    if runs < 1:
        raise ValueError(f"runs={runs}: must be 1 or more")
    again = replicates - 1 if runs > 2 * replicates + 1 else 0
    uniform = np.full(len(natural), 1 / len(natural))
    anchors = box.project(np.stack([*[natural] * (1 + again), uniform]), within)[:runs]
    candidates = swarm.design(natural, within, CANDIDATES, generator)
    # Many end in the same corner of the box.
    candidates = candidates[np.unique(candidates.round(6), axis=0, return_index=True)[1]]
    count = max(runs - len(anchors) - again, 0)
    chosen = candidates[choose(candidates, count, within, generator, anchors)]
    if not again:
        return np.vstack([anchors, chosen])
    extreme = chosen[box.distance(chosen, natural).argmax()]
    return np.vstack([anchors, chosen, *[extreme[None]] * again])


def choose(
    candidates: Floats,
    runs: int,
    within: Box,
    generator: np.random.Generator,
    given: Floats | None = None,
) -> NDArray[np.int_]:
    """(R,) which of candidates (C, K) to run, each once, beside the mixtures `given` (…, K).

    Raises ValueError where there are fewer candidates than runs.
    """
    if runs > len(candidates):
        raise ValueError(f"runs={runs}: there are {len(candidates)} candidates only")
    columns, inverse = _columns(candidates, within), np.eye(candidates.shape[1] + 1) / PRIOR
    for row in _columns(candidates[:0] if given is None else given, within):
        inverse, _ = _with(inverse, row, 1)
    free, chosen = np.ones(len(candidates), bool), []

    def best() -> int:
        gains = ((columns @ inverse) * columns).sum(1)
        return int(np.where(free, gains, -1).argmax())

    for _ in range(runs):
        chosen.append(best())
        free[chosen[-1]] = False
        inverse, _ = _with(inverse, columns[chosen[-1]], 1)
    for _ in range(SWEEPS):
        before = list(chosen)
        for place in generator.permutation(runs):
            old = chosen[place]
            inverse, free[old] = _with(inverse, columns[old], -1)[0], True
            new = best()
            if _with(inverse, columns[new], 1)[1] <= GAIN * _with(inverse, columns[old], 1)[1]:
                new = old
            chosen[place], free[new] = new, False
            inverse, _ = _with(inverse, columns[new], 1)
        if chosen == before:
            break
    return np.array(chosen, dtype=np.int_)


def _columns(points: Floats, within: Box) -> Floats:
    """(…, J) of the law, with its constant."""
    part = points / np.where(within.high > 0, within.high, 1)
    return np.hstack([np.ones((len(points), 1)), -np.expm1(-((RATE * part) ** POWER))])


def _with(inverse: Floats, row: Floats, sign: int) -> tuple[Floats, float]:
    """The inverse after a run (J,) was added, or taken away, and by what the determinant was
    multiplied."""
    turned = inverse @ row
    factor = float(1 + sign * (row @ turned))
    return inverse - sign * np.outer(turned, turned) / factor, factor
