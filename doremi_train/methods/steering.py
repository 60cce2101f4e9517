"""Steering a mixture by a law: metrics that are asked for get better, those that are held do not
get worse, and the mixture moves least.

    argmin ½ |w − w₀|² + Σ_m price_m max(log(L_m(w) − φ_m) − log(target_m − φ_m), 0)

in the simplex and within caps. Of a saturating law log(L − φ) is a sum of functions of one weight
each, convex but for much harm. So Newton's matrix of a primal-dual interior-point method (Nocedal &
Wright 2006, chapter 19) is diagonal but for a row a target and one for the sum of weights, and some
30 steps are enough. A target that cannot be reached is neared as far as it goes: what is held has a
thousand times the price of what is asked for. `reports/templates/steer.js` does the same in a page.

K domains, N runs, M metrics, T targets.
"""

from typing import NamedTuple

import numpy as np
import scipy
import torch
from numpy.typing import NDArray

from doremi_train.methods.box import Box, Floats, inside
from doremi_train.methods.fits import UNKNOWN, Known
from doremi_train.methods.forecast import Numbers, alike
from doremi_train.methods.saturating import Saturating, saturating

Flags = NDArray[np.bool_]

GROUPS = 10  # of runs, each left out once, for intervals
FEWEST, MANY = (
    5,
    640,
)  # groups of many domains, whose laws take long: MANY / K, but so many at least
LEVEL = 0.95
MOVED = 0.01  # of the tokens, of which an effect is told

ASKED, HELD = 1e4, 1e7  # prices
NEAREST = 1e-3  # least L − φ that is asked for, in parts of that at the start
ROOM = 1e-12  # least between floor and cap of a domain, so that there is an inside
INSIDE = 0.05  # of the box, from its walls, where the search begins
STEPS, CLOSE, TIGHT = 100, 1e-9, 1e-12
SHRINK, BARRIER, BACK = 0.1, 1e-13, 0.995


class Part(NamedTuple):
    """Metrics that are there in the same runs."""

    metrics: Numbers  # their numbers among the M
    law: Saturating
    without: list[Saturating]  # the same, of all runs but a group


class Steerable(NamedTuple):
    """A law of M metrics of which less is better: where more is, of what is below 0."""

    law: Saturating
    parts: list[Part]


class Effects(NamedTuple):
    """What a domain does to a metric when it gets `MOVED` of the tokens from all others."""

    change: Floats  # (K, M) of the metric; below 0 is better
    half: Floats  # (K, M) of the 95 % interval; infinite where runs are too few to tell


class Wish(NamedTuple):
    """What is to become of each metric."""

    target: Floats  # (M,) which it is to reach or to keep; infinite where it is free
    price: Floats  # (M,) of what it lacks


# ── The law and what it says ────────────────────────────────────────────────────────


