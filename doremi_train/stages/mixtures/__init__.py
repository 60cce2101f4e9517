"""The mixture of the final run, by the method asked for, as weights.json."""

from dataclasses import replace

import numpy as np

from doremi_train import __version__, mixture
from doremi_train import mixture as doremi_train_mixture
from doremi_train.config import fingerprint
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.parallel import comm
from doremi_train.stages import prepare, proxy
from doremi_train.stages.mixtures import given, mixmin, online, search, swarm
from doremi_train.stages.runs import budget, language_model
from doremi_train.stages.runs.budget import final_tokens
from doremi_train.stages.session import Session, once


@once
def run(session: Session) -> mixture.Mixture:
    """Compute it, complete it with epochs and provenance, and write it."""
    store = prepare.run(session)
    budget.within(session, store)  # before anything is trained that could not be used
    mixture = _capped(session, store, _compute(session, store))
    mixture = complete(session, store, mixture)
    comm.on_first(lambda: doremi_train_mixture.save(session.run_dir / "weights.json", mixture))
    return mixture


def _capped(session: Session, store: TokenStore, mixture: mixture.Mixture) -> mixture.Mixture:
    found = mixture.tensor(store.domains)
    kept = budget.capped(session, store, found)
    if kept is found:
        return mixture
    session.say(
        f"{', '.join(name for name, less in zip(store.domains, kept < found, strict=True) if less)}: "
        f"more than mixture.max_epochs={session.config.mixture.max_epochs:g} passes; what was too "
        "much went to the others"
    )
    return replace(mixture, weights=dict(zip(store.domains, kept.tolist(), strict=True)))


def _compute(session: Session, store: TokenStore) -> mixture.Mixture:
    if session.config.mixture.method == "swarm":
        return swarm.run(session)
    if online.asked(session):
        return online.mixture(session)
    if session.config.mixture.method == "search":
        return search.run(session)
    if session.config.mixture.method == "mixmin":
        return mixmin.run(session)
    if session.config.mixture.method in ("doremi", "doge"):
        return proxy.run(session)
    return given.given(session, store)


def complete(session: Session, store: TokenStore, mixture: mixture.Mixture) -> mixture.Mixture:
    """With the epochs that the final run makes of each domain, and where the weights come from."""
    epochs = (
        mixture.tensor(store.domains).numpy()
        * final_tokens(session)
        / np.asarray(store.sizes("train"))
    )
    shape = language_model.resolved_model(session, store)
    return replace(
        mixture,
        epochs=dict(zip(store.domains, epochs.tolist(), strict=True)),
        provenance={
            "seed": session.config.seed,
            "steps": session.config.training.steps,
            "model": fingerprint(shape),
            "tokenizer": store.manifest["tokenizer"]["fingerprint"],
            "data": store.fingerprint,
            "version": __version__,
        }
        | mixture.provenance,
    )
