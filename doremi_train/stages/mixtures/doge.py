"""DoGE: one small run, or several seeds of it, whose weights follow how the gradients of domains
agree."""

from dataclasses import fields

from doremi_train import mixture
from doremi_train.config import UserError, fingerprint
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import statistics
from doremi_train.methods import doge
from doremi_train.model import folders
from doremi_train.stages import prepare
from doremi_train.stages.mixtures import seeds
from doremi_train.stages.options import training_identity
from doremi_train.stages.runs import budget, language_model, targets
from doremi_train.stages.session import Session, once
from doremi_train.storage.runs import Run
from doremi_train.training import domain_gradients
from doremi_train.training.task import Task
from doremi_train.training.trainer import Trainer


@once
def run(session: Session) -> mixture.Mixture:
    """Train every seed, and take the mean of their averages. Raises UserError where rounds are
    asked for."""
    store = prepare.run(session)
    found = recipes(session, store)
    if seeds.apart(session):
        seeds.submitted(session, found, 1)
    trained = [_train(session, store, index, run) for index, run in enumerate(found)]
    mean, interval = statistics.summarize([seeds.average(one, store) for one in trained])
    return seeds.mixture(session, store, mean, interval)


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
    towards = targets.of_mixtures(session, store)
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
    config, name, seed = (
        session.config,
        seeds.name_of(session, 1, index),
        budget.proxy_seed(session, index),
    )
    with session.computing(run, name) as todo:
        if not todo:
            session.say(f"{name:<22} is in the store already: {run.folder.name}")
            return run
        task = Task(
            label=name,
            run=run,
            objective=doge,
            objective_options=config.doge,
            store=store,
            seed=seed,
            training=config.training,
            evaluation=config.evaluation,
            subsample=budget.subsample(session),
            target=domain_gradients.Target(
                targets.of_mixtures(session, store), config.doge.target_batch
            ),
            bar=session.part(name),
        )
        built = folders.build(
            language_model.resolved_model(session, store),
            seed,
            config.training.activation_checkpointing,
        )
        language_model.finish(session, task, Trainer(task, built, session.place))
    return run
