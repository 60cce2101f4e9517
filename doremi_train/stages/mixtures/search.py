"""Random search: small runs on mixtures drawn as a swarm draws them, and the best of them. What a
fit has to beat."""

from collections.abc import Mapping

import numpy as np
import torch

from doremi_train import mixture
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import box, replicates
from doremi_train.methods.swarm import design
from doremi_train.stages import prepare
from doremi_train.stages.mixtures import small_runs, swarm
from doremi_train.stages.runs import language_model, metrics
from doremi_train.stages.runs.ahead import Pipeline
from doremi_train.stages.session import Session, once

HOW = (
    "Small runs are trained on mixtures that are drawn at random; the mixture is that of the run "
    "that does best on the objective."
)

NATURAL = "search/natural"  # the name of the run that guards are held against
AGAIN = f"{NATURAL}{swarm.AGAIN}"

# Of random numbers: not one of a swarm's rounds, for that would be the swarm's own runs.
_STREAM = 1 << 20


@once
def run(session: Session) -> mixture.Mixture:
    """The mixture that does best on the objective."""
    store = prepare.run(session)
    drawn = mixtures(session, store)
    with (
        session.reporting(session.run_dir / "search"),
        session.over("search", len(drawn) * small_runs.tokens(session)) as bar,
    ):
        trained = swarm.train(session, store, drawn, bar)
    folders = {name: run.folder for name, run in trained.items()}
    best, reached = _best(session, store, metrics.measured(session, store, folders))
    provenance = {"runs": len(drawn), "chosen": best, "realised": reached}
    return mixture.Mixture("search", store.named(drawn[best]), provenance=provenance)


def ahead(session: Session, store: TokenStore, pipeline: Pipeline) -> torch.Tensor | None:
    """The runs of a random search; the best mixture (K,) when all are finished."""
    shape, steps = language_model.resolved_model(session, store), session.config.training.steps
    drawn = mixtures(session, store)
    wanted = {
        name: small_runs.recipe(session, store, mixed, swarm.seed_of(session, name))
        for name, mixed in drawn.items()
    }
    for name, run in wanted.items():
        pipeline.add(name, "swarm", shape, steps, run)
    if not all(run.finished for run in wanted.values()):
        return None
    known = metrics.there(session, store, {name: run.folder for name, run in wanted.items()})
    return None if known is None else drawn[_best(session, store, known)[0]]


def _best(
    session: Session, store: TokenStore, measured: Mapping[str, list[float]]
) -> tuple[str, float]:
    """Name and score of the run that does best on the objective, by the metrics (M,) of each;
    within the guards against natural where any is."""
    losses = np.array(list(measured.values()))
    # Without guards nothing is held against natural, and without replicates nothing scaled.
    on_natural = np.array([measured[name] for name in (NATURAL, AGAIN) if name in measured])
    natural = on_natural.mean(0) if len(on_natural) else losses[0]
    scale = replicates.pooled(np.zeros((2, 1)), on_natural).deviation if AGAIN in measured else None
    wanted = metrics.objective(session, store, natural, scale)
    judged, reached = wanted.scores(losses, penalised=True), wanted.scores(losses)
    best = int(judged.argmin())
    return list(measured)[best], float(reached[best])


def mixtures(session: Session, store: TokenStore) -> dict[str, torch.Tensor]:
    """swarm.runs of them (K,), within the swarm's caps, by the names of their runs under run_dir;
    and natural where guards are held against it, twice where metrics are standardised by it."""
    problem, _ = swarm.state(session, store)
    random = np.random.default_rng([session.config.seed, _STREAM])
    points = problem.space.expand(design(problem.prior, problem.inside, problem.draws, random))
    drawn = {
        f"search/run-{index}": torch.from_numpy(box.on_grid(point, problem.within))
        for index, point in enumerate(points)
    }
    asked = session.config.objective
    if asked.guard is not None or asked.standardise:
        drawn[NATURAL] = torch.from_numpy(problem.natural)
    if asked.standardise:
        drawn[AGAIN] = drawn[NATURAL]
    return drawn
