"""How long the saturating law takes to fit, against today's log-linear form on the same runs, and
how that grows with domains and runs.

Runs are of a known law with noise, 13 losses each, as RegMix's. All on one thread; times are the
processor's. Cross-validation is ten folds, as a swarm's.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common, growth
from doremi_train.methods import regressors, swarm, trees
from doremi_train.methods.box import Floats
from doremi_train.methods.saturating import Saturating

DOMAINS, LOSSES = 17, 13  # RegMix's
RUNS = (34, 102, 512)  # of which the two forms take turns
MANY_DOMAINS = (8, 17, 50, 100, 200)
MANY_RUNS = (34, 100, 200, 512, 1000, 2000)
NOISE = 0.01  # nats


def runs(domains: int, count: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Mixtures (N, K) and losses (N, 13)."""
    random = np.random.default_rng(seed)
    each = (
        np.ones(domains), random.uniform(1.5, 3, LOSSES), random.uniform(0.5, 1.5, LOSSES),
        random.choice([1.0, 4.0, 16.0], LOSSES), random.choice([0.35, 0.6, 1.0], LOSSES),
        np.full(LOSSES, np.inf), random.uniform(0, 2, (LOSSES, domains)) ** 2,
        np.zeros((LOSSES, domains)),
    )  # fmt: skip
    points = random.dirichlet(np.full(domains, 0.3), count)
    losses = Saturating(*map(torch.from_numpy, each)).predict(points)
    return points, losses + NOISE * random.standard_normal(losses.shape)


def fit(name: str, points: Floats, losses: Floats) -> Callable[[], object]:
    return lambda: regressors.REGRESSORS[name](points, losses)


def measure(given: argparse.Namespace) -> common.Result:
    torch.set_num_threads(1)
    ratios, figures = {}, dict[str, Any]()
    for count in RUNS[: 2 if given.quick else None]:
        sides = {name: fit(name, *runs(DOMAINS, count)) for name in ("log_linear", "saturating")}
        times = common.alternate(sides, 3 if given.quick else 7, clock=time.process_time)
        ratios[f"log_linear_over_saturating_{count}"] = common.ratio(*times.values())
        figures[f"seconds_{count}"] = {name: float(np.median(t)) for name, t in times.items()}
    figures["cross_validated"] = cross_validated(34 if given.quick else 512)
    axes: Mapping[str, tuple[tuple[int, ...], Callable[[int], tuple[Floats, Floats]]]] = {
        "domains": (MANY_DOMAINS, lambda size: runs(size, 2 * size)),
        "runs": (MANY_RUNS, lambda size: runs(DOMAINS, size)),
    }
    for name, (sizes, made) in axes.items():
        tried = sizes[:2] if given.quick else sizes
        times, memory = dict[str, list[float]](), dict[str, list[float]]()
        for size in tried:
            part = fit("saturating", *made(size))
            times.setdefault("saturating", []).append(growth.seconds(part, 0.1))
            memory.setdefault("saturating", []).append(growth.peak(part))
        figures[name] = growth.shown(name, f"fit-{name}", tried, times, memory, given.pictures)
    return common.Result(ratios, figures)


def cross_validated(count: int) -> dict[str, float]:
    """Seconds of a fit and of ten more, which each leave out a tenth of the runs."""
    found = {}
    for name in ("saturating", *(["corrected"] if trees.installed() else [])):
        points, losses = runs(DOMAINS, count)
        began = time.process_time()
        regressors.REGRESSORS[name](points, losses)
        swarm.out_of_fold(points, losses, name, np.random.default_rng(0))
        found[name] = time.process_time() - began
    common.table(
        f"a fit of {count} runs and its cross-validation",
        ("form", "s"),
        list(found.items()),
    )
    return found


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="draw growth-fit-NAME.svg there"
    )


if __name__ == "__main__":
    common.main("fit", __doc__, measure, options)
