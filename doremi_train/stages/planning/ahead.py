"""Every run that a command would make, before any of them: those to the mixture, and the main runs.

K domains.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import simplex
from doremi_train.stages import main
from doremi_train.stages.mixtures import WAYS
from doremi_train.stages.planning import missing_losses
from doremi_train.stages.runs import (
    budget,
    followed,
    language_model,
    reference,
    reference_losses,
    weighting,
)
from doremi_train.stages.runs.ahead import Ahead, Pipeline
from doremi_train.stages.session import Session


def runs(session: Session, store: TokenStore) -> tuple[list[Ahead], Tensor | None]:
    """Every run of the pipeline in its order, and the mixture (K,) of the final model where it is
    known by now.

    What depends on a run that is not finished is taken for not begun, and every round for one that
    will be needed. Raises UserError where mixture.max_epochs leaves no mixture.
    """
    pipeline = Pipeline(session)
    budget.within(session, store)
    learned = WAYS[session.method].ahead(session, store, pipeline)
    learned = None if learned is None else budget.capped(session, store, learned)
    weighed = _weighting(session, store, pipeline)
    shape = language_model.resolved_model(session, store, "main")
    read = np.zeros(len(store.domains), dtype=np.int64)
    for name, known in {"main": learned, **main.comparisons(session, store)}.items():
        if name in (run.name for run in pipeline.runs):  # the way is the main run itself
            continue
        training = main.training(session)
        ready = weighed is not None or training.loss_weighting == "none"
        run = None
        if name == "main" and followed.asked(session):
            run = followed.known(session, store, main.selection(session, store, name))
        elif known is not None and ready:
            picking = main.selection(session, store, name)
            run = language_model.recipe(
                session, store, shape, known, training, weighting=weighed, selection=picking
            )
        pipeline.add(name, "main", shape, training.steps, run)
        if reference_losses.weighing_cached(session) and pipeline.runs[-1].left:
            mixed = simplex.uniform(len(store.domains)) if known is None else known
            missing, read = missing_losses.missing_of_main(
                session, store, _models(session, weighed), mixed, read
            )
            pipeline.runs[-1] = pipeline.runs[-1]._replace(missing=missing)
    return pipeline.runs, learned


def _models(session: Session, weighed: language_model.Weighting | None) -> Sequence[str | None]:
    """Fingerprints of the models that weigh the main runs; None where one is not trained yet."""
    if weighed is None:
        return [None] * weighting.models(session)
    known: list[str] = weighed.recipe["weighting"]["models"]
    return known


def _weighting(
    session: Session, store: TokenStore, pipeline: Pipeline
) -> language_model.Weighting | None:
    """Weighting of the main runs' tokens, where it is known by now; the models it needs are runs
    too."""
    policy, given = session.config.training.loss_weighting, session.config.reference.path
    if policy == "none":
        return None
    ingredients = reference.ingredients(session, store, reference.mixture(session, store))
    run = language_model.recipe(session, store, *ingredients)
    name = "reference" if given is None else weighting.DATA_MODEL if policy == "imp" else None
    if name is not None and name not in [one.name for one in pipeline.runs]:
        pipeline.add(name, "reference", ingredients[0], session.config.training.steps, run)
    if name is not None and not run.finished:
        return None
    folders = [Path(given)] if given is not None else []
    return weighting.against(session, store, folders + [run.folder / "model"] * (name is not None))
