"""The part of a page to steer by: what each domain does to each metric, and what a script of ours
needs to compute mixtures in the page, from the file alone.

K domains, M metrics, N runs.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from doremi_train.methods import steering
from doremi_train.methods.box import Box, Floats
from doremi_train.methods.steering import Effects, Flags, Steerable
from doremi_train.reports.page import write_page

_TEMPLATES = Path(__file__).parent / "templates"
_DOTS = 20_000  # figures of runs that are drawn, at most
_KNEE = 99.0  # stands for a knee that is never reached: JSON has no infinity


class Given(NamedTuple):
    """What there is to steer."""

    domains: Sequence[str]
    metrics: Sequence[str]
    more: Flags  # (M,) where more is better
    steerable: Steerable
    within: Box
    starts: Mapping[str, Floats]  # mixtures (K,) to start from, the usual one first
    fitted: Mapping[str, Floats]  # (M,) what the fit of the page expects of each of them
    runs: Floats  # (N, M) measured, nan where it was not
    parts: Sequence[Mapping[str, float]]  # (K) what each domain is made of in a weights.json


def effects(given: Given) -> dict[str, dict[str, list[float | None]]]:
    """[change, half of its interval] of each domain and metric, at the usual start."""
    found = _effects(given)
    return {
        domain: {
            metric: [float(found.change[k, m]), _finite(found.half[k, m])]
            for m, metric in enumerate(given.metrics)
        }
        for k, domain in enumerate(given.domains)
    }


def write(page: Path, given: Given, title: str, verdict: str, regressor: str) -> None:
    """Write a page of its own, of a swarm's runs that this `regressor` fitted."""
    write_page(
        page,
        "swarm.html.jinja",
        title=title,
        verdict=verdict,
        regressor=regressor,
        runs=len(given.runs),
        steer=section(given),
    )


def section(given: Given) -> dict[str, Any]:
    """What `steer.html.jinja` shows."""
    found, law = _effects(given), given.steerable.law
    start, sign = next(iter(given.starts.values())), np.where(given.more, -1.0, 1.0)
    usual = next(iter(given.starts))
    expected = sign * law.predict(start[None])[0]
    script = "\n".join((_TEMPLATES / name).read_text() for name in ("steer.js", "steer_page.js"))
    return {
        "usual": usual,
        "moved": f"{steering.MOVED:.0%}",
        "metrics": given.metrics,
        "effects": _cells(given, found),
        "expected": [
            [name + " (more is better)" * bool(more), f"{value:.4f}", f"{fitted:.4f}"]
            for name, more, value, fitted in zip(
                given.metrics, given.more, expected, given.fitted[usual], strict=True
            )
        ],
        "weights": [
            [name, f"{weight:.4f}"] for name, weight in zip(given.domains, start, strict=True)
        ],
        "data": _data(given, sign),
        "script": script,
        "hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def _effects(given: Given) -> Effects:
    """Effects on the metrics as they are given, also where more is better."""
    start = next(iter(given.starts.values()))
    change, half = steering.effects(given.steerable, start)
    return Effects(change * np.where(given.more, -1.0, 1.0), half)


def _cells(given: Given, found: Effects) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows of the heat map; a metric's largest effect has its full colour."""
    most = np.abs(found.change).max(0) + 1e-300
    better = np.where(given.more, found.change > 0, found.change < 0)
    told = np.abs(found.change) > found.half
    return [
        (
            domain,
            [
                {
                    "value": repr(float(found.change[k, m])),
                    "text": f"{found.change[k, m]:+.2g}",
                    "half": f"{found.half[k, m]:.1g}" if np.isfinite(found.half[k, m]) else "?",
                    "kind": ("better" if better[k, m] else "worse") if told[k, m] else "untold",
                    "depth": f"{abs(found.change[k, m]) / most[m]:.3f}",
                }
                for m in range(len(given.metrics))
            ],
        )
        for k, domain in enumerate(given.domains)
    ]


def _data(given: Given, sign: Floats) -> dict[str, Any]:
    """What the script reads."""
    law, usual = given.steerable.law, next(iter(given.starts.values()))
    tensors = law._replace(knee=law.knee.clamp_max(_KNEE))._asdict()
    best = [
        law.predict(steering.best(law, usual, m, given.within)[None])[0, m]
        for m in range(len(given.metrics))
    ]
    every = max(given.runs.size // _DOTS, 1)
    return {
        "domains": list(given.domains),
        "parts": [list(parts.items()) for parts in given.parts],
        "metrics": list(given.metrics),
        "sign": sign.tolist(),
        "law": {name: _rounded(values.numpy()) for name, values in tensors.items()},
        "low": given.within.low.tolist(),
        "high": given.within.high.tolist(),
        "names": list(given.starts),
        "starts": {name: weights.tolist() for name, weights in given.starts.items()},
        "fitted": {name: _rounded(values) for name, values in given.fitted.items()},
        "best": _rounded(np.array(best)),
        "runs": [[_finite(value, 6) for value in run] for run in given.runs[::every]],
    }


def _rounded(values: Floats) -> Any:
    """Lists of numbers of ten digits: no more is needed in a page."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.10g}") for value in values]


def _finite(value: float, digits: int = 17) -> float | None:
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None
