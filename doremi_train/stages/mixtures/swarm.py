"""A swarm's search: mixtures are drawn, a small run trained on each, losses fitted, a mixture
proposed and confirmed.

`run_dir/swarm` is a run in the store itself, done once. It holds `runs.jsonl`, a line for every run
that was fitted, and `fit.json`: what was proposed and predicted, what came of it, and why a
proposal was refused.

K domains, V virtual domains (as many, where nothing is frozen), N runs.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from doremi_train import files, mixture
from doremi_train.console import Bar
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import box, design, swarm
from doremi_train.methods.box import Floats
from doremi_train.parallel import comm
from doremi_train.parallel.threads import fitting
from doremi_train.stages import prepare
from doremi_train.stages.mixtures import small_runs, swarm_page, swarm_problem, swarm_proposals
from doremi_train.stages.mixtures.swarm_problem import Problem, Row
from doremi_train.stages.options import Swarm
from doremi_train.stages.runs import budget, language_model, metrics
from doremi_train.stages.runs.ahead import Pipeline
from doremi_train.stages.session import Session, once
from doremi_train.storage.runs import Run

HOW = (
    "Small runs are trained on many mixtures and their losses fitted; the mixture is the best of "
    "what the fit proposes and of the free ones, all confirmed by a run."
)

AGAIN = "-again"  # ends the name of a run that is trained once more with another seed


@once
def run(session: Session) -> mixture.Mixture:
    """The confirmed mixture; what is known about it goes with it as provenance."""
    store = prepare.run(session)
    problem, search = state(session, store)
    with session.computing(search, "swarm") as todo:
        if todo:
            _search(session, store, problem, search)
    result = comm.on_first(search.result)
    if session.config.stage in swarm_page.STAGES:
        comm.on_first(lambda: swarm_page.write(session, store, problem, search))
    return mixture.Mixture("swarm", result["weights"], provenance=result["provenance"])


def ahead(session: Session, store: TokenStore, pipeline: Pipeline) -> Tensor | None:
    """The runs of a swarm: those that depend on a fit are not known before it."""
    problem, search = state(session, store)
    shape, steps = language_model.resolved_model(session, store), session.config.training.steps
    for name, mixed in planned(session, store, problem).items():
        if mixed is not None or not search.finished:
            seed = seed_of(session, name)
            run = None if mixed is None else small_runs.recipe(session, store, mixed, seed)
            pipeline.add(name, "swarm", shape, steps, run)
    if not search.finished:
        return None
    return mixture.Mixture("swarm", search.result()["weights"]).tensor(store.domains)


def state(session: Session, store: TokenStore) -> tuple[Problem, Run]:
    """What is searched, and the run that does it. Raises UserError where caps and floors leave no
    mixture."""
    problem, options = swarm_problem.problem_of(session, store), session.config.swarm
    like = small_runs.recipe(
        session, store, torch.from_numpy(problem.space.expand(problem.prior))
    ).recipe
    setting = {"prior": problem.prior, "low": problem.within.low, "high": problem.within.high}
    if problem.target is not None:
        setting["target"] = problem.target
    return problem, Run(
        session.store,
        "swarm",
        {key: value for key, value in like.items() if key != "mixture"}
        | metrics.recipe(session, store)
        | {"options": _decisive(options) | {"frozen": problem.space.spread.tolist()}}
        | {key: value.tolist() for key, value in setting.items()},
    )


def _decisive(options: Swarm) -> dict[str, Any]:
    """The options, as they were when there was one design."""
    plain = asdict(options)
    if options.design == "random":
        del plain["design"]
    return plain


def planned(session: Session, store: TokenStore, problem: Problem) -> dict[str, Tensor | None]:
    """Every run of the search by its name under run_dir, with its mixture (K,) where it is known
    beforehand."""
    options = session.config.swarm
    mixtures: dict[str, Tensor | None] = dict(_draw(session, store, problem, [], 1))
    for number in range(2, options.rounds + 1):
        mixtures |= {_name(number, index): None for index in range(problem.draws)}
    mixtures |= {f"swarm/confirm/proposal-{index + 1}": None for index in range(options.candidates)}
    return mixtures | {
        f"swarm/confirm/{name}": mixed for name, mixed in swarm_proposals.baselines(problem).items()
    }


def seed_of(session: Session, name: str) -> int | None:
    """Seed of a run, where it is not the command's."""
    return budget.proxy_seed(session, 1) if name.endswith(AGAIN) else None


def _name(number: int, index: int) -> str:
    return f"swarm/round-{number}/run-{index}"


# ── The search ──────────────────────────────────────────────────────────────────────


