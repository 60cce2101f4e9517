"""The runs that a command would make, found before any of them: their names, and what the store has
of them.

K domains.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from doremi_train import mixture as doremi_train_mixture
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import statistics
from doremi_train.methods import simplex
from doremi_train.stages import main
from doremi_train.stages.mixtures import (
    doge,
    doremi,
    given,
    mixmin,
    online,
    search,
    seeds,
    small_runs,
    swarm,
)
from doremi_train.stages.planning import missing_losses
from doremi_train.stages.runs import budget, language_model, reference, reference_losses, weighting
from doremi_train.stages.runs.ahead import Ahead, Found
from doremi_train.stages.session import Session
from doremi_train.storage.runs import Run


def runs(session: Session, store: TokenStore) -> tuple[list[Ahead], Tensor | None]:
    """Every run of the pipeline in its order, and the mixture (K,) of the final model where it is
    known by now.

    What depends on a run that is not finished is taken for not begun, and every round for one that will be needed.
    Raises UserError where mixture.max_epochs leaves no mixture.
    """
    found = Found(session)
    budget.within(session, store)
    learned: Tensor | None
    if online.asked(session):
        learned = None
    elif session.config.mixture.method == "doremi":
        learned = _search(session, store, found)
    elif session.config.mixture.method == "doge":
        learned = _doge(session, store, found)
    elif session.config.mixture.method == "mixmin":
        learned = _mixmin(session, store, found)
    elif session.config.mixture.method == "search":
        _random(session, store, found)
        learned = None
    elif session.config.mixture.method == "swarm":
        learned = _swarm(session, store, found)
    else:
        learned = given.given(session, store).tensor(store.domains)
    learned = None if learned is None else budget.capped(session, store, learned)
    weighed = _weighting(session, store, found)
    shape = language_model.resolved_model(session, store, session.config.main.model)
    read = np.zeros(len(store.domains), dtype=np.int64)
    for name, known in {"main": learned, **main.comparisons(session, store)}.items():
        training = main.training(session)
        ready = weighed is not None or training.loss_weighting == "none"
        run = None
        if name == "main" and online.asked(session):
            run = _adapted(session, store, found)
        elif known is not None and ready:
            picking = main.selection(session, store, name)
            run = language_model.recipe(
                session, store, shape, known, training, weighting=weighed, selection=picking
            )
        found.add(name, "main", shape, training.steps, run)
        if reference_losses.weighing_cached(session) and found.runs[-1].left:
            mixed = simplex.uniform(len(store.domains)) if known is None else known
            missing, read = missing_losses.missing_of_main(
                session, store, _models(session, weighed), mixed, read
            )
            found.runs[-1] = found.runs[-1]._replace(missing=missing)
    return found.runs, learned


def _models(session: Session, weighed: language_model.Weighting | None) -> Sequence[str | None]:
    """Fingerprints of the models that weigh the main runs; None where one is not trained yet."""
    if weighed is None:
        return [None] * weighting.models(session)
    known: list[str] = weighed.recipe["weighting"]["models"]
    return known


def _adapted(session: Session, store: TokenStore, found: "Found") -> Run | None:
    """The main run that adapts its mixture; a reference whose losses it needs is a run too."""
    target = online.known_target(session, store)
    config = session.config
    given = config.online.target_losses is not None or config.reference.path is not None
    if config.mixture.method == "dro" and not given:
        ingredients = reference.ingredients(session, store, reference.mixture(session, store))
        run = language_model.recipe(session, store, *ingredients)
        found.add("reference", "reference", ingredients[0], config.training.steps, run)
    return (
        None
        if target is None
        else online.recipe(session, store, online.options_of(session, store, target))
    )


def _weighting(
    session: Session, store: TokenStore, found: "Found"
) -> language_model.Weighting | None:
    """How the main runs weigh their tokens, where that is known by now; the models it needs are
    runs too."""
    policy, given = session.config.training.loss_weighting, session.config.reference.path
    if policy == "none":
        return None
    ingredients = reference.ingredients(session, store, reference.mixture(session, store))
    run = language_model.recipe(session, store, *ingredients)
    name = "reference" if given is None else weighting.DATA_MODEL if policy == "imp" else None
    if name is not None and name not in [one.name for one in found.runs]:
        found.add(name, "reference", ingredients[0], session.config.training.steps, run)
    if name is not None and not run.finished:
        return None
    folders = [Path(given)] if given is not None else []
    return weighting.against(session, store, folders + [run.folder / "model"] * (name is not None))


def _search(session: Session, store: TokenStore, found: "Found") -> Tensor | None:
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
            found.add(doremi.reference_name(number), "reference", shape, steps, run)
            folder = run.folder / "model" if run.finished else None
        else:
            found.add(doremi.reference_name(number), "reference", shape, steps, None)
        proxies = [
            doremi.recipe(session, store, folder, index) if folder else None
            for index in range(options.seeds)
        ]
        waiting = 0  # proxies of this round that are still to be run
        for index, one in enumerate(proxies):
            found.add(seeds.name_of(session, number, index), "proxy", shape, steps, one)
            if reference_losses.cached(session) and found.runs[-1].left:
                missing = missing_losses.missing(session, store, one, index, waiting)
                found.runs[-1] = found.runs[-1]._replace(missing=missing)
                waiting += 1
        finished = [one for one in proxies if one is not None and one.finished]
        if before is None or len(finished) < options.seeds:
            before = None
            continue
        mean, _ = statistics.summarize([seeds.average(one, store) for one in finished])
        moved, before = float((mean - before).abs().max()), mean
        if moved < options.round_tolerance:
            break
    return before


def _doge(session: Session, store: TokenStore, found: "Found") -> Tensor | None:
    """Its seeds; their mean average (K,) if all are finished."""
    recipes, shape = doge.recipes(session, store), language_model.resolved_model(session, store)
    for index, run in enumerate(recipes):
        found.add(
            seeds.name_of(session, 1, index), "doge", shape, session.config.training.steps, run
        )
    if not all(run.finished for run in recipes):
        return None
    return statistics.summarize([seeds.average(run, store) for run in recipes])[0]


def _mixmin(session: Session, store: TokenStore, found: "Found") -> Tensor | None:
    """The expert of every domain; the mixture (K,) if it is solved."""
    shape, steps = language_model.resolved_model(session, store), session.config.training.steps
    for name, run in mixmin.experts(session, store).items():
        found.add(name, "expert", shape, steps, run)
    search = mixmin.state(session, store)
    if not search.finished:
        return None
    return doremi_train_mixture.Mixture("mixmin", search.result()["weights"]).tensor(store.domains)


def _random(session: Session, store: TokenStore, found: "Found") -> None:
    """The runs of a random search, of which the best is not known before."""
    shape, steps = language_model.resolved_model(session, store), session.config.training.steps
    for name, mixed in search.mixtures(session, store).items():
        found.add(name, "swarm", shape, steps, small_runs.recipe(session, store, mixed))


def _swarm(session: Session, store: TokenStore, found: "Found") -> Tensor | None:
    """The runs of a swarm: those that depend on a fit are not known before it."""
    problem, search = swarm.state(session, store)
    shape, steps = language_model.resolved_model(session, store), session.config.training.steps
    for name, mixed in swarm.planned(session, problem).items():
        if mixed is not None or not search.finished:
            run = None if mixed is None else small_runs.recipe(session, store, mixed)
            found.add(name, "swarm", shape, steps, run)
    if not search.finished:
        return None
    return doremi_train_mixture.Mixture("swarm", search.result()["weights"]).tensor(store.domains)
