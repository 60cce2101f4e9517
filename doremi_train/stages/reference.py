"""The reference model p_ref: ordinary training on α_ref, or a model that exists already."""

from pathlib import Path
from typing import Any

from torch import Tensor

from doremi_train import mixture as doremi_train_mixture
from doremi_train.config import UserError
from doremi_train.data.sampler import Subsample
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.model import folders
from doremi_train.stages import Session, language_model, prepare, reference_losses
from doremi_train.train import Options


def run(session: Session) -> Path:
    """The folder of the reference of the first round; where its losses are cached, those that proxies need too."""
    store = prepare.run(session)
    trained = folder(session, store, mixture(session, store), "reference")
    if session.config.mixture.method == "doremi" and reference_losses.cached(session):
        with session.reporting(session.run_dir / "reference"):
            reference_losses.fill(session, store, trained)
    return trained


def mixture(session: Session, store: TokenStore) -> Tensor:
    """α_ref (K,) of the first round."""
    options = session.config.mixture
    if session.config.reference.mixture == "file" and options.weights is not None:
        found = doremi_train_mixture.checked(options.weights, store.domains, "mixture.weights", options.normalize)
        return doremi_train_mixture.Mixture("file", found).tensor(store.domains)
    if session.config.reference.mixture == "file":
        return doremi_train_mixture.load(Path(str(options.path)), store.domains, options.normalize).tensor(
            store.domains
        )
    return language_model.heuristic(session, store, session.config.reference.mixture, session.config.training.steps)


def folder(session: Session, store: TokenStore, mixed: Tensor, name: str) -> Path:
    """The model folder of the reference trained on the mixture `mixed` (K,), or of `reference.path`."""
    given = session.config.reference.path
    if given is None:
        return language_model.train(session, store, name, *ingredients(session, store, mixed)).folder / "model"
    if session.config.proxy.rounds > 1:
        raise UserError(
            f"reference.path={given}: goes with proxy.rounds=1, since each further round trains a reference of its own"
        )
    folders.load(Path(given), store.vocabulary_size, "reference.path")  # wrong or missing: known before anything runs
    return Path(given)


def ingredients(
    session: Session, store: TokenStore, mixed: Tensor
) -> tuple[dict[str, Any], Tensor, Options, Subsample | None]:
    """What the reference on `mixed` (K,) is trained from: model, mixture, training options and part of the data."""
    shape = language_model.resolved_model(session, store)
    return shape, mixed, session.config.training, language_model.subsample(session)
