"""Steps, tokens and parts of the data that runs of a command have in common, and the limits of its
mixtures."""

from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from doremi_train.config import UserError, in_keys
from doremi_train.data.sampler import Subsample
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import HEURISTICS, box
from doremi_train.methods.box import inside, project
from doremi_train.stages.session import Session

# Between the proxies of one command: far from the seeds a sweep counts through.
SEEDS_APART = 1_000_000
LAWS = ("saturating", "corrected")  # of swarm.regressor, those that know the harm of repetition


def main_steps(session: Session) -> int:
    return session.config.main.steps or session.config.training.steps


def final_tokens(session: Session) -> int:
    """Tokens of the run that the mixture is for."""
    training = session.config.training
    return (
        session.config.main.tokens
        or main_steps(session) * training.batch_size * training.sequence_length
    )


def proxy_seed(session: Session, index: int) -> int:
    """Seed of proxy number `index` of a command."""
    return session.config.seed + SEEDS_APART * index


def subsample(session: Session) -> Subsample | None:
    """The part of every domain that reference and proxy read; None: all. At equal weights they pass
    over it as often as the final run passes over the whole. It is the same for every proxy seed of
    a command."""
    training = session.config.training
    part = Fraction(
        training.steps * training.batch_size * training.sequence_length, final_tokens(session)
    )
    asked = session.config.proxy.match_repetition
    if asked is None:
        asked = session.config.main.tokens is not None
    if not asked or part >= 1:
        return None
    return Subsample(part, session.config.seed % SEEDS_APART)


def repeated(session: Session) -> int:
    """Tokens of a run that passes over the whole of each domain as often as a small run over what
    it reads of it."""
    training = session.config.training
    own = training.steps * training.batch_size * training.sequence_length
    return own if subsample(session) is None else final_tokens(session)


def seen(session: Session) -> bool:
    """Whether the mixture comes from a law with the harm of repetition in it, fitted to runs that
    repeat each domain as the final run will: then mixture.max_epochs is no cap."""
    law = session.method == "swarm" and session.config.swarm.regressor in LAWS
    return law and repeated(session) >= final_tokens(session)


def described(part: Subsample | None) -> dict[str, Any]:
    """Part of the recipe of a run that a sub-sample adds; nothing where all is read."""
    return {} if part is None else {"subsample": {"part": str(part.part), "seed": part.seed}}


def caps(
    session: Session, store: TokenStore, floor: float, key: str, always: bool = False
) -> box.Box:
    """Box of the mixtures that may be: no domain more than mixture.max_epochs times in the final
    run, unless a law has seen what that does (`always`: also then), and at least `floor` (of this
    key). Raises UserError where that leaves none."""
    sizes = np.asarray(store.sizes("train"), dtype=np.float64)
    most = np.inf if seen(session) and not always else session.config.mixture.max_epochs
    try:
        return box.box(sizes, final_tokens(session), most, floor)
    except ValueError as error:
        said = in_keys(error, {"max_epochs": "mixture.max_epochs", "floor": key})
        raise UserError(f"mixture={session.method}: {said}") from None


def heuristic(session: Session, store: TokenStore, name: str, steps: int) -> Tensor:
    """(K,) a mixture from sizes, for a run of `steps` steps. Raises UserError where it cannot be
    met."""
    training = session.config.training
    budget = steps * training.batch_size * training.sequence_length
    sizes = torch.from_numpy(np.asarray(store.sizes("train"), dtype=np.float64))
    try:
        return HEURISTICS[name](sizes, budget, session.config.mixture)
    except ValueError as error:
        said = in_keys(error, {"max_epochs": "mixture.max_epochs"})
        raise UserError(f"mixture {name}: {said}") from None


def within(session: Session, store: TokenStore) -> box.Box | None:
    """Box in which mixture.max_epochs keeps the mixture of every method; None: weights that the
    user gave stay as they are. Raises UserError where it leaves none. It is the whole simplex where
    a law has seen repetition."""
    return None if session.config.mixture.given else caps(session, store, 0.0, "")


def capped(session: Session, store: TokenStore, mixture: Tensor) -> Tensor:
    """Mixture (K,) within mixture.max_epochs: what a domain has too much goes to the others in
    proportion."""
    box, point = within(session, store), mixture.numpy()
    return mixture if box is None or inside(point, box) else torch.from_numpy(project(point, box))
