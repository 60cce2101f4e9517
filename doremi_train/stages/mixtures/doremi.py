"""DoReMi: Group DRO against the reference, for every round and seed, averaged into a mixture."""

from dataclasses import fields
from pathlib import Path

from doremi_train import mixture
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import statistics
from doremi_train.methods import doremi
from doremi_train.model import folders
from doremi_train.stages import prepare
from doremi_train.stages.mixtures import seeds
from doremi_train.stages.options import Proxy, training_identity
from doremi_train.stages.runs import budget, language_model, reference, reference_losses
from doremi_train.stages.session import Session
from doremi_train.storage.runs import Run
from doremi_train.training.task import Task
from doremi_train.training.trainer import Trainer


def reference_name(number: int) -> str:
    """Under run_dir, of the reference of round `number`, from 1."""
    return "reference" if number == 1 else f"proxy/round-{number}/reference"


def rounds(session: Session) -> mixture.Mixture:
    store = prepare.run(session)
    options = session.config.proxy
    before = reference.mixture(session, store)  # (K,) α_ref
    for number in range(1, options.rounds + 1):
        folder = reference.folder(session, store, before, reference_name(number))
        if seeds.apart(session):
            recipes = [recipe(session, store, folder, seed) for seed in range(options.seeds)]
            seeds.submitted(session, recipes, number, **{"reference.path": str(folder.resolve())})
        proxies = [_train(session, store, folder, number, seed) for seed in range(options.seeds)]
        mean, interval = statistics.summarize([seeds.average(proxy, store) for proxy in proxies])
        moved = float((mean - before).abs().max())
        session.say(f"round {number}: the largest change of a weight against α_ref is {moved:.4f}")
        if moved < options.round_tolerance:
            break
        before = mean
    return seeds.mixture(session, store, mean, interval, number)


def recipe(session: Session, store: TokenStore, reference_folder: Path, index: int) -> Run:
    """The proxy of seed `index` against a reference, wherever and whenever it is trained."""
    config, options = session.config, session.config.proxy
    method = algorithm(options)
    return Run(
        session.store,
        "proxy",
        {
            "data": store.fingerprint,
            "model": language_model.resolved_model(session, store),
            "reference": folders.folder_fingerprint(reference_folder),
            "options": {field.name: getattr(method, field.name) for field in fields(method)},
            "accumulation": options.accumulation,
            "training": training_identity(config.training),
            "evaluation": session.plain["evaluation"],
            "seed": budget.proxy_seed(session, index),
        }
        | budget.described(budget.subsample(session))
        | ({"reference_losses": "cached"} if reference_losses.cached(session) else {}),  # rounded
    )


def _train(
    session: Session, store: TokenStore, reference_folder: Path, number: int, index: int
) -> Run:
    """One proxy: seed `index` of round `number`."""
    config = session.config
    name = seeds.name_of(session, number, index)
    run = recipe(session, store, reference_folder, index)
    with session.computing(run, name) as todo:
        if not todo:
            session.say(f"{name:<22} is in the store already: {run.folder.name}")
            return run
        task = Task(
            label=name,
            run=run,
            objective=doremi,
            objective_options=algorithm(config.proxy),
            store=store,
            seed=budget.proxy_seed(session, index),
            training=config.training,
            evaluation=config.evaluation,
            accumulation=config.proxy.accumulation,
            reference=reference_losses.of(session, store, run, reference_folder),
            subsample=budget.subsample(session),
            bar=session.part(name),
        )
        shape = language_model.resolved_model(session, store)
        built = folders.build(
            shape, budget.proxy_seed(session, index), config.training.activation_checkpointing
        )
        language_model.finish(session, task, Trainer(task, built, session.place))
    return run


def algorithm(options: Proxy) -> doremi.Options:
    """The options that Algorithm 1 itself reads."""
    return doremi.Options(
        **{field.name: getattr(options, field.name) for field in fields(doremi.Options)}
    )
