"""The reference's losses as the proxies need them: live or cached, computed ahead, and counted for
the plan.

K domains.
"""

from functools import partial
from pathlib import Path

from doremi_train.data.sampler import Ints, Sampler
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import simplex
from doremi_train.model import folders
from doremi_train.parallel import comm, engine
from doremi_train.stages.runs import budget
from doremi_train.stages.session import Session
from doremi_train.storage import checkpoint
from doremi_train.storage.runs import Run
from doremi_train.training.frozen import Cached, Live, Reference, Table, recipe

# In sequences, what is computed ahead at once, in micro-batches of training: without a backward
# little is kept.
LARGER = 4


def needed(session: Session) -> bool:
    """Whether the proxies look at the reference's losses at all."""
    return session.config.proxy.score != "hardest"


def cached(session: Session) -> bool:
    return needed(session) and session.config.reference.losses == "cached"


def weighing_cached(session: Session) -> bool:
    """Whether the main runs weigh their tokens by losses that are cached."""
    return (
        session.config.training.loss_weighting != "none"
        and session.config.reference.losses == "cached"
    )


def of(session: Session, store: TokenStore, run: Run, folder: Path) -> Reference | None:
    """Those that the proxy `run` trains against, of the model in `folder`."""
    return frozen(session, store, run, folder, run.recipe["reference"]) if needed(session) else None


def frozen(
    session: Session, store: TokenStore, run: Run, folder: Path, fingerprint: str
) -> Reference:
    """Those of any model `folder` with this fingerprint, for `run`."""
    if session.config.reference.losses == "live":
        return live(session, store, folder)
    pending = run.folder / checkpoint.FOLDER / f"losses-{fingerprint}-{comm.world().rank}.pending"
    table = Table(session.store, store, recipe_of(session, store, fingerprint))
    load = partial(live, session, store, folder)
    return Cached(table, load, session.place.device, pending, divided(session))


def sampler(session: Session, store: TokenStore, index: int) -> Sampler:
    """What the proxy of seed `index` draws with."""
    training, seed = session.config.training, budget.proxy_seed(session, index)
    whole = store.sequences("train", training.sequence_length)
    return Sampler(whole, store.domains, training.batch_size, seed, budget.subsample(session))


def draws(session: Session, sampler: Sampler) -> Ints:
    """(K,) sequences of each domain in a proxy run with uniform draws."""
    return sampler.counts_before(
        session.config.training.steps, simplex.uniform(len(sampler.sizes)).numpy()
    )


def divided(session: Session) -> bool:
    """Whether frozen models beside a run are divided among the processes."""
    asked = session.config.reference.sharded
    wanted = engine.divides(session.strategy) if asked is None else asked
    return wanted and session.world.size > 1


def live(session: Session, store: TokenStore, folder: Path) -> Live:
    """A collective where the model is divided."""
    precision = session.config.training.precision
    loaded = folders.load(folder, store.vocabulary_size, "reference.path", precision)
    return Live(engine.frozen(session.place, loaded, divided(session)), session.place.device)


def recipe_of(session: Session, store: TokenStore, fingerprint: str) -> dict[str, str | int]:
    training = session.config.training
    return recipe(fingerprint, store, training.sequence_length, training.precision)
