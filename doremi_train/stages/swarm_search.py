"""A swarm's search: mixtures are drawn, a small run trained on each, losses fitted, a mixture proposed and confirmed.

`run_dir/swarm` is a run in the store itself, done once. It holds `runs.jsonl`, a line for every run that was fitted,
and `fit.json`: what was proposed and predicted, what came of it, and why a proposal was refused.

K domains, V virtual domains (as many, where nothing is frozen), N runs.
"""

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
from torch import Tensor

from doremi_train import files, mixture
from doremi_train.config import UserError
from doremi_train.console import Bar
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import box, regressors, swarm
from doremi_train.methods.box import Box, Floats, Space
from doremi_train.parallel import comm
from doremi_train.stages import language_model, prepare, swarm_runs
from doremi_train.stages.session import Session, once
from doremi_train.storage.runs import Run


class Problem(NamedTuple):
    """What the search works with."""

    names: list[str]  # (K,) domains
    natural: Floats  # (K,)
    space: Space
    prior: Floats  # (V,)
    within: Box  # of the K domains
    inside: Box  # of the V virtual ones
    draws: int  # runs of a round


class Row(NamedTuple):
    """A finished run, as a line of runs.jsonl."""

    run: str  # its name under run_dir; of one that was found in the store, its address
    weights: list[float]  # (K,)
    losses: list[float]  # (K,) nats per token


@once
def run(session: Session) -> mixture.Mixture:
    """The confirmed mixture; what is known about it goes with it as provenance."""
    store = prepare.run(session)
    problem, search = state(session, store)
    with session.computing(search, "swarm") as todo:
        if todo:
            _search(session, store, problem, search)
        else:
            session.say(f"{'swarm':<22} is in the store already: {search.folder.name}")
    found = comm.on_first(search.result)
    return mixture.Mixture("swarm", found["weights"], provenance=found["provenance"])


def state(session: Session, store: TokenStore) -> tuple[Problem, Run]:
    """What is searched, and the run that does it. Raises UserError where caps and floors leave no mixture."""
    problem, options = _problem(session, store), session.config.swarm
    like = swarm_runs.recipe(session, store, torch.from_numpy(problem.space.expand(problem.prior))).recipe
    setting = {"prior": problem.prior, "low": problem.within.low, "high": problem.within.high}
    return problem, Run(
        session.store,
        "swarm",
        {key: value for key, value in like.items() if key != "mixture"}
        | {"options": asdict(options) | {"frozen": problem.space.spread.tolist()}}
        | {key: value.tolist() for key, value in setting.items()},
    )


def _problem(session: Session, store: TokenStore) -> Problem:
    options = session.config.swarm
    if options.regressor == "lightgbm" and importlib.util.find_spec("lightgbm") is None:
        raise UserError(
            "swarm.regressor=lightgbm: needs the package lightgbm; install doremi-train[swarm], or take log_linear or "
            "gaussian_process"
        )
    within = language_model.caps(session, store, options.floor, "swarm.floor")
    space = box.space(_frozen(options.frozen, store.domains))
    try:
        inside = space.box(within)
    except ValueError as error:
        raise UserError(f"mixture=swarm: {error}") from None
    steps = language_model.main_steps(session)
    natural, prior = (language_model.heuristic(session, store, name, steps) for name in ("natural", options.prior))
    draws = options.runs or swarm.RUNS_PER_DOMAIN * len(space.spread)
    return Problem(list(store.domains), natural.numpy(), space, space.reduce(prior.numpy()), within, inside, draws)


def _frozen(path: str | None, names: Sequence[str]) -> Floats:
    """(K,) the weights of the domains that keep their proportions; 0 for those that the file does not know."""
    if path is None:
        return np.zeros(len(names))
    try:
        content = files.read_json(Path(path))
        known = content.get("weights", content)
        found = np.array([float(known.get(name, 0)) for name in names])
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"swarm.frozen={path}: not a weights.json that can be read ({error})") from None
    if not (np.isfinite(found).all() and (found >= 0).all() and (found > 0).sum() >= 2):
        raise UserError(f"swarm.frozen={path}: must hold weights above 0 for two or more of {', '.join(names)}")
    return found


def planned(session: Session, problem: Problem) -> dict[str, Tensor | None]:
    """Every run of the search by its name under run_dir, with its mixture (K,) where it is known beforehand."""
    options = session.config.swarm
    found: dict[str, Tensor | None] = dict(_draw(session, problem, [], 1))
    for number in range(2, options.rounds + 1):
        found |= {_name(number, index): None for index in range(problem.draws)}
    found |= {f"swarm/confirm/proposal-{index + 1}": None for index in range(options.candidates)}
    return found | {f"swarm/confirm/{name}": mixed for name, mixed in _baselines(problem).items()}