def steerable(points: Floats, values: Floats, more: Flags, known: Known = UNKNOWN) -> Steerable:
    """The law of runs (N, K) and their metrics (N, M), nan where one is missing; `more` (M,) says
    of which more is better."""
    signed, parts = values * np.where(more, -1.0, 1.0), list[Part]()
    for runs, metrics in alike(signed):
        mixtures, losses = points[runs], signed[np.ix_(runs, metrics)]
        groups = min(GROUPS, max(FEWEST, MANY // points.shape[1]), len(runs))
        group = np.random.default_rng(0).permutation(len(runs)) % groups
        rest = [group != one for one in range(groups) if groups > 1]
        left = [saturating(mixtures[kept], losses[kept], known) for kept in rest]
        parts.append(Part(metrics, saturating(mixtures, losses, known), left))
    order = torch.from_numpy(np.argsort(np.concatenate([part.metrics for part in parts])))
    fields = zip(*(part.law[1:] for part in parts), strict=True)
    merged = [torch.cat(field)[order] for field in fields]
    return Steerable(Saturating(parts[0].law.passes, *merged), parts)


def effects(given: Steerable, point: Floats) -> Effects:
    """Effects at a mixture (K,), with intervals by the jackknife over groups of runs: each refit
    chooses anew what the law's form leaves open, without which intervals are too narrow."""
    change = np.empty((len(point), len(given.law.floor)))
    half = np.full_like(change, np.inf)
    for metrics, law, left in given.parts:
        change[:, metrics] = _changes(law, point)
        if left:
            each = np.stack([_changes(one, point) for one in left])
            spread = np.sqrt((len(left) - 1) * each.var(0))
            half[:, metrics] = spread * scipy.stats.t.ppf((1 + LEVEL) / 2, len(left) - 1)
    return Effects(change, half)


def _changes(law: Saturating, point: Floats) -> Floats:
    """(K, M) the others give in proportion; the last of a domain is not more than all."""
    more = np.minimum(MOVED, 1 - point)[:, None]
    left = np.maximum(1 - point, 1e-12)[:, None]
    moved = point + more * (np.eye(len(point)) - point) / left
    return law.predict(moved) - law.predict(point[None])


# ── Steering ────────────────────────────────────────────────────────────────────────


def wish(now: Floats, better: Floats, held: Flags, tolerance: float) -> Wish:
    """Metrics that are `now` (M,) are to get better by `better` (M,) where it is above 0; of the
    others those `held` (M,) may get worse by a part of their size."""
    asked = better > 0
    kept = np.where(held, now + tolerance * np.abs(now), np.inf)
    return Wish(np.where(asked, now - better, kept), np.where(asked, ASKED, HELD))


def steer(law: Saturating, start: Floats, wanted: Wish, within: Box) -> Floats:
    """The mixture (K,) within the box that grants the wish, and is nearest to `start` (K,)."""
    counted = np.flatnonzero(wanted.target < np.inf)
    curves = Curves.of(law, counted)
    first = curves.at(start).value
    asked = wanted.target[counted] - law.floor.numpy()[counted]
    limit, price = np.log(np.maximum(asked, NEAREST * np.exp(first))), wanted.price[counted]
    if (first <= limit + CLOSE).all() and inside(start, within):
        return start
    low, high = within.low, np.maximum(within.high, within.low + ROOM)

    margin = INSIDE * (high - low)
    w = np.clip(start, low + margin, high - margin)
    below, above = w - low, high - w  # kept beside w: near a wall the difference has no digits
    lower, upper = np.full((2, len(w)), 0.1)  # multipliers of the walls
    over = curves.at(w).value - limit
    kept, lacking = np.maximum(-over, 0.01), np.maximum(over, 0.01)  # slacks
    worth, left, level = np.ones(len(limit)), price - 1, 0.0  # multipliers of targets and sum
    for _ in range(STEPS):
        value, slope, bend = curves.at(w)
        over, total = value - limit, w.sum() - 1
        pairs = np.concatenate([lower * below, upper * above, worth * kept, left * lacking])
        pull = w - start + worth @ slope + level
        wrong = np.abs(pull - lower + upper).max() / (1 + worth.max(initial=0))
        short = np.abs(over + kept - lacking).max(initial=0)
        if max(wrong, short, abs(total)) < CLOSE and pairs.max() < TIGHT:
            break
        barrier = max(SHRINK * pairs.mean(), BARRIER)

        # Newton's step; all but the multipliers of targets and sum is eliminated.
        stiff = 1 + np.maximum(worth @ bend, 0) + lower / below + upper / above
        pull += barrier / above - barrier / below
        rows = np.vstack([slope, np.ones_like(w)])
        matrix = (rows / stiff) @ rows.T
        matrix += np.diag(np.append(kept / worth + lacking / left, 0))
        right = np.append(over + barrier / worth - barrier / left, total) - rows / stiff @ pull
        step = np.linalg.solve(matrix, right)
        d_worth, d_w = step[:-1], -(pull + step @ rows) / stiff
        moves = (
            (below, d_w),
            (above, -d_w),
            (kept, (barrier - kept * d_worth) / worth - kept),
            (lacking, (barrier + lacking * d_worth) / left - lacking),
            (worth, d_worth),
            (left, -d_worth),
            (lower, (barrier - lower * d_w) / below - lower),
            (upper, (barrier + upper * d_w) / above - upper),
        )
        shrink = max(float((-move / of).max(initial=0)) for of, move in moves)
        part = min(1.0, BACK / max(shrink, 1e-300))
        w, level = w + part * d_w, level + part * step[-1]
        below, above, kept, lacking, worth, left, lower, upper = (
            of + part * move for of, move in moves
        )
    return np.clip(w, within.low, within.high)


def best(law: Saturating, start: Floats, metric: int, within: Box) -> Floats:
    """The mixture (K,) of the best of one metric, whatever becomes of the others."""
    target = np.full(len(law.floor), np.inf)
    target[metric] = -np.inf
    return steer(law, start, Wish(target, np.full_like(target, ASKED)), within)


def front(law: Saturating, start: Floats, pair: tuple[int, int], within: Box, count: int) -> Floats:
    """(count, K) mixtures of the front of two metrics: the least of the first while the second
    keeps a value, from the best of the first to, ever more densely, the best of the second."""
    first, second = pair
    ends = [best(law, start, metric, within) for metric in pair]
    begin, end = law.predict(np.stack(ends))[:, second].tolist()
    found = []
    for value in end + (begin - end) * np.linspace(1, 0, count) ** 3:
        target, price = np.full(len(law.floor), np.inf), np.full(len(law.floor), HELD)
        target[second], target[first], price[first] = value, -np.inf, ASKED
        found.append(steer(law, start, Wish(target, price), within))
    return np.stack(found)


class Curves(NamedTuple):
    """log(L − φ) of T losses of a law."""

    passes: Floats  # (K,)
    constant: Floats  # (T,) and so are the next three
    rate: Floats
    power: Floats
    knee: Floats
    help: Floats  # (T, K)
    harm: Floats  # (T, K)

    @classmethod
    def of(cls, law: Saturating, which: Numbers) -> "Curves":
        """Those of some of M losses."""
        each = (law.constant, law.rate, law.power, law.knee, law.help, law.harm)
        return cls(law.passes.numpy(), *(part.numpy()[which] for part in each))

    def at(self, w: Floats) -> "Local":
        """Value, slope and bend at a mixture (K,)."""
        rate, power, knee = (part[:, None] for part in (self.rate, self.power, self.knee))
        exposure = w * self.passes
        x = np.maximum(rate * exposure, 1e-30)
        raised = x**power
        fade = np.exp(-raised) * power * raised / x * rate  # slope of what helps
        u = np.log1p(exposure) - knee
        soft, sharp = np.logaddexp(0, u), 1 / (1 + np.exp(-u))
        after = 1 + exposure
        value = (self.help * np.expm1(-raised) + self.harm * soft**2).sum(1) + self.constant
        slope = self.harm * 2 * soft * sharp / after - self.help * fade
        bend = self.harm * 2 * sharp**2 * (1 - soft) / after**2
        bend -= self.help * fade * ((power - 1) / x - power * raised / x) * rate
        return Local(value, slope * self.passes, bend * self.passes**2)


class Local(NamedTuple):
    """T functions of a mixture near it."""

    value: Floats  # (T,)
    slope: Floats  # (T, K)
    bend: Floats  # (T, K) second derivatives; there are no mixed ones
