"""Means over seeds with intervals, and paired differences."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor

_RESAMPLES = 10_000


def summarize(samples: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Mean (K,) of S weight vectors and its 95 % Student-t interval, within [0, 1]; None for one
    sample."""
    stacked = torch.stack(list(samples))  # (S, K)
    mean = stacked.mean(0) / stacked.mean(0).sum()
    if len(samples) == 1:
        return mean, None
    half = torch.tensor(
        [student_t(column)[1] for column in stacked.T.tolist()], dtype=torch.float64
    )
    return mean, ((mean - half).clamp(0, 1), (mean + half).clamp(0, 1))


def student_t(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of its two-sided Student-t interval; the half-width of a single value is
    infinite."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.inf
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, float(scipy.stats.t.ppf((1 + level) / 2, len(values) - 1)) * deviation / math.sqrt(
        len(values)
    )


class Paired(NamedTuple):
    """How much higher another's losses are, seed by seed."""

    mean: float  # in the unit of the losses
    half: float | None  # half-width of the 95 % Student-t interval; None of one seed
    low: float  # of the 95 % paired bootstrap interval
    high: float


def paired(others: Sequence[float], losses: Sequence[float]) -> Paired:
    """Difference of losses with the same seeds. A bootstrap over so few seeds is too narrow, so
    `judged` asks both intervals."""
    gains = np.array(others) - np.array(losses)
    mean, half = student_t(gains.tolist())
    drawn = np.random.default_rng(0).integers(len(gains), size=(_RESAMPLES, len(gains)))
    low, high = np.quantile(gains[drawn].mean(1), [0.025, 0.975])
    return Paired(mean, half if len(gains) > 1 else None, float(low), float(high))


def judged(name: str, other: str, gain: Paired, seeds: int, unit: str = "nats per token") -> str:
    """Verdict on a difference, in one plain sentence."""
    amount = f"{gain.mean:+.4f} {unit}"
    if gain.half is None:
        return f"{name} against {other}: {amount}; one seed, no interval, so this decides nothing."
    apart = abs(gain.mean) > gain.half and (gain.low > 0 or gain.high < 0)
    words = f"better than {other}" if gain.mean > 0 else f"worse than {other}"
    return (
        f"{name} is {words if apart else f'not distinguishable from {other}'} ({amount}, ± "
        f"{gain.half:.4f} over {seeds} seeds; bootstrap {gain.low:+.4f} to {gain.high:+.4f})."
    )


def unit(counted: Collection[str], tasks: Collection[str], scores: Collection[str]) -> str:
    """Unit of a mean or maximum of metrics of these names, of which some are tasks and some scores;
    of metrics that have none in common it is points."""
    units = {
        "bits per byte" if name in tasks else "points" if name in scores else "nats per token"
        for name in counted
    }
    return units.pop() if len(units) == 1 else "points"


def listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def spread(values: Sequence[float | None], digits: int = 4) -> str:
    """Mean ± half-width; of one value the value. Seeds without one (such as a goal never reached)
    are said."""
    known = [value for value in values if value is not None]
    if not known:
        return "never" if values else ""
    mean, half = student_t(known)
    missing = (
        f", {len(values) - len(known)} of {len(values)} never" if len(known) < len(values) else ""
    )
    shown = (
        f"{mean:.{digits}f} ± {half:.{digits}f}" if math.isfinite(half) else f"{mean:.{digits}f}"
    )
    return shown + missing
