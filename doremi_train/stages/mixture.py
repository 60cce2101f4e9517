"""The mixture of the final run, by the method asked for, as weights.json."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from doremi_train import __version__, comm, weights
from doremi_train.config import fingerprint
from doremi_train.data.shards import TokenStore
from doremi_train.stages import Session, language_model, once, prepare, proxy, swarm_search
from doremi_train.stages.language_model import final_tokens, main_steps


@once
def run(session: Session) -> weights.Mixture:
    """Compute it, complete it with epochs and provenance, and write it."""
    store = prepare.run(session)
    mixture = complete(session, store, _compute(session, store))
    comm.on_first(lambda: weights.save(session.run_dir / "weights.json", mixture))
    return mixture


def _compute(session: Session, store: TokenStore) -> weights.Mixture:
    if session.config.mixture.method == "swarm":
        return swarm_search.run(session)
    return proxy.run(session) if session.config.mixture.method == "doremi" else given(session, store)


def given(session: Session, store: TokenStore) -> weights.Mixture:
    """The mixture of a method that trains nothing."""
    options = session.config.mixture
    if options.method == "file":
        return weights.load(Path(str(options.path)), store.domains, options.normalize)
    found = language_model.heuristic(session, store, options.method, main_steps(session))
    return weights.Mixture(options.method, dict(zip(store.domains, found.tolist(), strict=True)))


def complete(session: Session, store: TokenStore, mixture: weights.Mixture) -> weights.Mixture:
    """With the epochs that the final run makes of each domain, and where the weights come from."""
    epochs = mixture.tensor(store.domains).numpy() * final_tokens(session) / np.asarray(store.sizes("train"))
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
