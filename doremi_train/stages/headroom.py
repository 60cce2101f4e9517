"""Headroom: how much any mixture can gain on the objective, asked with few runs before a swarm is
paid for.

Natural, uniform and a D-optimal choice of mixtures are trained as a swarm trains its own, which
later fits them too, and a law is fitted to them. Natural is also trained for a half, a quarter and
an eighth of the steps: what a gain is worth in tokens is read off that curve. The final run's FLOPs
that it saves are set beside the swarm's.

`run_dir/headroom` is a run in the store, done once; `headroom.json` in it has every figure.

K domains, V virtual domains (as many, where nothing is frozen), N runs.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from doremi_train import files
from doremi_train.console import say
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import box, design, headroom, replicates
from doremi_train.methods.box import Floats
from doremi_train.methods.headroom import Gain, Lowest, SpeedUp
from doremi_train.methods.objective import Objective
from doremi_train.parallel import comm
from doremi_train.parallel.threads import fitting
from doremi_train.reports import headroom_text
from doremi_train.stages import prepare
from doremi_train.stages.mixtures import small_runs, swarm_problem
from doremi_train.stages.mixtures.swarm_problem import Problem
from doremi_train.stages.planning import swarm_bill
from doremi_train.stages.planning.bill import Bill
from doremi_train.stages.runs import budget, language_model, metrics
from doremi_train.stages.runs.ahead import Ahead
from doremi_train.stages.session import Session, once
from doremi_train.stages.tables import headroom as of_table
from doremi_train.storage.runs import Run

PARTS = {"half": 2, "quarter": 4, "eighth": 8}  # of natural's steps, in its shorter runs
NATURAL, UNIFORM = "headroom/natural", "headroom/uniform"  # runs, by name under run_dir
AGAIN = f"{NATURAL}-again"
_STREAM = 1 << 21  # of random numbers: no round of a swarm, and no search


class Asked(NamedTuple):
    """What is measured."""

    problem: Problem
    run: Run  # the stage's own
    mixtures: dict[str, Tensor]  # (K,) of the runs at full length, by name under run_dir
    reused: dict[str, Tensor]  # (K,) of those that the store had, by address


@once
def run(session: Session) -> dict[str, Any]:
    """Train what is missing, judge it and say it; the content of headroom.json. Of fit.runs nothing
    is trained. Raises UserError where caps and floors leave no mixture."""
    if session.config.fit.runs is not None:
        return of_table.run(session)
    store = prepare.run(session)
    asked = comm.on_first(lambda: ask(session, store))
    with session.computing(asked.run, "headroom") as todo:
        if todo:
            comm.on_first(lambda: files.write_json(asked.run.folder / "reused.json", _named(asked)))
            _measure(session, store, asked)
    content: dict[str, Any] = comm.on_first(lambda: result(asked.run))
    for line in (*content["said"], str(session.run_dir / "headroom" / "headroom.json")):
        if comm.world().first:
            say(f"headroom: {line}")
    return content


def ask(session: Session, store: TokenStore) -> Asked:
    """What is measured, of which the store may have runs already. Raises UserError where caps and
    floors leave no mixture."""
    problem = swarm_problem.problem_of(session, store)
    count = session.config.headroom.runs or len(problem.prior)
    like = small_runs.recipe(session, store, torch.from_numpy(problem.natural))
    plain, options = dict(like.recipe), session.config.swarm
    del plain["mixture"]
    final = {"tokens": budget.final_tokens(session), "model": session.config.main.model}
    measured = Run(
        session.store,
        "headroom",
        plain
        | metrics.recipe(session, store)
        | {"runs": count, "reuse": options.reuse, "final": final}
        | {"swarm": {"runs": problem.draws * options.rounds, "confirmed": options.candidates}}
        | {"frozen": problem.space.spread.tolist(), "prior": problem.prior.tolist()}
        | {"low": problem.within.low.tolist(), "high": problem.within.high.tolist()}
        | ({} if problem.target is None else {"target": problem.target.tolist()}),
    )
    anchors = _anchors(problem)
    reused = _reused(session, store, problem, measured, like)
    given = [*anchors.values(), *reused.values()]
    designed = _designed(session, problem, given, max(count - len(reused), 0))
    named = {f"headroom/run-{index}": mixed for index, mixed in enumerate(designed)}
    mixtures = {name: torch.from_numpy(mixed) for name, mixed in (anchors | named).items()}
    return Asked(
        problem, measured, mixtures, {name: torch.from_numpy(one) for name, one in reused.items()}
    )


def _anchors(problem: Problem) -> dict[str, Floats]:
    """The mixtures (K,) that a gain is told over, as a swarm trains them too."""
    virtual = len(problem.prior)
    natural = problem.space.reduce(problem.natural)
    points = {NATURAL: natural, UNIFORM: np.full(virtual, 1 / virtual)}
    return {name: problem.space.expand(point) for name, point in points.items()}


def _reused(
    session: Session, store: TokenStore, problem: Problem, measured: Run, like: Run
) -> dict[str, Floats]:
    """Other mixtures (K,) of finished runs that the store had when this began."""
    path = measured.folder / "reused.json"
    if path.exists():
        known: dict[str, dict[str, float]] = files.read_json(path)
        return {name: swarm_problem.row_of(problem, mixed) for name, mixed in known.items()}
    if not session.config.swarm.reuse:
        return {}
    anchors, found = [*_anchors(problem).values()], {}
    for mixed in small_runs.finished_like(session, like):
        point = swarm_problem.row_of(problem, mixed)
        apart = all(box.distance(point, anchor) > 1e-6 for anchor in anchors)
        if apart and problem.space.holds(point):
            name = small_runs.recipe(session, store, torch.from_numpy(point)).folder.name
            found[name] = point
    return found


def _designed(session: Session, problem: Problem, given: list[Floats], count: int) -> list[Floats]:
    """(K,) each: the mixtures that tell most beside those that are given."""
    random = swarm_problem.generator(session, _STREAM)
    candidates = swarm_problem.candidates(problem, design.CANDIDATES, random)
    # Many end in the same corner of the box.
    candidates = candidates[np.unique(candidates.round(6), axis=0, return_index=True)[1]]
    count, points = min(count, len(candidates)), problem.space.reduce(np.stack(given))
    chosen = candidates[design.choose(candidates, count, problem.inside, random, points)]
    return [box.on_grid(mixed, problem.within) for mixed in problem.space.expand(chosen)]


def _others(session: Session) -> dict[str, Session]:
    """Sessions of natural's other runs: with another seed, as a swarm has it, and with a part of
    the steps, and of main.* alike, so that they read the same part of the data. Of equal lengths
    one."""
    again = replace(session.config, seed=budget.proxy_seed(session, 1))
    sessions = {AGAIN: replace(session, config=again, plain={**session.plain, "seed": again.seed})}
    lengths: list[int] = []
    for name, part in PARTS.items():
        steps = max(session.config.training.steps // part, 1)
        given = session.config.main.steps, session.config.main.tokens
        final, tokens = (None if one is None else max(one // part, 1) for one in given)
        if steps in (*lengths, session.config.training.steps):
            continue
        lengths.append(steps)
        config = replace(
            session.config,
            training=replace(session.config.training, steps=steps),
            main=replace(session.config.main, steps=final, tokens=tokens),
        )
        plain = dict(session.plain)
        plain["training"] = {**plain["training"], "steps": steps}
        plain["main"] = {**plain["main"], "steps": final, "tokens": tokens}
        sessions[f"{NATURAL}-{name}"] = replace(session, config=config, plain=plain)
    return sessions


def _measure(session: Session, store: TokenStore, asked: Asked) -> None:
    others, natural = _others(session), asked.mixtures[NATURAL]
    sessions = [session] * len(asked.mixtures) + [*others.values()]
    with session.over("headroom", sum(map(small_runs.tokens, sessions))) as bar:
        trained = small_runs.train(session, store, asked.mixtures, bar)
        for name, one in others.items():
            trained |= small_runs.train(one, store, {name: natural}, bar)
    folders = {name: run.folder for name, run in trained.items()}
    folders |= {name: session.store / "runs" / name for name in asked.reused}
    measured = metrics.measured(session, store, folders)
    comm.on_first(lambda: _conclude(session, store, asked, measured))


# ── What came of it ─────────────────────────────────────────────────────────────────


class Found(NamedTuple):
    """What the runs say."""

    best: Lowest
    gains: dict[str, Gain]  # over natural and uniform
    noise: float  # standard deviation of a run's score over seeds
    speed: SpeedUp | None


@fitting("headroom")
def _conclude(
    session: Session, store: TokenStore, asked: Asked, measured: Mapping[str, list[float]]
) -> None:
    wanted = _wanted(session, store, asked, measured)
    # A curve that leads to natural is not clipped; what is a candidate is.
    bare, candidates = wanted._replace(clip=np.inf), _points(asked)
    scores = {
        name: float((wanted if name in candidates else bare).scores(np.array([row]))[0])
        for name, row in measured.items()
    }
    found, costs = (
        _found(session, asked, measured, wanted, scores),
        swarm_bill.of_swarm(session, store),
    )
    speed, flops = found.speed, costs["final_flops"]
    # What natural would need more than the final run, at both ends of the interval.
    saved = None if speed is None else [(end - 1) * flops for end in (speed.low, speed.high)]
    if found.gains["natural"].high <= 0:
        pays: bool | None = False
    else:
        pays = None if saved is None else headroom.worth(saved, costs["swarm_flops"])
    mixed = asked.problem.space.expand(found.best.mixture)
    content = {
        "runs": len(asked.mixtures) + 1 + len(asked.reused),  # with natural again
        "reused": len(asked.reused),
        "objective": wanted.reduce,
        "unit": wanted.unit,
        "scores": scores,
        "noise": found.noise,
        "best": {
            "score": found.best.score,
            "mixture": swarm_problem.named(asked.problem, mixed.tolist()),
        },
        "gains": {name: headroom_text.ends(gain) for name, gain in found.gains.items()},
        "speed_up": None if found.speed is None else headroom_text.ends(found.speed),
        "saved_flops": None if saved is None else [headroom_text.finite(end) for end in saved],
        "worth": pays,
        **costs,
    }
    content["said"] = headroom_text.sentences(content)
    files.write_json(asked.run.folder / "headroom.json", content)
    asked.run.finish({"said": content["said"]})


def _points(asked: Asked) -> dict[str, Floats]:
    """(K,) of the runs of full length, natural's second among them."""
    mixed = asked.mixtures | {AGAIN: asked.mixtures[NATURAL]} | asked.reused
    return {name: one.numpy() for name, one in mixed.items()}


