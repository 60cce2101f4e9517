"""Headroom: how much any mixture can gain on an objective, from few runs, and what that is worth in
tokens.

The saturating law is fitted to the runs, and its lowest score within caps found. How far that may
be off is told by the delete-a-group jackknife (Tukey 1958; Kott 2001): it is found anew without
each group of mixtures, which errs on the wide side (Efron and Stein 1981). The noise of the run
that a gain is over comes on top. What a run within caps reached bounds the gain from below, less
noise.

What a gain is worth is read off natural's learning curve L(D) = E + A D^−β through runs of several
lengths: how many times as many tokens natural would need for the same score.

K domains, N runs, M metrics, G groups, P points of a curve.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

from doremi_train.methods.box import Box, Floats
from doremi_train.methods.fits import Known, Smooth
from doremi_train.methods.objective import Objective
from doremi_train.methods.optimum import minimise
from doremi_train.methods.saturating import saturating

Flags = NDArray[np.bool_]

GROUPS = 20  # at most, of the jackknife
LEAST = 4  # mixtures of which a group can be left out
STARTS = 4  # drawn, beside natural and uniform
LEVEL = 0.95
POWERS = np.geomspace(0.02, 2, 60)  # β
FARTHEST = 8.0  # times the tokens of the longest run, beyond which a curve is not believed


class Runs(NamedTuple):
    """What was run."""

    points: Floats  # (N, K)
    metrics: Floats  # (N, M)


class Lowest(NamedTuple):
    """The lowest score of any mixture within caps and guards."""

    mixture: Floats  # (K,) that the fit takes for the best; it lies where no run is
    score: float
    half: float  # of the 95 % interval; infinite where there are too few runs for one
    seen: float  # lowest score of the runs within caps and guards; infinite where none is
    tried: int  # runs of which that is the lowest


class Gain(NamedTuple):
    """How much lower than a mixture's score any other may be."""

    mean: float
    low: float  # of the 95 % interval
    high: float


def lowest(
    runs: Runs, known: Known, within: Box, wanted: Objective, generator: np.random.Generator
) -> Lowest:
    """Lowest score that the law expects within the box, with its interval."""
    none = np.empty((0, runs.points.shape[1]))
    return _told(runs, known, within, wanted, none, generator)[0]


def expected(
    runs: Runs,
    known: Known,
    within: Box,
    wanted: Objective,
    anchors: Floats,
    noise: float,
    generator: np.random.Generator,
) -> tuple[Lowest, list[Gain]]:
    """The same, and the gain over each of A mixtures (A, K), of which the law says what they have:
    what it errs alike of both is no part of the interval. `noise` is the standard deviation of a
    run's score."""
    best, scores, again = _told(runs, known, within, wanted, anchors, generator)
    halves, inside = _halves(again[:, 1:] - again[:, :1]), _inside(anchors, within)
    return best, [
        gain(score, best._replace(half=half), noise, np.inf, bool(within_caps))
        for score, half, within_caps in zip(scores, halves.tolist(), inside, strict=True)
    ]


def _halves(again: Floats) -> Floats:
    """(C,) halves of 95 % intervals, by (G, C) values without one group each; infinite of none."""
    if not len(again):
        return np.full(again.shape[1], np.inf)
    spread = np.sqrt((len(again) - 1) * again.var(0))
    return scipy.stats.t.ppf((1 + LEVEL) / 2, len(again) - 1) * spread


def _inside(points: Floats, within: Box) -> Flags:
    apart = np.maximum(within.low - points, points - within.high).max(1)
    found: Flags = apart <= 1e-9
    return found


def _told(
    runs: Runs,
    known: Known,
    within: Box,
    wanted: Objective,
    anchors: Floats,
    generator: np.random.Generator,
) -> tuple[Lowest, list[float], Floats]:
    """The lowest score, the scores of the anchors (A, K), and (G, 1 + A) both without each group of
    mixtures; of too few there is no group."""
    # The law is of what falls.
    points, metrics = runs = runs._replace(metrics=runs.metrics * wanted.turn)
    wanted = wanted.turned()
    even = np.full((1, points.shape[1]), 1 / points.shape[1])
    drawn = generator.dirichlet(np.ones(points.shape[1]), STARTS)
    starts = np.vstack([even, drawn, points.mean(0)])
    mixture, (score, *others) = _lowest(runs, known, within, wanted, starts, anchors)
    reached = wanted.scores(metrics, penalised=True)[_inside(points, within)]
    best = Lowest(mixture, score, np.inf, float(reached.min(initial=np.inf)), len(reached))
    _, same = np.unique(points, axis=0, return_inverse=True)
    count = int(same.max()) + 1  # mixtures
    if count < LEAST:
        return best, others, np.empty((0, 1 + len(anchors)))
    groups, again = min(count, GROUPS), []
    group = (generator.permutation(count) % groups)[same.ravel()]
    for one in range(groups):
        rest = Runs(points[group != one], metrics[group != one])
        near = np.vstack([mixture, even])
        again.append(_lowest(rest, known, within, wanted, near, anchors)[1])
    found = np.array(again)
    return best._replace(half=float(_halves(found[:, :1])[0])), others, found


