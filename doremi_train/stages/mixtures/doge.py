"""DoGE: one small run, or several seeds of it, whose weights follow how the gradients of domains
agree."""

from dataclasses import fields

from torch import Tensor

from doremi_train import mixture
from doremi_train.config import UserError, fingerprint
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import statistics
from doremi_train.methods import doge
from doremi_train.stages import prepare
from doremi_train.stages.mixtures import seeds
from doremi_train.stages.options import training_identity
from doremi_train.stages.runs import budget, language_model, targets
from doremi_train.stages.runs.ahead import Pipeline
from doremi_train.stages.runs.language_model import Begun
from doremi_train.stages.session import Session, once
from doremi_train.storage.runs import Run
from doremi_train.training import domain_gradients

HOW = (
    "The proxy raises the weight of a domain whose gradient points where that of the target does, "
    "or without a target those of the other domains. The mixture is the average of α over the "
    "steps."
)


@once
def run(session: Session) -> mixture.Mixture:
    """Train every seed, and take the mean of their averages. Raises UserError where rounds are
    asked for."""
    with seeds.reporting(session):
        store = prepare.run(session)
        wanted = recipes(session, store)
        if seeds.apart(session):
            seeds.submitted(session, wanted, 1)
        trained = [_train(session, store, index, run) for index, run in enumerate(wanted)]
        mean, interval = statistics.summarize([seeds.average(one, store) for one in trained])
        return seeds.mixture(session, store, "doge", mean, interval)


def ahead(session: Session, store: TokenStore, pipeline: Pipeline) -> Tensor | None:
    """Its seeds; their mean average (K,) if all are finished."""
    wanted, shape = recipes(session, store), language_model.resolved_model(session, store)
    for index, run in enumerate(wanted):
        name = seeds.name_of(session, 1, index)
        pipeline.add(name, "doge", shape, session.config.training.steps, run)
    if not all(run.finished for run in wanted):
        return None
    return statistics.summarize([seeds.average(run, store) for run in wanted])[0]


def recipes(session: Session, store: TokenStore) -> list[Run]:
    """The run of every seed, wherever and whenever it is trained. Raises UserError where rounds are
    asked for."""
    if session.config.proxy.rounds > 1:
        raise UserError(
            "proxy.rounds: mixture=doge has no reference that a further round could replace; leave "
            "it at 1"
        )
    return [_recipe(session, store, index) for index in range(session.config.proxy.seeds)]


def _recipe(session: Session, store: TokenStore, index: int) -> Run:
    towards = targets.of_ways(session, store)
    return Run(
        session.store,
        "doge",
        {
            "data": store.fingerprint,
            "model": language_model.resolved_model(session, store),
            "options": {
                field.name: getattr(session.config.doge, field.name)
                for field in fields(session.config.doge)
            },
            "target": fingerprint(towards.tolist()),
            "training": training_identity(session.config.training),
            "evaluation": session.plain["evaluation"],
            "seed": budget.proxy_seed(session, index),
        }
        | budget.described(budget.subsample(session)),
    )


def _train(session: Session, store: TokenStore, index: int, run: Run) -> Run:
    config, seed = session.config, budget.proxy_seed(session, index)
    name = seeds.name_of(session, 1, index)

    def begin() -> Begun:
        towards = targets.of_ways(session, store)
        task = language_model.task_of(
            session,
            run,
            name,
            store,
            objective=doge,
            objective_options=config.doge,
            seed=seed,
            subsample=budget.subsample(session),
            target=domain_gradients.Target(towards, config.doge.target_batch),
        )
        shape = language_model.resolved_model(session, store)
        return Begun(task, language_model.built(session, shape, config.training, seed))

    language_model.train_once(session, run, name, begin)
    return run