def _name(number: int, index: int) -> str:
    return f"swarm/round-{number}/run-{index}"


# ── The search ──────────────────────────────────────────────────────────────────────


def _search(session: Session, store: TokenStore, problem: Problem, search: Run) -> None:
    rows = comm.on_first(lambda: _found(session, store, problem, search.folder))
    total = len(planned(session, problem)) * swarm_runs.tokens(session)
    with session.over("swarm", total) as bar:
        for number in range(1, session.config.swarm.rounds + 1):
            mixtures = comm.on_first(functools.partial(_draw, session, problem, rows, number))
            trained = _train(session, store, mixtures, bar)
            new = {tuple(row.weights): row for row in rows + trained if problem.space.holds(np.array(row.weights))}
            rows = list(new.values())  # of equal mixtures one
        proposed = comm.on_first(lambda: _propose(session, problem, rows))
        tried = {f"proposal-{index + 1}": torch.from_numpy(p.mixed) for index, p in enumerate(proposed.proposals)}
        mixtures = {f"swarm/confirm/{name}": mixed for name, mixed in (tried | _baselines(problem)).items()}
        confirmed = _train(session, store, mixtures, bar)
    comm.on_first(lambda: _conclude(session, problem, search, rows, proposed, confirmed))


def _found(session: Session, store: TokenStore, problem: Problem, folder: Path) -> list[Row]:
    """What the store had when the search began; a search that is continued fits the same runs."""
    path = folder / "reused.json"
    if not path.exists():
        one = swarm_runs.recipe(session, store, torch.from_numpy(problem.space.expand(problem.prior)))
        reuse = session.config.swarm.reuse
        known = swarm_runs.finished_like(session, one) if reuse else []
        files.write_json(path, [mixed for mixed in known if problem.space.holds(_row(problem, mixed))])
    found = []
    for mixed in files.read_json(path):
        run = swarm_runs.recipe(session, store, torch.from_numpy(_row(problem, mixed)))
        found.append(Row(run.folder.name, _row(problem, mixed).tolist(), swarm_runs.losses(run, store)))
    if found:
        session.say(f"{'swarm':<22} {len(found)} runs in the store are used too")
    return found


def _row(problem: Problem, mixed: Mapping[str, float]) -> Floats:
    return np.array([mixed[name] for name in problem.names])


def _draw(session: Session, problem: Problem, rows: Sequence[Row], number: int) -> dict[str, Tensor]:
    """The mixtures (K,) of a round by the names of their runs; the first has natural and uniform as anchors."""
    options, random = session.config.swarm, _random(session, number)
    found = {}
    if number == 1:
        virtual = len(problem.prior)
        anchors = {"natural": problem.space.reduce(problem.natural), "uniform": np.full(virtual, 1 / virtual)}
        found = {f"swarm/round-1/{name}": problem.space.expand(point) for name, point in anchors.items()}
        points = swarm.design(problem.prior, problem.inside, problem.draws, random)
    else:
        fit = regressors.REGRESSORS[options.regressor](*_table(problem, rows))
        points = swarm.explore(fit, problem.prior, problem.inside, options.kl, problem.draws, random)
    drawn = (box.on_grid(mixed, problem.within) for mixed in problem.space.expand(points))
    found |= {_name(number, index): mixed for index, mixed in enumerate(drawn)}
    return {name: torch.from_numpy(mixed) for name, mixed in found.items()}


def _train(session: Session, store: TokenStore, mixtures: Mapping[str, Tensor], bar: Bar) -> list[Row]:
    trained = swarm_runs.train(session, store, mixtures, bar)
    return comm.on_first(
        lambda: [Row(name, mixtures[name].tolist(), swarm_runs.losses(run, store)) for name, run in trained.items()]
    )


def _table(problem: Problem, rows: Sequence[Row]) -> tuple[Floats, Floats]:
    """Points (N, V) and losses (N, K)."""
    return problem.space.reduce(np.array([row.weights for row in rows])), np.array([row.losses for row in rows])


def _random(session: Session, *stream: int) -> np.random.Generator:
    return np.random.default_rng([session.config.seed, *stream])


# ── Proposals ───────────────────────────────────────────────────────────────────────


class Proposal(NamedTuple):
    mixed: Floats  # (K,)
    predicted: float  # mean loss, nats per token
    interval: tuple[float, float]
    distance: float  # to the nearest run that was fitted, total variation
    refused: list[str]  # why it is not to be believed, before it is trained


class Proposed(NamedTuple):
    proposals: list[Proposal]
    diagnostics: swarm.Diagnostics
    fitted: Floats  # (N,) mean loss
    unseen: Floats  # (N,) the same out of fold