def _search(session: Session, store: TokenStore, problem: Problem, search: Run) -> None:
    rows = _reused(session, store, problem, search.folder)
    names = metrics.names(session, store)
    total = len(planned(session, store, problem)) * small_runs.tokens(session)
    with session.over("swarm", total) as bar:
        for number in range(1, session.config.swarm.rounds + 1):
            mixtures = comm.on_first(
                functools.partial(_draw, session, store, problem, rows, number)
            )
            trained = _train(session, store, mixtures, bar)
            new = {
                (*row.weights, row.run.endswith(AGAIN)): row
                for row in rows + trained
                if problem.space.holds(np.array(row.weights))
            }
            rows = list(new.values())  # of equal mixtures one
        wanted = swarm_problem.wanted(session, store, problem, rows)
        proposed = comm.on_first(lambda: swarm_proposals.propose(session, problem, rows, wanted))
        tried = {
            f"proposal-{index + 1}": torch.from_numpy(p.mixed)
            for index, p in enumerate(proposed.proposals)
        }
        mixtures = {
            f"swarm/confirm/{name}": mixed
            for name, mixed in (tried | swarm_proposals.baselines(problem)).items()
        }
        confirmed = _train(session, store, mixtures, bar)
    comm.on_first(
        lambda: swarm_proposals.conclude(
            session, problem, search, rows, proposed, confirmed, names, wanted
        )
    )


def _reused(session: Session, store: TokenStore, problem: Problem, folder: Path) -> list[Row]:
    """What the store had when the search began; a search that is continued fits the same runs."""
    path = folder / "reused.json"

    def look() -> list[dict[str, float]]:
        if not path.exists():
            on_prior = small_runs.recipe(
                session, store, torch.from_numpy(problem.space.expand(problem.prior))
            )
            reuse = session.config.swarm.reuse
            known = small_runs.finished_like(session, on_prior) if reuse else []
            holds = [m for m in known if problem.space.holds(swarm_problem.row_of(problem, m))]
            files.write_json(path, holds)
        found: list[dict[str, float]] = files.read_json(path)
        return found

    points = [swarm_problem.row_of(problem, mixed) for mixed in comm.on_first(look)]
    runs = [small_runs.recipe(session, store, torch.from_numpy(point)) for point in points]
    measured = metrics.measured(session, store, {run.folder.name: run.folder for run in runs})
    if runs:
        session.say(f"{'swarm':<22} {len(runs)} runs in the store are used too")
    return [
        Row(run.folder.name, point.tolist(), measured[run.folder.name])
        for run, point in zip(runs, points, strict=True)
    ]


@fitting("swarm")
def _draw(
    session: Session, store: TokenStore, problem: Problem, rows: Sequence[Row], number: int
) -> dict[str, Tensor]:
    """The mixtures (K,) of a round by the names of their runs; the first has natural and uniform as
    anchors, the domains that the objective is for, and where it is designed two runs again."""
    options, random = session.config.swarm, swarm_problem.generator(session, number)
    mixtures = {}
    if number == 1:
        virtual = len(problem.prior)
        anchors = {
            "natural": problem.space.reduce(problem.natural),
            "uniform": np.full(virtual, 1 / virtual),
        }
        if problem.target is not None:  # which random ones are hardly ever near
            anchors["target"] = problem.space.reduce(problem.target)
        mixtures = {
            f"swarm/round-1/{name}": problem.space.expand(point) for name, point in anchors.items()
        }
        points = _designed(options.design, problem, np.stack([*anchors.values()]), random)
    else:
        wanted = swarm_problem.wanted(session, store, problem, rows)
        fit = swarm_problem.fitted(session, problem, rows, wanted)
        points = swarm.explore(
            fit, problem.prior, problem.inside, options.kl, problem.draws, random
        )
    drawn = (box.on_grid(mixed, problem.within) for mixed in problem.space.expand(points))
    mixtures |= {_name(number, index): mixed for index, mixed in enumerate(drawn)}
    if number == 1 and (options.design == "optimal" or session.config.objective.standardise):
        # The noise differs with the mixture: natural, and what is farthest from it, once more.
        far = max(mixtures, key=lambda name: float(box.distance(mixtures[name], problem.natural)))
        mixtures |= {f"{name}{AGAIN}": mixtures[name] for name in ("swarm/round-1/natural", far)}
    return {name: torch.from_numpy(mixed) for name, mixed in mixtures.items()}


def _designed(how: str, problem: Problem, anchors: Floats, random: np.random.Generator) -> Floats:
    """(N, V) mixtures of the first round beside its anchors."""
    count = problem.draws if how == "random" else max(design.CANDIDATES, 10 * problem.draws)
    candidates = swarm_problem.candidates(problem, count, random)
    if how == "random":
        return candidates
    # Many end in the same corner of the box; of equal mixtures one run is trained.
    candidates = candidates[np.unique(candidates.round(6), axis=0, return_index=True)[1]]
    if len(candidates) <= problem.draws:
        return candidates
    return candidates[design.choose(candidates, problem.draws, problem.inside, random, anchors)]


def train(
    session: Session, store: TokenStore, mixtures: Mapping[str, Tensor], bar: Bar
) -> dict[str, Run]:
    """A run on each mixture (K,), linked by its name under run_dir; with another seed where it
    repeats one."""
    trained: dict[str, Run] = {}
    for seed in sorted({seed_of(session, name) for name in mixtures}, key=lambda seed: seed or -1):
        some = {name: mixed for name, mixed in mixtures.items() if seed_of(session, name) == seed}
        trained |= small_runs.train(session, store, some, bar, seed)
    return trained


def _train(
    session: Session, store: TokenStore, mixtures: Mapping[str, Tensor], bar: Bar
) -> list[Row]:
    trained = train(session, store, mixtures, bar)
    measured = metrics.measured(session, store, {name: run.folder for name, run in trained.items()})
    return [Row(name, mixtures[name].tolist(), measured[name]) for name in trained]
