"""The ways to a mixture, and the mixture of the final run, by the way asked for, as
weights.json."""

from dataclasses import replace
from typing import Protocol

import numpy as np
from torch import Tensor

from doremi_train import __version__, mixture
from doremi_train.config import UserError, fingerprint
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.mixture import Mixture
from doremi_train.parallel import comm
from doremi_train.stages import prepare
from doremi_train.stages.mixtures import doge, doremi, follows, given, mixmin, online, search, swarm
from doremi_train.stages.mixtures.given import Given
from doremi_train.stages.options import Config, one_of
from doremi_train.stages.runs import budget, language_model
from doremi_train.stages.runs.ahead import Pipeline
from doremi_train.stages.session import Session, once


class Way(Protocol):
    """A way to a mixture: a module of this package."""

    @property
    def HOW(self) -> str:
        """How it comes about, in the words of the report."""

    def run(self, session: Session) -> Mixture:
        """Compute it, with every run that it needs; done at most once in a command."""

    def ahead(self, session: Session, store: TokenStore, pipeline: Pipeline) -> Tensor | None:
        """Add the runs that `run` would make to `pipeline`; the mixture (K,) where it is known.

        What depends on a run that is not finished is taken for not begun.
        """


# mixture=… → the way there. What is given is free; of all others it is asked what they gain.
WAYS: dict[str, Way] = {
    "doremi": doremi,
    "doge": doge,
    "ado": online.ado,
    "odm": online.odm,
    "dro": online.furthest,
    "mixmin": mixmin,
    "swarm": swarm,
    "search": search,
    "file": given.file,
    "natural": given.natural,
    "uniform": given.uniform,
    "temperature": given.temperature,
    "unimax": given.unimax,
    "target": given.target,
}
"""How the mixture of a way comes about:

>>> from doremi_train.stages.mixtures import WAYS
>>> print(WAYS["uniform"].HOW)
The same weight for every domain, whatever its size.
"""


def check(config: Config) -> None:
    """Raise UserError for a way that there is not."""
    method = config.mixture.method
    one_of("mixture", method, list(WAYS))
    learned = [name for name, way in WAYS.items() if not isinstance(way, Given)]
    for name in config.compare.methods:
        one_of("compare.methods", name, learned)
    if config.stage == "swarm" and WAYS[method] is not swarm:
        raise UserError(
            f"stage=swarm: goes with mixture=swarm, not {method}; write mixture=swarm too"
        )


@once
def run(session: Session) -> Mixture:
    """Compute it, complete it with epochs and provenance, and write it."""
    store = prepare.run(session)
    budget.within(session, store)  # before anything is trained that could not be used
    instead = follows.unfollowed(session, store)
    if instead is not None:
        session.say(f"mixture: {instead}")
    weights = _capped(session, store, WAYS[session.method].run(session))
    weights = complete(session, store, weights)
    if instead is not None:
        weights = replace(weights, provenance=weights.provenance | {"follows": instead})
    comm.on_first(lambda: mixture.save(session.run_dir / "weights.json", weights))
    return weights


def _capped(session: Session, store: TokenStore, weights: Mixture) -> Mixture:
    point = weights.tensor(store.domains)
    kept = budget.capped(session, store, point)
    if kept is point:
        _warn(session, store, point)
        return weights
    cut = [name for name, less in zip(store.domains, kept < point, strict=True) if less]
    session.say(
        f"{', '.join(cut)}: more than mixture.max_epochs="
        f"{session.config.mixture.max_epochs:g} passes; what was too much went to the others"
    )
    return replace(weights, weights=store.named(kept))


def _warn(session: Session, store: TokenStore, point: Tensor) -> None:
    """Say what is repeated more often than mixture.max_epochs, where that is no cap."""
    passes = point.numpy() * budget.final_tokens(session) / np.asarray(store.sizes("train"))
    most = session.config.mixture.max_epochs
    above = [f"{store.domains[k]} {passes[k]:.1f}" for k in np.flatnonzero(passes > most)]
    if above and budget.seen(session):
        session.say(
            f"passes of the final run: {', '.join(above)}, more than "
            f"mixture.max_epochs={most:g}; kept, for the law was fitted to runs that repeat as "
            "often and knows the harm of it"
        )


def complete(session: Session, store: TokenStore, weights: Mixture) -> Mixture:
    """Add the epochs that the final run makes of each domain, and where the weights come from."""
    tokens = weights.tensor(store.domains).numpy() * budget.final_tokens(session)
    shape = language_model.resolved_model(session, store)
    return replace(
        weights,
        epochs=store.named(tokens / np.asarray(store.sizes("train"))),
        provenance={
            "seed": session.config.seed,
            "steps": session.config.training.steps,
            "model": fingerprint(shape),
            "tokenizer": store.manifest["tokenizer"]["fingerprint"],
            "data": store.fingerprint,
            "version": __version__,
        }
        | weights.provenance,
    )