def _propose(session: Session, problem: Problem, rows: Sequence[Row]) -> Proposed:
    """Fit, solve at λ, 4 λ, …, and say what is to be expected."""
    options, random = session.config.swarm, _random(session, 0)
    points, losses = _table(problem, rows)
    fit, realised = regressors.REGRESSORS[options.regressor](points, losses), losses.mean(1)
    unseen = swarm.out_of_fold(points, losses, options.regressor, random).mean(1)
    diagnostics, proposals = swarm.diagnose(unseen, realised), []
    for index in range(options.candidates):
        point = swarm.solve(fit, problem.prior, problem.inside, options.kl * 4**index, random)
        near = box.distance(points, point)
        predicted = float(fit.predict(point[None]).mean())
        proposals.append(
            Proposal(
                mixed=box.on_grid(problem.space.expand(point), problem.within),
                predicted=predicted,
                interval=swarm.interval(predicted, near, realised - unseen),
                distance=float(near.min()),
                refused=swarm.gates(diagnostics, point, points),
            )
        )
    return Proposed(proposals, diagnostics, fit.predict(points).mean(1), unseen)


def _baselines(problem: Problem) -> dict[str, Tensor]:
    """What a proposal has to beat, (K,) each: natural, uniform, and UniMax, which is uniform within caps and floors."""
    uniform = np.full(len(problem.names), 1 / len(problem.names))
    unimax = box.on_grid(box.project(uniform, problem.within), problem.within)
    found = {"natural": problem.natural, "uniform": uniform}
    found["unimax"] = uniform if box.inside(uniform, problem.within) else unimax
    return {name: torch.from_numpy(mixed) for name, mixed in found.items()}


# ── The confirmation ────────────────────────────────────────────────────────────────


def _conclude(
    session: Session, problem: Problem, search: Run, rows: Sequence[Row], proposed: Proposed, confirmed: Sequence[Row]
) -> None:
    """Take the best mixture of those that were trained, within caps and floors and not refused; and write all down."""
    lines: list[dict[str, Any]] = []
    for index, row in enumerate(confirmed):
        realised = float(np.mean(row.losses))
        line = {"name": row.run.rpartition("/")[2], "weights": _named(problem, row.weights), "realised": realised}
        if index < len(proposed.proposals):
            found = proposed.proposals[index]
            line |= {"predicted": found.predicted, "interval": found.interval, "distance": found.distance}
            line["refused"] = found.refused + swarm.confirm(realised, found.interval)
        else:
            kept = box.inside(np.array(row.weights), problem.within)
            line["refused"] = [] if kept else ["it is outside mixture.max_epochs or swarm.floor"]
        lines.append(line)
    chosen = min((line for line in lines if not line["refused"]), key=lambda line: line["realised"])
    verdict = _verdict(lines, chosen)
    diagnostics, first = proposed.diagnostics._asdict(), lines[0]
    files.write_bytes(
        search.folder / "runs.jsonl", b"".join(orjson.dumps(line) + b"\n" for line in _lines(problem, rows, proposed))
    )
    files.write_json(
        search.folder / "fit.json",
        {"verdict": verdict, "chosen": chosen["name"], "diagnostics": diagnostics, "confirmed": lines},
    )
    session.say(f"swarm: {verdict}")
    search.finish(
        {
            "weights": chosen["weights"],
            "provenance": {
                "swarm": search.folder.name,
                "runs": len(rows),
                "chosen": chosen["name"],
                "verdict": verdict,
                **diagnostics,
                **{f"proposal_{key}": first[key] for key in ("predicted", "interval", "realised", "distance")},
            },
        }
    )


def _verdict(lines: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> str:
    """What is written, and why it is not the proposal where it is not."""
    first = lines[0]
    low, high = first["interval"]
    if chosen is first:
        return (
            f"the proposal reached {first['realised']:.4f} nats per token ({low:.4f} to {high:.4f} predicted) and is "
            "the best of those confirmed"
        )
    why = "; ".join(first["refused"]) or f"it reached {first['realised']:.4f} nats per token"
    return (
        f"the proposal is {'refused' if first['refused'] else 'not the best'}: {why}; {chosen['name']} is written "
        f"instead, with {chosen['realised']:.4f} the best of those confirmed"
    )


def _lines(problem: Problem, rows: Sequence[Row], proposed: Proposed) -> list[dict[str, Any]]:
    first = proposed.proposals[0].mixed
    return [
        {
            "run": row.run,
            "weights": _named(problem, row.weights),
            "losses": _named(problem, row.losses),
            "loss": float(np.mean(row.losses)),
            "fitted": float(proposed.fitted[index]),
            "out_of_fold": float(proposed.unseen[index]),
            "distance": float(box.distance(np.array(row.weights), first)),  # from the first proposal
        }
        for index, row in enumerate(rows)
    ]


def _named(problem: Problem, values: Sequence[float]) -> dict[str, float]:
    return dict(zip(problem.names, values, strict=True))
