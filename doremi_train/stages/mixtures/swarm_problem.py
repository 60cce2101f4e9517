"""Problem that a swarm searches: domains, caps, the prior, and the runs it fits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from doremi_train.config import UserError, in_keys, read_object
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import box, regressors, replicates, swarm, trees
from doremi_train.methods.box import Box, Floats, Space
from doremi_train.methods.fits import Fit, Known
from doremi_train.methods.objective import Objective
from doremi_train.stages.runs import budget, metrics, targets
from doremi_train.stages.session import Session


class Problem(NamedTuple):
    """Domains, bounds and prior of the search."""

    names: list[str]  # (K,) domains
    natural: Floats  # (K,)
    even: Floats  # (K,) UniMax: uniform within mixture.max_epochs and floor, as far as can be
    target: Floats | None  # (K,) mixture=target, within the same; None: as natural, or none
    space: Space
    prior: Floats  # (V,)
    within: Box  # of the K domains
    inside: Box  # of the V virtual ones
    draws: int  # runs of a round
    passes: Floats  # (V,) over a domain by a small run on it alone


class Row(NamedTuple):
    """A finished run, as a line of runs.jsonl."""

    run: str  # its name under run_dir; of one that was found in the store, its address
    weights: list[float]  # (K,)
    losses: list[float]  # (M,) metrics, of which the first K are the domains' in nats per token


def problem_of(session: Session, store: TokenStore) -> Problem:
    options = session.config.swarm
    if options.regressor == "lightgbm" and not trees.installed():
        raise UserError(
            "swarm.regressor=lightgbm: needs the package lightgbm; install doremi-train[swarm], or "
            "take log_linear or gaussian_process"
        )
    within = budget.caps(session, store, options.floor, "swarm.floor")
    space = box.space(_frozen(options.frozen, store.domains))
    try:
        inside = space.box(within)
    except ValueError as error:
        keys = {
            "frozen": "swarm.frozen",
            "max_epochs": "mixture.max_epochs",
            "floor": "swarm.floor",
        }
        raise UserError(f"mixture=swarm: {in_keys(error, keys)}") from None
    steps = budget.main_steps(session)
    natural, prior = (
        budget.heuristic(session, store, name, steps) for name in ("natural", options.prior)
    )
    known = _known(session, store, within)
    draws = options.runs or swarm.RUNS_PER_DOMAIN * len(space.spread)
    return Problem(
        list(store.domains),
        natural.numpy(),
        _even(known),
        _target(session, store, known, natural.numpy()),
        space,
        space.reduce(prior.numpy()),
        within,
        inside,
        draws,
        # Of what is frozen, passes over the domain that a token is drawn from, on average.
        (space.spread**2) @ (budget.repeated(session) / np.asarray(store.sizes("train"))),
    )


def _known(session: Session, store: TokenStore, within: Box) -> Box:
    """The box of what is known to be harmless without a law: mixture.max_epochs and floor."""
    try:
        return budget.caps(session, store, session.config.swarm.floor, "swarm.floor", always=True)
    except UserError:  # more tokens than the cap allows of all domains, and a law that needs none
        return within


def _even(within: Box) -> Floats:
    uniform = np.full(len(within.high), 1 / len(within.high))
    if box.inside(uniform, within):
        return uniform
    return box.on_grid(box.project(uniform, within), within)


def _target(session: Session, store: TokenStore, within: Box, natural: Floats) -> Floats | None:
    alone = targets.alone(session, store, within)
    if alone is None or box.distance(alone.numpy(), natural) < 1e-6:
        return None
    return alone.numpy()


def candidates(problem: Problem, count: int, generator: np.random.Generator) -> Floats:
    """(N, V) mixtures that runs may be chosen from. Half of each is what the objective is for,
    where it is for some domains: corners without these are nats worse than anything that could be
    proposed, and a law that is fitted to such corners tells nothing of where it is good."""
    drawn = swarm.design(problem.prior, problem.inside, count, generator)
    if problem.target is None:
        return drawn
    return (drawn + problem.space.reduce(problem.target)) / 2


def _frozen(path: str | None, names: Sequence[str]) -> Floats:
    """(K,) the weights of the domains that keep their proportions; 0 for those that the file does
    not know."""
    if path is None:
        return np.zeros(len(names))
    content = read_object(Path(path), f"swarm.frozen={path}", "give a weights.json")
    try:
        known = content.get("weights", content)
        weights = np.array([float(known.get(name, 0)) for name in names])
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"swarm.frozen={path}: not a weights.json ({error}); give one") from None
    if not (np.isfinite(weights).all() and (weights >= 0).all() and (weights > 0).sum() >= 2):
        raise UserError(
            f"swarm.frozen={path}: must hold weights above 0 for two or more of {', '.join(names)}"
        )
    return weights


def row_of(problem: Problem, mixed: Mapping[str, float]) -> Floats:
    return np.array([mixed[name] for name in problem.names])


def table_of(problem: Problem, rows: Sequence[Row]) -> tuple[Floats, Floats]:
    """Points (N, V) and metrics (N, M)."""
    return problem.space.reduce(np.array([row.weights for row in rows])), np.array(
        [row.losses for row in rows]
    )


def wanted(session: Session, store: TokenStore, problem: Problem, rows: Sequence[Row]) -> Objective:
    """The objective, whose natural is the mean of the runs on it, and its scales what replicates
    say."""
    natural = [row.losses for row in on_natural(problem, rows)]
    points, values = table_of(problem, rows)
    scale = replicates.scale(points, values, problem.space.reduce(problem.natural))
    return metrics.objective(session, store, np.mean(natural, axis=0), scale)


def on_natural(problem: Problem, rows: Sequence[Row]) -> list[Row]:
    """The runs on natural: an anchor of the first round, and what repeats it."""
    anchor = problem.space.expand(problem.space.reduce(problem.natural))
    return [row for row in rows if box.distance(np.array(row.weights), anchor) < 1e-6]


def known(problem: Problem) -> Known:
    """What fits may know beside the runs."""
    return Known(problem.passes, problem.space.reduce(problem.natural))


def fitted(session: Session, problem: Problem, rows: Sequence[Row], wanted: Objective) -> Fit:
    """Fit of what counts: of all losses where they count alike, else of the objective's one
    figure."""
    regressor = regressors.REGRESSORS[session.config.swarm.regressor]
    points, metrics = table_of(problem, rows)
    fit = regressor(points, metrics * wanted.turn, known(problem))
    if wanted.plain:
        return fit
    return swarm.Judged(fit, wanted.turned())


def generator(session: Session, *stream: int) -> np.random.Generator:
    return np.random.default_rng([session.config.seed, *stream])


def named(problem: Problem, values: Sequence[float]) -> dict[str, float]:
    return dict(zip(problem.names, values, strict=True))
