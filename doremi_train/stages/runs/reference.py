"""The reference model as a run: its mixture, its folder, and what it is trained from."""

from pathlib import Path
from typing import Any

from torch import Tensor

from doremi_train.config import UserError
from doremi_train.data.sampler import Subsample
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.mixture import Mixture, checked, load
from doremi_train.model import folders
from doremi_train.stages.runs import budget, language_model
from doremi_train.stages.session import Session
from doremi_train.training.task import TrainingOptions


def mixture(session: Session, store: TokenStore) -> Tensor:
    """α_ref (K,) of the first round."""
    options = session.config.mixture
    if session.config.reference.mixture == "file" and options.weights is not None:
        weights = checked(options.weights, store.domains, "mixture.weights", options.normalize)
        return Mixture("file", weights).tensor(store.domains)
    if session.config.reference.mixture == "file":
        return load(Path(str(options.path)), store.domains, options.normalize).tensor(store.domains)
    return budget.heuristic(
        session, store, session.config.reference.mixture, session.config.training.steps
    )


def folder(session: Session, store: TokenStore, mixed: Tensor, name: str) -> Path:
    """The model folder of the reference trained on the mixture `mixed` (K,), or of
    `reference.path`."""
    given = session.config.reference.path
    if given is None:
        return (
            language_model.train(session, store, name, *ingredients(session, store, mixed)).folder
            / "model"
        )
    if session.config.proxy.rounds > 1:
        raise UserError(
            f"reference.path={given}: goes with proxy.rounds=1, since each further round trains a "
            "reference of its own"
        )
    # Wrong or missing: known before anything runs.
    folders.load(Path(given), store.vocabulary_size, "reference.path")
    return Path(given)


def ingredients(
    session: Session, store: TokenStore, mixed: Tensor
) -> tuple[dict[str, Any], Tensor, TrainingOptions, Subsample | None]:
    """What the reference on `mixed` (K,) is trained from: model, mixture, training options and part
    of the data."""
    shape = language_model.resolved_model(session, store, "reference")
    return shape, mixed, session.config.training, budget.subsample(session)
