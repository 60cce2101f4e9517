"""DoReMi: Group DRO against the reference, for every round and seed, averaged into a mixture."""

from dataclasses import fields
from functools import partial
from pathlib import Path

from torch import Tensor

from doremi_train import mixture
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import statistics
from doremi_train.methods import doremi
from doremi_train.model import folders
from doremi_train.stages import prepare
from doremi_train.stages.mixtures import seeds
from doremi_train.stages.options import training_identity
from doremi_train.stages.planning import missing_losses
from doremi_train.stages.runs import budget, language_model, reference, reference_losses
from doremi_train.stages.runs.ahead import Pipeline
from doremi_train.stages.runs.language_model import Begun
from doremi_train.stages.session import Session, once
from doremi_train.storage.runs import Run

HOW = (
    "The proxy raises the weight of a domain where its loss is above the reference's (the excess "
    "loss, clipped at 0 per token): there is more to learn. The mixture is the average of α over "
    "the steps."
)


def reference_name(number: int) -> str:
    """Name under run_dir of the reference of round `number`, from 1."""
    return "reference" if number == 1 else f"proxy/round-{number}/reference"


@once
def run(session: Session) -> mixture.Mixture:
    """Reference and proxy, round after round, until the mixture stays where it was."""
    with seeds.reporting(session):
        return _rounds(session)


def _rounds(session: Session) -> mixture.Mixture:
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
    return seeds.mixture(session, store, "doremi", mean, interval, number)


def ahead(session: Session, store: TokenStore, pipeline: Pipeline) -> Tensor | None:
    """References and proxies of all rounds, followed through those that are finished; ᾱ (K,) if all
    are."""
    options, steps = session.config.proxy, session.config.training.steps
    shape = language_model.resolved_model(session, store)
    before: Tensor | None = reference.mixture(session, store)
    for number in range(1, options.rounds + 1):
        folder: Path | None = None
        if before is not None and session.config.reference.path is not None:
            folder = reference.folder(session, store, before, "reference")
        elif before is not None:
            run = language_model.recipe(
                session, store, *reference.ingredients(session, store, before)
            )
            pipeline.add(reference_name(number), "reference", shape, steps, run)
            folder = run.folder / "model" if run.finished else None
        else:
            pipeline.add(reference_name(number), "reference", shape, steps, None)
        proxies = [
            recipe(session, store, folder, index) if folder else None
            for index in range(options.seeds)
        ]
        waiting = 0  # proxies of this round that are still to be run
        for index, proxy in enumerate(proxies):
            pipeline.add(seeds.name_of(session, number, index), "proxy", shape, steps, proxy)
            if reference_losses.cached(session) and pipeline.runs[-1].left:
                missing = missing_losses.missing(session, store, proxy, index, waiting)
                pipeline.runs[-1] = pipeline.runs[-1]._replace(missing=missing)
                waiting += 1
        finished = [proxy for proxy in proxies if proxy is not None and proxy.finished]
        if before is None or len(finished) < options.seeds:
            before = None
            continue
        mean, _ = statistics.summarize([seeds.average(proxy, store) for proxy in finished])
        moved, before = float((mean - before).abs().max()), mean
        if moved < options.round_tolerance:
            break
    return before


def recipe(session: Session, store: TokenStore, reference_folder: Path, index: int) -> Run:
    """The proxy of seed `index` against a reference, wherever and whenever it is trained."""
    config, options = session.config, session.config.proxy
    read = {field.name: getattr(options, field.name) for field in fields(doremi.Options)}
    if options.settled is None:  # a proxy of all its steps is the run that it was without the key
        del read["settled"]
    return Run(
        session.store,
        "proxy",
        {
            "data": store.fingerprint,
            "model": language_model.resolved_model(session, store),
            "reference": folders.folder_fingerprint(reference_folder),
            "options": read,
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
    config, seed = session.config, budget.proxy_seed(session, index)
    name = seeds.name_of(session, number, index)
    run = recipe(session, store, reference_folder, index)

    def begin() -> Begun:
        task = language_model.task_of(
            session,
            run,
            name,
            store,
            objective=doremi,
            objective_options=config.proxy,
            seed=seed,
            accumulation=config.proxy.accumulation,
            settled=partial(doremi.settled, options=config.proxy),
            reference=reference_losses.of(session, store, run, reference_folder),
            subsample=budget.subsample(session),
        )
        shape = language_model.resolved_model(session, store)
        return Begun(task, language_model.built(session, shape, config.training, seed))

    language_model.train_once(session, run, name, begin)
    steps, asked = run.result()["steps"], config.training.steps
    if steps < asked:
        session.say(
            f"{name}: settled after {steps} of {asked} steps: every weight of the average is known "
            f"to ± {config.proxy.settled} (proxy.settled)"
        )
    return run
