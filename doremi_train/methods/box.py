"""The box in the simplex where mixtures may be; virtual domains, projection and distances."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Box(NamedTuple):
    """Mixtures p with low ≤ p ≤ high."""

    low: Floats  # (K,)
    high: Floats  # (K,)


def box(sizes: Floats, budget: float, max_epochs: float, floor: float) -> Box:
    """Mixtures of at most `max_epochs` passes over each of `sizes` (K,) tokens in a run of `budget`
    tokens, and of at least `floor` where the cap leaves it.

    Raises ValueError where no mixture is within.
    """
    high = np.minimum(max_epochs * sizes / budget, 1.0)
    low = np.minimum(floor, high)
    if high.sum() < 1:
        raise ValueError(
            f"a budget of {budget:.3g} tokens is more than max_epochs={max_epochs:g} "
            f"epochs of all {sizes.sum():.3g} tokens; raise it, or train for fewer tokens"
        )
    if low.sum() > 1:
        raise ValueError(
            f"floor={floor:g} for {len(sizes)} domains is more than all; allowed: at most 1 / "
            "domains"
        )
    return Box(low, high)


def project(points: Floats, within: Box) -> Floats:
    """(…, K) → the mixtures in the box that are nearest in KL divergence, clip(s · point, low,
    high) with the s that makes the sum 1: what a cap takes away goes to the others in
    proportion."""
    positive = np.maximum(points / points.max(-1, keepdims=True), 1e-280)
    lowest = np.full((*points.shape[:-1], 1), -700.0)  # of log s
    highest = -lowest
    for _ in range(64):  # bisection to the last bit
        middle = (lowest + highest) / 2
        above = np.clip(np.exp(middle) * positive, *within).sum(-1, keepdims=True) > 1
        lowest, highest = np.where(above, lowest, middle), np.where(above, middle, highest)
    return np.clip(np.exp(lowest) * positive, *within)


def on_grid(point: Floats, within: Box) -> Floats:
    """The mixture (K,) in multiples of 2⁻⁴⁵ with a sum of exactly 1: it reads back from any file as
    the same bits, and has the same address on machines whose last bits differ."""
    units = np.floor(point * 2.0**45)
    short = round(2.0**45 - units.sum())
    # Where there is most room below the cap.
    units[np.argsort(point - within.high, kind="stable")[:short]] += 1
    return units * 2.0**-45


def inside(point: Floats, within: Box) -> bool:
    """Whether a mixture (K,) keeps caps and floors, to 1e-12."""
    return bool((point >= within.low - 1e-12).all() and (point <= within.high + 1e-12).all())


def distance(a: Floats, b: Floats) -> Floats:
    """Total variation ½ Σ |a − b| over the last axis."""
    return np.abs(a - b).sum(-1) / 2


def divergence(points: Floats, prior: Floats) -> Floats:
    """KL(p‖prior) of (…, K) mixtures, in nats."""
    return (points * np.log(np.maximum(points, 1e-300) / prior)).sum(-1)


class Space(NamedTuple):
    """Mixtures of V virtual domains, each a frozen mixture of domains: after some were added,
    dropped or split, what did not change is one of them, and the others are themselves (Olmix)."""

    spread: Floats  # (V, K) rows are mixtures, no domain is in two

    def expand(self, points: Floats) -> Floats:
        """(…, V) → (…, K)."""
        return points @ self.spread

    def reduce(self, points: Floats) -> Floats:
        """(…, K) → (…, V)."""
        return points @ (self.spread > 0).T.astype(float)

    def holds(self, point: Floats) -> bool:
        """Whether a mixture (K,) keeps what is frozen."""
        return bool(distance(self.expand(self.reduce(point)), point) < 1e-9)

    def box(self, within: Box) -> Box:
        """The box of the virtual domains in which every domain is in its own part of `within`.
        Raises ValueError where no mixture is."""
        inside = self.spread > 0
        ratio = np.where(inside, self.spread, 1)
        low = np.where(inside, within.low / ratio, 0).max(1)
        high = np.where(inside, within.high / ratio, np.inf).min(1)
        if (low > high).any() or low.sum() > 1 or high.sum() < 1:
            raise ValueError("what frozen keeps together does not fit within max_epochs and floor")
        return Box(low, np.minimum(high, 1))


def space(frozen: Floats) -> Space:
    """`frozen` (K,) is the relative weight of the domains that keep their proportions, and 0 for
    the others."""
    kept = frozen > 0
    rows = np.eye(len(frozen))[~kept]
    return Space(np.vstack([frozen / frozen.sum(), rows]) if kept.any() else rows)
