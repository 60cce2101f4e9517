"""The reference's losses as the proxies need them: live or cached, computed ahead, and counted for the plan.

K domains.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from doremi_train import losses
from doremi_train.data.sampler import Ints, Sampler
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import simplex
from doremi_train.model import folders
from doremi_train.parallel import comm
from doremi_train.stages import language_model
from doremi_train.stages.session import Session
from doremi_train.storage import checkpoint
from doremi_train.storage.runs import Run

_LOOKED_AT = 1024  # draws of a proxy, spread over domains and time, that tell the plan how much is there


def needed(session: Session) -> bool:
    """Whether the proxies look at the reference's losses at all."""
    return session.config.proxy.score != "hardest"


def cached(session: Session) -> bool:
    return needed(session) and session.config.reference.losses == "cached"


def weighing_cached(session: Session) -> bool:
    """Whether the main runs weigh their tokens by losses that are cached."""
    return session.config.training.loss_weighting != "none" and session.config.reference.losses == "cached"


def of(session: Session, store: TokenStore, run: Run, folder: Path) -> losses.Reference | None:
    """Those that the proxy `run` trains against, of the model in `folder`."""
    return frozen(session, store, run, folder, run.recipe["reference"]) if needed(session) else None


def frozen(session: Session, store: TokenStore, run: Run, folder: Path, fingerprint: str) -> losses.Reference:
    """Those of any model `folder` with this fingerprint, for `run`."""
    if session.config.reference.losses == "live":
        return live(session, store, folder)
    pending = run.folder / checkpoint.FOLDER / f"losses-{fingerprint}-{comm.world().rank}.pending"
    table = losses.Table(session.store, store, recipe_of(session, store, fingerprint))
    return losses.Cached(table, lambda: live(session, store, folder), session.place.device, pending)


def sampler(session: Session, store: TokenStore, index: int) -> Sampler:
    """What the proxy of seed `index` draws with."""
    training, seed = session.config.training, language_model.proxy_seed(session, index)
    whole = store.sequences("train", training.sequence_length)
    return Sampler(whole, store.domains, training.batch_size, seed, language_model.subsample(session))


def draws(session: Session, sampler: Sampler) -> Ints:
    """(K,) sequences of each domain in a proxy run with uniform draws."""
    return sampler.counts_before(session.config.training.steps, simplex.uniform(len(sampler.sizes)).numpy())


def live(session: Session, store: TokenStore, folder: Path) -> losses.Live:
    frozen = folders.load(folder, store.vocabulary_size, "reference.path")
    return losses.Live(frozen, session.place.device, session.config.training.precision)


def recipe_of(session: Session, store: TokenStore, fingerprint: str) -> dict[str, str | int]:
    training = session.config.training
    return losses.recipe(fingerprint, store, training.sequence_length, training.precision)


# ── For the plan ────────────────────────────────────────────────────────────────────


def missing(session: Session, store: TokenStore, run: Run | None, index: int, before: int) -> float:
    """Sequences that the proxy of seed `index` finds without a loss, `before` other seeds having run before it.

    An estimate: from some of its draws how much is there (`run` is None: nothing), and what seeds have in common is an
    expectation, since they draw independently. Draws from α are taken for uniform.
    """
    drawing = sampler(session, store, index)
    count = np.minimum(draws(session, drawing), drawing.sizes)  # (K,)
    read = count / drawing.sizes
    absent = _absent(session, store, None if run is None else run.recipe["reference"], drawing, count)
    return float((absent * (1 - read) ** before).sum())


def missing_of_main(
    session: Session, store: TokenStore, fingerprints: Sequence[str | None], mixed: Tensor, before: Ints
) -> tuple[float, Ints]:
    """Sequences that a main run on `mixed` (K,) finds without a loss, summed over the models that weigh it (None: one
    that is not trained yet); and the draws (K,) with which main runs have passed, `before` of them ahead of this one.

    All main runs of a command draw a domain's sequences in one order. What proxies read is not counted off.
    """
    training = session.config.training
    whole = store.sequences("train", training.sequence_length)
    drawing = Sampler(whole, store.domains, training.batch_size, session.config.seed)
    steps = language_model.main_steps(session)
    count = np.minimum(drawing.counts_before(steps, mixed.numpy()), drawing.sizes)
    known = np.minimum(count, before)
    left = sum(
        float((_absent(session, store, one, drawing, count) - _absent(session, store, one, drawing, known)).sum())
        for one in fingerprints
    )
    return left, np.maximum(count, before)


def _absent(
    session: Session, store: TokenStore, fingerprint: str | None, drawing: Sampler, count: Ints
) -> NDArray[np.float64]:
    """(K,) how many of the first `count` (K,) draws have no loss of this model."""
    domains = len(count)
    recipe = None if fingerprint is None else recipe_of(session, store, fingerprint)
    if recipe is None or not losses.exists(session.store, recipe):
        return count.astype(np.float64)
    table = losses.Table(session.store, store, recipe)
    looked = np.minimum(count, max(1, _LOOKED_AT // domains))  # (K,)
    domain = np.repeat(np.arange(domains), looked)
    nth = np.arange(len(domain)) - np.repeat(np.cumsum(looked) - looked, looked)
    number = nth * count[domain] // looked[domain]
    found = losses.there(table.read(table.rows(domain, drawing.sequence(domain, number))))
    return count * (1 - np.bincount(domain, found, domains) / np.maximum(looked, 1))