def _wanted(
    session: Session, store: TokenStore, asked: Asked, measured: Mapping[str, list[float]]
) -> Objective:
    points = _points(asked)
    values = np.array([measured[name] for name in points])
    scale = replicates.scale(np.stack([*points.values()]), values, points[NATURAL])
    mean = np.mean([measured[NATURAL], measured[AGAIN]], axis=0)
    return metrics.objective(session, store, mean, scale)


def _found(
    session: Session,
    asked: Asked,
    measured: Mapping[str, list[float]],
    wanted: Objective,
    scores: Mapping[str, float],
) -> Found:
    problem, known = asked.problem, swarm_problem.known(asked.problem)
    points = _points(asked)
    runs = headroom.Runs(
        problem.space.reduce(np.stack([*points.values()])),
        np.array([measured[name] for name in points]),
    )
    random = swarm_problem.generator(session, _STREAM, 1)
    best = headroom.lowest(runs, known, problem.inside, wanted, random)
    noise = max(
        abs(scores[NATURAL] - scores[AGAIN]) / math.sqrt(2),
        _usual_noise(np.array(measured[NATURAL]) - measured[AGAIN], wanted),
    )
    natural = (scores[NATURAL] + scores[AGAIN]) / 2
    gains = {"natural": (natural, 2, NATURAL), "uniform": (scores[UNIFORM], 1, UNIFORM)}
    told = {
        name: headroom.gain(score, best, noise, count, box.inside(points[of], problem.within))
        for name, (score, count, of) in gains.items()
    }
    steps = {name: one.config.training.steps for name, one in _others(session).items()}
    curve = {session.config.training.steps: natural}
    curve |= {length: scores[name] for name, length in steps.items() if name != AGAIN}
    lengths, reached = np.array([*curve], float), np.array([*curve.values()])
    return Found(best, told, noise, headroom.speed_up(lengths, reached, told["natural"]))