def _lowest(
    runs: Runs, known: Known, within: Box, wanted: Objective, starts: Floats, anchors: Floats
) -> tuple[Floats, list[float]]:
    """The mixture (K,) of the lowest score; it, and the scores of the anchors (A, K)."""
    fit: Smooth = saturating(*runs, known)

    def cost(points: Tensor) -> Tensor:
        return wanted.penalised(fit.losses(points))

    mixture = minimise(cost, within, starts)
    with torch.no_grad():
        lowest = cost(torch.from_numpy(mixture[None])).tolist()
        return mixture, lowest + wanted.scores(fit.predict(anchors)).tolist()


def gain(score: float, best: Lowest, noise: float, runs: float = 1.0, inside: bool = True) -> Gain:
    """Gain over a mixture that has this score, the mean of so many `runs`; `noise` is the standard
    deviation of one over seeds. A mixture `inside` the box is itself one of those that may be the
    best: nothing is lost over it."""
    own = noise / np.sqrt(runs)
    half = float(np.hypot(best.half, scipy.stats.norm.ppf((1 + LEVEL) / 2) * own))
    # The luckiest of many runs (Bonferroni).
    luck = scipy.stats.norm.ppf(1 - (1 - LEVEL) / 2 / max(best.tried, 1)) * np.hypot(noise, own)
    mean, least = score - best.score, 0.0 if inside else -np.inf
    low = max(mean - half, score - best.seen - luck, least)
    return Gain(max(mean, low), float(low), max(mean + half, low))


# ── What it is worth ────────────────────────────────────────────────────────────────


class Curve(NamedTuple):
    """L(D) = E + A D^−β, with D in units of the longest run; A is above 0."""

    floor: float  # E
    scale: float  # A
    power: float  # β

    def times(self, score: float) -> float:
        """How many times the longest run's tokens reach the score; infinite where it never is
        reached."""
        above = score - self.floor
        if above <= 0:
            return np.inf
        # In logarithms, since a small β makes the power overflow.
        return float(np.exp(min(np.log(self.scale / above) / self.power, 700.0)))


def curve(tokens: Floats, scores: Floats) -> Curve | None:
    """Least squares over a grid of β, of P runs of (P,) tokens; None where there are fewer than
    three, or scores do not fall with tokens."""
    if len(tokens) < 3:
        return None
    found = []
    for power in POWERS.tolist():
        column = (tokens / tokens.max()) ** -power
        given = np.stack([np.ones_like(column), column], axis=1)
        (floor, scale), *_ = np.linalg.lstsq(given, scores, rcond=None)
        error = float(((given @ [floor, scale] - scores) ** 2).sum())
        found.append((error, Curve(float(floor), float(scale), power)))
    best = min(found, key=lambda one: one[0])[1]
    return best if best.scale > 1e-9 * np.abs(scores).max() else None


class SpeedUp(NamedTuple):
    """How many times as many tokens natural would need; infinite where its curve never gets
    there."""

    mean: float
    low: float
    high: float


def speed_up(tokens: Floats, scores: Floats, gained: Gain) -> SpeedUp | None:
    """Speed-up of a gain over the longest of P runs of natural, (P,) each. Its interval is that of
    the gain, and of curves that leave out each of the shorter runs. None where curves say
    nothing."""
    longest = int(tokens.argmax())
    curves = [curve(tokens, scores)]
    if len(tokens) > 3:
        others = [one for one in range(len(tokens)) if one != longest]
        curves += [curve(np.delete(tokens, one), np.delete(scores, one)) for one in others]
    known = [one for one in curves if one is not None]
    if not known or len(known) < len(curves):
        return None

    def times(amount: float) -> list[float]:
        # From where the curve is at the longest run, which is not quite at its score.
        return [one.times(one.floor + one.scale - amount) for one in known]

    return SpeedUp(times(gained.mean)[0], min(times(gained.low)), max(times(gained.high)))


def worth(saved: Sequence[float], cost: float) -> bool | None:
    """Whether what is saved pays a cost, by the ends of its interval; None where that cannot be
    told."""
    low, high = min(saved), max(saved)
    return True if low > cost else False if high <= cost else None
