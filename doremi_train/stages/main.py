"""The final model on the learned mixture, and at the same size and budget the mixtures it has to
beat."""

from dataclasses import replace

from torch import Tensor

from doremi_train.data.tokens.shards import TokenStore
from doremi_train.stages import mixtures, prepare
from doremi_train.stages.mixtures import online
from doremi_train.stages.runs import budget, followed, language_model, reference, targets, weighting
from doremi_train.stages.session import Session, once
from doremi_train.storage.runs import Run
from doremi_train.training.batch_selection import Setting
from doremi_train.training.task import TrainingOptions


@once
def run(session: Session) -> dict[str, Run]:
    """Every model of the comparison by its name in evaluation.json. Runs that are the same are
    trained once."""
    store = prepare.run(session)
    if followed.asked(session):
        followed.check(session, store)
    learned = mixtures.run(session).tensor(store.domains)
    shape = language_model.resolved_model(session, store, "main")
    weighed = weighting.of(session, store)
    own: dict[str, Run] = {}  # a main run whose mixture is not one for all of its steps
    if online.asked(session):
        own["main"] = online.main(session)
    elif followed.asked(session):
        own["main"] = followed.train(session, store, selection(session, store, "main"))
    return own | {
        name: language_model.train(
            session,
            store,
            name,
            shape,
            weights,
            training(session),
            weighting=weighed,
            selection=selection(session, store, name),
        )
        for name, weights in {"main": learned, **comparisons(session, store)}.items()
        if name not in own
    }


def training(session: Session) -> TrainingOptions:
    """The training options of the main runs."""
    return replace(session.config.training, steps=budget.main_steps(session))


def selection(session: Session, store: TokenStore, name: str) -> Setting | None:
    """How the candidates of every step are picked: of the main model alone, so that a comparison
    shows its gain."""
    return targets.setting(session, store) if name == "main" else None


def comparisons(session: Session, store: TokenStore) -> dict[str, Tensor]:
    """The mixtures (K,) that the learned one has to beat, by name."""
    steps = budget.main_steps(session)
    return {
        name: reference.mixture(session, store)
        if name == "baseline"
        else budget.heuristic(session, store, name, steps)
        for name in session.config.comparisons
    }