def _usual_noise(differences: Floats, wanted: Objective) -> float:
    """Standard deviation of the score over seeds, were all metrics as noisy as they are on average:
    two seeds may agree on one of them by chance."""
    if wanted.scale is not None:
        differences = (differences / wanted.scale)[wanted.weights != 0]
    each = np.sqrt((differences**2).mean() / 2)
    return float(each * np.linalg.norm(wanted.weights) / np.abs(wanted.weights).sum())


def ahead(session: Session, store: TokenStore) -> str:
    """What the plan of a swarm says: what came of it, or what it would cost."""
    asked = ask(session, store)
    if asked.run.finished:
        return headroom_text.line(result(asked.run))
    bill, shape = Bill(session, store, {}), language_model.resolved_model(session, store)
    sessions = [session] * len(asked.mixtures) + [*_others(session).values()]
    steps = [one.config.training.steps for one in sessions]
    flops = sum(bill.run(Ahead("", "swarm", shape, count, 0, None))["flops"] for count in steps)
    own = {"headroom_runs": len(sessions), "headroom_flops": float(flops)}
    return headroom_text.offer(swarm_bill.of_swarm(session, store) | own)


def _named(asked: Asked) -> dict[str, dict[str, float]]:
    return {
        name: swarm_problem.named(asked.problem, mixed.tolist())
        for name, mixed in asked.reused.items()
    }


def result(run: Run) -> dict[str, Any]:
    """The content of headroom.json of a finished run."""
    content: dict[str, Any] = files.read_json(run.folder / "headroom.json")
    return content
