"""Sequences for which a frozen model is still to be run, where its losses are cached: an estimate
for the plan."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from doremi_train.data.sampler import Ints, Sampler
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.stages.runs import budget, reference_losses
from doremi_train.stages.session import Session
from doremi_train.storage.runs import Run
from doremi_train.training import frozen

# Draws of a proxy, spread over domains and time, that tell the plan how much is there.
_LOOKED_AT = 1024


def missing(session: Session, store: TokenStore, run: Run | None, index: int, before: int) -> float:
    """Sequences that the proxy of seed `index` finds without a loss, `before` other seeds having
    run before it.

    An estimate: from some of its draws how much is there (`run` is None: nothing), and what seeds
    have in common is an expectation, since they draw independently. Draws from α are taken for
    uniform.
    """
    drawing = reference_losses.sampler(session, store, index)
    count = np.minimum(reference_losses.draws(session, drawing), drawing.sizes)  # (K,)
    read = count / drawing.sizes
    absent = _absent(
        session, store, None if run is None else run.recipe["reference"], drawing, count
    )
    return float((absent * (1 - read) ** before).sum())


def missing_of_main(
    session: Session,
    store: TokenStore,
    fingerprints: Sequence[str | None],
    mixed: Tensor,
    before: Ints,
) -> tuple[float, Ints]:
    """Sequences that a main run on `mixed` (K,) finds without a loss, summed over the models that
    weigh it (None: one that is not trained yet); and the draws (K,) with which main runs have
    passed, `before` of them ahead of this one.

    All main runs of a command draw a domain's sequences in one order. What proxies read is not
    counted off.
    """
    training = session.config.training
    whole = store.sequences("train", training.sequence_length)
    drawing = Sampler(whole, store.domains, training.batch_size, session.config.seed)
    steps = budget.main_steps(session)
    count = np.minimum(drawing.counts_before(steps, mixed.numpy()), drawing.sizes)
    known = np.minimum(count, before)
    left = sum(
        float(
            (
                _absent(session, store, one, drawing, count)
                - _absent(session, store, one, drawing, known)
            ).sum()
        )
        for one in fingerprints
    )
    return left, np.maximum(count, before)


def _absent(
    session: Session, store: TokenStore, fingerprint: str | None, drawing: Sampler, count: Ints
) -> NDArray[np.float64]:
    """(K,) how many of the first `count` (K,) draws have no loss of this model."""
    domains = len(count)
    recipe = (
        None if fingerprint is None else reference_losses.recipe_of(session, store, fingerprint)
    )
    if recipe is None or not frozen.exists(session.store, recipe):
        return count.astype(np.float64)
    table = frozen.Table(session.store, store, recipe)
    looked = np.minimum(count, max(1, _LOOKED_AT // domains))  # (K,)
    domain = np.repeat(np.arange(domains), looked)
    nth = np.arange(len(domain)) - np.repeat(np.cumsum(looked) - looked, looked)
    number = nth * count[domain] // looked[domain]
    present = frozen.there(table.read(table.rows(domain, drawing.sequence(domain, number))))
    return count * (1 - np.bincount(domain, present, domains) / np.maximum(looked, 1))
